"""Collate rows into a batch in two halves: tensors on the host, which reads no device, and their way to the device.

`host_batch` pads token ids and joins the pixels of all images, as uint8. `upload` moves a batch to the device, from
pinned memory and without waiting where that is a GPU. There `add_pixels` makes floats of the pixels and cuts them into
patches through the family's own image processor with `do_resize=False`, so they equal the stock processor's output bit
for bit. `collate` does all of it at once. What a batch holds besides tensors is of plain Python.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import IGNORED, Sample
from ray_vlm.errors import DataError
from ray_vlm.models.layouts import BatchRows, LayoutPlanner
from ray_vlm.models.vision_inputs import ImagePlan, plan_images, register_plan

if TYPE_CHECKING:
    import torch

_Batch = TypeVar("_Batch")
_UNJOINED = "images"  # of a row whose tensors cannot be joined with those of others


@dataclass(frozen=True)
class ImageBytes:
    """Resized images in one tensor, so that all of a batch travel to the device at once.

    `values`: `uint8`, the pixels of all images one behind another, each `[height, width, 3]`; `sizes`: height and width
    of each.
    """

    values: "torch.Tensor"
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def join(cls, images: Sequence[np.ndarray]) -> "ImageBytes":
        """Copy images, `uint8 [height, width, 3]` each, into one tensor."""
        import torch

        values = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]))
        return cls(values, tuple((image.shape[0], image.shape[1]) for image in images))

    def to(self, device: str, non_blocking: bool = False) -> "ImageBytes":
        """Return the images on a device."""
        return ImageBytes(self.values.to(device, non_blocking=non_blocking), self.sizes)

    def pin_memory(self) -> "ImageBytes":
        """Return the images in pinned memory of the host."""
        return ImageBytes(self.values.pin_memory(), self.sizes)

    def split(self) -> "list[torch.Tensor]":
        """Return each image, `uint8 [3, height, width]`, without a copy."""
        images = self.values.split([3 * height * width for height, width in self.sizes])
        return [image.view(*size, 3).permute(2, 0, 1) for image, size in zip(images, self.sizes, strict=True)]


def collate(
    rows: Sequence[Sample],
    builder: SampleBuilder,
    device: str = "cpu",
    side: str = "right",
    copies: int = 1,
    pixels: dict[str, Any] | None = None,
    planner: LayoutPlanner | None = None,
    prompts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return `host_batch` on the device, with `pixel_values`: `float32 [patches, patch values]`.

    `pixels`: the result of `read_pixels`, if the images have been read before.
    """
    batch = host_batch(rows, builder, side, copies, with_images=pixels is None, planner=planner, prompts=prompts)
    moved = upload(batch, device)
    if pixels is None:
        return add_pixels(moved, builder)
    moved |= pixels
    if "image_grid_thw" in moved:
        attach_plan(moved, plan_rows(rows, builder), device)
    return moved


def host_batch(
    rows: Sequence[Sample],
    builder: SampleBuilder,
    side: str = "right",
    copies: int = 1,
    with_images: bool = True,
    planner: LayoutPlanner | None = None,
    prompts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return a batch on the host as the model's forward takes it, with `labels` only if all rows have them.

    `copies`: the rows are the same records this many times, one copy after another. Their images are processed once,
    and with a `planner` they appear once. `with_images=False` leaves the images out. `planner`: plans `layout`
    (`models/layouts.py`), by which the model computes the batch; `prompts`: how many tokens of each row are its prompt,
    for rows that may share it.

    `input_ids`, `attention_mask`, `mm_token_type_ids` (some families: `token_type_ids`, or none), `labels`: `int64
    [rows, longest]`, padded on `side`; `loss_weights`: `float32 [rows, longest]`, 0 for tokens that are not trained
    (only if rows have weights); `images`: `ImageBytes`, which `add_pixels` turns into `pixel_values`;
    `image_grid_thw`: `int64 [images, 3]`; for families with `stock_images`, what their processor makes.
    """
    import torch

    def pad(sequences: Sequence[np.ndarray], value: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        tensors = [torch.tensor(sequence, dtype=dtype) for sequence in sequences]
        return torch.nn.utils.rnn.pad_sequence(tensors, True, value, side)

    ids = [row.input_ids for row in rows]
    tokens = pad(ids, builder.tokenizer.pad_token_id)
    batch: dict[str, Any] = {"input_ids": tokens, "attention_mask": pad([np.ones_like(i) for i in ids], 0)}
    if builder.kinds is not None:
        batch[builder.kinds] = mark_images(tokens, builder)
    if all(len(row.labels) == len(row.input_ids) for row in rows):
        batch["labels"] = pad([row.labels for row in rows], IGNORED)
    if "labels" in batch and rows[0].weights is not None:
        weights = pad([row.weights for row in rows if row.weights is not None], 0.0, torch.float32)
        batch["loss_weights"] = weights * (batch["labels"] != IGNORED)
    distinct = rows[: len(rows) // copies]
    if planner is not None:
        spans = spans_of_rows(distinct) * copies
        lengths = [len(row.input_ids) for row in rows] if prompts is None else prompts
        batch["layout"] = planner.plan(batch_rows(ids, lengths, spans, distinct, builder, side=side))
    if not any(row.images for row in distinct):
        return batch
    shared = planner is not None or copies == 1  # else each copy shows images of its own
    if builder.stock is None:
        _check_grid(rows, builder)
    if with_images:
        batch |= _image_inputs([row.images for row in (distinct if shared else rows)], builder)
        if plan := plan_rows(distinct if shared else rows, builder):
            batch["image_plan"] = plan
    return batch


def batch_rows(
    tokens: Sequence[np.ndarray],
    prompts: Sequence[int],
    spans: Sequence[tuple[int, int]],
    shown: Sequence[Sample],
    builder: SampleBuilder,
    ends: Sequence[int] = (),
    columns: int = 0,
    side: str = "right",
) -> BatchRows:
    """Return what a layout of a batch is planned from.

    `tokens`: of each row, without padding, and `prompts`, how many of them are its prompt. `spans`: the range of its
    images among those of `shown`. `ends`, `columns`: the column after its last token, and columns of the batch, if rows
    are not padded to the longest on one `side`.
    """
    longest = columns or max(map(len, tokens))
    if not ends:
        ends = [longest] * len(tokens) if side == "left" else [len(ids) for ids in tokens]
    return BatchRows(
        [np.asarray(ids, np.int64) for ids in tokens],
        prompts,
        [end - len(ids) for ids, end in zip(tokens, ends, strict=True)],
        longest,
        spans,
        _grids(_sizes(shown), builder),
    )


def upload(batch: _Batch, device: str) -> _Batch:
    """Return a batch with all that has a method `to` on the device; numbers, lists and strings stay as they are.

    Nothing is read from the device. To a GPU tensors go through pinned memory, and this does not wait for them: work on
    the current stream finds them, for other streams see `data/feed.py`. What is no mapping, such as a list of rows, is
    returned as it is.
    """
    if not isinstance(batch, Mapping):
        return batch
    is_gpu = device.startswith("cuda")
    moved = {}
    for name, value in batch.items():
        pinned = value.pin_memory() if is_gpu and hasattr(value, "pin_memory") else value
        moved[name] = pinned.to(device, non_blocking=is_gpu) if hasattr(pinned, "to") else pinned
    return moved  # type: ignore[return-value]


def add_pixels(batch: _Batch, builder: SampleBuilder) -> _Batch:
    """Return a batch with `pixel_values` in place of `images`, made where these are, and let the image encoder use its
    `image_plan`. Nothing is read from the device.

    Raise `DataError` if the processor makes another number of patches than was planned.
    """
    if not isinstance(batch, Mapping) or "images" not in batch:
        return batch
    images: ImageBytes = batch["images"]
    device = str(images.values.device)
    processor = builder.processor.image_processor
    values = processor(images.split(), do_resize=False, return_tensors="pt", device=device)["pixel_values"]
    planned, made = sum(map(math.prod, _grids(images.sizes, builder))), len(values)
    if planned != made:
        raise DataError(f"{planned} image patches were planned, but the processor makes {made}. Please report this.")
    if "image_plan" in batch:
        register_plan(batch["image_grid_thw"], batch["image_plan"])
    rest = {name: value for name, value in batch.items() if name not in ("images", "image_plan")}
    return rest | {"pixel_values": values}  # type: ignore[return-value]


def spans_of_rows(rows: Sequence[Sample]) -> list[tuple[int, int]]:
    """Return each row's span among all their images: the first image, and one past the last."""
    ends = [0, *accumulate(len(row.images) for row in rows)]
    return list(pairwise(ends))


def plan_rows(rows: Sequence[Sample], builder: SampleBuilder) -> ImagePlan | None:
    """Plan the image encoder's inputs for the images of rows, on the host; None without images, or for a family whose
    encoder is not planned for. Keys of images are in the plan if all rows have them."""
    sizes = _sizes(rows)
    if builder.encoder is None or not sizes:
        return None
    keys = [key for row in rows for key in row.image_keys]
    return plan_images(builder.encoder, _grids(sizes, builder), keys if len(keys) == len(sizes) else ())


def attach_plan(batch: dict[str, Any], plan: ImagePlan | None, device: str) -> None:
    """Let the encoder use `plan` for the images of this batch on `device`."""
    if plan is not None:
        register_plan(batch["image_grid_thw"], plan.to(device, non_blocking=True))


def read_pixels(images: Sequence[np.ndarray], builder: SampleBuilder, device: str) -> dict[str, Any]:
    """Return what `join_pixels` takes of a row's resized images: `pixel_values` and `image_grid_thw`, or what the
    family's processor makes, on the device; empty without images."""
    if builder.stock is not None and not builder.stock.joins:
        return {_UNJOINED: images} if images else {}
    return add_pixels(upload(_image_inputs([images], builder), device), builder) if images else {}


def mark_images(tokens: "torch.Tensor", builder: SampleBuilder) -> "torch.Tensor":
    """Return which tokens are an image's, `int64` in the shape of `tokens`: 1, others 0."""
    import torch

    if len(builder.kind_ids) == 1:
        return (tokens == builder.image_token_id).long()
    return torch.isin(tokens, torch.tensor(builder.kind_ids, device=tokens.device)).long()


def _image_inputs(rows: Sequence[Sequence[np.ndarray]], builder: SampleBuilder) -> dict[str, Any]:
    """Return `images` and `image_grid_thw` of the images of rows, or what the family's own processor makes, on the
    host."""
    import torch

    if builder.stock is not None:
        return builder.stock.tensors(rows)
    joined = ImageBytes.join([image for images in rows for image in images])
    return {"images": joined, "image_grid_thw": torch.tensor(_grids(joined.sizes, builder))}


def _sizes(rows: Sequence[Sample]) -> list[tuple[int, int]]:
    """Return (height, width) of all images of the rows."""
    return [(image.shape[0], image.shape[1]) for row in rows for image in row.images]


def _grids(sizes: Sequence[tuple[int, int]], builder: SampleBuilder) -> list[tuple[int, int, int]]:
    """Return the frames, and the rows and columns of patches, of images of (height, width)."""
    patch = builder.image_spec.patch
    return [(1, height // patch, width // patch) for height, width in sizes]


def join_pixels(pixels: Sequence[dict[str, Any]], builder: SampleBuilder, device: str) -> dict[str, Any]:
    """Concatenate the image inputs of several rows, as `read_pixels` returns them for the device; empty if no row has
    images."""
    import torch

    if builder.stock is not None and not builder.stock.joins:
        return upload(builder.stock.tensors([part[_UNJOINED] for part in pixels if part]), device)
    if builder.stock is not None:
        return builder.stock.join(pixels)
    filled = [row_pixels for row_pixels in pixels if row_pixels]
    return {name: torch.cat([row_pixels[name] for row_pixels in filled]) for name in (filled or [{}])[0]}


def collate_pairs(
    rows: Sequence[Sample], builder: SampleBuilder, device: str = "cpu", planner: LayoutPlanner | None = None
) -> dict[str, Any]:
    """Return `host_pairs` on the device, with `pixel_values` as in `collate`."""
    return add_pixels(upload(host_pairs(rows, builder, planner), device), builder)


def host_pairs(rows: Sequence[Sample], builder: SampleBuilder, planner: LayoutPlanner | None = None) -> dict[str, Any]:
    """Return pairs on the host as TRL's DPO takes them: prompts with the preferred answers, then with the others.

    Like `host_batch`, with `completion_mask` (`int64 [2 rows, longest]`) in place of labels.
    """
    both = [answered(row, row.completions[k]) for k in (0, 1) for row in rows]
    prompts = [len(row.input_ids) for row in rows] * 2
    batch = host_batch(both, builder, copies=2, planner=planner, prompts=prompts)
    batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
    return batch


def answered(row: Sample, completion: np.ndarray) -> Sample:
    """Return a sample of the prompt of `row` and this answer, whose tokens are trained."""
    ids = np.concatenate([row.input_ids, completion])
    labels = np.concatenate([np.full_like(row.input_ids, IGNORED), completion])
    return replace(row, input_ids=ids, labels=labels, weights=None, completions=())


def _check_grid(rows: Sequence[Sample], builder: SampleBuilder) -> None:
    """Raise `DataError` if a batch's planned image tokens are not as many as the image encoder will make."""
    planned = sum(int(np.count_nonzero(row.input_ids == builder.image_token_id)) for row in rows)
    # The encoder merges merge x merge patches to a token.
    made = sum(map(math.prod, _grids(_sizes(rows), builder))) // builder.image_spec.merge**2
    if planned != made:
        raise DataError(f"{planned} image tokens were planned, but the processor makes {made}. Please report this.")
