"""Read images that are written into a row as data URIs, `data:image/png;base64,...` (RFC 2397)."""

import base64
import binascii
import re

LARGEST_URI = 24 * 2**20  # characters
_HEAD = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)
_LONGEST_HEAD = 200
_SPACES = str.maketrans("", "", " \t\r\n")
_FIX = "write the image to a file and give a path under image_root"


def is_data_uri(value: str) -> bool:
    """Return whether a text is meant as a data URI."""
    return value[:64].lstrip()[:5].lower() == "data:"


def read_data_uri(value: str) -> bytes:
    """Return the bytes of an image in a data URI. Raise `ValueError` if it is none, is not base64 or is too large."""
    text = value.strip()
    if len(text) > LARGEST_URI:
        raise ValueError(f"image is a data: URI of {len(text)} characters, above {LARGEST_URI}; {_FIX}")
    head = _HEAD.match(text[:_LONGEST_HEAD])
    if head is None:
        raise ValueError(f"image is a data: URI without a type and a comma ({text[:40]!r}); mend it, or {_FIX}")
    media, options = head[1].strip().lower(), [option.strip().lower() for option in head[2].split(";")]
    if not media.startswith("image/"):
        raise ValueError(f"image is a data: URI of type {media[:40] or 'text/plain'!r}, which is no image; {_FIX}")
    if options[-1] != "base64":
        raise ValueError(f"image is a data: URI that is not base64 ({head[0]!r}); {_FIX}")
    try:
        data = base64.b64decode(text[head.end() :].translate(_SPACES), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"image is a data: URI that is not base64 ({error}); mend it, or {_FIX}") from None
    if not data:
        raise ValueError(f"image is a data: URI without data; {_FIX}")
    return data
