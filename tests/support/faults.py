"""Storage that fails for real: a small disk that fills up or turns read-only, and an object store that stumbles."""

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PAGE = os.sysconf("SC_PAGE_SIZE")  # a tmpfs is full by pages


class SmallDisk:
    """A tmpfs of its own at `path`."""

    def __init__(self, path: Path):
        self.path = path
        self._ballast = path / "ballast"
        self._mounts = 1

    @property
    def free(self) -> int:
        """Pages that are left."""
        return os.statvfs(self.path).f_bavail

    def leave(self, pages: int) -> None:
        """Fill it up, so that so many pages are left; those who write into files they have can still end a page."""
        self.clear()
        with open(self._ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, self.free - pages) * PAGE)
        assert self.free == pages

    def clear(self) -> None:
        """Make room again."""
        self._ballast.unlink(missing_ok=True)

    def make_read_only(self) -> None:
        """For every file that is opened from now on: `remount,ro` itself is refused while one is open for writing."""
        _mount("--bind", self.path, self.path)
        self._mounts += 1
        _mount("-o", "remount,ro,bind", self.path)

    def make_writable(self) -> None:
        """The opposite of `make_read_only`."""
        subprocess.run(["umount", self.path], check=True)
        self._mounts -= 1

    def unmount(self) -> None:
        """Give it back; what still has a file open there keeps it."""
        for _ in range(self._mounts):
            subprocess.run(["umount", "-l", self.path], check=True)


def _mount(*words: str | Path) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a disk of its own needs leave to mount one: {done.stderr.strip()}")


@contextmanager
def small_disk(path: Path, size_mib: int) -> Iterator[SmallDisk]:
    """A disk of that size at `path`; skips the test where this process may not mount one."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("a disk of its own is mounted by root alone")
    path.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", path)
    disk = SmallDisk(path)
    try:
        yield disk
    finally:
        disk.unmount()


class Stumbling:
    """Moto's application, but `fault` says of each request (its method, its path) what happens to it instead: a number
    is an HTTP status, "cut" ends the connection, None lets it through."""

    def __init__(self, app: Any):
        self.fault: Callable[[str, str], int | str | None] = lambda method, path: None
        self.failed: list[tuple[str, str]] = []
        self._app = app

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        request = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        fault = self.fault(*request)
        if fault is None:
            return self._app(environ, start)
        self.failed.append(request)
        if fault == "cut":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError  # nothing more is to be sent
        chunked = environ.get("wsgi.input_terminated", False)
        environ["wsgi.input"].read(-1 if chunked else int(environ.get("CONTENT_LENGTH") or 0))
        code = {403: "AccessDenied"}.get(int(fault), "ServiceUnavailable")
        body = f"<Error><Code>{code}</Code><Message>not now</Message></Error>".encode()
        start(f"{fault} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


@contextmanager
def stumbling_store() -> Iterator[tuple[str, Stumbling]]:
    """The address of a bucket, and what makes its requests fail."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from pyarrow import fs
    from werkzeug.serving import WSGIRequestHandler, make_server

    from ray_vlm.storage import full_address

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            pass

    app = Stumbling(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        endpoint = f"http://127.0.0.1:{server.port}"
        fs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True).create_dir("stumbling")
        yield full_address("s3://stumbling"), app
    app.fault = lambda method, path: None
    server.shutdown()
    server.server_close()
