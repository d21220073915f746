"""Rows -> tensors on the training device: pad token ids, normalise and cut images into patches.

Pixels arrive as uint8 and become floats here, on the device, through the family's own image processor with
`do_resize=False`; so they equal the stock processor's output bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_vlm.data.rows import IGNORED, Preparer, Row
from ray_vlm.errors import DataError


def collate(rows: Sequence[Row], preparer: Preparer, device: str = "cpu", side: str = "right") -> dict[str, Any]:
    """A batch as the model's forward takes it; `labels` only where rows have them.

    `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels`: `int64 [rows, longest]`, padded on `side`;
    `loss_weights`: `float32 [rows, longest]`, 0 where nothing is trained, only where rows have weights;
    `pixel_values`: `float32 [patches, patch values]`; `image_grid_thw`: `int64 [images, 3]`.
    """
    import torch

    ids = [row.input_ids for row in rows]
    pad = preparer.tokenizer.pad_token_id
    tokens = torch.from_numpy(_pad(ids, pad, side)).to(device)
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.from_numpy(_pad([i * 0 + 1 for i in ids], 0, side)).to(device),
        "mm_token_type_ids": (tokens == preparer.image_token_id).long(),
    }
    if all(len(row.labels) == len(row.input_ids) for row in rows):
        batch["labels"] = torch.from_numpy(_pad([row.labels for row in rows], IGNORED, side)).to(device)
    if "labels" in batch and rows[0].weights is not None:
        weights = torch.from_numpy(_pad([row.weights for row in rows], 0.0, side, np.float32)).to(device)
        batch["loss_weights"] = weights * (batch["labels"] != IGNORED)
    images = [torch.tensor(image, device=device).permute(2, 0, 1) for row in rows for image in row.images]
    if images:
        batch |= preparer.processor.image_processor(images, do_resize=False, return_tensors="pt", device=device)
        _check_grid(batch, preparer)
    return batch


def _pad(sequences: Sequence[Any], value: float, side: str, dtype: Any = np.int64) -> Any:
    out = np.full((len(sequences), max(map(len, sequences))), value, dtype)
    for i, sequence in enumerate(sequences):
        if side == "right":
            out[i, : len(sequence)] = sequence
        else:
            out[i, out.shape[1] - len(sequence) :] = sequence
    return out


def _check_grid(batch: dict[str, Any], preparer: Preparer) -> None:
    """The image tokens that were planned must be those that the tower will make."""
    planned = int(batch["mm_token_type_ids"].sum())
    made = int(batch["image_grid_thw"].prod(dim=-1).sum()) // preparer.image_spec.merge**2
    if planned != made:
        raise DataError(f"{planned} image tokens were planned, but the processor makes {made}. Please report this.")
