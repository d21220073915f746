"""What vLLM's server is asked and how its answers are read: plain data, and no request.

Prompts go as token ids, with one image token for each image, and images as PNG: `/inference/v1/generate`, so that no
chat template of the server takes part. The server returns the prompt's tokens as it has them, images expanded, and they
must be those of training. Tried with vLLM 0.32.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.engines.interface import Completion, Sampling
from ray_vlm.engines.server_client import Reply
from ray_vlm.engines.vllm_requests import NEVER, seed_number, unexpanded_ids, whole_logprob

GENERATE, MODELS = "/inference/v1/generate", "/v1/models"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PROBE_ADAPTER = {"lora_name": "ray_vlm-probe", "lora_path": "/ray_vlm/no-such-adapter"}  # a load that must fail
_OF_RUNS = ("best", "final")  # folders of whole models


def build_prompt(row: Sample, builder: SampleBuilder) -> dict[str, Any]:
    """Return the part of a request that holds the prompt and its images, whose bits PNG keeps."""
    parts = [{"type": "image_url", "url": _write_png(image)} for image in row.images]
    return {"token_ids": unexpanded_ids(row, builder), "return_token_ids": True} | (
        {"content_parts": parts} if parts else {}
    )


def _write_png(image: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def build_params(
    sampling: Sampling, temperature: float, count: int, seed: Sequence[int], never: Sequence[int], scored: bool
) -> dict[str, Any]:
    """Return vLLM's sampling parameters of `count` completions without the tokens `never`. `scored`: with the
    log-probabilities that `read_completions` needs."""
    params: dict[str, Any] = {
        "n": count,
        "max_tokens": sampling.max_new_tokens,
        "temperature": temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "seed": seed_number(seed),
        "detokenize": False,
        # The trainer would look for the pixels of each image token.
        "logit_bias": {str(token): NEVER for token in never},
    }
    if scored:
        # The server returns as many as it is asked for with the sampled token among them, so one is named twice.
        params |= {"logprobs": len(never) + 1, "logprob_token_ids": [*never, never[0]]} if never else {"logprobs": 0}
    return params


def read_prompt(reply: Reply) -> list[int] | None:
    """Return the prompt's tokens as the server has them, images expanded; None if it does not return them."""
    ids = reply.body.get("prompt_token_ids")
    return ids if isinstance(ids, list) else None


def read_completions(
    reply: Reply, never: Sequence[int], temperature: float, scored: bool, processed: bool
) -> list[Completion]:
    """Return the whole completions of an answer, in order; those that the server broke off are left out.

    `processed`: the server's log-probabilities are after temperature and bias, otherwise before both. They are turned
    into those over the whole vocabulary."""
    completions = []
    for choice in sorted(reply.body.get("choices") or (), key=lambda choice: choice["index"]):
        if choice.get("finish_reason") not in ("stop", "length") or not choice.get("token_ids"):
            continue
        logprobs: list[float] = []
        for entry in choice["logprobs"]["content"] if scored else ():
            banned: list[float] = []
            if processed:
                others = {other["token_id"]: other["logprob"] for other in entry["top_logprobs"]}
                banned = [others[token] for token in set(never)]
            logprobs.append(whole_logprob(entry["logprob"], banned, temperature))
        completions.append(Completion(choice["token_ids"], logprobs, choice["finish_reason"] == "stop"))
    return completions


@dataclass(frozen=True)
class Demand:
    """What a job asks of its server. `setting`: the key that names the server; `base`: the job's `model.name`, and
    `resolved` what it stands for; `tokens`: of the longest prompt and answer; `adapters`: whether adapters are loaded;
    `proved`: whether the adapter is proved to be in use later, which another base would not pass."""

    setting: str
    base: str
    resolved: str
    tokens: int
    adapters: bool
    proved: bool


def build_probe(token: int) -> dict[str, Any]:
    """Return a request whose answer shows whether log-probabilities are after the bias: then that of `token` is 0."""
    params = {"max_tokens": 1, "temperature": 1.0, "logprobs": 0, "logit_bias": {str(token): -NEVER}}
    return {"token_ids": [0, 0], "return_token_ids": True, "sampling_params": params}


def is_processed(probe: Reply) -> bool:
    """Whether the server's log-probabilities are after temperature and bias."""
    return abs(probe.body["choices"][0]["logprobs"]["content"][0]["logprob"]) < 0.01


def served_base(models: Reply) -> dict[str, Any] | None:
    """Return what `/v1/models` says of the base, None if the server names none as vLLM does."""
    cards = models.body.get("data")
    bases = [card for card in cards if isinstance(card, dict) and not card.get("parent")] if cards else []
    return bases[0] if bases and isinstance(bases[0].get("max_model_len"), int) else None


def list_problems(demand: Demand, models: Reply, probe: Reply, load: Reply | None) -> tuple[list[str], list[str]]:
    """Return what keeps a server from answering the job, and what is worth a warning.

    `models`, `probe`, `load`: its answers to `MODELS`, to `build_probe`, and to a load of `PROBE_ADAPTER` if adapters
    are needed."""
    if models.status in (401, 403):
        return [f"{models.message}. Set OPENAI_API_KEY to the key that the server was started with."], []
    card = served_base(models)
    if models.status != 200 or card is None:
        return [f"this is not a server of vLLM ({MODELS} answers {models.message}). Give one that was started so."], []
    problems, notes = [], []
    if not _same_base(demand, card):
        text = f"its base is {card.get('root') or card['id']}, and model.name is {demand.base!r}"
        if demand.proved:
            notes.append(f"{text}; the run goes on, and ends if the server's probabilities are not the trainer's")
        else:
            problems.append(f"{text}. Serve that base; if it is the same, add --served-model-name {demand.base}")
    if card["max_model_len"] < demand.tokens:
        problems.append(
            f"its longest context is {card['max_model_len']} tokens, and the longest prompt and answer take "
            f"{demand.tokens}. Start it with --max-model-len {demand.tokens}"
        )
    problems += _problems_of_probe(probe)
    if demand.adapters and load is not None:
        problems += _problems_of_load(load)
    return problems, notes


def _same_base(demand: Demand, card: dict[str, Any]) -> bool:
    served = {_plain(name) for name in (card["id"], card.get("root")) if isinstance(name, str)}
    return bool(served & {_plain(demand.base), _plain(demand.resolved)})


def _plain(base: str) -> str:
    """Return a base's name on the hub, or that of its folder: copies have the same. A run's own folders are named alike
    in all runs, so their names are those of the run too."""
    parts = base.rstrip("/").split("/")
    cached = [part for part in parts if part.startswith("models--")]
    if cached:
        return cached[0].rpartition("--")[2].lower()
    return "/".join(parts[-2 if parts[-1] in _OF_RUNS else -1 :]).lower()


def _problems_of_probe(probe: Reply) -> list[str]:
    if probe.status == 403 or "scale-out" in probe.message.lower():
        return [f"{probe.message} Start it with --enable-scale-out, which lets it take and return token ids"]
    if probe.status in (404, 405):
        return [f"it does not take token ids ({GENERATE} answers {probe.message}). Use vLLM 0.32, which was tried"]
    if probe.status != 200:
        return [f"it does not answer a prompt of two tokens: {probe.message}"]
    choices = probe.body.get("choices")
    if read_prompt(probe) is None or not choices or not choices[0].get("token_ids") or not choices[0].get("logprobs"):
        return ["its answers lack token ids or log-probabilities. Use vLLM 0.32, which was tried"]
    return []


def _problems_of_load(load: Reply) -> list[str]:
    if load.status == 404 and "No adapter" in load.message:
        return []  # it has looked for the adapter
    return [
        f"it loads no adapters ({LOAD} answers {load.message}). Start it with --enable-lora and "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
    ]
