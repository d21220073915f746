"""What a batch's image encoder needs beside pixels, worked out on the host from the images' grids.

transformers works out from the grids where images and windows begin, the order of windows, positions, and how learned
positions are interpolated; on a GPU each of these reads the grids back, and the GPU waits. The host knows the grids
before a batch is uploaded, so `plan_images` does it there, by transformers' own functions, and `use_image_plans` passes
the result to the encoder, under the names of arguments that its forward takes.

A plan belongs to the tensor `image_grid_thw` of a batch (`register_plan`), which goes unchanged from the batch through
trainer, adapter and model to the encoder. A grid without a plan, of a caller of another kind, is read as before.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ray_vlm.models.attention import KNOWN, know_segments
from ray_vlm.models.backbone import base_of, language_model

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from torch import Tensor, device, dtype
    from torch.nn import Module
    from transformers import PreTrainedConfig

Grid = tuple[int, int, int]  # frames, rows and columns of patches of an image
# Of one image, each [visual tokens, width]: "pooled" and, of models with DeepStack, "deepstack.0", ...
Features = dict[str, "Tensor"]
_PLANS_KEPT = 32  # of batches with the same grids: images that were resized have few sizes
_BOUNDARIES = ("cu_seqlens", "cu_window_seqlens")  # arguments whose differences are lengths of segments


@dataclass(frozen=True)
class EncoderShape:
    """What the inputs of an image encoder depend on beside the grids.

    `merge`: patches along a side of a visual token. `patch`, `window`: pixels along a side of a patch and of a window;
    no window: 0. `positions`: entries along a side of the table of learned positions; no table: 0."""

    merge: int
    patch: int
    window: int = 0
    positions: int = 0


def encoder_shape(config: "PreTrainedConfig") -> EncoderShape | None:
    """Return the shape of the image encoder of a model with this configuration; None if its inputs are not planned."""
    if config.model_type not in KNOWN:
        return None
    vision = config.vision_config
    table = getattr(vision, "num_position_embeddings", 0)
    window = vision.window_size if hasattr(vision, "fullatt_block_indexes") else 0
    return EncoderShape(vision.spatial_merge_size, vision.patch_size, window, int(table**0.5))


@dataclass(frozen=True, eq=False)
class ImagePlan:
    """What is known on the host of a batch's images, in the order of its pixels.

    `inputs`: arguments of the encoder's forward, tensors and numbers. `keys`: of each image, by which its features are
    cached; empty if nothing is cached. `features`: those that were read ahead, by the image and how the encoder sees it
    (`models/frozen_encoder.py`). They stay on the host until the encoder needs them: batches are made a step ahead.
    """

    shape: EncoderShape
    grids: tuple[Grid, ...]
    inputs: Mapping[str, "Tensor | int"]
    keys: tuple[str, ...] = ()
    features: dict[str, Features] = field(default_factory=dict)

    @property
    def patches(self) -> list[int]:
        """The patches of each image."""
        return [frames * rows * columns for frames, rows, columns in self.grids]

    @property
    def tokens(self) -> list[int]:
        """The visual tokens of each image."""
        return [count // self.shape.merge**2 for count in self.patches]

    def build_grid(self) -> "Tensor":
        """Return the grids on the host, `int64 [images, 3]`, in a tensor by which the plan is known as well."""
        import torch

        grid = torch.tensor(self.grids, dtype=torch.int64)
        register_plan(grid, self)
        return grid

    def to(self, device: "device | str", non_blocking: bool = False) -> "ImagePlan":
        """Return the plan with its inputs on `device`; `non_blocking` copies go through pinned memory, and features are
        pinned for one."""
        inputs = {
            name: value if isinstance(value, int) else _move(value, device, non_blocking)
            for name, value in self.inputs.items()
        }
        for name in _BOUNDARIES:
            if name in inputs:
                know_segments(inputs[name], _lengths(self.inputs[name]))  # type: ignore[arg-type]
        features = self.features
        if non_blocking and str(device).startswith("cuda"):
            features = {image: {name: _pin(part) for name, part in parts.items()} for image, parts in features.items()}
        return replace(self, inputs=inputs, features=features)

    def select(self, numbers: Sequence[int]) -> "ImagePlan":
        """Return the plan of some of the images, on the host."""
        keys = [self.keys[n] for n in numbers if self.keys]
        return replace(plan_images(self.shape, [self.grids[n] for n in numbers], keys), features=self.features)


def plan_images(shape: EncoderShape, grids: Sequence[Grid], keys: Sequence[str] = ()) -> ImagePlan:
    """Plan the inputs of the image encoder for images with these grids, on the host."""
    import torch

    inputs = _plan_inputs(shape, tuple(grids), torch.get_default_dtype())
    return ImagePlan(shape, tuple(grids), inputs, tuple(keys))


@lru_cache(_PLANS_KEPT)
def _plan_inputs(shape: EncoderShape, grids: tuple[Grid, ...], dtype: "dtype") -> Mapping[str, "Tensor | int"]:
    """Return the encoder's inputs. `dtype`: torch's default, which the weights of the interpolation have."""
    import torch
    from transformers import vision_utils

    with torch.device("cpu"):
        grid = torch.tensor(grids, dtype=torch.int64)
        ends = vision_utils.get_vision_cu_seqlens(grid)
        inputs: dict[str, Tensor | int] = {
            "cu_seqlens": ends,
            "max_seqlen": max(_lengths(ends)),
            "position_ids": vision_utils.get_vision_position_ids(grid, shape.merge),
        }
        if shape.window:
            order, ends = vision_utils.get_vision_window_index(grid, shape.merge, shape.window, shape.patch)
            inputs |= {"window_index": order, "cu_window_seqlens": ends, "max_window_seqlen": max(_lengths(ends))}
        if shape.positions:
            indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                grid, shape.positions, "bilinear", align_corners=True, spatial_merge_size=shape.merge
            )
            inputs |= {"interp_indices": indices, "interp_weights": weights}
    return inputs


def _lengths(ends: "Tensor") -> list[int]:
    return [end - start for start, end in pairwise(ends.tolist())]


def _move(tensor: "Tensor", device: "device | str", non_blocking: bool) -> "Tensor":
    if non_blocking and str(device).startswith("cuda"):
        tensor = _pin(tensor)
    return tensor.to(device, non_blocking=non_blocking)


def _pin(tensor: "Tensor") -> "Tensor":
    """Return a tensor of the host in pinned memory: a copy from other memory waits for all work of the stream."""
    return tensor.pin_memory() if tensor.device.type == "cpu" and not tensor.is_pinned() else tensor


def move_features(features: Features, device: "device | str", non_blocking: bool = True) -> Features:
    """Return the features of an image on `device`."""
    return {name: _move(part, device, non_blocking) for name, part in features.items()}


def register_plan(grid_thw: "Tensor", plan: ImagePlan) -> None:
    """Let the encoder use `plan` where it gets this very tensor. `plan` lies where the encoder runs."""
    _plans()[grid_thw] = plan


def plan_of(grid_thw: "Tensor | None") -> ImagePlan | None:
    """Return the plan of the images with these grids, if this very tensor has one."""
    return None if grid_thw is None else _plans().get(grid_thw)


def select_plan(grid_thw: "Tensor", numbers: Sequence[int], selected: "Tensor") -> None:
    """Let `selected`, the grids of the images `numbers` of `grid_thw`, have their part of its plan, if it has one."""
    if (plan := plan_of(grid_thw)) is not None:
        register_plan(selected, plan.select(numbers).to(selected.device, non_blocking=True))


@cache
def _plans() -> "MutableMapping[Tensor, ImagePlan]":
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()  # by identity; an entry goes when its tensor does


def use_image_plans(model: "Module") -> bool:
    """Let the model's image encoder take its inputs from the plan of its images, and let nothing be read from a GPU on
    the way of features into the language model. Return whether the encoder is one that can."""
    base = base_of(model)
    if base.config.model_type not in KNOWN:
        return False
    backbone, encoder = base.base_model, base.get_encoder(modality="image")
    plain_features, plain_mask, plain = backbone.get_image_features, backbone.get_placeholder_mask, encoder.forward
    planned = False  # the images of the last call

    @functools.wraps(plain_features)
    def get_image_features(pixel_values: "Tensor", image_grid_thw: "Tensor | None" = None, **options: Any) -> Any:
        # transformers reads the grids once more, for the number of tokens of each image.
        nonlocal planned
        plan = plan_of(image_grid_thw)
        planned = plan is not None
        return plain_features(pixel_values, image_grid_thw if plan is None else plan.build_grid(), **options)

    @functools.wraps(plain_mask)
    def get_placeholder_mask(
        input_ids: "Tensor | None",
        inputs_embeds: "Tensor",
        image_features: "Tensor | None" = None,
        video_features: "Tensor | None" = None,
    ) -> Any:
        # transformers compares the numbers of image tokens and of features, as `data/collate.py` has on the host.
        if planned and inputs_embeds.device.type != "cpu":
            image_features = None
        return plain_mask(input_ids, inputs_embeds, image_features, video_features)

    @functools.wraps(plain)
    def forward(hidden_states: "Tensor", grid_thw: "Tensor", **options: Any) -> Any:
        plan = plan_of(grid_thw)
        inputs = {} if plan is None else dict(plan.inputs)
        return plain(hidden_states, grid_thw=grid_thw, **{**inputs, **options})

    backbone.get_image_features, backbone.get_placeholder_mask = get_image_features, get_placeholder_mask
    encoder.forward = forward
    language = language_model(base)
    if (indexed := getattr(language, "_deepstack_process", None)) is not None:
        language._deepstack_process = functools.partial(_add_features, indexed)
    return True


def _add_features(
    indexed: "Callable[..., Tensor]", hidden: "Tensor", is_image: "Tensor", features: "Tensor"
) -> "Tensor":
    """Return `hidden` `[rows, tokens, width]` plus `features` `[image tokens, width]` where `is_image` is true.

    `indexed` is transformers' way, for which a GPU is asked how many tokens these are."""
    return (
        indexed(hidden, is_image, features)
        if hidden.device.type == "cpu"
        else add_scattered(hidden, is_image, features)
    )


def add_scattered(hidden: "Tensor", is_image: "Tensor", features: "Tensor") -> "Tensor":
    """Return what `_add_features` does, without a read of the device."""
    scattered = hidden.new_zeros(hidden.shape).masked_scatter(
        is_image.to(hidden.device)[..., None], features.to(hidden.device, hidden.dtype)
    )
    return hidden + scattered
