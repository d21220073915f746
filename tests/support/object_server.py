"""An S3 server that only reads: the files of a folder, each request after a pause. It is quicker than moto's, and
answers many requests at once, so that what is measured is the reader."""

import asyncio
import sys
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LARGEST_HEAD = 2**16


async def _answer(folder: Path, pause_s: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection."""
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, target, _ = head[0].split(" ")
            fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            await asyncio.sleep(pause_s)
            path = folder / unquote(urlsplit(target).path).lstrip("/")
            if not path.is_file():
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            else:
                _send(writer, path, method, fields.get("range", ""))
            await writer.drain()
    writer.close()


def _send(writer: asyncio.StreamWriter, path: Path, method: str, wanted: str) -> None:
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
    if method == "GET":
        with open(path, "rb") as file:
            file.seek(first)
            writer.write(file.read(last - first + 1))


async def serve(folder: Path, pause_s: float) -> None:
    """Serve the buckets in `folder` on a free port of this machine, which is printed, until the input ends."""
    server = await asyncio.start_server(
        lambda reader, writer: _answer(folder, pause_s, reader, writer), "127.0.0.1", 0, limit=_LARGEST_HEAD
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2])))
