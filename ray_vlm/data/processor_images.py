"""Images of families whose own processor does everything: their tensors, and the text that stands for them.

Llama-4, for example, cuts an image into tiles with separators between them. A processor is asked with blank images what
it makes of a row, and the answers are kept by the sizes of the row's images: LLaVA-OneVision cuts an only image into
tiles and others not, and MiniCPM-V numbers the images of a row. What a processor writes must be the text around the
images as it is, with text of its own in the place of each image; others are refused when the model is loaded.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from ray_vlm.errors import ModelError
from ray_vlm.models.load import first_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

Size = tuple[int, int]  # width and height in pixels
_TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "text_replacement_offsets")
_KIND_INPUTS = ("mm_token_type_ids", "token_type_ids")  # they tell some families' forward where images are
_BLANK = (64, 64)
_KEPT = 4096  # rows of images of different sizes whose texts are kept
_OTHERS = "Use one of the families that docs/models.md lists as tested."


class TilingProcessor(Protocol):
    """What is used of such a family's processor: the placeholder of an image, and the inputs for texts and images."""

    image_token: str
    tokenizer: "PreTrainedTokenizerFast"

    def __call__(self, *, text: Sequence[str], images: Sequence[object], **options: object) -> Mapping[str, Any]: ...


class ProcessorImages:
    """What a family's own processor makes of images.

    `token`: the placeholder of an image in a prompt; `token_id`: the id that stands for the image encoder's output;
    `kinds`: the input that marks tokens of images, or None if the forward takes none; `kind_ids`: those tokens. `head`:
    text that the processor writes before each conversation that does not begin with it. `joins`: whether tensors of
    rows can be joined; those of Molmo2 hold numbers of patches in the batch.
    """

    def __init__(self, processor: TilingProcessor, token_id: int):
        self.processor, self.token, self.token_id = processor, processor.image_token, token_id
        self._cached = lru_cache(_KEPT)(self._expand)
        blank = _blank(_BLANK)
        one, two = (self._call([[blank]] * count, return_tensors="pt") for count in (1, 2))
        self.kinds = next((name for name in _KIND_INPUTS if name in one), None)
        self.kind_ids = tuple(sorted({token_id, *(getattr(processor, "image_token_ids", None) or ())}))
        # Along which axis the tensors of images lie one behind another.
        self._axes = {name: _doubled(one[name].shape, two[name].shape) for name in one if name not in _TEXT_INPUTS}
        once = self.tensors([[blank]])
        joined, both = self.join([once, once]), self.tensors([[blank], [blank]])
        self.joins = all(bool((value == both[name]).all()) for name, value in joined.items())
        self.head = self._read_head()

    def expand(self, sizes: Sequence[Size]) -> tuple[tuple[str, int], ...]:
        """Return the prompt text for each image of a row, and how many of its tokens are the encoder's."""
        return self._cached(tuple(sizes)) if sizes else ()

    def tensors(self, rows: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
        """Return the image inputs of the model's forward for the images of rows, `uint8 [h, w, 3]` each, in order;
        empty without images."""
        shown = [images for images in rows if len(images)]
        inputs = self._call(shown, return_tensors="pt") if shown else {}
        return {name: value for name, value in inputs.items() if name not in _TEXT_INPUTS}

    def join(self, parts: "Sequence[Mapping[str, Tensor]]") -> "dict[str, Tensor]":
        """Join the results of `tensors` for several rows, each a part, into that for all. Processors pad images, and
        rows of images, to the largest with zeros."""
        import torch

        filled = [part for part in parts if part]
        joined: dict[str, Tensor] = {}
        for name in (filled or [{}])[0]:
            values, axis = [part[name] for part in filled], self._axes[name]
            shape = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
            padded = []
            for value in values:
                missing = [0 if n == axis else shape[n] - value.shape[n] for n in range(value.dim())]
                widths = [width for n in reversed(missing) for width in (0, n)]
                padded.append(torch.nn.functional.pad(value, widths) if any(missing) else value)
            joined[name] = torch.cat(padded, axis)
        return joined

    def _read_head(self) -> str:
        """Return `head`. Raise `ValueError` if the processor changes the text around images otherwise."""
        inputs = self._call([[_blank(_BLANK)]], tail="a")
        ids, own = list(map(int, inputs["input_ids"][0])), self._ids(self.expand([_BLANK])[0][0] + "a")
        if ids[len(ids) - len(own) :] != own:
            raise ValueError("it writes text of its own behind images, so a prompt is not what the chat template makes")
        return str(self.processor.tokenizer.decode(ids[: len(ids) - len(own)]))

    def _expand(self, sizes: tuple[Size, ...]) -> tuple[tuple[str, int], ...]:
        inputs = self._call([[_blank(size) for size in sizes]], return_text_replacement_offsets=True)
        texts = [image["replacement"] for image in inputs["text_replacement_offsets"][0]]
        return tuple((text, self._ids(text).count(self.token_id)) for text in texts)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _call(self, rows: Sequence[Sequence[np.ndarray]], tail: str = "", **options: object) -> Mapping[str, Any]:
        pictures = [[Image.fromarray(image) for image in images] for images in rows]
        texts = [self.token * len(images) + tail for images in rows]
        # Rows differ in length, so tensors need padding; the token ids are not used.
        return self.processor(text=texts, images=pictures, padding=True, add_special_tokens=False, **options)


def _blank(size: Size) -> np.ndarray:
    return np.zeros((size[1], size[0], 3), np.uint8)


def _doubled(one: Sequence[int], two: Sequence[int]) -> int:
    """Return the only axis along which the shape of two images is twice that of one."""
    axes = [axis for axis, (first, second) in enumerate(zip(one, two, strict=True)) if first != second]
    if len(axes) != 1 or two[axes[0]] != 2 * one[axes[0]]:
        raise ValueError(f"two images have the shape {list(two)} where one has {list(one)}")
    return axes[0]


def load_processor_images(processor: TilingProcessor, config: "PretrainedConfig") -> ProcessorImages:
    """Return the processor's `ProcessorImages`. Raise `ModelError` if it cannot be asked how it marks images."""
    token_id = getattr(config, "image_token_id", None)
    token_id = getattr(config, "image_token_index", None) if token_id is None else token_id
    if getattr(processor, "image_token", None) is None or token_id is None:
        raise ModelError(
            f"model type {config.model_type!r}: its processor has no image token that transformers could replace, so "
            f"it cannot be asked where images stand in a text. {_OTHERS}"
        )
    try:
        return ProcessorImages(processor, token_id)
    except Exception as error:  # processors raise many types
        reason = "it does not report what it writes for an image" if isinstance(error, KeyError) else first_line(error)
        raise ModelError(
            f"model type {config.model_type!r}: its processor cannot be asked what it makes of images ({reason}). "
            f"{_OTHERS}"
        ) from None
