"""HTTP requests to a server that samples: connections are kept, and a server that is away for a while is waited for."""

import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ray_vlm.errors import RunError

if TYPE_CHECKING:
    import requests

logger = logging.getLogger(__name__)
CONNECTIONS = 64  # requests at a time; the server batches them
PATIENCE_S = 300.0  # how long a server that is away is waited for: vLLM starts again in minutes
_LONGEST_PAUSE_S = 15.0
_CONNECT_S, ANSWER_S = 10.0, 900.0  # for a connection, and for an answer
_PASSING = (429, 502, 503, 504)  # too many requests, and a server that is starting, behind a proxy or not
_KEY = "OPENAI_API_KEY"


def choose_pause(attempt: int, waited_s: float, patience_s: float) -> float | None:
    """Return the pause in seconds before a request is sent again, or None if it is given up.

    `attempt`: how often it was sent again before; `waited_s`: since it was sent first. A request that took longer than
    `patience_s` by itself is sent again once."""
    if waited_s >= patience_s and attempt:
        return None
    return min(2.0**attempt, _LONGEST_PAUSE_S)


def is_local(url: str) -> bool:
    """Whether the address is one of this machine."""
    host = (urlsplit(url).hostname or "").lower()
    return host in {"localhost", "::1", socket.gethostname().lower()} or host.startswith("127.")


@dataclass(frozen=True)
class Reply:
    """A server's answer: the HTTP status, and its JSON object (empty if it is none)."""

    status: int
    body: dict[str, Any]
    text: str

    @property
    def message(self) -> str:
        """The server's own words for an error."""
        error = self.body.get("error", self.body.get("detail", self.body.get("message")))
        words = error.get("message") if isinstance(error, dict) else error
        return f"HTTP {self.status}: {str(words or self.text or 'no message').strip()[:500]}"


class ServerClient:
    """Sends requests from any number of threads. The key in `OPENAI_API_KEY` goes with them, and into no message."""

    def __init__(self, url: str):
        import requests
        from requests.adapters import HTTPAdapter

        self.url = url
        self._root = url.rstrip("/").removesuffix("/v1")
        self._session = requests.Session()
        self._session.trust_env = not is_local(url)  # proxies are for other hosts
        self._session.auth = _add_key  # also keeps requests from taking a password from ~/.netrc
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=CONNECTIONS))
        self._stopped = threading.Event()
        self._away = False  # whether a request has failed since the last one that was answered

    def send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        patience_s: float = PATIENCE_S,
        answer_s: float = ANSWER_S,
    ) -> Reply:
        """Send a request and return the answer, whatever its status. While the server is away, or does not answer
        within `answer_s`, try again for `patience_s`, then raise `RunError`."""
        started, attempt = time.monotonic(), 0
        while True:
            answer = self._try(method, path, body, answer_s)
            if isinstance(answer, Reply):
                self._away = False
                return answer
            waited = time.monotonic() - started
            pause = choose_pause(attempt, waited, patience_s)
            if pause is None or self._stopped.is_set():
                raise RunError(
                    f"{self.url}: the server does not answer {path} ({answer}), asked from {socket.gethostname()} for "
                    f"{waited:.0f} s. Start it, or correct sampler_url; then continue a run with --resume."
                )
            if not self._away:
                logger.warning(f"{self.url}: {answer}; waiting up to {patience_s:.0f} s for the server")
            self._away = True
            self._stopped.wait(pause)
            attempt += 1

    def _try(self, method: str, path: str, body: dict[str, Any] | None, answer_s: float) -> Reply | str:
        """Return the answer, or the reason why there is none for now."""
        import requests

        try:
            response = self._session.request(
                method, self._root + path, json=body, timeout=(_CONNECT_S, answer_s), allow_redirects=False
            )
        except requests.Timeout:
            return f"no answer within {answer_s:.0f} s, or no connection within {_CONNECT_S:.0f} s"
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            return type(error).__name__ if not (cause := _innermost(error)) else cause
        except requests.RequestException as error:
            raise RunError(f"{self.url}: {error}. Correct sampler_url.") from None
        reply = _read(response)
        return reply.message if reply.status in _PASSING else reply

    def stop_waiting(self, stop: bool) -> None:
        """Let requests in other threads give up at once (True), or wait for the server again (False)."""
        if stop:
            self._stopped.set()
        else:
            self._stopped.clear()

    def close(self) -> None:
        """Close all connections."""
        self._stopped.set()
        self._session.close()


def _add_key(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
    if key := os.environ.get(_KEY):
        request.headers["Authorization"] = f"Bearer {key}"
    return request


def _innermost(error: BaseException) -> str:
    """Return the words of the system for a connection that failed, such as "Connection refused"."""
    reason: object = error.args[0] if error.args else error
    reason = getattr(reason, "reason", reason)
    return str(reason).rpartition(": ")[2].strip("()' ")


def _read(response: "requests.Response") -> Reply:
    try:
        body = response.json()
    except ValueError:
        body = None
    return Reply(response.status_code, body if isinstance(body, dict) else {}, response.text[:500])
