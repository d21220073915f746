"""List the kinds of image files that are read, and name others for errors."""

from PIL import Image

Image.init()  # all decoders, so that they can be named
_READ = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
FORMATS = tuple(kind for kind in _READ if kind in Image.OPEN)  # Pillow before 11.3 has no AVIF
_HEAD = 64
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


def name_kind(head: bytes) -> str | None:
    """Return what kind of file starts with these bytes, if it is a known kind that is not read."""
    for start, mark, kind in _OTHERS:
        if head[start:].lower().startswith(mark.lower()):
            return kind
    padded = head.ljust(_HEAD, b"\0")  # decoders index into the head without checking its length
    others = ((name, accept) for name, (_, accept) in Image.OPEN.items() if name not in FORMATS)
    name = next((name for name, accept in others if accept and accept(padded) is True), None)
    return f"a {name} image" if name else None
