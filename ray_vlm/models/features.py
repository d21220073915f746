"""What a frozen image encoder makes of an image, kept on a disk: each image is encoded once, in all epochs and runs.

Keyed by content: the pixels as the encoder gets them, and the encoder's weights. A file that cannot be read is made
again; a full disk, or a folder that holds what it may, ends the writing and nothing else.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_vlm.errors import ModelError

_RECOUNT = 500  # files written between looks at how full the folder is: other processes write to it too
_WORDS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
_AT_ONCE = 2**22  # numbers
Features = dict[str, Any]  # of one image: "pooled" and, of models with DeepStack, "deepstack.0", ... [tokens, width]


def keep_features(model: Any, folder: Path, limit: float) -> None:
    """Let the model's image encoder, in which nothing learns, take from `folder` what it made before.

    `limit`: bytes that the folder may hold. Raises `ModelError` for an encoder with an adapter: it would say one thing
    with it and another without, as the references of DPO and GRPO ask.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tower = base.get_encoder(modality="image")
    if not hasattr(tower, "spatial_merge_size"):
        raise ModelError(
            f"train.vision_cache: it knows the image encoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and this one is a "
            f"{type(tower).__name__}. Leave train.vision_cache out."
        )
    if changing := [name for name, p in tower.named_parameters() if "lora_" in name or p.requires_grad]:
        raise ModelError(
            f"train.vision_cache: {changing[0]} in the image encoder is an adapter's or learns, so what the encoder "
            "makes of an image is not fixed. Leave train.vision_cache out."
        )
    plain, merge = tower.forward, tower.spatial_merge_size**2
    shelf = Shelf(folder / _key([fingerprint(value) for value in tower.state_dict().values()]), limit)

    @torch.no_grad()
    def forward(pixels: Any, grid_thw: Any, **options: Any) -> Any:
        patches = grid_thw.prod(dim=1).tolist()
        images, device = pixels.split(patches), pixels.device
        how = f"{pixels.dtype} {torch.is_autocast_enabled(device.type)}"
        keys = [_key([how, grid.tolist(), fingerprint(own)]) for grid, own in zip(grid_thw, images, strict=True)]
        found: dict[str, Any] = {key: shelf.read(key, str(device)) for key in keys}
        missing = {key: number for number, key in enumerate(keys) if found[key] is None}
        if numbers := list(missing.values()):
            made = plain(torch.cat([images[n] for n in numbers]), grid_thw=grid_thw[numbers], **options)
            for key, features in zip(missing, _by_image(made, [patches[n] // merge for n in numbers]), strict=True):
                shelf.write(key, features)
                found[key] = features
        return _output([found[key] for key in keys])

    tower.forward = forward


class Shelf:
    """Files of features in a folder, which other processes may use too."""

    def __init__(self, folder: Path, limit: float):
        self.folder, self.limit, self.written, self.full = folder, limit, 0, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(
                f"train.vision_cache={str(folder.parent)!r} cannot be used as a folder: {error}. Name one on a disk of "
                "each node, or leave it out."
            ) from None

    def read(self, key: str, device: str) -> Features | None:
        """What is kept under the key; None if nothing is, or nothing that can be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.folder / key, device)
        except (OSError, SafetensorError):
            return None

    def write(self, key: str, features: Features) -> None:
        """Keep it, whole or not at all. Says so once where there is no more room."""
        from safetensors.torch import save_file

        half = self.folder / f"{key}.{os.getpid()}.part"
        try:
            if not self.full and self.written % _RECOUNT == 0 and self._held() >= self.limit:
                self._stop(f"{self.folder.parent} holds {self.limit / 2**30:g} GiB, as train.vision_cache_gib says")
            if not self.full:
                save_file({name: value.contiguous() for name, value in features.items()}, half)
                os.replace(half, self.folder / key)
                self.written += 1
        except OSError as error:
            self._stop(f"{self.folder}: {error}")
            half.unlink(missing_ok=True)

    def _held(self) -> int:
        return sum(path.stat().st_size for path in self.folder.parent.glob("*/*"))

    def _stop(self, why: str) -> None:
        self.full = True
        print(f"note: train.vision_cache: no more is written. {why}", flush=True)


def fingerprint(values: Any) -> str:
    """A tensor's content in 128 bits, computed where it lies: two sums of its words, each times a number that is drawn
    by its place. No protection against images made to collide."""
    import torch

    words = values.detach().contiguous().reshape(-1).view(getattr(torch, _WORDS[values.element_size()]))
    sums = [len(words), 0, 0]
    for start in range(0, len(words), _AT_ONCE):
        part = words[start : start + _AT_ONCE].long()
        places = torch.arange(start + 1, start + 1 + len(part), device=part.device)
        for number, factor in ((1, -7046029254386353131), (2, -4417276706812531889)):
            drawn = places * factor
            drawn = (drawn ^ (drawn >> 29)) * -4658895280553007687
            sums[number] += int((part * ((drawn ^ (drawn >> 32)) | 1)).sum())
    return " ".join(str(number) for number in sums)


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
