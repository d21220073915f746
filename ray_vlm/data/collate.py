"""Collate rows into tensors on the training device: pad token ids, normalise images and cut them into patches.

Pixels arrive as uint8 and become floats here, on the device, through the family's own image processor with
`do_resize=False`, so they equal the stock processor's output bit for bit.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import IGNORED, Sample
from ray_vlm.errors import DataError


def collate(
    rows: Sequence[Sample],
    builder: SampleBuilder,
    device: str = "cpu",
    side: str = "right",
    copies: int = 1,
    pixels: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a batch as the model's forward takes it, with `labels` only if all rows have them.

    `copies`: the rows are the same records this many times, one copy after another. Their images are processed once,
    and appear once if `image_spans` can say which row they belong to (`models/prefix_sharing.py`). `pixels`: the result
    of `read_pixels`, if the images have been read before.

    `input_ids`, `attention_mask`, `mm_token_type_ids` (some families: `token_type_ids`, or none), `labels`: `int64
    [rows, longest]`, padded on `side`; `loss_weights`: `float32 [rows, longest]`, 0 for tokens that are not trained
    (only if rows have weights); `pixel_values`: `float32 [patches, patch values]`; `image_grid_thw`: `int64 [images,
    3]`; for families with `stock_images`, what their processor makes.
    """
    import torch

    def pad(sequences: Sequence[np.ndarray], value: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        tensors = [torch.tensor(sequence, dtype=dtype) for sequence in sequences]
        return torch.nn.utils.rnn.pad_sequence(tensors, True, value, side).to(device)

    ids = [row.input_ids for row in rows]
    tokens = pad(ids, builder.tokenizer.pad_token_id)
    batch: dict[str, Any] = {"input_ids": tokens, "attention_mask": pad([np.ones_like(i) for i in ids], 0)}
    if builder.kinds is not None:
        batch[builder.kinds] = (tokens == builder.image_token_id).long()
    if all(len(row.labels) == len(row.input_ids) for row in rows):
        batch["labels"] = pad([row.labels for row in rows], IGNORED)
    if "labels" in batch and rows[0].weights is not None:
        weights = pad([row.weights for row in rows if row.weights is not None], 0.0, torch.float32)
        batch["loss_weights"] = weights * (batch["labels"] != IGNORED)
    distinct = rows[: len(rows) // copies]
    if pixels is None:
        pixels = read_pixels([image for row in distinct for image in row.images], builder, device)
    if pixels and builder.stock is None:
        batch |= pixels
        _check_grid(batch, builder, copies)
        if copies > 1:
            batch["image_spans"] = spans_of_rows(distinct) * copies
    elif pixels:
        batch |= join_pixels([pixels] * copies)
    return batch


def spans_of_rows(rows: Sequence[Sample]) -> list[tuple[int, int]]:
    """Return each row's span among all their images: the first image, and one past the last."""
    ends = [0, *accumulate(len(row.images) for row in rows)]
    return list(pairwise(ends))


def read_pixels(images: Sequence[np.ndarray], builder: SampleBuilder, device: str) -> dict[str, Any]:
    """Return `pixel_values` and `image_grid_thw` of resized images, or what the family's processor makes; empty without
    images."""
    import torch

    if not images:
        return {}
    if builder.stock is not None:
        return {name: value.to(device) for name, value in builder.stock.tensors(images).items()}
    tensors = [torch.tensor(image, device=device).permute(2, 0, 1) for image in images]  # [3, h, w] each
    return dict(builder.processor.image_processor(tensors, do_resize=False, return_tensors="pt", device=device))


def join_pixels(pixels: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate the results of `read_pixels` for several rows; empty if no row has images."""
    import torch

    filled = [row_pixels for row_pixels in pixels if row_pixels]
    return {name: torch.cat([row_pixels[name] for row_pixels in filled]) for name in (filled or [{}])[0]}


def collate_pairs(rows: Sequence[Sample], builder: SampleBuilder, device: str = "cpu") -> dict[str, Any]:
    """Return pairs as TRL's DPO takes them: each prompt with its preferred answer, then each with the other.

    Like `collate`, with `completion_mask` (`int64 [2 rows, longest]`) in place of labels.
    """
    both = [answered(row, row.completions[k]) for k in (0, 1) for row in rows]
    batch = collate(both, builder, device, copies=2)
    batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
    return batch


def answered(row: Sample, completion: np.ndarray) -> Sample:
    """Return a sample of the prompt of `row` and this answer, whose tokens are trained."""
    ids = np.concatenate([row.input_ids, completion])
    labels = np.concatenate([np.full_like(row.input_ids, IGNORED), completion])
    return Sample(ids, labels, row.images, number=row.number)


def _check_grid(batch: dict[str, Any], builder: SampleBuilder, copies: int) -> None:
    """Raise `DataError` if the planned image tokens are not as many as the image encoder will make."""
    # The grid [images, 3] counts patches (time, height, width); the encoder merges merge x merge of them to a token.
    planned = int(batch["mm_token_type_ids"].sum()) // copies
    made = int(batch["image_grid_thw"].prod(dim=-1).sum()) // builder.image_spec.merge**2
    if planned != made:
        raise DataError(f"{planned} image tokens were planned, but the processor makes {made}. Please report this.")
