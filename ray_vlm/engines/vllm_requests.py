"""What vLLM is asked and what its answers mean: prompts, sampling parameters, completions. Nothing is started here.

A server of vLLM is asked the same in JSON (`server_protocol.py`)."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.engines.interface import Completion, Sampling
from ray_vlm.engines.vllm_start import EngineLimits
from ray_vlm.errors import RunError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput

_NO_SUCH_LIMIT = "In training, please report this; transformers has no such limit."
NEVER = -100.0  # added to the logits of tokens that are not sampled, the lowest value that vLLM takes


def prompt_of(row: Sample, builder: SampleBuilder) -> dict[str, Any]:
    """Convert a row to vLLM's input: token ids with one image token for each image, which vLLM expands, and resized
    images."""
    from PIL import Image

    prompt: dict[str, Any] = {"prompt_token_ids": unexpanded_ids(row, builder)}
    if row.images:
        prompt["multi_modal_data"] = {"image": [Image.fromarray(image) for image in row.images]}
        if builder.stock is None:
            # They have the size that training uses, which may be outside the limits of the base's own processor.
            prompt["mm_processor_kwargs"] = {"do_resize": False}
    return prompt


def unexpanded_ids(row: Sample, builder: SampleBuilder) -> list[int]:
    """Return the tokens of a row's prompt with one image token for each image."""
    token, ids = builder.image_token_id, row.input_ids.tolist()
    return [t for i, t in enumerate(ids) if t != token or i == 0 or ids[i - 1] != token]


def seed_number(seed: Sequence[int]) -> int:
    """Return the one number that stands for a row's seed."""
    return int(np.random.SeedSequence(list(seed)).generate_state(1)[0])


def whole_logprob(logprob: float, banned: Sequence[float], temperature: float) -> float:
    """Return a token's log-probability over the whole vocabulary. `banned`: vLLM's log-probabilities of the tokens that
    are not sampled.

    vLLM's are over what their bias leaves: with r, the sum of their probabilities without it, all others are larger by
    a factor of 1 + r."""
    bias = NEVER / (temperature or 1.0)  # vLLM adds it before it divides by the temperature
    return logprob - math.log1p(sum(math.exp(other - bias) for other in banned))


def is_truncated(sampling: Sampling) -> bool:
    """Return whether tokens are sampled from a part of the vocabulary. vLLM's log-probabilities are then of that part
    alone, so completions have none."""
    return sampling.top_p < 1 or sampling.top_k > 0


def sampling_params(sampling: Sampling, seed: Sequence[int], never: Sequence[int]) -> "list[SamplingParams]":
    """Return the requests of one row: one for all completions, or one for each if each has a temperature of its own.

    `seed`: of the row. `never`: tokens that are not sampled. Raise `ValueError` for another number of temperatures than
    of completions."""
    size, heats = sampling.num_generations, sampling.temperature
    if isinstance(heats, tuple):
        if len(heats) != size:
            raise ValueError(f"{len(heats)} temperatures for {size} completions")
        return [_params(sampling, heat, 1, (*seed, index), never) for index, heat in enumerate(heats)]
    return [_params(sampling, heats, size, seed, never)]


def _params(
    sampling: Sampling, temperature: float, count: int, seed: Sequence[int], never: Sequence[int]
) -> "SamplingParams":
    from vllm import SamplingParams

    scored = not is_truncated(sampling)
    return SamplingParams(
        n=count,
        max_tokens=sampling.max_new_tokens,
        temperature=temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        logprobs=len(never) if scored else None,  # of these, beside the sampled token
        # The trainer would look for the pixels of each image token.
        logit_bias=dict.fromkeys(never, NEVER),
        logprob_token_ids=list(never) if scored else None,
        seed=seed_number(seed),
    )


def completion_of(output: "CompletionOutput", params: "SamplingParams", never: Sequence[int]) -> Completion:
    """Return an answer with log-probabilities over the whole vocabulary, or none if none were asked for. `never`: the
    tokens that were not sampled."""
    ids, logprobs = list(output.token_ids), []
    if params.logprobs is not None:
        for token, of_token in zip(ids, output.logprobs, strict=True):
            banned = [of_token[other].logprob for other in never]
            logprobs.append(whole_logprob(of_token[token].logprob, banned, params.temperature))
    return Completion(ids, logprobs, output.finish_reason == "stop")


def check_prompt(row: Sample, prompt_ids: Sequence[int], exact: bool) -> None:
    """Raise `RunError` if vLLM made another prompt of a row than training does.

    `exact`: compare every token; False: their number alone, for bases whose own processor writes the placeholders."""
    wanted = row.input_ids.tolist()
    if len(prompt_ids) != len(wanted):
        problem = f"{len(prompt_ids)} tokens of the prompt of row {row.number}, and training {len(wanted)}"
    elif exact and list(prompt_ids) != wanted:
        first = next(i for i, (a, b) in enumerate(zip(prompt_ids, wanted, strict=True)) if a != b)
        problem = f"other tokens of the prompt of row {row.number} than training, from token {first} on"
    else:
        return
    raise RunError(
        f"vllm makes {problem}: it resizes images in another way, or its template is another. Use transformers for "
        "method.rollouts and evaluate.engine, and please report this."
    )


def check_rows(rows: Sequence[Sample], new_tokens: int, limits: EngineLimits) -> None:
    """Raise `RunError` if a prompt and its answer are longer than the engine's context, or a prompt has more images."""
    for row in rows:
        if len(row.input_ids) + new_tokens > limits.tokens:
            raise RunError(
                f"row {row.number}: its prompt has {len(row.input_ids)} tokens and its answer up to {new_tokens}, and "
                f"vllm was started for {limits.tokens} tokens together, those of the longest prompt and answer of its "
                f"job. {_NO_SUCH_LIMIT}"
            )
        if len(row.images) > limits.images:
            raise RunError(
                f"row {row.number}: it has {len(row.images)} images, and vllm was started for {limits.images}, the "
                f"most of a row of its job. {_NO_SUCH_LIMIT}"
            )
