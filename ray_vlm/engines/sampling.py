"""Answers sampled in groups by the package's own decoding loop, which are GRPO's rollouts.

Each group of `sample_groups` has its own random numbers, so neither the other rows of the batch nor the number of
workers changes it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ray_vlm.data.collate import collate, join_pixels
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.engines.arithmetic import answering
from ray_vlm.engines.decoding import build_static_steps, decode, end_ids
from ray_vlm.engines.interface import Completion, Pixels, Sampling
from ray_vlm.models.backbone import base_of, evaluation_mode

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from ray_vlm.engines.static_step import StaticSteps


def sample_groups(
    model: "Module",
    rows: Sequence[Sample],
    builder: SampleBuilder,
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
    device: str,
    group_batch: int | None = None,
    pixels: Pixels | None = None,
) -> list[list[Completion]]:
    """Sample `sampling.num_generations` completions for each prompt row, in order.

    `seeds[i]` (non-negative integers) seeds row i's random numbers. At most `group_batch` prompts run at a time; None:
    all. `pixels` returns a row's image inputs if they are already processed. Modules keep their train or eval mode, and
    the model's stored `rope_deltas` are neither read nor written.
    """
    import torch

    pairs = list(zip(rows, seeds, strict=True))
    size = group_batch or max(len(rows), 1)
    groups: list[list[Completion]] = []
    # Not inference_mode: the same model is trained afterwards, and what a forward caches in it must allow autograd.
    longest = max((len(row.input_ids) for row in rows), default=0)
    tokens, sequences = longest + sampling.max_new_tokens, min(size, len(rows)) * sampling.num_generations
    with torch.no_grad(), evaluation_mode(model), answering(model, device, sequences, tokens):
        static = build_static_steps(model, builder, device, tokens)
        for start in range(0, len(pairs), size):
            prompts, own = zip(*pairs[start : start + size], strict=True)
            groups += _sample_batch(model, prompts, builder, sampling, _uniforms(own, sampling), device, pixels, static)
    return groups


def _uniforms(seeds: Sequence[Sequence[int]], sampling: Sampling) -> np.ndarray:
    """Draw random numbers in [0, 1) for each token: `float64 [max_new_tokens, groups * G]`, G neighbouring columns for
    each seed."""
    shape = (sampling.max_new_tokens, sampling.num_generations)
    return np.concatenate([np.random.default_rng(list(seed)).random(shape) for seed in seeds], axis=1)


def _sample_batch(
    model: "Module",
    rows: Sequence[Sample],
    builder: SampleBuilder,
    sampling: Sampling,
    uniforms: np.ndarray,
    device: str,
    pixels: Pixels | None,
    static: "StaticSteps | None",
) -> list[list[Completion]]:
    """Sample the groups of prompts that run together."""
    import torch

    base = base_of(model)
    # Image tokens are never sampled: the trainer would look for the pixels of each. Some heads, as Molmo2's, have no
    # logits for them.
    kinds = (getattr(base.config, name, None) for name in ("image_token_id", "video_token_id"))
    scored = base.get_output_embeddings().out_features
    ids = [token for token in (*builder.kind_ids, *kinds) if token is not None and token < scored]
    never = torch.tensor(ids, device=device, dtype=torch.int64)
    joined_pixels = None if pixels is None else join_pixels([pixels(row) for row in rows], builder, device)
    batch = collate(rows, builder, device, side="left", pixels=joined_pixels)
    size = sampling.num_generations
    draws = torch.from_numpy(uniforms).to(device)  # [tokens, sequences]
    if isinstance(sampling.temperature, tuple) and len(sampling.temperature) != size:
        raise ValueError(f"{len(sampling.temperature)} temperatures for {size} completions")
    heat = torch.tensor(np.resize(sampling.temperature, len(rows) * size), dtype=torch.float32, device=device)
    greedy = not np.any(sampling.temperature)
    logprobs = torch.zeros(draws.shape, device=device)

    def choose_token(logits: "Tensor", step: int, rows_left: "Tensor") -> "Tensor":
        token, logprob = _choose(logits, draws[step, rows_left], heat[rows_left], sampling, never, greedy)
        logprobs[step, rows_left] = logprob
        return token

    tokens = decode(model, batch, builder, sampling.max_new_tokens, choose_token, size, static)
    ends = end_ids(base, builder)
    completions = [
        Completion(ids, values[: len(ids)], ids[-1] in ends)
        for ids, values in zip(tokens, logprobs.T.tolist(), strict=True)
    ]
    return [completions[start : start + size] for start in range(0, len(completions), size)]


def _choose(
    logits: "Tensor", draws: "Tensor", heat: "Tensor", sampling: Sampling, never: "Tensor", greedy: bool
) -> tuple["Tensor", "Tensor"]:
    """Return the next tokens `int64 [sequences]` and their log-probabilities `float32 [sequences]`.

    `draws`: `float64 [sequences]` in [0, 1); the token is the first whose cumulative probability exceeds the draw.
    `heat`: `float32 [sequences]`, the temperatures. `never`: tokens that are not sampled.
    `greedy`: all temperatures are 0; asking `heat` would wait for the device.
    """
    import torch

    scores = logits.float() / heat.masked_fill(heat == 0, 1.0)[:, None]
    logprobs = torch.log_softmax(scores, dim=-1)
    scores[:, never] = -torch.inf
    token = scores.argmax(dim=-1)
    if not greedy:
        # In float64: in float32 a cumulative sum over 150,000 tokens rounds the probabilities of rare ones away.
        mass = _truncate(scores, sampling).double().softmax(dim=-1).cumsum(dim=-1)
        reached = draws[:, None] * mass[:, -1:]  # a draw is below 1, so this is below the last sum
        token = torch.where(heat == 0, token, torch.searchsorted(mass, reached, right=True)[:, 0])
    return token, logprobs.gather(1, token[:, None])[:, 0]


def _truncate(scores: "Tensor", sampling: Sampling) -> "Tensor":
    """Set `scores` to -inf outside the top-k, then outside the top-p, as `generate` does."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)  # it reads scores alone
    return TopPLogitsWarper(sampling.top_p)(None, scores) if sampling.top_p < 1 else scores
