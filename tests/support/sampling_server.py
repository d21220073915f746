"""A server in this process that answers as vLLM's does: recorded from vLLM 0.32, with settings for its faults.

Texts of errors and the shape of answers are vLLM's own. The answer to a prompt depends on nothing but its seed.
"""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FACTOR = 16  # pixels along a side of an image token of the tiny Qwen3-VL
END = 2
_NO_SCALE_OUT = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."


@dataclass
class SamplingServer:
    """What the server is and has. `away`: how many requests it drops; `short`: how many answers lack a completion."""

    base: str
    root: str
    image_token: int
    max_model_len: int = 1024
    max_lora_rank: int = 16
    processed: bool = True
    scale_out: bool = True
    lora_routes: bool = True
    enable_lora: bool = True
    vllm: bool = True
    key: str | None = None
    away: int = 0
    short: int = 0
    extra_tokens: int = 0
    url: str = ""
    adapters: dict[str, str] = field(default_factory=dict)
    loaded: list[dict[str, Any]] = field(default_factory=list)  # of each load: files and weights
    requests: list[dict[str, Any]] = field(default_factory=list)  # bodies of requests for completions
    images: list[np.ndarray] = field(default_factory=list)

    def answer(self, path: str, body: Any, key: str | None) -> tuple[int, Any]:
        """Return the status and the JSON of the answer to a request."""
        if self.key is not None and key != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        if path == "/v1/models":
            return 200, {"object": "list", "data": [self._card(self.base, self.root, None), *self._adapter_cards()]}
        if path == "/inference/v1/generate" and self.vllm:
            return self._generate(body) if self.scale_out else _error(403, _NO_SCALE_OUT)
        if path == "/v1/load_lora_adapter" and self.lora_routes and self.vllm:
            return self._load(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter" and self.lora_routes and self.vllm:
            if self.adapters.pop(body["lora_name"], None) is None:
                return _error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
            return 200, "Success"
        return 404, {"detail": "Not Found"}

    def _card(self, name: str, root: str, parent: str | None) -> dict[str, Any]:
        card = {"id": name, "object": "model", "owned_by": "vllm", "root": root, "parent": parent}
        return card | {"max_model_len": self.max_model_len if parent is None else None} if self.vllm else {"id": name}

    def _adapter_cards(self) -> list[dict[str, Any]]:
        return [self._card(name, path, self.base) for name, path in self.adapters.items()]

    def _load(self, name: str, path: str) -> tuple[int, Any]:
        from safetensors.numpy import load_file

        if not self.enable_lora:
            return _error(500, "Call to add_lora method failed: LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        rank = json.loads((Path(path) / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            return _error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}.")
        self.adapters[name] = path
        self.loaded.append({"name": name, "path": path, "weights": load_file(Path(path) / "adapter_model.safetensors")})
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("model", self.base) not in {self.base, *self.adapters}:
            return _error(404, f"The model `{body['model']}` does not exist.")
        images = [_read_png(part["url"]) for part in body.get("content_parts", ())]
        prompt = self._expand(body["token_ids"], images)
        params = body["sampling_params"]
        if params["max_tokens"] > 1:
            self.requests.append(body)
            self.images += images
        wanted = params.get("n", 1)
        if self.short and params["max_tokens"] > 1:
            self.short -= 1
            wanted -= 1
        choices = [self._choice(number, params) for number in range(wanted)]
        return 200, {"prompt_token_ids": prompt, "output_mode": "tokens", "choices": choices}

    def _expand(self, ids: list[int], images: list[np.ndarray]) -> list[int]:
        sizes = iter([image.shape[0] // FACTOR * (image.shape[1] // FACTOR) for image in images])
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (next(sizes, 1) + self.extra_tokens if token == self.image_token else 1)
        return expanded

    def _choice(self, number: int, params: dict[str, Any]) -> dict[str, Any]:
        bias = {int(token): value for token, value in params["logit_bias"].items()}
        forced = next((token for token, value in bias.items() if value > 0), None)
        ids = [forced] if forced is not None else [20 + (params["seed"] + number) % 50, END]
        finish = "stop" if ids[-1] == END and number % 2 else "length"
        choice = {"index": number, "finish_reason": finish, "token_ids": ids, "logprobs": None}
        if "logprobs" in params:
            heat = params["temperature"] or 1.0
            entries = []
            for token in ids:
                logprob = (0.0 if self.processed else -6.5) if forced is not None else -0.5
                others = set(params.get("logprob_token_ids", ()))
                top = {token: logprob} | {t: -3.0 + (bias[t] / heat if self.processed else 0.0) for t in others}
                shown = [{"token_id": t, "logprob": value} for t, value in list(top.items())[: params["logprobs"] or 1]]
                entries.append({"token_id": token, "logprob": logprob, "rank": 1, "top_logprobs": shown})
            choice["logprobs"] = {"content": entries}
        return choice


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "Error", "param": None, "code": status}}


def _read_png(uri: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


@contextmanager
def serve(server: SamplingServer) -> Iterator[SamplingServer]:
    """Let the server answer at `server.url` while the body runs."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: Any) -> None:
            with lock:
                if server.away:
                    server.away -= 1
                    self.close_connection = True
                    return  # closes the connection without an answer, as a server that dies
                status, answer = server.answer(self.path, body, self.headers.get("Authorization"))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
