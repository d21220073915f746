"""Storage of a run: a folder, or an object store that pyarrow supports (`s3://`, `gs://`, `abfs://`, `hdfs://`).

Names are relative, with `/`. A store needs no rename, append or fsync: a set of files is committed by a manifest,
written last (`checkpoints.py`). Credentials come from the environment, as for the cloud's own tools.
"""

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from ray_vlm.errors import RunError

_BLOCK = 2**23  # bytes that are copied at a time
_PATIENCE_S = 60.0  # of retries for an object store that has answered before; pyarrow itself gives up after 6 s
_PASSING = re.compile(r"NETWORK|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|TIMEOUT|status 5\d\d")
_T = TypeVar("_T")


def is_remote(address: str) -> bool:
    """Return whether an address is an object store rather than a folder."""
    return "://" in address and not address.startswith("file://")


def join(address: str, name: str) -> str:
    """Return the address of `name` inside a folder or an object store; `?options` stay at the end."""
    if not is_remote(address):
        return str(Path(local_path(address)) / name)
    base, mark, options = address.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


def split_address(address: str) -> tuple[str, str]:
    """Return the address of the folder that holds a file or folder, and its name; the opposite of `join`."""
    base, mark, options = address.partition("?") if is_remote(address) else (address, "", "")
    folder, _, name = base.rstrip("/").rpartition("/")
    return f"{folder or '/'}{mark}{options}", name


def full_address(address: str) -> str:
    """Return the address in a form that every process can use: an absolute path, or a URI.

    The endpoint of an S3 store that is not Amazon's becomes part of the URI: pyarrow does not read `AWS_ENDPOINT_URL`.
    """
    if not is_remote(address):
        return local_path(address)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint or not address.startswith("s3://") or "endpoint_override=" in address:
        return address
    mark = "&" if "?" in address else "?"
    return f"{address}{mark}endpoint_override={quote(endpoint, safe='')}"


def local_path(address: str) -> str:
    """Return the absolute path of a folder given as a path or as `file://`."""
    return str(Path(os.path.expanduser(address.removeprefix("file://"))).absolute())


class Store:
    """Files by name under one address. Raises `OSError` if the disk or the object store fails."""

    def __init__(self, address: str | Path):
        self.address = str(address)
        self.local = None if is_remote(self.address) else Path(local_path(self.address))
        self._fs: Any = None
        self._root = ""
        self._answered = False  # recently; if not, such as for a wrong endpoint, there are no retries

    def _remote(self, name: str = "") -> tuple[Any, str]:
        if self._fs is None:
            from pyarrow import fs

            try:
                self._fs, self._root = fs.FileSystem.from_uri(self.address)
            except ValueError as error:  # pyarrow's ArrowInvalid
                raise OSError(f"{self.address}: {error}") from None
        return self._fs, f"{self._root}/{name}".rstrip("/")

    def _ask(self, do: Callable[[], _T]) -> _T:
        """Return `do()`; retry transient errors of an object store with growing pauses."""
        until, pause = time.monotonic() + _PATIENCE_S, 1.0
        while True:
            try:
                result = do()
            except FileNotFoundError:
                self._answered = True
                raise
            except OSError as error:
                left = until - time.monotonic()
                if self.local is not None or not self._answered or left <= 0 or not _PASSING.search(str(error)):
                    self._answered = False
                    raise
                time.sleep(min(pause, left))
                pause = min(2 * pause, 10.0)
            else:
                self._answered = True
                return result

    def names(self) -> list[str]:
        """Return the sorted files and folders at the top level; none if the address does not exist."""
        if self.local is not None:
            return sorted(os.listdir(self.local)) if self.local.is_dir() else []
        return sorted({name.split("/")[0] for name in self.files()})

    def files(self, name: str = "") -> dict[str, int]:
        """Return every file under `name`, relative to it, with its size in bytes."""
        if self.local is not None:
            folder = self.local / name
            paths = (Path(root) / file for root, _, files in os.walk(folder) for file in files)
            return {path.relative_to(folder).as_posix(): path.lstat().st_size for path in paths}
        from pyarrow import fs

        system, path = self._remote(name)
        selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
        infos = self._ask(lambda: system.get_file_info(selector))
        return {i.path[len(path) + 1 :]: i.size for i in infos if i.type == fs.FileType.File}

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file, or None if it does not exist."""

        def get() -> bytes:
            with self._open(name) as stream:
                return stream.read()

        try:
            return self._ask(get)
        except FileNotFoundError:
            return None

    def _open(self, name: str) -> Any:
        if self.local is not None:
            return open(self.local / name, "rb")
        system, key = self._remote(name)
        return system.open_input_stream(key, compression=None)

    def write(self, name: str, data: bytes) -> None:
        """Write one small file atomically; on a disk it also survives a power loss."""
        if self.local is not None:
            target: Path = self.local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            return sync_folder(target.parent)
        system, path = self._remote(name)

        def send() -> None:
            with system.open_output_stream(path, compression=None) as stream:
                stream.write(data)

        self._ask(send)

    def put(self, source: Path, name: str) -> None:
        """Move the files of folder `source` into folder `name`, whose other files stay."""
        files = [path for path in source.rglob("*") if path.is_file()]
        if self.local is not None:
            for file in files:
                target = self.local / name / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
                sync_folder(target.parent)
        else:
            for file in files:
                self._send(file, f"{name}/{file.relative_to(source).as_posix()}")
        shutil.rmtree(source)

    def _send(self, file: Path, name: str) -> None:
        system, key = self._remote(name)

        def send() -> None:
            with open(file, "rb") as data, system.open_output_stream(key, compression=None) as stream:
                shutil.copyfileobj(data, stream, _BLOCK)

        self._ask(send)

    def staging(self, name: str) -> Path:
        """Return an empty folder for files before `put`; on a disk in the same file system, so that `put` renames."""
        if self.local is None:
            return Path(tempfile.mkdtemp(prefix=f"ray_vlm-{name}-"))
        folder = self.local / f".staging-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def fetch(self, name: str, folder: Path) -> None:
        """Copy everything under `name` into `folder`."""
        for relative in self.files(name):
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            self._get(f"{name}/{relative}", target)

    def _get(self, name: str, target: Path) -> None:
        def get() -> None:
            with open(target, "wb") as copy, self._open(name) as stream:
                shutil.copyfileobj(stream, copy, _BLOCK)

        self._ask(get)

    def remove(self, name: str) -> None:
        """Delete a file or a folder, if it exists."""
        if self.local is not None:
            path = self.local / name
            if path.is_dir() and not path.is_symlink():
                return shutil.rmtree(path, ignore_errors=True)
            return path.unlink(missing_ok=True)
        from pyarrow import fs

        system, key = self._remote(name)
        if self._ask(lambda: system.get_file_info(key)).type == fs.FileType.File:
            self._ask(lambda: system.delete_file(key))
        elif self.files(name):
            self._ask(lambda: system.delete_dir(key))


@contextmanager
def whole_or_gone(folder: Path) -> Iterator[None]:
    """Remove `folder` if the body, which fills it, does not end normally."""
    complete = False
    try:
        yield
        complete = True
    finally:
        if not complete:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Turn errors of the disk in the body, which writes files in `folder`, into an `OSError` with cause and path.

    safetensors raises its own error for them, and torch a `RuntimeError` without the cause.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error
    except SafetensorError as error:
        if not (match := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(folder)) from error
    except RuntimeError as error:
        if number := _refuses(folder):
            raise OSError(number, os.strerror(number), str(folder)) from error
        if not re.search("inline_container|PytorchStreamWriter|iostream", str(error)):
            raise
        raise OSError(errno.EIO, str(error).strip(), str(folder)) from error


def _refuses(folder: Path) -> int | None:
    """Return the errno if a file cannot be written in `folder` now, else None."""
    try:
        with tempfile.TemporaryFile(dir=folder if folder.is_dir() else folder.parent) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


def sync_folder(folder: Path) -> None:
    """Flush new names in `folder` to the disk, if the file system supports it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse it for folders
        pass
    finally:
        os.close(handle)


def write_picture(png: bytes, output: str | None, output_dir: str, name: str) -> str:
    """Write a PNG to `output`, or by default to `data/<name>.png` of `output_dir`. Return its address."""
    address = full_address(output) if output else join(output_dir, f"data/{name}.png")
    folder, file = split_address(address)
    try:
        Store(folder).write(file, png)
    except OSError as error:
        raise RunError(f"{address} cannot be written ({error}). Give another --output.") from None
    return address
