"""Image files -> upright uint8 RGB, and the size that a family's processor makes of them.

Everything that can go wrong with a file is a `ValueError` or `OSError` with a reason; the index turns it into a bad
row. Sizes come from transformers' own smart resize, pixels from the processor's own resize, so that a resized image
equals the stock processor's bit for bit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Image.init()  # all decoders, so that they can be named
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # others are refused, by name
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # what the last bytes of a whole file contain
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageSpec:
    """How a family sizes images: sides become multiples of `patch * merge`, areas stay within the two limits (px)."""

    patch: int
    merge: int
    min_pixels: int
    max_pixels: int

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) after smart resize of (width, height). Raises `ValueError` on extreme shapes."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        width, height = size
        factor = self.patch * self.merge
        if min(size) < factor:
            raise ValueError(f"image is {width}x{height} px; its short side is below {factor} px, one visual token")
        tall, wide = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        return wide, tall

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of an image of (width, height), before resizing."""
        width, height = self.resized(size)
        return (width // (self.patch * self.merge)) * (height // (self.patch * self.merge))


def read_size(path: str, max_pixels: int) -> tuple[int, int]:
    """Upright (width, height) from the header, after a look at the end of the file.

    Formats whose end is not marked, and files with something behind the mark, are decoded once to be sure.
    Raises `ValueError` with the reason.
    """
    if not Path(path).is_file():
        raise ValueError("image file is missing" if not Path(path).exists() else "image path is not a file")
    if Path(path).stat().st_size == 0:
        raise ValueError("image file is empty (0 bytes)")
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _TooLarge(f"image has {width * height} pixels, above data.max_image_pixels={max_pixels}")
            kind = image.format or ""
            if kind not in _ENDS or not _ends_whole(path, _ENDS[kind]):
                image.load()
            # Pillow gives a TIFF's size upright already
            look = kind != "TIFF" and (kind != "PNG" or "exif" in image.info)  # getexif() decodes a PNG to find none
            turned = look and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except _TooLarge:
        raise
    except Exception as error:  # decoders raise what they like
        raise ValueError(f"image cannot be read ({type(error).__name__}: {error})") from None
    return (height, width) if turned else (width, height)


class _TooLarge(ValueError):
    pass


def _ends_whole(path: str, marker: bytes) -> bool:
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 4096))  # some cameras append padding after the marker
        return marker in file.read()


def decode(path: str) -> np.ndarray:
    """`uint8 [height, width, 3]`: upright, alpha on white, first frame, palettes and CMYK converted."""
    with Image.open(path, formats=FORMATS) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode == "F":
        raise ValueError("floating-point images have no agreed range; convert it to 8 bit")
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        depth = np.asarray(image).astype(np.float32)
        image = Image.fromarray((np.clip(depth, 0, 65535) / 257.0).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.asarray(image.convert("RGB"))


def resize(pixels: np.ndarray, spec: ImageSpec, processor: Any) -> np.ndarray:
    """`uint8 [h, w, 3]` at the family's size, by the image processor's own resize."""
    import torch
    from transformers.image_utils import SizeDict

    size = SizeDict(shortest_edge=spec.min_pixels, longest_edge=spec.max_pixels)
    tensor = torch.tensor(pixels).permute(2, 0, 1).unsqueeze(0).contiguous()
    small = processor.resize(tensor, size=size, resample=processor.resample, factor=spec.patch * spec.merge)
    return small[0].permute(1, 2, 0).contiguous().numpy()
