"""An S3 server that only reads: the files of a folder, each request after a pause. It is quicker than moto's, and
answers many requests at once, so that what is measured is the reader. It may also answer in pieces, or break off."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]
_LARGEST_HEAD = 2**16
PIECE = 2**14  # bytes that are sent at a time


async def _answer(folder: Path, pause_s: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection."""
    with suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, target, _ = head[0].split(" ")
            fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            await asyncio.sleep(pause_s)
            path = folder / unquote(urlsplit(target).path).lstrip("/")
            if not path.is_file():
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            else:
                body = _head(writer, path, method, fields.get("range", ""))
                if "breaks-off" in path.name:
                    writer.write(body[: len(body) // 2])
                    break
                for start in range(0, len(body), PIECE):
                    writer.write(body[start : start + PIECE])
                    await writer.drain()
            await writer.drain()
    writer.close()


def _head(writer: asyncio.StreamWriter, path: Path, method: str, wanted: str) -> bytes:
    """Write the head of an answer, and return its body."""
    about = path.stat()
    first, last = 0, about.st_size - 1
    if wanted:
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        first, last = int(start), min(int(end) if end else last, last)
    status = f"206 Partial Content\r\nContent-Range: bytes {first}-{last}/{about.st_size}" if wanted else "200 OK"
    writer.write(
        f"HTTP/1.1 {status}\r\nContent-Length: {last - first + 1}\r\nAccept-Ranges: bytes\r\n"
        f'Content-Type: application/octet-stream\r\nETag: "{about.st_mtime_ns:x}"\r\n'
        f"Last-Modified: {formatdate(about.st_mtime, usegmt=True)}\r\n\r\n".encode()
    )
    if method != "GET":
        return b""
    with open(path, "rb") as file:
        file.seek(first)
        return file.read(last - first + 1)


async def serve(folder: Path, pause_s: float) -> None:
    """Serve the buckets in `folder` on a free port of this machine, which is printed, until the input ends."""
    server = await asyncio.start_server(
        lambda reader, writer: _answer(folder, pause_s, reader, writer), "127.0.0.1", 0, limit=_LARGEST_HEAD
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


@contextmanager
def serving(folder: Path, pause_s: float = 0.0) -> Iterator[dict[str, str]]:
    """Serve the buckets in a folder from a process of its own, and give the variables that S3 clients read."""
    command = [sys.executable, "-m", "tests.support.object_server", str(folder), str(pause_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
        try:
            yield keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        finally:
            server.terminate()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2])))
