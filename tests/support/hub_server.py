"""A hub on this machine: data set repositories in a folder, behind the requests of the hub that `huggingface_hub` and
`datasets` make. It answers errors as the hub does: https://huggingface.co/docs/hub/api."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

READER, STRANGER = "hf_reader", "hf_stranger"  # tokens: of an account with access to all, and of one without
_API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """A repository: its commits, each with the folder of its files, and what branches and tags point to."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


class Hub:
    """The hub's content. `requests` are the methods and paths of all requests so far."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.address = ""
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []

    def commit(
        self,
        name: str,
        files: Mapping[str, bytes | str],
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Put files on a branch of a repository, in place of those that are there. Return the commit."""
        repository = self.repositories.setdefault(name, Repository(private, gated))
        sha = hashlib.sha1(f"{name} {branch} {len(repository.commits)}".encode()).hexdigest()
        folder = self.folder / name / sha
        for path, data in files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data.encode() if isinstance(data, str) else data)
        repository.commits[sha], repository.refs[branch] = folder, sha
        return sha


class _Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {unquote(url.path)}")
        try:
            if match := _API.fullmatch(url.path):
                self._answer_api(match, parse_qs(url.query), body)
            elif match := _FILE.fullmatch(url.path):
                self._answer_file(*map(unquote, match.groups()))
            else:
                raise _Refused(404, "", "Not found")
        except _Refused as refused:
            names = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            headers = {name: value for name, value in names.items() if value}
            self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], size: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _repository(self, name: str, downloads: bool) -> Repository:
        """Return a repository that the sender of the request may read."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", READER, STRANGER):
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and token != READER):
            if token:
                raise _Refused(404, "RepoNotFound", "Repository not found")
            raise _Refused(401, "", "Invalid username or password.")
        if repository.gated and downloads and token != READER:
            raise _Refused(403 if token else 401, "GatedRepo", "Access to this dataset is restricted.")
        return repository

    def _commit(self, repository: Repository, revision: str) -> tuple[str, Path]:
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def _answer_api(self, match: re.Match[str], query: Mapping[str, list[str]], body: bytes) -> None:
        name, kind, revision, path = unquote(match[1]), match[2], unquote(match[3] or "main"), unquote(match[4] or "")
        repository = self._repository(name, downloads=False)
        sha, folder = self._commit(repository, revision)
        if kind == "tree":
            answer: Any = _list(folder, path, query.get("recursive", ["false"])[0].lower() in ("true", "1"))
        elif kind == "paths-info":
            values = parse_qs(body.decode()) if b"=" in body and not body.startswith(b"{") else json.loads(body)
            answer = [_describe(folder, folder / path) for path in values["paths"] if (folder / path).exists()]
        else:
            files = [_describe(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
            siblings = [{"rfilename": about["path"], "size": about["size"], "blobId": about["oid"]} for about in files]
            gated = "manual" if repository.gated else False
            answer = {"id": name, "sha": sha, "private": repository.private, "gated": gated, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name, downloads=True)
        sha, folder = self._commit(repository, revision)
        if not (folder / path).is_file():
            raise _Refused(404, "EntryNotFound", "Entry not found")
        data = (folder / path).read_bytes()
        headers = {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(206, data[first : last + 1], headers)
        else:
            self._send(200, data, headers)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _describe(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": _blob(name.encode())}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _blob(path.read_bytes())}


def _list(folder: Path, path: str, recursive: bool) -> list[dict[str, Any]]:
    start = folder / path
    if not start.is_dir():
        raise _Refused(404, "EntryNotFound", f"{path} does not exist")
    return [_describe(folder, entry) for entry in sorted(start.rglob("*") if recursive else start.iterdir())]


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """Serve a hub on a free port of this machine."""
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str, home: Path, token: str = "", offline: bool = False) -> None:
    """Let the hub's client of this process use the hub at an address, with the cache in `home`. It reads the variables
    of the environment when it is imported, which other tests have done."""
    import datasets.config
    import fsspec
    import huggingface_hub.constants as constants

    from ray_vlm import storage
    from ray_vlm.data.sources import hub

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(home))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    downloads = datasets.config.DOWNLOADED_DATASETS_DIR
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(home / "datasets" / downloads))
    monkeypatch.setattr(
        datasets.config,
        "EXTRACTED_DATASETS_PATH",
        str(home / "datasets" / downloads / datasets.config.EXTRACTED_DATASETS_DIR),
    )
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.forget()
    storage._file_system.cache_clear()
    fsspec.get_filesystem_class("hf").clear_instance_cache()


@contextmanager
def using_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """Serve the repositories in `folder` to this process, with a cache beside them, and forget their answers behind
    it."""
    from ray_vlm.data.sources.hub import forget

    with serving(folder / "repositories") as served:
        use_hub(monkeypatch, served.address, folder / "home")
        yield served
    forget()
