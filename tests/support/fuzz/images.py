"""Mutations of images for `fuzz`: the complete file, and the EXIF block alone. `inputs` defines an attempt."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ray_vlm.config.schema import Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.images import decode
from ray_vlm.data.measure import measure_row
from ray_vlm.data.records import BadRow, SftRecord
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import DataError
from tests.support.fuzz.inputs import Attempt, write_base
from tests.support.fuzz.mutations import NUMBERS, TEXTS, break_bytes, pick


def of_images(folder: Path) -> Attempt:
    """Return an attempt on image files and bytes: if the index accepts a header, the image must decode and resize."""
    model = write_base(folder)
    whole, builders = _pictures(), []
    for options in ({}, {"resize": "pad"}, {"resize": "pad", "pad_place": "center", "max_pixels": 4096}):
        builders.append(SampleBuilder(SampleSpec(Model(name=model, load_in_4bit=False), ChatTask(), (), **options)))

    def attempt(rng: np.random.Generator) -> int:
        kind, data = pick(rng, whole)
        data = break_bytes(data, rng)
        if rng.random() < 0.1:  # a header that says something else
            at = {"PNG": 16, "BMP": 18, "GIF": 6, "WEBP": 24}.get(kind, 4)
            data = data[:at] + rng.bytes(8) + data[at + 8 :]
        path = folder / f"image{pick(rng, ['.jpg', '.png', '.txt', ''])}"
        path.write_bytes(data)
        image = str(path) if rng.random() < 0.7 else data
        _read(image, pick(rng, builders), pick(rng, [4096, *[50_000_000] * 9]))
        return 0

    return attempt


def _read(image: str | bytes, builder: SampleBuilder, max_pixels: int) -> tuple[int, int]:
    """Read a row with that image as training does; (width, height). Raises `DataError` where it would be a bad row."""
    row = SftRecord("a", 0, (image,), (), {"answer": "A dog."}, {"turns": (("user", "<image>What?"),)})
    measured = measure_row(row, max_pixels)
    if isinstance(measured, BadRow):
        raise DataError(measured.reason)
    (encoded,) = builder.encode([measured])
    if isinstance(encoded, str):
        raise DataError(encoded)
    builder.row(measured)
    return measured.sizes[0]


def of_exif(folder: Path) -> Attempt:
    """Return an attempt on intact images with a damaged EXIF block: each is read, with its own pixels in one of the
    eight orientations."""
    model = write_base(folder)
    builder = SampleBuilder(SampleSpec(Model(name=model, load_in_4bit=False), ChatTask(), ()))
    whole = {kind: _encode(kind, _colours()) for kind in ("JPEG", "PNG", "WEBP")}
    turns = {kind: _turns(decode(data)) for kind, data in whole.items()}

    def attempt(rng: np.random.Generator) -> int:
        kind = pick(rng, sorted(whole))
        block = _exif_block(rng)
        if rng.random() < 0.5:
            block = break_bytes(block, rng)
        data = _with_exif(kind, whole[kind], block[:60_000])
        try:
            width, height = _read(data, builder, 50_000_000)
        except DataError as error:
            raise AssertionError(f"a whole image is refused: {error}") from None
        pixels = decode(data)
        turn = next((i for i, turned in enumerate(turns[kind]) if np.array_equal(turned, pixels)), None)
        return int(turn is None or (height, width) != pixels.shape[:2])

    return attempt


def _exif_block(rng: np.random.Generator) -> bytes:
    """A TIFF structure with an orientation among tags of any kind, length and place; some lead to other directories,
    or back to where they stand."""
    order = pick(rng, ["<", ">"])
    entries, values = [], b""
    tags = [0x0112, *rng.choice(_TAGS, int(rng.integers(1, 7)), replace=False).tolist()]
    start = 8 + 2 + 12 * len(tags) + 4
    for tag in sorted(tags):
        text = pick(rng, TEXTS).encode("utf-8", "surrogatepass")[:300]
        kind, count = int(rng.integers(0, 14)), pick(rng, [1, 1, 2, 4, 100, 2**31, len(text)])
        field = struct.pack(order + "I", pick(rng, [start + len(values), 8, 0, 2**32 - 1]))
        if tag == 0x0112 and rng.random() < 0.7:
            kind, count = 3, 1
            field = struct.pack(order + "HH", int(rng.integers(0, 10)), 0)
        elif rng.random() < 0.2:
            field = struct.pack(order + "f", float(np.clip(float(pick(rng, _FITTING)), -1e38, 1e38)))
        entries.append(struct.pack(order + "HHI", tag, kind, count) + field)
        values += text
    after = struct.pack(order + "I", pick(rng, [0, 0, 8, start]))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    block = mark + struct.pack(order + "IH", 8, len(entries)) + b"".join(entries) + after + values
    return b"Exif\0\0" + block if rng.random() < 0.8 else block


_TAGS = [0x0100, 0x0101, 0x010F, 0x011A, 0x011B, 0x0128, 0x014A, 0x0201, 0x02BC, 0x8769, 0x8825, 0x927C, 0xA005, 0xC4A5]
_FITTING = [value for value in NUMBERS if abs(value) < 1e300 or value != value]


def _with_exif(kind: str, data: bytes, block: bytes) -> bytes:
    """The file with that block where its kind has it, with lengths and checksums that are right."""
    if kind == "JPEG":
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    if kind == "PNG":
        body = b"eXIf" + block.removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        return data[:33] + chunk + data[33:]
    width, height = 100, 80
    flags = struct.pack("<I", 8) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + flags + data[12:]
    body += b"EXIF" + struct.pack("<I", len(block)) + block + b"\0" * (len(block) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _turns(pixels: np.ndarray) -> list[np.ndarray]:
    """An image in the eight ways in which a camera can be held."""
    turned = [np.rot90(pixels, times) for times in range(4)]
    return [*turned, *(np.fliplr(image) for image in turned)]


def _colours() -> Any:
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8))


def _encode(kind: str, image: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _pictures() -> list[tuple[str, bytes]]:
    from PIL import Image

    rng, colours = np.random.default_rng(1), _colours()
    wide = Image.fromarray(rng.integers(0, 65535, (80, 100), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[str, Any, dict[str, Any]]] = [("JPEG", colours, {"exif": exif}), ("PNG", colours, {"exif": exif})]
    kinds += [("PNG", colours.convert(mode), {}) for mode in ("RGBA", "P", "LA", "1", "L")] + [("PNG", wide, {})]
    kinds += [("JPEG", colours.convert("CMYK"), {}), ("JPEG", colours, {"progressive": True}), ("PPM", colours, {})]
    kinds += [
        ("WEBP", colours, {}),
        ("BMP", colours, {}),
        ("GIF", colours, {"save_all": True, "append_images": [colours]}),
    ]
    kinds += [("TIFF", image, {}) for image in (colours, wide, colours.convert("LAB"), colours.convert("F"))]
    return [(kind, _encode(kind, image, **options)) for kind, image, options in kinds]
