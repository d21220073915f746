"""This package's own decoding loop.

Prompts are prefilled once, as a left-padded batch, then one token is decoded at a time. `decode` differs from
transformers' `generate` in three ways. New keys and values are written in place (`cache.py`), where `DynamicCache`
copies the whole cache at every token. Finished rows leave the batch. A prompt with several completions is prefilled
once: `generate` on G copies of it would encode its image G times and run G prompt forwards; here the KV cache is
repeated for the completions. The tokens are those of `generate`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray_vlm.data.collate import collate
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.engines.cache import is_plain, make_room, repeat_rows, select_rows
from ray_vlm.models.backbone import base_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import DynamicCache, PreTrainedModel

    from ray_vlm.engines.static_step import StaticSteps

# Finished rows leave the batch when at most this share is unfinished. Dropping each at once copies the cache too often.
_KEEP = 0.75
# Tokens between two looks at which sequences have ended, on a device that works ahead of the host: a look waits for it.
_CHECK_EVERY = 8

_IMAGE_SIZES = ("image_grid_thw", "target_sizes")  # inputs that say how M-RoPE counts the tokens of images

# (logits `[sequences, vocabulary]`, number of the step, numbers of these sequences `int64 [sequences]`) -> next tokens
# `int64 [sequences]`
ChooseToken = Callable[["Tensor", int, "Tensor"], "Tensor"]


def decode(
    model: "Module",
    batch: dict[str, Any],
    builder: SampleBuilder,
    max_new_tokens: int,
    choose_token: ChooseToken,
    repeats: int = 1,
    static: "StaticSteps | None" = None,
) -> list[list[int]]:
    """Return the new tokens of each sequence, up to and including its end token if it was not cut off.

    `batch`: prompts as `collate` makes them with `side="left"`. `repeats`: sequences of each prompt, one after another.
    `static`: steps of a fixed shape (`build_static_steps`), for caches that can take them. The model must be in
    evaluation mode. Its stored `rope_deltas` are neither read nor written.
    """
    import torch

    base = base_of(model)
    device = batch["input_ids"].device
    stops = end_ids(base, builder)
    ends = torch.tensor(stops, device=device)
    logits, steps = _prefill(model, base, batch, repeats, max_new_tokens, static)
    tokens = torch.full((max_new_tokens, len(logits)), builder.tokenizer.pad_token_id, device=device)
    rows_left = torch.arange(len(logits), device=device)  # numbers of the sequences in the batch
    going = torch.ones(len(logits), dtype=torch.bool, device=device)  # which of those are unfinished
    check_every = 1 if device.type == "cpu" else _CHECK_EVERY
    token: Any = None
    for step in range(max_new_tokens):
        if step:
            logits = steps(token)
        token = choose_token(logits, step, rows_left)
        tokens[step, rows_left] = token
        going &= ~torch.isin(token, ends)
        if (step + 1) % check_every:
            continue
        count = int(going.sum())  # waits for the device
        if count == 0:
            break
        size = steps.remaining(count, max_new_tokens - step - 1)
        if size < len(going):
            kept = torch.argsort((~going).int(), stable=True)[:size]  # unfinished rows first, in order
            steps.keep(kept)
            rows_left, token, going = rows_left[kept], token[kept], going[kept]
    return [ids[: next((i + 1 for i, token in enumerate(ids) if token in stops), None)] for ids in tokens.T.tolist()]


def decode_greedy(
    model: "Module",
    rows: Sequence[Sample],
    builder: SampleBuilder,
    max_new_tokens: int,
    device: str,
) -> list[list[int]]:
    """Return the new tokens of each prompt row, as `decode` does, by greedy decoding."""
    batch = collate(rows, builder, device, side="left")
    static = build_static_steps(model, builder, device, batch["input_ids"].shape[1] + max_new_tokens)
    return decode(
        model, batch, builder, max_new_tokens, lambda logits, step, rows_left: logits.argmax(dim=-1), static=static
    )


def build_static_steps(model: "Module", builder: SampleBuilder, device: str, capacity: int) -> "StaticSteps | None":
    """Return steps that CUDA graphs repeat, for one rollout, or None where the plain ones serve as well or alone.

    On a CPU a launch costs nothing, and attention over a whole capacity costs more than over the tokens that are there.
    Families with their own processor have caches and masks of their own. `capacity`: tokens of the longest prompt and
    its answer."""
    base = base_of(model)
    if not device.startswith("cuda") or builder.stock is not None or not _has_axes(base):
        return None
    from ray_vlm.engines.static_step import CudaGraphs, StaticSteps

    return StaticSteps(model, _axes(base), CudaGraphs(), capacity)


class _PlainSteps:
    """Steps with a cache that grows, on any device and for any family."""

    def __init__(
        self, model: "Module", base: "PreTrainedModel", cache: "DynamicCache", position: "Tensor", mask: "Tensor"
    ):
        """`cache`: filled with the prompts; `position` and `mask` as `_prefill` makes them."""
        self._model, self._axes, self._cache, self._position, self._mask = model, _axes(base), cache, position, mask
        self._steps = 0

    def __call__(self, token: "Tensor") -> "Tensor":
        # Finished rows that are still in the batch stay unmasked: their output is not used, and if no prompt is padded
        # attention then needs no mask.
        self._mask = _with_new_token(self._mask)
        out = self._model(
            input_ids=token[:, None],
            attention_mask=self._mask,
            position_ids=self._axes(self._position + self._steps)[..., None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._steps += 1
        return out.logits[:, -1]

    def remaining(self, unfinished: int, tokens_left: int) -> int:
        return unfinished if unfinished <= _KEEP * len(self._mask) else len(self._mask)

    def keep(self, rows: "Tensor") -> None:
        select_rows(self._cache, rows)
        self._position, self._mask = self._position[rows], self._mask[rows]


def end_ids(base: "PreTrainedModel", builder: SampleBuilder) -> list[int]:
    """Return the tokens that end an answer."""
    ends = base.generation_config.eos_token_id or builder.tokenizer.eos_token_id
    return list(ends) if isinstance(ends, list | tuple) else [ends]


def _prefill(
    model: "Module",
    base: "PreTrainedModel",
    batch: dict[str, Any],
    repeats: int,
    max_new_tokens: int,
    static: "StaticSteps | None",
) -> tuple["Tensor", "StaticSteps | _PlainSteps"]:
    """Run one forward of the prompts, and repeat its results for the completions of each prompt.

    Return logits of the first new token `[sequences, vocabulary]`, and the steps that follow.
    """
    mask = batch["attention_mask"]
    inputs, first = forward_inputs(base, batch)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    logits, first, mask = (values.repeat_interleave(repeats, dim=0) for values in (out.logits[:, -1], first, mask))
    if static is not None and is_plain(cache):
        static.start(cache, first, mask, repeats, mask.shape[1] + max_new_tokens)
        return logits, static
    if repeats > 1:
        repeat_rows(cache, repeats)
    make_room(cache)
    return logits, _PlainSteps(model, base, cache, first, mask)


def forward_inputs(base: "PreTrainedModel", batch: dict[str, Any]) -> tuple[dict[str, Any], "Tensor"]:
    """Return a collated batch as a forward takes it that neither reads nor writes the model's `rope_deltas`, and the
    position of the token after each row, `int64 [rows]`."""
    positions, following = _positions(base, batch)
    inputs = {key: value for key, value in batch.items() if key != "mm_token_type_ids" or not _has_axes(base)}
    return inputs | {"position_ids": positions}, following


def _with_new_token(mask: "Tensor") -> "Tensor":
    """Lengthen an attention mask `[sequences, tokens]` by one token that is seen."""
    import torch

    return torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


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
    sizes = {name: batch[name] for name in _IMAGE_SIZES if name in batch}
    positions, deltas = backbone.get_rope_index(ids, batch["mm_token_type_ids"], attention_mask=mask, **sizes)
    # [3, prompts, tokens]; an image takes fewer positions than tokens, by the (negative) delta [prompts, 1].
    return positions, mask.sum(dim=1) + deltas[:, 0]
