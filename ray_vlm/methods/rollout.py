"""Answers by this package's own decoding loop: greedy, and sampled in groups, which are GRPO's rollouts.

Prompts are prefilled once, as a left-padded batch, then one token is decoded at a time. `decode` differs from
transformers' `generate` in three ways. New keys and values are written in place (`_make_room`), where `DynamicCache`
copies the whole cache at every token. Finished rows leave the batch. A prompt with several completions is prefilled
once: `generate` on G copies of it would encode its image G times and run G prompt forwards; here the KV cache is
repeated for the completions. The tokens are those of `generate`.

Each group of `sample_groups` has its own random numbers, so neither the other rows of the batch nor the number of
workers changes it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_vlm.data.collate import collate, join_pixels
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.models.backbone import base_of
from ray_vlm.models.dequantize import dequantised

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import DynamicCache, PreTrainedModel

# Finished rows leave the batch when at most this share is unfinished. Dropping each at once copies the cache too often.
_KEEP = 0.75
_ROOM = 64  # tokens of spare capacity in a KV cache

# (logits `[sequences, vocabulary]`, number of the step, numbers of these sequences `int64 [sequences]`) -> next tokens
# `int64 [sequences]`
ChooseToken = Callable[["Tensor", int, "Tensor"], "Tensor"]


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled. `temperature`: of all, or of each completion of a group; 0: greedy. `top_p` 1 and
    `top_k` 0: from the whole vocabulary."""

    num_generations: int = 8
    max_new_tokens: int = 256
    temperature: float | tuple[float, ...] = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Completion:
    """A sampled answer. `ids` include the end token; `finished` is False if the answer was cut off before it.

    `logprobs`: natural logarithm of each token's probability at the sampling temperature (greedy: 1) over the whole
    vocabulary, before top-p, top-k and the ban on image tokens: what the trainer's forward computes.
    """

    ids: list[int]
    logprobs: list[float]
    finished: bool


# Samples answers to rows: `sample_groups`, or vLLM's in its place.
Sampler = Callable[..., list[list[Completion]]]


def sample_groups(
    model: "Module",
    rows: Sequence[Sample],
    builder: SampleBuilder,
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
    device: str,
    group_batch: int | None = None,
    pixels: Callable[[Sample], dict[str, Any]] | None = None,
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
    with torch.no_grad(), evaluation_mode(model), dequantised(model):
        for start in range(0, len(pairs), size):
            prompts, own = zip(*pairs[start : start + size], strict=True)
            groups += _sample_batch(model, prompts, builder, sampling, _uniforms(own, sampling), device, pixels)
    return groups


@contextmanager
def evaluation_mode(model: "Module") -> Iterator[None]:
    """Use evaluation mode, which also turns gradient checkpointing (it forbids caches) off; then restore all modes."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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
    pixels: Callable[[Sample], dict[str, Any]] | None,
) -> list[list[Completion]]:
    """Sample the groups of prompts that run together."""
    import torch

    base = base_of(model)
    # Image tokens are never sampled: the trainer would look for the pixels of each.
    kinds = (getattr(base.config, name, None) for name in ("image_token_id", "video_token_id"))
    never = torch.tensor([builder.image_token_id, *(token for token in kinds if token is not None)], device=device)
    joined_pixels = None if pixels is None else join_pixels([pixels(row) for row in rows])
    batch = collate(rows, builder, device, side="left", pixels=joined_pixels)
    size = sampling.num_generations
    draws = torch.from_numpy(uniforms).to(device)  # [tokens, sequences]
    if isinstance(sampling.temperature, tuple) and len(sampling.temperature) != size:
        raise ValueError(f"{len(sampling.temperature)} temperatures for {size} completions")
    heat = torch.tensor(np.resize(sampling.temperature, len(rows) * size), dtype=torch.float32, device=device)
    logprobs = torch.zeros(draws.shape, device=device)

    def choose_token(logits: "Tensor", step: int, rows_left: "Tensor") -> "Tensor":
        token, logprob = _choose(logits, draws[step, rows_left], heat[rows_left], sampling, never)
        logprobs[step, rows_left] = logprob
        return token

    tokens = decode(model, batch, builder, sampling.max_new_tokens, choose_token, repeats=size)
    ends = end_ids(base, builder)
    completions = [
        Completion(ids, values[: len(ids)], ids[-1] in ends)
        for ids, values in zip(tokens, logprobs.T.tolist(), strict=True)
    ]
    return [completions[start : start + size] for start in range(0, len(completions), size)]


def _choose(
    logits: "Tensor", draws: "Tensor", heat: "Tensor", sampling: Sampling, never: "Tensor"
) -> tuple["Tensor", "Tensor"]:
    """Return the next tokens `int64 [sequences]` and their log-probabilities `float32 [sequences]`.

    `draws`: `float64 [sequences]` in [0, 1); the token is the first whose cumulative probability exceeds the draw.
    `heat`: `float32 [sequences]`, the temperatures. `never`: tokens that are not sampled.
    """
    import torch

    scores = logits.float() / heat.masked_fill(heat == 0, 1.0)[:, None]
    logprobs = torch.log_softmax(scores, dim=-1)
    scores[:, never] = -torch.inf
    token = scores.argmax(dim=-1)
    if heat.any():
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


def decode(
    model: "Module",
    batch: dict[str, Any],
    builder: SampleBuilder,
    max_new_tokens: int,
    choose_token: ChooseToken,
    repeats: int = 1,
) -> list[list[int]]:
    """Return the new tokens of each sequence, up to and including its end token if it was not cut off.

    `batch`: prompts as `collate` makes them with `side="left"`. `repeats`: sequences of each prompt, one after another.
    The model must be in evaluation mode. Its stored `rope_deltas` are neither read nor written.
    """
    import torch

    base = base_of(model)
    device = batch["input_ids"].device
    ends = torch.tensor(end_ids(base, builder), device=device)
    axes = _axes(base)
    logits, cache, position, mask = _prefill(model, base, batch, repeats)
    tokens = torch.full((max_new_tokens, len(logits)), builder.tokenizer.pad_token_id, device=device)
    rows_left = torch.arange(len(logits), device=device)  # numbers of the sequences in the batch
    going = torch.ones(len(logits), dtype=torch.bool, device=device)  # which of those are unfinished
    token: Any = None
    for step in range(max_new_tokens):
        if step:
            # Finished rows that are still in the batch stay unmasked: their output is not used, and if no prompt is
            # padded attention then needs no mask.
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            out = model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=axes(position + step - 1)[..., None],
                past_key_values=cache,
                use_cache=True,
            )
            logits = out.logits[:, -1]
        token = choose_token(logits, step, rows_left)
        tokens[step, rows_left] = token
        going &= ~torch.isin(token, ends)
        count = int(going.sum())
        if count == 0:
            break
        if count <= _KEEP * len(going):
            cache.batch_select_indices(going.nonzero()[:, 0])
            rows_left, token, position, mask = (values[going] for values in (rows_left, token, position, mask))
            going = going[going]
    stops = set(ends.tolist())
    return [ids[: next((i + 1 for i, token in enumerate(ids) if token in stops), None)] for ids in tokens.T.tolist()]


def decode_greedy(
    model: "Module", rows: Sequence[Sample], builder: SampleBuilder, max_new_tokens: int, device: str
) -> list[list[int]]:
    """Return the new tokens of each prompt row, as `decode` does, by greedy decoding."""
    batch = collate(rows, builder, device, side="left")
    return decode(model, batch, builder, max_new_tokens, lambda logits, step, rows_left: logits.argmax(dim=-1))


def end_ids(base: "PreTrainedModel", builder: SampleBuilder) -> list[int]:
    """Return the tokens that end an answer."""
    ends = base.generation_config.eos_token_id or builder.tokenizer.eos_token_id
    return list(ends) if isinstance(ends, list | tuple) else [ends]


def _prefill(
    model: "Module", base: "PreTrainedModel", batch: dict[str, Any], repeats: int
) -> tuple["Tensor", "DynamicCache", "Tensor", "Tensor"]:
    """Run one forward of the prompts, and repeat its results for the completions of each prompt.

    Return logits of the first new token `[sequences, vocabulary]`, the KV cache, the position of the first new token
    `int64 [sequences]`, and the attention mask `[sequences, tokens]`.
    """
    mask = batch["attention_mask"]
    positions, first = _positions(base, batch)
    inputs = {key: value for key, value in batch.items() if key != "mm_token_type_ids" or not _has_axes(base)}
    out = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
    _make_room(cache)
    logits, first, mask = (values.repeat_interleave(repeats, dim=0) for values in (out.logits[:, -1], first, mask))
    return logits, cache, first, mask


def _has_axes(base: "PreTrainedModel") -> bool:
    """Return whether positions have M-RoPE's three axes."""
    return hasattr(base.base_model, "get_rope_index")


def _axes(base: "PreTrainedModel") -> Callable[["Tensor"], "Tensor"]:
    """Return a function that maps positions of text `[...]` to the model's format: M-RoPE's axes are equal for text."""
    return (lambda position: position.expand(3, *position.shape)) if _has_axes(base) else (lambda position: position)


def _positions(base: "PreTrainedModel", batch: dict[str, Any]) -> tuple["Tensor", "Tensor"]:
    """Return the positions of the prompts' tokens, and of the first new token.

    They are passed in every call, because those that a model stores (`rope_deltas`) belong to the last batch that it
    saw, which may be another. Without images `get_rope_index` returns plain positions, counted after the padding.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if not _has_axes(base):
        return (mask.cumsum(dim=1) - 1).clamp(min=0), mask.sum(dim=1)
    backbone: Any = base.base_model
    positions, deltas = backbone.get_rope_index(
        ids, batch["mm_token_type_ids"], image_grid_thw=batch.get("image_grid_thw"), attention_mask=mask
    )
    # [3, prompts, tokens]; an image takes fewer positions than tokens, by the (negative) delta [prompts, 1].
    return positions, mask.sum(dim=1) + deltas[:, 0]


def _make_room(cache: "DynamicCache") -> None:
    """Let the plain layers of a filled `DynamicCache` write new tokens in place; other kinds stay as they are.

    transformers' `DynamicLayer` copies all keys and values at every token."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        room: "list[Tensor] | None" = None  # `keys` and `values` are views of these, which are longer

        def update(
            self, key_states: "Tensor", value_states: "Tensor", *args: object, **kwargs: object
        ) -> tuple["Tensor", "Tensor"]:
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            if self.room is None or end > self.room[0].shape[-2]:
                self.room = [_with_room(old, end + _ROOM) for old in (self.keys, self.values) if old is not None]
            for room, new in zip(self.room, (key_states, value_states), strict=True):
                room[..., start:end, :] = new
            self.keys, self.values = (room[..., :end, :] for room in self.room)
            return self.keys, self.values

        def batch_select_indices(self, indices: "Tensor") -> None:
            super().batch_select_indices(indices)
            self.room = None  # of the rows that left

    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            roomy = RoomyLayer()
            roomy.__dict__ |= layer.__dict__  # its keys and values
            cache.layers[number] = roomy


def _with_room(old: "Tensor", length: int) -> "Tensor":
    """Copy `old` (`[sequences, heads, tokens, size]`) into a tensor with a capacity of `length` tokens."""
    room = old.new_empty(*old.shape[:-2], length, old.shape[-1])
    room[..., : old.shape[-2], :] = old
    return room
