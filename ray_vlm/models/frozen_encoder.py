"""A frozen image encoder: it runs without autograd, and its features are cached, for a step and on disk.

Within a step the reference, the rollout and the trained model see the same images: `StepFeatureCache` keeps their
features in memory. `DiskFeatureCache` keeps them in files for epochs and runs, in a folder for each encoder. Both know
an image by the key that its loader made of its pixels (`data/spec.py`, `hash_images`), which is in the plan of a batch
(`models/vision_inputs.py`); images without one are encoded. The thread that makes batches reads their files
(`DiskFeatureCache.read_ahead`). A file that cannot be read is written again; a full disk, or a folder at its limit,
only ends the writing.
"""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.errors import ModelError
from ray_vlm.models.attention import KNOWN
from ray_vlm.models.backbone import base_of
from ray_vlm.models.vision_inputs import Features, ImagePlan, move_features, plan_of
from ray_vlm.storage import replacing

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers.modeling_outputs import BaseModelOutputWithPooling

logger = logging.getLogger(__name__)
_RECOUNT = 0.01  # share of the limit written between two counts of the folder: other processes write to it too
_SUFFIX = ".features"


def run_without_autograd(model: "Module") -> bool:
    """Run the model's image encoder under `no_grad` if nothing in it is trainable. Return whether that is so.

    transformers registers a hook on every input embedding so that gradient checkpointing works with an adapter, and
    counts the patch embedding of Qwen2-VL's and Qwen2.5-VL's encoders among them: a frozen encoder is then computed
    twice and back-propagated through at every step. Without that the gradients of trained weights are bitwise the same.
    """
    import torch

    encoder = _encoder(model)
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        return False
    encoder.forward = torch.no_grad()(encoder.forward)
    return True


def why_not_cached(model: "Module") -> str | None:
    """Return why the features of the model's image encoder cannot be cached, or None.

    With an adapter in the encoder they change when the adapter is turned off, as for the references of DPO and GRPO."""
    model_type = base_of(model).config.model_type
    if model_type not in KNOWN:  # `_output` builds the output of their encoders
        return f"it knows the image encoders of {', '.join(KNOWN)}, and this is a {model_type}"
    changing = [name for name, p in _encoder(model).named_parameters() if "lora_" in name or p.requires_grad]
    return f"{changing[0]} in the image encoder is an adapter's or learns" if changing else None


def cache_features(model: "Module", step_cache: "StepFeatureCache", disk_cache: "DiskFeatureCache | None") -> None:
    """Let the model's image encoder read features from `step_cache`, then from `disk_cache`, and compute the others.

    Raise `ModelError` if cached features could differ from computed ones."""
    import torch

    if reason := why_not_cached(model):
        raise ModelError(f"train.vision_cache: {reason}. Leave train.vision_cache out.")
    encoder = _encoder(model)
    plain = encoder.forward

    @torch.no_grad()
    def forward(pixels: "Tensor", grid_thw: "Tensor", **options: object) -> "BaseModelOutputWithPooling":
        # `pixels` [patches of all images, patch values] are the images one behind another.
        plan = plan_of(grid_thw)
        if plan is None or not plan.keys:
            return plain(pixels, grid_thw=grid_thw, **options)
        # The same pixels have other features in another dtype, under autocast, on another device, and in another grid.
        mode = f"{pixels.dtype} {torch.is_autocast_enabled(pixels.device.type)} {pixels.device.type}"
        images = [f"{mode} {list(grid)} {key}" for grid, key in zip(plan.grids, plan.keys, strict=True)]
        if disk_cache is not None:
            disk_cache.mode = mode
        features_of: dict[int, Features] = {}
        for n, image in enumerate(images):
            features = step_cache.read(image) or move_features(plan.features.get(image, {}), pixels.device) or None
            if features is None and disk_cache is not None:
                features = disk_cache.read(image, str(pixels.device))
            if features is not None:
                features_of[n] = features
        if missing := [n for n in range(len(images)) if n not in features_of]:
            some = plan.select(missing).to(pixels.device, non_blocking=True)
            parts = pixels.split(plan.patches)
            output = plain(torch.cat([parts[n] for n in missing]), grid_thw=some.build_grid(), **options)
            for n, features in zip(missing, _by_image(output, some.tokens), strict=True):
                features_of[n] = features
                if disk_cache is not None:
                    disk_cache.write(images[n], features)
        for n, image in enumerate(images):
            step_cache.write(image, features_of[n])
        return _output([features_of[n] for n in range(len(images))])

    encoder.forward = forward


class StepFeatureCache:
    """The features of the last images, at most `room` of them.

    `image` in its methods: an image's key, with how the encoder sees it (dtype, autocast, grid)."""

    def __init__(self) -> None:
        self.room = 0
        self.entries: dict[str, Features] = {}

    def start(self, room: int) -> None:
        """Drop all features, and keep those of up to `room` images from now on."""
        self.room = room
        self.entries.clear()

    def read(self, image: str) -> Features | None:
        """Return the features of this image, or None."""
        return self.entries.get(image)

    def write(self, image: str, features: Features) -> None:
        """Store the features, and drop the oldest."""
        if self.room:
            self.entries[image] = features
        while len(self.entries) > self.room:
            self.entries.pop(next(iter(self.entries)))  # a dictionary keeps the order of insertion


class DiskFeatureCache:
    """Files of features in a folder, which other processes may use too.

    `image` in its methods: an image's key, with how the encoder sees it. `mode`: of the last forward, without the grid;
    None before the first one."""

    def __init__(self, folder: Path, limit: float, model: "Module"):
        """`limit`: bytes that the folder may hold. `model`: the model whose encoder computes the features; each
        encoder has a subfolder."""
        import transformers

        encoder = _encoder(model)
        known = [transformers.__version__, sorted(encoder.config.to_dict().items(), key=str)]
        self.folder = folder / _key([*known, *(fingerprint(value) for value in encoder.state_dict().values())])
        self.mode: str | None = None
        # Bytes in the folder: counted (`held`), and written by this process since (`unseen`).
        self.limit, self.full, self.held, self.unseen = limit, False, held(folder), 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(
                f"train.vision_cache={str(folder)!r} cannot be used as a folder: {error}. Name one on a disk of each "
                "node, or leave it out."
            ) from None

    def read_ahead(self, plan: ImagePlan) -> None:
        """Read the features of a batch's images into its plan, on the host, for a forward like the last one."""
        if self.mode is None:
            return
        for grid, key in zip(plan.grids, plan.keys, strict=bool(plan.keys)):
            image = f"{self.mode} {list(grid)} {key}"
            if image not in plan.features and (features := self.read(image)) is not None:
                plan.features[image] = features

    def read(self, image: str, device: str = "cpu") -> Features | None:
        """Return the features of an image from its file; None if there is none that can be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._file(image), device)
        except (OSError, SafetensorError):
            return None

    def _file(self, image: str) -> Path:
        return self.folder / (_key([image]) + _SUFFIX)

    def write(self, image: str, features: Features) -> None:
        """Write the file of an image atomically. Log a warning once if there is no more room."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self.full:
            return
        try:
            if self.unseen >= self.limit * _RECOUNT:
                self.held, self.unseen = held(self.folder.parent), 0.0
            if self.held + self.unseen >= self.limit:
                return self._stop(f"{self.folder.parent} holds what train.vision_cache_gib allows")
            with replacing(self._file(image)) as temporary:
                save_file({part: value.contiguous() for part, value in features.items()}, temporary)
            self.unseen += sum(value.nbytes for value in features.values())
        except (OSError, SafetensorError) as error:
            self._stop(f"{self.folder}: {error}")

    def _stop(self, reason: str) -> None:
        self.full = True
        logger.warning(f"train.vision_cache: no more is written. {reason}")


def held(folder: Path) -> float:
    """Return the bytes of all features in the folder, of every encoder."""
    total = 0.0
    for path in folder.glob(f"*/*{_SUFFIX}*"):
        with suppress(FileNotFoundError):  # another process has just renamed or removed it
            total += path.stat().st_size
    return total


def _encoder(model: "Module") -> Any:
    return base_of(model).get_encoder(modality="image")


def fingerprint(values: "Tensor") -> str:
    """Return the SHA-256 of a tensor's content, shape and dtype."""
    import torch

    digest = hashlib.sha256(f"{values.dtype} {list(values.shape)} ".encode())
    # As bytes, because numpy has no bfloat16.
    digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(parts: Sequence[object]) -> str:
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:32]


def _by_image(output: "BaseModelOutputWithPooling", tokens: list[int]) -> list[Features]:
    """Split the encoder's output by image. `tokens`: visual tokens of each."""
    layers = getattr(output, "deepstack_features", None) or []  # of Qwen3-VL: features of earlier layers, for DeepStack
    named = {"pooled": output.pooler_output} | {f"deepstack.{n}": layer for n, layer in enumerate(layers)}
    # Each is [visual tokens of all images, width], the images one behind another.
    by_name = {name: value.split(tokens) for name, value in named.items()}
    return [{name: parts[number] for name, parts in by_name.items()} for number in range(len(tokens))]


def _output(images: Sequence[Features]) -> "BaseModelOutputWithPooling":
    """Join images' features into the encoder's output."""
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    joined = {name: torch.cat([features[name] for features in images]) for name in images[0]}
    pooled = joined.pop("pooled")
    if not joined:
        return BaseModelOutputWithPooling(pooler_output=pooled)
    layers = [joined[f"deepstack.{number}"] for number in range(len(joined))]
    return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=layers)
