"""The files of the Hugging Face hub, `hf://datasets/owner/name@revision/path`, as a file system of pyarrow."""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


def hub_file_system() -> "FileSystem":
    """Return the file system of `hf://`. The hub's client has errors of its own for a network that fails, which become
    `OSError` here."""
    from fsspec import AbstractFileSystem
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HTTPError
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    @contextmanager
    def as_os_error() -> Iterator[None]:
        try:
            yield
        except HTTPError as error:
            if isinstance(error, OSError):
                raise
            raise OSError(errno.EIO, f"the hub cannot be reached: {error}") from error

    class File(io.RawIOBase):
        def __init__(self, file: BinaryIO):
            self.file = file

        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def seek(self, offset: int, whence: int = 0) -> int:
            return self.file.seek(offset, whence)

        def read(self, size: int = -1) -> bytes:
            with as_os_error():
                return self.file.read(size)

    class Handler(FSSpecHandler):
        fs: AbstractFileSystem

        def get_file_info(self, paths: list[str]) -> list:
            with as_os_error():
                return super().get_file_info(paths)

        def get_file_info_selector(self, selector: object) -> list:
            with as_os_error():
                return super().get_file_info_selector(selector)

        def open_input_file(self, path: str) -> object:
            from pyarrow import PythonFile

            with as_os_error():
                if not self.fs.isfile(path):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
                return PythonFile(File(self.fs.open(path, mode="rb")), mode="r")

    return PyFileSystem(Handler(HfFileSystem()))


def describe_hub_file(system: "FileSystem", path: str) -> tuple[int, int]:
    """Return the bytes of a file on the Hugging Face hub, and a number made from its content: there are no times."""
    if not system.get_file_info(path).is_file:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    about = system.handler.fs.info(path)  # which the file system has kept
    content = (about.get("lfs") or {}).get("sha256") or about.get("blob_id") or about.get("xet_hash") or ""
    return about["size"], int(content[:15] or "0", 16)
