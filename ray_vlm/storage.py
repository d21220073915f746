"""Files in folders and in object stores, for runs and for data.

An address is a path, or the URI of a file system that pyarrow knows (`s3://`, `gs://`, `abfs://`, `hdfs://`) or fsspec
(every other scheme). A disk is used through the system's own calls, everything else through pyarrow's file systems.
Nothing is read from the web: a name in a data file must not make this machine call another. Credentials come from the
environment, as for the cloud's own tools.
"""

import errno
import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple, TypeVar
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

WEB = ("http", "https", "ftp", "ftps")  # schemes that are never opened
_BLOCK = 2**23  # bytes that are copied at a time
_LISTED_FILES = 16  # that many in one folder of an object store are described by one listing
_REQUESTS = 32  # to an object store at a time
_PATIENCE_S = 60.0  # of retries for an object store that has answered before; pyarrow itself gives up after 6 s
_PASSING = re.compile(r"NETWORK|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|TIMEOUT|status 5\d\d")
_T = TypeVar("_T")


def is_remote(address: str) -> bool:
    """Return whether an address is an object store rather than a folder."""
    return "://" in address and not address.startswith("file://")


def is_absolute(address: str) -> bool:
    """Return whether an address or a path is the same from every current folder."""
    return "://" in address or address.startswith(("/", "~"))


def local_path(address: str) -> str:
    """Return the absolute path of a file or folder given as a path or as `file://`."""
    return str(Path(os.path.expanduser(address.removeprefix("file://"))).absolute())


def split_options(address: str) -> tuple[str, str]:
    """Return an address without its `?options`, and these with their mark; a path has none."""
    base, mark, options = address.partition("?") if is_remote(address) else (address, "", "")
    return base, mark + options


def join(address: str, name: str) -> str:
    """Return the address of `name` inside a folder or an object store; `?options` stay at the end."""
    if not is_remote(address):
        return str(Path(local_path(address)) / name)
    base, options = split_options(address)
    return f"{base.rstrip('/')}/{name}{options}"


def split_address(address: str) -> tuple[str, str]:
    """Return the address of the folder that holds a file or folder, and its name; the opposite of `join`."""
    if not is_remote(address):
        path = Path(local_path(address))
        return str(path.parent), path.name
    base, options = split_options(address)
    folder, _, name = base.rstrip("/").rpartition("/")
    return folder + options, name


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


def _locate(address: str) -> "tuple[FileSystem, str]":
    """Return the file system of an address that is not on a disk, and the path in it."""
    base, options = split_options(full_address(address))
    scheme, _, rest = base.partition("://")
    server, _, key = rest.partition("/")
    system, folder = _file_system(scheme, server, options)
    return system, f"{folder.rstrip('/')}/{key}" if folder else key


@lru_cache(maxsize=64)
def _file_system(scheme: str, server: str, options: str) -> "tuple[FileSystem, str]":
    """Return a file system, and the path in it of the scheme's top folder (usually a bucket).

    Raise `UnsupportedOperation`, which is an `OSError` and a `ValueError`, if there is none.
    """
    if re.split(r"::|\+", scheme.lower())[-1] in WEB:  # fsspec's schemes may hold others
        raise io.UnsupportedOperation(f"{scheme}:// addresses are not read; download the file and give its path")
    from pyarrow.fs import FileSystem

    if scheme == "hf":
        from ray_vlm.hub_system import hub_file_system

        return hub_file_system(), server
    try:
        return FileSystem.from_uri(f"{scheme}://{server}/{options}")
    except ValueError as error:  # pyarrow's ArrowInvalid
        if "Unrecognized filesystem type" not in str(error):
            raise io.UnsupportedOperation(f"{scheme}://{server}{options} cannot be opened ({error})") from None
    try:
        return FileSystem.from_uri(f"fsspec+{scheme}://{server}/")
    except (ImportError, ValueError) as error:
        raise io.UnsupportedOperation(
            f"no file system for {scheme}:// ({error}); install the fsspec package for it, or copy the files to a "
            "folder or to s3://, gs:// or abfs://"
        ) from None


def open_file(address: str) -> BinaryIO:
    """Open a path or an address as a seekable binary file; close it after use.

    Raise `OSError` if it cannot be read, `ValueError` if no file can have that name.
    """
    if not is_remote(address):
        return open(address if address.startswith("/") else local_path(address), "rb", opener=_open_regular)
    system, path = _locate(address)
    return system.open_input_file(path)


def _open_regular(path: str, flags: int) -> int:
    """Open a file of this machine. Raise `OSError` for a pipe or a device: a name in a data file may lead to one."""
    number = os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for a writer; files are read as ever
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # `open` refuses folders
        return number
    os.close(number)
    raise OSError("a pipe or a device, which has no end and cannot be read twice")


def read_bytes(address: str) -> bytes:
    """Return all bytes of a path or an address. Raises as `open_file` does."""
    with open_file(address) as file:
        return file.read()


def describe_file(address: str) -> tuple[str, int, int]:
    """Return a file's name, bytes and time of the last change (ns), which together identify its version. Raise
    `OSError` if it is missing."""
    name = split_address(address)[1]
    if not is_remote(address):
        about = os.stat(local_path(address))
        return name, about.st_size, about.st_mtime_ns
    system, path = _locate(address)
    if address.startswith("hf://"):
        from ray_vlm.hub_system import describe_hub_file

        return name, *describe_hub_file(system, path)
    info = system.get_file_info(path)
    return name, info.size or 0, info.mtime_ns or 0


class FolderEntry(NamedTuple):
    """A file or a folder inside a folder: its path in that, its bytes, and the time of its last change (ns)."""

    name: str
    is_file: bool
    size: int
    changed: int


def kind_of(address: str) -> Literal["file", "folder"] | None:
    """Return what is at a path or an address, or None for nothing. Raise `OSError` if that cannot be seen, and
    `ValueError` if nothing can have that name."""
    if not is_remote(address):
        try:
            mode = os.stat(local_path(address)).st_mode
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):  # a pattern may be long
                return None
            raise
        return "folder" if stat.S_ISDIR(mode) else "file"
    from pyarrow.fs import FileType

    system, path = _locate(address)
    kinds: dict[FileType, Literal["file", "folder"]] = {FileType.File: "file", FileType.Directory: "folder"}
    return kinds.get(system.get_file_info(path.rstrip("/")).type)


def list_folder(address: str, recursive: bool = False) -> list[FolderEntry]:
    """Return what lies in a folder or below an address, sorted by name; nothing if it does not exist.

    `recursive`: also what lies in its folders, in an object store alone. Raise `OSError` if it cannot be listed.
    """
    if not is_remote(address):
        with suppress(FileNotFoundError), os.scandir(local_path(address)) as entries:
            return sorted(FolderEntry(entry.name, not entry.is_dir(), 0, 0) for entry in entries)
        return []
    from pyarrow.fs import FileSelector

    system, path = _locate(address)
    infos = system.get_file_info(FileSelector(path.rstrip("/"), recursive=recursive, allow_not_found=True))
    start = len(path.strip("/")) + 1
    return sorted(
        FolderEntry(info.path.strip("/")[start:], info.is_file, info.size or 0, info.mtime_ns or 0) for info in infos
    )


def describe_files(addresses: Sequence[str]) -> list[tuple[int, int] | None]:
    """Return bytes and time of the last change of files, as `describe_file` does, None for one that cannot be
    described. Of many files in one folder of an object store a listing tells them, whose times may be finer."""
    folders: dict[str, int] = {}
    for address in filter(is_remote, addresses):
        if address.startswith("hf://"):  # where listings have no times
            continue
        folder = split_address(address)[0]
        folders[folder] = folders.get(folder, 0) + 1
    listed: dict[str, dict[str, tuple[int, int]]] = {}
    for folder, count in folders.items():
        if count >= _LISTED_FILES:
            with suppress(OSError, ValueError, ImportError):
                listed[folder] = {entry.name: entry[2:] for entry in list_folder(folder) if entry.is_file}

    def describe(address: str) -> tuple[int, int] | None:
        if is_remote(address):
            folder, name = split_address(address)
            if folder in listed:
                return listed[folder].get(name)
        try:
            return describe_file(address)[1:]
        except (OSError, ValueError, ImportError):
            return None

    if len(addresses) == 1 or not folders:
        return list(map(describe, addresses))
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(describe, addresses))


def stamp_file(path: str) -> tuple[int, int] | None:
    """Return size and modification time (ns) of a local file; None for any other."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def copy_folder(address: str) -> Path:
    """Return the folder of this user on this machine for copies from an object store."""
    folder = Path(tempfile.gettempdir()) / f"ray_vlm-index-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; remove it, or set TMPDIR to another folder")
    return folder / hashlib.sha256(address.encode()).hexdigest()[:16]


class Store:
    """Files by name under one address; names are relative, with `/`. Raises `OSError` if the disk or the object store
    fails.

    A store needs no rename, append or fsync: a set of files is committed by a manifest, written last
    (`runs/checkpoints.py`).
    """

    def __init__(self, address: str | Path):
        self.local = None if is_remote(str(address)) else Path(local_path(str(address)))
        self.address = str(self.local or address)
        self._answered = False  # recently; if not, such as for a wrong endpoint, there are no retries

    def _locate(self, name: str = "") -> "tuple[FileSystem, str]":
        system, path = _locate(self.address)
        return system, f"{unquote(path).rstrip('/')}/{name}".rstrip("/")  # `%20` in the address of a run is a space

    def _ask(self, do: Callable[[], _T]) -> _T:
        """Return `do()`; retry transient errors of an object store with growing pauses."""
        from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential

        passing = retry_if_exception(lambda error: self._answered and _PASSING.search(str(error)) is not None)
        stop = stop_after_delay(_PATIENCE_S)
        try:
            result = Retrying(retry=passing, wait=wait_exponential(max=10), stop=stop, reraise=True)(do)
        except OSError as error:
            self._answered = isinstance(error, FileNotFoundError)
            raise
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
            sizes = {}
            for file in (Path(root) / file for root, _, files in os.walk(folder) for file in files):
                with suppress(FileNotFoundError):  # a temporary file of another process, which has renamed it by now
                    sizes[file.relative_to(folder).as_posix()] = file.lstat().st_size
            return sizes
        from pyarrow.fs import FileSelector

        system, key = self._locate(name)
        selector = FileSelector(key, recursive=True, allow_not_found=True)
        infos = self._ask(lambda: system.get_file_info(selector))
        start = len(key.strip("/")) + 1
        return {info.path.strip("/")[start:]: info.size for info in infos if info.is_file}

    def _open(self, file: Path | str, mode: Literal["rb", "wb"] = "rb") -> BinaryIO:
        """Open a file of this machine by its path, or one of the object store by its name."""
        if isinstance(file, Path):
            return open(file, mode)
        system, path = self._locate(file)
        opens = system.open_input_stream if mode == "rb" else system.open_output_stream
        return opens(path, compression=None)

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file, or None if it does not exist."""

        def get() -> bytes:
            with self._open(name) as stream:
                return stream.read()

        try:
            return self._ask(get) if self.local is None else (self.local / name).read_bytes()
        except FileNotFoundError:
            return None

    def _copy(self, source: Path | str, target: Path | str) -> None:
        """Copy a file to or from the object store, from the start again after a transient error."""

        def copy() -> None:
            with self._open(source) as reader, self._open(target, "wb") as writer:
                shutil.copyfileobj(reader, writer, _BLOCK)

        self._ask(copy)

    def write(self, name: str, data: bytes) -> None:
        """Write one small file atomically; on a disk it also survives a power loss."""

        def send() -> None:
            with self._open(name, "wb") as stream:
                stream.write(data)

        if self.local is None:
            return self._ask(send)
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary, open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(target.parent)

    def put(self, source: Path, name: str) -> None:
        """Move the files of folder `source` into folder `name`, whose other files stay."""
        for file in [path for path in source.rglob("*") if path.is_file()]:
            relative = f"{name}/{file.relative_to(source).as_posix()}"
            if self.local is None:
                self._copy(file, relative)
            else:
                target = self.local / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
                _sync_folder(target.parent)
        shutil.rmtree(source)

    def staging(self, name: str) -> Path:
        """Return an empty folder for files before `put`; on a disk in the same file system, so that `put` renames."""
        if self.local is None:
            return Path(tempfile.mkdtemp(prefix=f"ray_vlm-{name}-"))
        folder = self.local / f".staging-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def fetch(self, name: str, folder: Path, files: Iterable[str]) -> None:
        """Copy these files, named relative to `name`, into `folder`."""
        for relative in files:
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            source = f"{name}/{relative}"
            self._copy(source if self.local is None else self.local / source, target)

    def remove(self, name: str) -> None:
        """Delete a file or a folder, if it exists."""
        if self.local is not None:
            path = self.local / name
            if path.is_dir() and not path.is_symlink():
                return shutil.rmtree(path, ignore_errors=True)
            return path.unlink(missing_ok=True)
        system, key = self._locate(name)
        if self._ask(lambda: system.get_file_info(key)).is_file:
            self._ask(lambda: system.delete_file(key))
        elif self.files(name):
            self._ask(lambda: system.delete_dir(key))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file beside `path`, and rename it to `path` after the body, which writes it. If the
    body does not end normally, the file at `path` stays as it is."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")  # threads may write one file
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_or_gone(folder: Path) -> Iterator[None]:
    """Remove `folder` if the body, which fills it, does not end normally."""
    with ExitStack() as removal:
        removal.callback(shutil.rmtree, folder, ignore_errors=True)
        yield
        removal.pop_all()


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


def _sync_folder(folder: Path) -> None:
    """Flush new names in `folder` to the disk; some network file systems refuse it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
