"""The images of each row of a batch. Rows that show the same image need it among the inputs only once.

`image_spans` of a batch gives each row's range of the batch's images: `(first, one after the last)`. Ranges of rows may
overlap. Without it each image belongs to one row, as in transformers.
"""

from collections.abc import Sequence
from typing import Any

from ray_vlm.data.collate import join_pixels

Span = tuple[int, int]


class RowImages:
    """The images of a batch, row by row."""

    def __init__(self, visual: Any, inputs: dict[str, Any], spans: Sequence[Span] | None):
        self.pixels: Any = inputs.get("pixel_values")
        self.grids: Any = inputs.get("image_grid_thw")
        patches = [] if self.grids is None else self.grids.prod(dim=1).tolist()
        self.starts = [0]  # first patch of each image, and the number of all patches
        for size in patches:
            self.starts.append(self.starts[-1] + size)
        rows = zip(inputs["mm_token_type_ids"], inputs["attention_mask"], strict=True)
        kinds = [kind[mask.bool()] for kind, mask in rows]
        self.ends = [int(kind.nonzero()[-1]) + 1 if kind.any() else 0 for kind in kinds]
        merged = [size // visual.spatial_merge_size**2 for size in patches]
        self.spans = list(spans) if spans else spans_of([int(kind.sum()) for kind in kinds], merged)

    def end(self, row: int) -> int:
        """Return the number of the row's tokens up to the end of its last image."""
        return self.ends[row]

    def of(self, row: int) -> dict[str, Any]:
        """Return the row's pixels and grids; an empty dictionary without images."""
        first, end = self.spans[row]
        if first == end:
            return {}
        pixels = self.pixels[self.starts[first] : self.starts[end]]
        return {"pixel_values": pixels, "image_grid_thw": self.grids[first:end]}

    def grids_of(self, rows: Sequence[int]) -> Any:
        """Return `image_grid_thw` of rows, one after another; None without images."""
        numbers = [number for row in rows for number in range(*self.spans[row])]
        return self.grids[numbers] if numbers else None

    def of_all(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return the pixels and grids of rows, one after another."""
        return join_pixels([self.of(row) for row in rows])

    def same(self, one: int, other: int) -> bool:
        """Return whether two rows show the same images, pixel by pixel."""
        import torch

        if self.spans[one] == self.spans[other]:
            return True
        first, second = self.of(one), self.of(other)
        return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def spans_of(tokens: Sequence[int], sizes: Sequence[int]) -> list[Span]:
    """Return each row's range of images if no image is shared. `tokens`: image tokens of each row; `sizes`: of each
    image."""
    spans, number = [], 0
    for left in tokens:
        first = number
        while left > 0:
            left -= sizes[number]
            number += 1
        spans.append((first, number))
    return spans
