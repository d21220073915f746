"""The decoding loop of sampled and greedy answers: prompts are prefilled once, then one token is decoded at a time.

It differs from transformers' `generate` in three ways. New keys and values are written in place (`kv_cache.py`), where
`DynamicCache` copies the whole cache at every token. Finished rows leave the batch. A prompt with several completions
is prefilled once. The tokens are those of `generate`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ray_vlm.data.collate import collate
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.methods.kv_cache import make_room
from ray_vlm.models.backbone import base_of

# Finished rows leave the batch when at most this share is unfinished. Dropping each at once copies the cache too often.
_KEEP = 0.75

# (logits `[sequences, vocabulary]`, number of the step, numbers of these sequences `int64 [sequences]`) -> next tokens
# `int64 [sequences]`
ChooseToken = Callable[[Any, int, Any], Any]


def decode(
    model: Any,
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
    return [_until_end(ids, set(ends.tolist())) for ids in tokens.T.tolist()]


def decode_greedy(
    model: Any, rows: Sequence[Sample], builder: SampleBuilder, max_new_tokens: int, device: str
) -> list[list[int]]:
    """Return the new tokens of each prompt row, as `decode` does, by greedy decoding."""
    batch = collate(rows, builder, device, side="left")
    return decode(model, batch, builder, max_new_tokens, lambda logits, step, rows_left: logits.argmax(dim=-1))


def end_ids(base: Any, builder: SampleBuilder) -> list[int]:
    """Return the tokens that end an answer."""
    ends = base.generation_config.eos_token_id or builder.tokenizer.eos_token_id
    return list(ends) if isinstance(ends, list | tuple) else [ends]


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    """Return a sequence up to and including its first end token."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), None)]


def _prefill(model: Any, base: Any, batch: dict[str, Any], repeats: int) -> tuple[Any, Any, Any, Any]:
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
    make_room(cache)
    repeated = (values.repeat_interleave(repeats, dim=0) for values in (first, mask))
    return out.logits[:, -1].repeat_interleave(repeats, dim=0), cache, *repeated


def _has_axes(base: Any) -> bool:
    """Return whether positions have M-RoPE's three axes."""
    return hasattr(base.base_model, "get_rope_index")


def _axes(base: Any) -> Callable[[Any], Any]:
    """Return a function that maps positions of text `[...]` to the model's format: M-RoPE's axes are equal for text."""
    return (lambda position: position.expand(3, *position.shape)) if _has_axes(base) else (lambda position: position)


def _positions(base: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Return the positions of the prompts' tokens, and of the first new token.

    They are passed in every call, because those that a model stores (`rope_deltas`) belong to the last batch that it
    saw, which may be another. Without images `get_rope_index` returns plain positions, counted after the padding.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if not _has_axes(base):
        return (mask.cumsum(dim=1) - 1).clamp(min=0), mask.sum(dim=1)
    positions, deltas = base.base_model.get_rope_index(
        ids, batch["mm_token_type_ids"], image_grid_thw=batch.get("image_grid_thw"), attention_mask=mask
    )
    return positions, mask.sum(dim=1) + deltas[:, 0]
