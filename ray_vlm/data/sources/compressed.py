"""Read text files in .gz and .zst: they are decompressed while they are read, by one process."""

from collections.abc import Iterator
from typing import BinaryIO

from ray_vlm.config.row_files import COMPRESSIONS, split_suffix

_MAGIC = {  # what a file begins with (RFC 1952 and RFC 8878); Zstandard's skippable frames may precede the others
    "gzip": (b"\x1f\x8b",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))),
}


def is_compressed(address: str) -> bool:
    """Return whether the name of a file says that it is compressed."""
    return split_suffix(address)[1] != ""


def decompress(file: BinaryIO, address: str, block: int) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file, up to `block` at a time. It may have several members or frames.

    Raise `ValueError` for a file that is no such one, and `OSError` for one that is cut off or damaged.
    """
    from pyarrow import CompressedInputStream

    compression = COMPRESSIONS[split_suffix(address)[1]]
    start = file.read(4)
    if not start:
        raise ValueError("it is empty, so it was cut off; fetch it again")
    if not start.startswith(_MAGIC[compression]):
        raise ValueError(f"it is no {compression} file, whatever its name says; rename or compress it")
    file.seek(0)
    with CompressedInputStream(file, compression) as stream:
        try:
            while data := stream.read(block):
                yield data
        except OSError as error:
            raise OSError(f"{error}: it is cut off or damaged; fetch or compress it again") from None
