"""Where a run is kept: a folder, or an object store that pyarrow reaches (`s3://`, `gs://`, `abfs://`, `hdfs://`).

Names are relative, with `/`. A store needs no rename, no append and no fsync: what makes a set of files count is
a manifest written last (`checkpoints.py`). Credentials come from the environment, as the cloud's own tools read them.
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
_PATIENCE_S = 60.0  # that an object store which has answered before may be away; pyarrow itself gives up after 6
_PASSING = re.compile(r"NETWORK|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|TIMEOUT|status 5\d\d")
_T = TypeVar("_T")


def is_remote(address: str) -> bool:
    """Whether an address names an object store rather than a folder."""
    return "://" in address and not address.startswith("file://")


def join(address: str, name: str) -> str:
    """The address of `name` inside a folder or an object store; `?options` stay at the end."""
    if not is_remote(address):
        return str(Path(local_path(address)) / name)
    base, mark, options = address.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


def full_address(address: str) -> str:
    """The address as every process can use it: an absolute path, or a URI that names the endpoint of an S3 store that
    is not Amazon's (`AWS_ENDPOINT_URL`, which pyarrow does not read)."""
    if not is_remote(address):
        return local_path(address)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint or not address.startswith("s3://") or "endpoint_override=" in address:
        return address
    mark = "&" if "?" in address else "?"
    return f"{address}{mark}endpoint_override={quote(endpoint, safe='')}"


def local_path(address: str) -> str:
    """The absolute path of a folder given as a path or as `file://`."""
    return str(Path(os.path.expanduser(address.removeprefix("file://"))).absolute())


class Store:
    """Files by name under one address. Raises `OSError` where the disk or the object store refuses."""

    def __init__(self, address: str | Path):
        self.address = str(address)
        self.local = None if is_remote(self.address) else Path(local_path(self.address))
        self._fs: Any = None
        self._root = ""
        self._answered = False  # lately: one that never did, as a wrong endpoint, or was given up, is not waited for

    def _remote(self, name: str = "") -> tuple[Any, str]:
        if self._fs is None:
            from pyarrow import fs

            try:
                self._fs, self._root = fs.FileSystem.from_uri(self.address)
            except ValueError as error:  # pyarrow's ArrowInvalid
                raise OSError(f"{self.address}: {error}") from None
        return self._fs, f"{self._root}/{name}".rstrip("/")

    def _ask(self, do: Callable[[], _T]) -> _T:
        """What `do()` returns; an object store that stumbles is asked again, with growing pauses."""
        until, pause = time.monotonic() + _PATIENCE_S, 1.0
        while True:
            try:
                found = do()
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
                return found

    def names(self) -> list[str]:
        """Files and folders at the top, sorted; an address that is not there yet has none."""
        if self.local is not None:
            return sorted(os.listdir(self.local)) if self.local.is_dir() else []
        return sorted({name.split("/")[0] for name in self.files()})

    def files(self, name: str = "") -> dict[str, int]:
        """Every file under `name`, relative to it, with its size in bytes."""
        if self.local is not None:
            folder = self.local / name
            found = (Path(root) / file for root, _, files in os.walk(folder) for file in files)
            return {path.relative_to(folder).as_posix(): path.lstat().st_size for path in found}
        from pyarrow import fs

        system, path = self._remote(name)
        selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
        infos = self._ask(lambda: system.get_file_info(selector))
        return {i.path[len(path) + 1 :]: i.size for i in infos if i.type == fs.FileType.File}

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, or None where there is none."""

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
        """Write one small file, so that a reader sees the old bytes or the new ones; on a disk it is there for good."""
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
        """Move the files of folder `source` into folder `name`, beside those that are there."""
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
        """An empty folder to make files in before `put`; on a disk in the same file system, so that moving is free."""
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
        """Delete a file or a folder; nothing happens where there is none."""
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
    """Around whatever fills `folder`, which is removed unless the body ends well, whatever ends it."""
    whole = False
    try:
        yield
        whole = True
    finally:
        if not whole:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Around whatever makes files in `folder`: what the disk refuses is an `OSError` that names its cause and place.

    safetensors raises an error of its own for it, and torch a `RuntimeError` that does not say why.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error
    except SafetensorError as error:
        if not (found := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from error
    except RuntimeError as error:
        if number := _refuses(folder):
            raise OSError(number, os.strerror(number), str(folder)) from error
        if not re.search("inline_container|PytorchStreamWriter|iostream", str(error)):
            raise
        raise OSError(errno.EIO, str(error).strip(), str(folder)) from error


def _refuses(folder: Path) -> int | None:
    """The number of the error by which `folder` refuses another file now, if it does."""
    try:
        with tempfile.TemporaryFile(dir=folder if folder.is_dir() else folder.parent) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


def sync_folder(folder: Path) -> None:
    """Make new names in `folder` survive a power loss, where the file system can promise that."""
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
    """Write it to `output`, or to its place in the job's folder; returns where it is."""
    address = full_address(output) if output else join(output_dir, f"data/{name}.png")
    base, _, options = address.partition("?") if is_remote(address) else (address, "", "")
    folder, _, file = base.rpartition("/")
    try:
        Store(f"{folder}?{options}" if options else folder or "/").write(file, png)
    except OSError as error:
        raise RunError(f"{address} cannot be written ({error}). Give another --output.") from None
    return address
