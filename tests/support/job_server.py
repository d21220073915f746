"""A job server as Ray's client sees one, without Ray: it keeps what it is sent, and its jobs end at once."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class JobServer:
    """What the server was sent, and how it answers."""

    ray_version: str
    token: str | None = None
    log: str = "step 1\n"
    exit_code: int = 0
    running: bool = False  # jobs go on until the test ends them
    packages: dict[str, bytes] = field(default_factory=dict)
    jobs: list[dict] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    address: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        """Status and body of an answer."""
        self.requests.append(f"{method} {path}")
        name = path.rpartition("/")[2]
        if path == "/api/version":
            return 200, {"version": "4", "ray_version": self.ray_version, "ray_commit": ""}
        if path.startswith("/api/packages/gcs/"):
            if method == "PUT":
                self.packages[name] = body
            return (200 if name in self.packages else 404), ""
        if method == "POST" and path == "/api/jobs/":
            self.jobs.append(json.loads(body))
            return 200, {"job_id": "j", "submission_id": self.jobs[-1].get("submission_id") or "j"}
        if path.endswith("/logs"):
            return 200, {"logs": self.log}
        status = "RUNNING" if self.running else "FAILED" if self.exit_code else "SUCCEEDED"
        details = {"type": "SUBMISSION", "submission_id": name, "status": status, "entrypoint": "python"}
        return 200, details | ({} if self.running else {"driver_exit_code": self.exit_code})


@contextmanager
def start_job_server(server: JobServer) -> Iterator[ThreadingHTTPServer]:
    """Serve until the block ends; `server.address` is set. The yielded object can be shut down before that."""

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            sent = self.headers.get("Authorization", "")
            if server.token and not sent:
                status, reply = 401, "Unauthorized: Missing authentication token"
            elif server.token and sent != f"Bearer {server.token}":
                status, reply = 403, "Forbidden: Invalid authentication token"
            else:
                status, reply = server.answer(self.command, self.path, body)
            data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = _reply

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        server.address = f"http://127.0.0.1:{http.server_address[1]}"
        yield http
        http.shutdown()
