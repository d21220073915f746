"""What a frozen image encoder makes of an image, made once: within a step, and with a folder in all epochs and runs.

Within a step the reference, the rollout and what is trained look at the same images: `StepFeatureCache` has them in
memory, by their pixels. `DiskFeatureCache` has them on a disk, by the hash of the pixels as the encoder gets them and
of the encoder's weights. A file that cannot be read is made again; a full disk, or a folder that holds what it may,
ends the writing and nothing else.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_vlm.errors import ModelError
from ray_vlm.models.backbone import base_of

_RECOUNT = 0.01  # of the limit, written between looks at how full the folder is: other processes write to it too
_SUFFIX = ".features"
_KNOWN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # whose encoder gives out what `_output` makes again
Features = dict[str, Any]  # of one image: "pooled" and, of models with DeepStack, "deepstack.0", ... [tokens, width]


def why_not_kept(model: Any) -> str | None:
    """Why what the model's image encoder makes of an image is not fixed, or not known, if so. An adapter in it says one
    thing when it is on and another when it is off, as the references of DPO and GRPO ask."""
    tower = _tower(model)
    if model.config.model_type not in _KNOWN:
        return f"it knows the image encoders of {', '.join(_KNOWN)}, and this is a {model.config.model_type}"
    changing = [name for name, p in tower.named_parameters() if "lora_" in name or p.requires_grad]
    return f"{changing[0]} in the image encoder is an adapter's or learns" if changing else None


def keep_features(model: Any, recent: "StepFeatureCache", shelf: "DiskFeatureCache | None" = None) -> None:
    """Let the model's image encoder take what it made before from `recent`, or from `shelf`. Raises `ModelError` where
    that would not be the same."""
    import torch

    if why := why_not_kept(model):
        raise ModelError(f"train.vision_cache: {why}. Leave train.vision_cache out.")
    tower = _tower(model)
    plain, merge = tower.forward, tower.spatial_merge_size**2

    @torch.no_grad()
    def forward(pixels: Any, grid_thw: Any, **options: Any) -> Any:
        patches = grid_thw.prod(dim=1).tolist()
        how = f"{pixels.dtype} {torch.is_autocast_enabled(pixels.device.type)}"
        images = [(own, f"{how} {grid}") for own, grid in zip(pixels.split(patches), grid_thw.tolist(), strict=True)]
        found: list[Any] = [recent.read(*image) for image in images]
        names: dict[int, str] = {}
        if shelf is not None:
            names = {n: shelf.name(*images[n]) for n, features in enumerate(found) if features is None}
            for n, name in names.items():
                found[n] = shelf.read(name, str(pixels.device))
        if missing := [number for number, features in enumerate(found) if features is None]:
            made = plain(torch.cat([images[n][0] for n in missing]), grid_thw=grid_thw[missing], **options)
            for n, features in zip(missing, _by_image(made, [patches[n] // merge for n in missing]), strict=True):
                found[n] = features
                if shelf:
                    shelf.write(names[n], features)
        for image, features in zip(images, found, strict=True):
            recent.write(*image, features)
        return _output(found)

    tower.forward = forward


class StepFeatureCache:
    """The features of the last images, of no more than `room`."""

    def __init__(self) -> None:
        self.room = 0
        self.kept: dict[tuple, tuple[Any, Features]] = {}

    def start(self, room: int) -> None:
        """Forget all, and keep so many images from now on."""
        self.room = room
        self.kept.clear()

    def read(self, pixels: Any, how: str) -> Features | None:
        """Those of the very same pixels, seen in the same way."""
        import torch

        there = self.kept.get(self._key(pixels, how)) if self.kept else None
        return there[1] if there is not None and torch.equal(there[0], pixels) else None

    def write(self, pixels: Any, how: str, features: Features) -> None:
        """Keep them in place of the oldest."""
        if self.room:
            self.kept[self._key(pixels, how)] = pixels, features
        while len(self.kept) > self.room:
            self.kept.pop(next(iter(self.kept)))

    def _key(self, pixels: Any, how: str) -> tuple:
        return how, float(pixels.sum())  # `read` looks at every pixel of what this finds


class DiskFeatureCache:
    """Files of features in a folder, which other processes may use too."""

    def __init__(self, folder: Path, limit: float, model: Any):
        """`limit`: bytes that the folder may hold. `model`: whose encoder it is; its features have a folder in it."""
        import transformers

        tower = _tower(model)
        known = [transformers.__version__, sorted(tower.config.to_dict().items(), key=str)]
        self.folder = folder / _key([*known, *(fingerprint(value) for value in tower.state_dict().values())])
        self.limit, self.full, self.held, self.unseen = limit, False, held(folder), 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(
                f"train.vision_cache={str(folder)!r} cannot be used as a folder: {error}. Name one on a disk of each "
                "node, or leave it out."
            ) from None

    def name(self, pixels: Any, how: str) -> str:
        """Of the file of an image, seen in this way."""
        return _key([how, fingerprint(pixels)]) + _SUFFIX

    def read(self, name: str, device: str) -> Features | None:
        """What is kept under the name; None if nothing is, or nothing that can be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.folder / name, device)
        except (OSError, SafetensorError):
            return None

    def write(self, name: str, features: Features) -> None:
        """Keep them, whole or not at all. Says so once where there is no more room."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self.full:
            return
        half = self.folder / f"{name}.{os.getpid()}"
        try:
            if self.unseen >= self.limit * _RECOUNT:
                self.held, self.unseen = held(self.folder.parent), 0.0
            if self.held + self.unseen >= self.limit:
                return self._stop(f"{self.folder.parent} holds what train.vision_cache_gib allows")
            save_file({part: value.contiguous() for part, value in features.items()}, half)
            os.replace(half, self.folder / name)
            self.unseen += sum(value.nbytes for value in features.values())
        except (OSError, SafetensorError) as error:
            self._stop(f"{self.folder}: {error}")
            with suppress(OSError):
                half.unlink(missing_ok=True)

    def _stop(self, why: str) -> None:
        self.full = True
        print(f"note: train.vision_cache: no more is written. {why}", flush=True)


def held(folder: Path) -> float:
    """Bytes of all features in the folder, of every encoder."""
    total = 0.0
    for path in folder.glob(f"*/*{_SUFFIX}*"):
        with suppress(FileNotFoundError):  # another process has just given it its name
            total += path.stat().st_size
    return total


def _tower(model: Any) -> Any:
    return base_of(model).get_encoder(modality="image")


def fingerprint(values: Any) -> str:
    """SHA-256 of a tensor's content, shape and dtype."""
    import torch

    found = hashlib.sha256(f"{values.dtype} {list(values.shape)} ".encode())
    found.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _key(told: Sequence[Any]) -> str:
    return hashlib.sha256(repr(list(told)).encode()).hexdigest()[:32]


def _by_image(output: Any, tokens: list[int]) -> list[Features]:
    """The encoder's output, cut up."""
    layers = getattr(output, "deepstack_features", None) or []
    named = {"pooled": output.pooler_output} | {f"deepstack.{n}": layer for n, layer in enumerate(layers)}
    cut = {name: value.split(tokens) for name, value in named.items()}
    return [{name: parts[number] for name, parts in cut.items()} for number in range(len(tokens))]


def _output(images: Sequence[Features]) -> Any:
    """Images' features as the encoder gives them out."""
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    joined = {name: torch.cat([of_image[name] for of_image in images]) for name in images[0]}
    pooled = joined.pop("pooled")
    if not joined:
        return BaseModelOutputWithPooling(pooler_output=pooled)
    layers = [joined[f"deepstack.{number}"] for number in range(len(joined))]
    return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=layers)
