"""Decode image files to upright uint8 RGB, and compute the size that a family's processor gives them.

Every fault of a file is a `ValueError` or `OSError` with a reason, which the index turns into a bad row. Sizes come
from the rule of transformers' own smart resize, pixels from the processor's own resize, so a resized image equals the
stock processor's bit for bit. Families whose own processor does everything have
`ProcessorImages` (`data/processor_images.py`).
"""

import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ray_vlm.data.inner_images import read_inner
from ray_vlm.data.records import Image as ImageSource
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import DataError
from ray_vlm.models.families import Family
from ray_vlm.models.processor import ImageSizes
from ray_vlm.storage import is_remote, open_file, read_bytes

if TYPE_CHECKING:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

Image.init()  # all decoders, so that they can be named
_READ = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
FORMATS = tuple(kind for kind in _READ if kind in Image.OPEN)  # Pillow before 11.3 has no AVIF
_HEAD = 64
_AHEAD_BYTES = 2**16  # of an image in an object store that are read at a time
# The position and the first bytes of other kinds of files.
_OTHERS = (
    (4, b"ftyphe", "a HEIC image"),
    (4, b"ftypmif1", "a HEIF image"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"%PDF", "a PDF document"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<?xml", "an XML document"),
    (0, b"<!doctype html", "an HTML page, as a failed download leaves it"),
    (0, b"<html", "an HTML page, as a failed download leaves it"),
    (0, b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull`"),
)
_HUB_CACHE = "/datasets--"  # in the paths of files in the cache of the Hugging Face hub
_FIX_CACHE = (
    "it is in the hub's cache, and this machine may have another: set HF_HOME to a folder that all nodes see, or give "
    "addresses as hf://datasets/owner/name/rows.parquet"
)
FETCH_AGAIN = "fetch the file again, or remove the row"
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # the end markers of complete files
_ORIENTATION = 0x0112
# Markers of a JPEG: the frame (baseline, extended, progressive), the first scan, and parts before it that do not change
# what it shows: JFIF, tables and comments.
_FRAMES, _SCAN, _HARMLESS = (0xC0, 0xC1, 0xC2), 0xDA, (0xE0, 0xDB, 0xC4, 0xDD, 0xFE)
_TURNS = {  # EXIF orientation -> the transpose that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UNLIMITED = 2**40  # pixels


@dataclass(frozen=True)
class Placement:
    """Where an image lies in what the model sees, in pixels: (width, height) of all that the model sees, of the part
    that shows the image, and the distance of that part from the left and the top."""

    resized: tuple[int, int]
    content: tuple[int, int]
    offset: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ImageSpec:
    """How a family sizes images: sides become multiples of `patch * merge`, areas stay within the two limits (px).

    `pad`: the colour that fills the rest if shapes are kept; None: stretch. `center`: pad on all sides, not only at the
    right and bottom. `stock`: only shrink images with more than `max_pixels`; the family's own processor does the rest
    (`ProcessorImages`).
    """

    patch: int
    merge: int
    min_pixels: int
    max_pixels: int
    pad: tuple[int, int, int] | None = None
    center: bool = False
    stock: bool = False

    @property
    def factor(self) -> int:
        """Side of one visual token in pixels."""
        return self.patch * self.merge

    def place(self, size: tuple[int, int]) -> Placement:
        """Return the placement of an image of (width, height). Raise `ValueError` on extreme shapes."""
        width, height = size
        if min(size) < 1:
            raise ValueError(f"image is {width}x{height} px, which is empty")
        if self.stock:
            scale = min(1.0, math.sqrt(self.max_pixels / (width * height)))
            smaller = (max(1, int(width * scale)), max(1, int(height * scale))) if scale < 1 else size
            return Placement(smaller, smaller)
        if self.pad is not None:
            return self._pad(size)
        resized = smart_resize(size, self.factor, self.min_pixels, self.max_pixels)
        return Placement(resized, resized)

    def _pad(self, size: tuple[int, int]) -> Placement:
        """Keep the image's shape; scale it only as far as the limits require."""
        if max(size) > 200 * min(size):
            raise ValueError(f"image is {size[0]}x{size[1]} px; one side is over 200 times the other")
        scale, area = 1.0, self._area(size)
        if area > self.max_pixels or area < self.min_pixels:
            limit = self.max_pixels if area > self.max_pixels else self.min_pixels
            scale = math.sqrt(limit / (size[0] * size[1]))
        content = self._scaled(size, scale)
        while self._area(content) > self.max_pixels and max(content) > self.factor:
            scale *= 0.99
            content = self._scaled(size, scale)
        resized = self._fill(content)
        gap = (resized[0] - content[0], resized[1] - content[1])
        return Placement(resized, content, (gap[0] // 2, gap[1] // 2) if self.center else (0, 0))

    def _scaled(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        return (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))

    def _fill(self, size: tuple[int, int]) -> tuple[int, int]:
        return (-(-size[0] // self.factor) * self.factor, -(-size[1] // self.factor) * self.factor)

    def _area(self, size: tuple[int, int]) -> int:
        width, height = self._fill(size)
        return width * height

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Return the visual tokens of an image of (width, height) before resizing; not for `stock`."""
        width, height = self.place(size).resized
        return (width // self.factor) * (height // self.factor)


def build_image_spec(sizes: ImageSizes | None, spec: SampleSpec, family: Family) -> ImageSpec:
    """Return how rows of `spec` size images. `sizes`: what the base's files say. Raise `DataError` for settings that
    the family does not support."""
    if family.stock_images:
        if spec.min_pixels or spec.resize == "pad":
            raise DataError(
                f"data.min_pixels and data.resize=pad are not for {family.model_type}: its own processor sizes images. "
                "Remove them; data.max_pixels makes images smaller before it sees them."
            )
        return ImageSpec(1, 1, 1, spec.max_pixels or _UNLIMITED, stock=True)
    assert sizes is not None
    low = spec.min_pixels or sizes.min_pixels
    high = spec.max_pixels or sizes.max_pixels
    mean = [round(255 * value) for value in sizes.mean]
    color = spec.pad_color or (mean[0], mean[1], mean[2])
    pad = color if spec.resize == "pad" else None
    return ImageSpec(sizes.patch_size, sizes.merge_size, min(low, high), high, pad, spec.pad_place == "center")


def smart_resize(size: tuple[int, int], factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return (width, height) of a resized image: sides are multiples of `factor`, the area is within the limits.

    An image smaller than one visual token is enlarged. This is the rule of `transformers.models.qwen2_vl`, which cannot
    be imported without torchvision; a test compares the two. Raise `ValueError` on extreme shapes.
    """
    shape = max(size) / min(size)
    if shape > 200:
        raise ValueError(f"image is {size[0]}x{size[1]} px; one side is over 200 times the other")
    width, height = (round(side / factor) * factor for side in size)
    if width * height > max_pixels:
        beta = math.sqrt((size[1] * size[0]) / max_pixels)
        width, height = (max(factor, math.floor(side / beta / factor) * factor) for side in size)
    elif width * height < min_pixels:
        beta = math.sqrt(min_pixels / (size[1] * size[0]))
        width, height = (math.ceil(side * beta / factor) * factor for side in size)
    return width, height


def read_size(image: ImageSource, max_pixels: int) -> tuple[int, int]:
    """Return the upright (width, height) from the header, and check the end of the file.

    Formats without an end marker, and files with something behind the marker, are decoded once to be sure. Raise
    `ValueError` with the reason.
    """
    _allow(max_pixels)
    try:
        with open_image(image) as file:
            end = file.seek(0, 2)
            if end == 0:
                raise _ImageProblem(f"image file is empty (0 bytes); {FETCH_AGAIN}")
            file.seek(max(0, end - 4096))  # some cameras append padding after the marker
            tail = file.read()
            file.seek(0)
            return _read_header(file, tail, max_pixels)
    except _ImageProblem:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else "path is not a file"
        fix = _FIX_CACHE if _HUB_CACHE in str(image) else "mend the path or image_root"
        raise ValueError(f"image {'file ' if 'missing' in what else ''}{what}; {fix}") from None
    except Exception as error:  # decoders raise exceptions of any type
        raise ValueError(f"image cannot be read ({type(error).__name__}: {error}); {FETCH_AGAIN}") from None


class SizeCache:
    """Sizes of images by path or position, for one pass over a source whose rows share images; the last 65,536 stay.

    Make a new one for each pass: files may change in between. Threads may share it. Faults are not kept.
    """

    def __init__(self, max_pixels: int):
        self._max_pixels = max_pixels
        self._read = lru_cache(2**16)(lambda image: read_size(image, max_pixels))

    def read_size(self, image: ImageSource) -> tuple[int, int]:
        """Return what `read_size` does, and raise as it does."""
        return read_size(image, self._max_pixels) if isinstance(image, bytes) else self._read(image)


def _open(file: BinaryIO) -> Image.Image:
    """Open the image in a file. Raise `_ImageProblem` for kinds of files that are not read."""
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        if (kind := name_kind(file.read(64))) is None:
            raise
        formats = ", ".join(FORMATS)
        raise _ImageProblem(f"image file is {kind}; supported are {formats}: convert or replace it") from None


def name_kind(head: bytes) -> str | None:
    """Return what kind of file starts with these bytes, if it is a known kind that is not read."""
    for start, mark, kind in _OTHERS:
        if head[start:].lower().startswith(mark.lower()):
            return kind
    padded = head.ljust(_HEAD, b"\0")  # decoders index into the head without checking its length
    others = ((name, accept) for name, (_, accept) in Image.OPEN.items() if name not in FORMATS)
    name = next((name for name, accept in others if accept and accept(padded) is True), None)
    return f"a {name} image" if name else None


def _allow(pixels: int) -> None:
    """Raise Pillow's own limit of pixels in this process if a job allows more. The job's limit decides, and Pillow
    checks its own in many functions."""
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = pixels


def _orientation(image: Image.Image) -> int:
    """Return the EXIF or XMP orientation, 1 to 8; 1 if it cannot be read. Pillow turns TIFF files itself."""
    if image.format == "TIFF":
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (ValueError, TypeError, SyntaxError, struct.error):  # broken EXIF or XMP; the pixels are usable without it
        return 1


def _read_header(file: BinaryIO, tail: bytes, max_pixels: int) -> tuple[int, int]:
    with _open(file) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise _ImageProblem(
                f"image has {width * height} pixels, above data.max_image_pixels={max_pixels}; make it smaller, or "
                "raise the limit"
            )
        if image.mode == "F":
            raise _ImageProblem("floating-point images have no agreed range; convert it to 8 bit")
        kind = image.format or ""
        late = kind == "PNG" and any(mark in tail for mark in (b"eXIf", b"iTXt", b"zTXt"))  # EXIF behind the pixels
        if kind not in _ENDS or _ENDS[kind] not in tail or late:
            image.load()
        # `getexif()` decodes a whole PNG to find that it has none, so `info` is checked first.
        look = kind != "PNG" or not {"exif", "xmp", "Raw profile type exif"}.isdisjoint(image.info)
        turned = look and _orientation(image) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def read_orientation(image: ImageSource) -> int:
    """Return the EXIF orientation of a readable image, 1 to 8."""
    with open_image(image) as file, _open(file) as opened:
        return _orientation(opened)


@contextmanager
def _explained(image: ImageSource) -> Iterator[None]:
    """Add the fix to the error for a file of the hub's cache that is missing, as on a node with a cache of its own."""
    try:
        yield
    except FileNotFoundError as error:
        if isinstance(image, bytes) or _HUB_CACHE not in str(image):
            raise
        raise FileNotFoundError(f"{error}; {_FIX_CACHE}") from None


def open_image(image: ImageSource) -> BinaryIO:
    """Open the file of an image: a local path, an address, a position in a file, or its own bytes."""
    if not isinstance(image, str):
        return io.BytesIO(read_image(image))
    with _explained(image):
        file: Any = open_file(image)
    return io.BufferedReader(file, _AHEAD_BYTES) if is_remote(image) else file  # each read of it would be a request


def read_image(image: ImageSource) -> bytes:
    """Return the bytes of the file of an image."""
    with _explained(image):
        if isinstance(image, str):
            return read_bytes(image)
        return image if isinstance(image, bytes) else read_inner(image)


class _ImageProblem(ValueError):
    """A reason that `read_size` passes on unchanged."""


def decode(source: ImageSource, pixels: int = 0, fast: bool = False) -> np.ndarray:
    """Return `uint8 [height, width, 3]`: upright, alpha on white, first frame, palettes and CMYK converted.

    `pixels`: the number of pixels that the header has. `fast`: use torchvision's decoder, which imports torch, for
    files of which it makes the same pixels as Pillow.
    """
    _allow(pixels)
    data = read_image(source) if fast and _decodes_alike() else None
    if data is not None and _is_plain_jpeg(data, pixels) and (decoded := _decode_jpeg(data)) is not None:
        return decoded
    with open_image(source if data is None else data) as file, _open(file) as opened:
        if data is not None and opened.format == "JPEG" and opened.mode == "RGB" and _orientation(opened) == 1:
            decoded = _decode_jpeg(data)
            if decoded is not None:
                return decoded
        opened.load()
        turn = _TURNS.get(_orientation(opened))  # not `exif_transpose`, which rewrites all other EXIF and may fail
        image: Image.Image = opened if turn is None else opened.transpose(turn)
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        depth = np.asarray(image).astype(np.float32)
        image = Image.fromarray((np.clip(depth, 0, 65535) / 257.0).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _is_plain_jpeg(data: bytes, pixels: int) -> bool:
    """Return whether a file is a JPEG in colour of at most so many pixels, without parts that may say more of it, such
    as an orientation or further pictures. Pillow takes as long for its header as for the rest of a row's work."""
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    at, plain = 2, False
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _SCAN:
            return plain
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            plain = data[at + 4] == 8 and data[at + 9] == 3 and 0 < width * height <= pixels
        elif marker not in _HARMLESS:
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Return the pixels of a JPEG in colour as torchvision decodes it, or None if it refuses the file.

    Both decoders are libjpeg-turbo. Pillow's image has four bytes for a pixel, and an array is a copy of it.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)  # [3, h, w]
    except RuntimeError:
        return None
    return tensor.permute(1, 2, 0).numpy()


@lru_cache(maxsize=1)
def _decodes_alike() -> bool:
    """Return whether torchvision's decoder makes the pixels of Pillow's, which depends on how both were built."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    try:
        for settings in ({"subsampling": 0}, {"subsampling": 2}, {"subsampling": 1, "progressive": True}):
            file = io.BytesIO()
            Image.fromarray(noise).save(file, "JPEG", quality=80, **settings)
            with Image.open(file) as plain:
                decoded = _decode_jpeg(file.getvalue())
                if decoded is None or not np.array_equal(decoded, np.asarray(plain)):
                    return False
    except ImportError:
        return False
    return True


def resize(pixels: np.ndarray, spec: ImageSpec, processor: "Qwen2VLImageProcessor") -> np.ndarray:
    """Return `uint8 [h, w, 3]` as the model sees it: stretched by the processor's own resize, or padded; for stock
    families, the input of their processor."""
    if spec.stock:
        to = spec.place((pixels.shape[1], pixels.shape[0])).resized
        small = Image.fromarray(pixels)
        return pixels if to == small.size else np.array(small.resize(to, Image.Resampling.BICUBIC, reducing_gap=2.0))
    import torch
    from transformers.image_utils import SizeDict

    size = (pixels.shape[1], pixels.shape[0])
    if spec.place(size) == Placement(size, size):
        return pixels
    # [1, 3, h, w] with channels-last strides: the fast path for uint8
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    if spec.pad is None:
        limits = SizeDict(shortest_edge=spec.min_pixels, longest_edge=spec.max_pixels)
        tensor = processor.resize(tensor, size=limits, resample=processor.resample, factor=spec.factor)
        return tensor[0].permute(1, 2, 0).contiguous().numpy()
    placement = spec.place(size)
    (width, height), (left, top) = placement.content, placement.offset
    if placement.content != size:
        from transformers.image_processing_backends import TorchvisionBackend

        plain = SizeDict(height=height, width=width)  # the plain resize, without the family's rounding of sides
        tensor = TorchvisionBackend.resize(processor, image=tensor, size=plain, resample=processor.resample)
    canvas = np.empty((placement.resized[1], placement.resized[0], 3), np.uint8)
    canvas[:] = spec.pad
    canvas[top : top + height, left : left + width] = tensor[0].permute(1, 2, 0).numpy()
    return canvas
