"""Sizes as published, padding that keeps an image's pixels, and images from bytes."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ray_vlm.data import images
from ray_vlm.data.images import FORMATS, ImageSpec, SizeCache, decode, read_size, resize

# (height, width) -> (height, width) at factor, least and most tokens: transformers' smart_resize. `qwen_vl_utils` has
# the same rule and refuses a side below one token.
INPUTS = ((1080, 1920), (428, 640), (480, 640), (2400, 1080), (3000, 4000), (20, 20), (30, 5000))
GOLDEN = {
    (28, 4, 16384): ((1092, 1932), (420, 644), (476, 644), (2408, 1092), (2996, 4004), (56, 56), (28, 5012)),
    (28, 256, 1280): ((728, 1316), (420, 644), (476, 644), (1484, 672), (840, 1148), (448, 448), (56, 5796)),
    (32, 64, 16384): ((1088, 1920), (416, 640), (480, 640), (2400, 1088), (3008, 4000), (256, 256), (32, 4992)),
    (32, 256, 1280): ((832, 1504), (416, 640), (480, 640), (1696, 768), (960, 1312), (512, 512), (64, 6624)),
}
COLOR = (10, 200, 30)


def _spec(factor: int = 28, fewest: int = 256, most: int = 1280, **options: Any) -> ImageSpec:
    return ImageSpec(factor // 2, 2, fewest * factor**2, most * factor**2, **options)


def _processor(factor: int = 28) -> Any:
    from transformers import Qwen2VLImageProcessor

    size = {"shortest_edge": 256 * factor**2, "longest_edge": 1280 * factor**2}
    return Qwen2VLImageProcessor(patch_size=factor // 2, size=size)


def _photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _bytes(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("limits", list(GOLDEN))
def test_sizes_are_the_published_ones(limits: tuple[int, int, int]) -> None:
    spec = _spec(*limits)
    for (height, width), expected in zip(INPUTS, GOLDEN[limits], strict=True):
        assert spec.place((width, height)).resized == (expected[1], expected[0])
        assert spec.num_tokens((width, height)) == expected[0] * expected[1] // limits[0] ** 2


@pytest.mark.parametrize("pad", [None, COLOR])
def test_extreme_shapes_are_refused(pad: tuple[int, int, int] | None) -> None:
    for size in [(2, 500), (500, 2), (28, 28 * 201), (0, 10), (10, 0)]:
        with pytest.raises(ValueError, match=r"200|empty"):
            _spec(pad=pad).place(size)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("factor", [28, 32])
def test_padding_keeps_shape_and_limits(factor: int, center: bool) -> None:
    rng = np.random.default_rng(0)
    spec = _spec(factor, pad=COLOR, center=center)
    for _ in range(500):
        size = (int(rng.integers(factor, 3000)), int(rng.integers(factor, 3000)))
        placement = spec.place(size)
        gap = [placement.resized[a] - placement.content[a] for a in (0, 1)]
        assert all(side % factor == 0 for side in placement.resized)
        assert all(0 <= g < factor for g in gap)
        assert spec.min_pixels <= placement.resized[0] * placement.resized[1] <= spec.max_pixels
        assert placement.offset == ((gap[0] // 2, gap[1] // 2) if center else (0, 0))
        content = placement.content
        scale = [content[a] / size[a] for a in (0, 1)]
        assert all(abs(content[a] - scale[1 - a] * size[a]) <= 1 + 0.5 * max(size) / min(size) for a in (0, 1))
        if spec.min_pixels <= size[0] * size[1] and spec._area(size) <= spec.max_pixels:
            assert placement.content == size


@pytest.mark.parametrize("center", [False, True])
def test_padding_keeps_the_pixels_and_fills_with_the_colour(center: bool) -> None:
    spec, pixels = _spec(pad=COLOR, center=center), _photo(641, 431)
    out = resize(pixels, spec, _processor())
    (left, top), (width, height) = spec.place((641, 431)).offset, spec.place((641, 431)).resized
    assert out.shape == (height, width, 3) == (448, 644, 3)
    inside = np.zeros((height, width), bool)
    inside[top : top + 431, left : left + 641] = True
    assert np.array_equal(out[inside].reshape(431, 641, 3), pixels)
    assert (out[~inside] == COLOR).all()


@pytest.mark.parametrize("size", [(2000, 1500), (1500, 3000), (300, 200)])
def test_an_image_beyond_the_limits_is_scaled_and_then_padded(size: tuple[int, int]) -> None:
    spec, pixels = _spec(pad=COLOR), _photo(*size)
    placement = spec.place(size)
    out = resize(pixels, spec, _processor())
    (width, height), (wide, tall) = placement.content, placement.resized
    assert out.shape == (tall, wide, 3)
    expected = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    assert np.abs(out[:height, :width] - expected).max() <= 2
    assert (out[height:] == COLOR).all()
    assert (out[:, width:] == COLOR).all()


@pytest.mark.parametrize("factor", [28, 32])
def test_stretched_pixels_equal_the_stock_processor_s(factor: int) -> None:
    processor, rng = _processor(factor), np.random.default_rng(1)
    for seed in range(12):
        width, height = (int(v) for v in rng.integers(8 if seed < 4 else 40, 1500 if seed > 1 else 30, 2))
        data = _bytes(_photo(width, height, seed), "JPEG", quality=85)
        small = torch.tensor(resize(decode(data), _spec(factor), processor)).permute(2, 0, 1)
        batch = processor([small], do_resize=False, return_tensors="pt")
        stock = processor(images=[Image.open(io.BytesIO(data))], return_tensors="pt")
        assert torch.equal(batch["pixel_values"], stock["pixel_values"])
        assert torch.equal(batch["image_grid_thw"], stock["image_grid_thw"])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photos_are_padded_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _bytes(_photo(640, 430), exif=exif)
    turned = orientation >= 5
    size = (430, 640) if turned else (640, 430)
    assert read_size(data, 10**6) == size
    pixels = decode(data)
    out = resize(pixels, _spec(pad=COLOR), _processor())
    assert out.shape == ((644, 448, 3) if turned else (448, 644, 3))
    assert np.array_equal(out[: size[1], : size[0]], pixels)
    assert (out[size[1] :] == COLOR).all()
    assert (out[:, size[0] :] == COLOR).all()
    ends = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert np.array_equal(pixels[ends[orientation]], _photo(640, 430)[0, 0])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_bytes_are_read_like_the_file(kind: str, tmp_path: Path) -> None:
    data = _bytes(_photo(120, 80), kind)
    (tmp_path / "a.img").write_bytes(data)
    assert read_size(data, 10**6) == read_size(str(tmp_path / "a.img"), 10**6) == (120, 80)
    assert np.array_equal(decode(data), decode(str(tmp_path / "a.img")))


@pytest.mark.parametrize("data", [b"", b"no image", _bytes(_photo(120, 80))[:200], _bytes(_photo(120, 80))[:-900]])
def test_broken_bytes_are_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises((ValueError, OSError), match=r"\w"):
        read_size(data, 10**6)


@pytest.mark.parametrize(("tag", "value"), [(0x0100, b"64"), (0x011A, b"72")])
def test_a_photo_whose_other_exif_is_wrong_is_turned_all_the_same(tag: int, value: bytes) -> None:
    """Pillow reads such tags and cannot write them again, which its own `exif_transpose` does."""
    entries = [struct.pack(">HHI4s", tag, 2, 3, value), struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)]
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + b"".join(sorted(entries)) + bytes(4)
    data = _bytes(_photo(640, 430), "JPEG", exif=exif)
    with Image.open(io.BytesIO(data)) as image, pytest.raises((struct.error, TypeError)):
        ImageOps.exif_transpose(image)
    assert read_size(data, 10**6) == (430, 640)
    assert decode(data).shape == (640, 430, 3)


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x09"]
)
def test_a_photo_whose_exif_cannot_be_read_is_as_it_is_stored(exif: bytes) -> None:
    data = _bytes(_photo(64, 48), "JPEG", exif=exif)
    assert read_size(data, 10**6) == (64, 48)
    assert decode(data).shape == (48, 64, 3)


def test_size_and_pixels_agree_where_a_png_says_behind_its_pixels_how_it_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = _bytes(_photo(64, 48), exif=exif)
    start = data.index(b"eXIf") - 4
    size = int.from_bytes(data[start : start + 4], "big") + 12
    chunk, rest = data[start : start + size], data[:start] + data[start + size :]
    moved = rest[:-12] + chunk + rest[-12:]  # before IEND
    for png in (data, moved):
        assert read_size(png, 10**6) == (48, 64)
        assert decode(png).shape == (64, 48, 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "WEBP"])
def test_the_job_s_limit_on_pixels_rules_and_not_pillow_s(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    data = _bytes(_photo(64, 48), kind)
    for read in (lambda: read_size(data, 10_000), lambda: decode(data, 64 * 48)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        read()
    with pytest.raises(ValueError, match=r"3072 pixels, above data.max_image_pixels=3000"):
        read_size(data, 3000)


@pytest.mark.skipif("AVIF" not in FORMATS, reason="Pillow before 11.3 reads no AVIF")
def test_avif_is_read() -> None:
    data = _bytes(_photo(64, 48), "AVIF", quality=100)
    assert read_size(data, 10**6) == (64, 48)
    assert np.abs(decode(data).astype(int) - _photo(64, 48)).mean() < 4


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "a HEIC image"),
        (b"\x00\x00\x00\x18ftypmif1", "a HEIF image"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "a JPEG2000 image"),
        (b"\xff\x0a\x00\x00", "a JPEG XL image"),
        (b"%PDF-1.7", "a PDF document"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"x", "cannot identify"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_what_is_not_read_is_named(head: bytes, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"image file is .*{kind}|{kind} image file"):
        read_size(head + b"\x00" * 100, 10**6)


def test_an_image_that_rows_share_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(_bytes(_photo(60, 40)))
    opened: list[object] = []
    real = images.open_image

    def count(image: str | bytes) -> Any:
        opened.append(image)
        return real(image)

    monkeypatch.setattr(images, "open_image", count)
    cache = SizeCache(10**6)
    assert [cache.read_size(str(path)) for _ in range(3)] == [(60, 40)] * 3
    assert opened == [str(path)]
    assert [cache.read_size(path.read_bytes()) for _ in range(2)] == [(60, 40)] * 2
    assert SizeCache(10**6).read_size(str(path)) == (60, 40)
    assert len(opened) == 4
    with pytest.raises(ValueError, match=r"above data\.max_image_pixels=5"):
        SizeCache(5).read_size(str(path))


def test_a_fault_of_an_image_is_not_kept(tmp_path: Path) -> None:
    cache, path = SizeCache(10**6), tmp_path / "a.png"
    with pytest.raises(ValueError, match="image file is missing"):
        cache.read_size(str(path))
    path.write_bytes(_bytes(_photo(60, 40)))
    assert cache.read_size(str(path)) == (60, 40)
