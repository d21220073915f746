"""Images of families whose own processor does everything: their tensors, and the text that stands for them.

Llama-4, for example, cuts an image into tiles with separators between them. How many tokens an image takes depends on
its size alone, so they are counted on a blank image of that size.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from ray_vlm.errors import ModelError

_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "text_replacement_offsets")
_KINDS = ("mm_token_type_ids", "token_type_ids")  # the inputs that tell some families' forward where images are


class StockImages:
    """How a processor treats images. `token`: the placeholder of an image in a prompt; `token_id`: the id that stands
    for the image encoder's output; `kinds`: the input that marks those, or None if the forward takes none."""

    def __init__(self, processor: Any, token_id: int):
        self.processor, self.token, self.token_id = processor, processor.image_token, token_id
        self._cached = lru_cache(4096)(self._expand)
        inputs = self._call([np.zeros((64, 64, 3), np.uint8)])
        self.kinds = next((name for name in _KINDS if name in inputs), None)

    def expand(self, size: tuple[int, int]) -> tuple[str, int]:
        """Return the prompt text for an image of (width, height), and how many of its tokens are the encoder's."""
        return self._cached(size)

    def tensors(self, images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return the image inputs of the model's forward for images `uint8 [h, w, 3]`, in order."""
        inputs = self._call(images, return_tensors="pt")
        return {name: value for name, value in inputs.items() if name not in _TEXT}

    def _expand(self, size: tuple[int, int]) -> tuple[str, int]:
        inputs = self._call([np.zeros((size[1], size[0], 3), np.uint8)], return_text_replacement_offsets=True)
        text = inputs["text_replacement_offsets"][0][0]["replacement"]
        return text, list(inputs["input_ids"][0]).count(self.token_id)

    def _call(self, images: Sequence[np.ndarray], **options: Any) -> Any:
        pictures = [Image.fromarray(image) for image in images]
        return self.processor(text=[self.token * len(images)], images=[pictures], **options)


def load_stock(processor: Any, config: Any) -> StockImages:
    """Return the processor's `StockImages`. Raise `ModelError` if it does not say how it marks images."""
    token_id = getattr(config, "image_token_id", None)
    token_id = getattr(config, "image_token_index", None) if token_id is None else token_id
    if getattr(processor, "image_token", None) is None or token_id is None:
        raise ModelError(
            f"model type {config.model_type!r}: its processor has no image token that transformers could replace, so "
            "it cannot be told where images are. Use another family."
        )
    return StockImages(processor, token_id)
