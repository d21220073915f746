"""Rollouts with a shared prefill: `generate`'s own tokens, the trainer's log-probabilities, the right frequencies."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from ray_vlm.data.collate import collate
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.engines.interface import Completion, Sampling
from ray_vlm.engines.sampling import sample_groups
from tests.conftest import FAMILIES
from tests.support.rollouts import (
    GREEDY,
    PROMPTS,
    SEEDS,
    adapted_model,
    fresh_model,
    prompt_builder,
    prompt_rows,
)
from tests.support.twins import slow_but


def _generate(model: Any, rows: Sequence[Sample], builder: SampleBuilder, sampling: Sampling) -> list[list[int]]:
    """`generate` on copies of each prompt, greedy: new tokens with what follows the end."""
    copies = [row for row in rows for _ in range(sampling.num_generations)]
    batch = collate(copies, builder, side="left")
    never = [builder.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")]
    with torch.inference_mode():
        tokens = model.generate(
            **batch,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            use_cache=True,
            suppress_tokens=never,
            pad_token_id=builder.tokenizer.pad_token_id,
        )
    return tokens[:, batch["input_ids"].shape[1] :].tolist()


def _same_tokens(groups: list[list[Completion]], stock: list[list[int]]) -> None:
    flat = [completion for group in groups for completion in group]
    assert len(flat) == len(stock)
    for completion, tokens in zip(flat, stock, strict=True):
        assert completion.ids == tokens[: len(completion.ids)]
        assert len(completion.ids) == len(completion.logprobs)
        assert completion.finished or len(completion.ids) == len(tokens)


def _scored(
    model: Any, row: Sample, completion: Completion, builder: SampleBuilder, temperature: float
) -> torch.Tensor:
    """Log-probabilities by one forward over prompt and completion, as the trainer computes them."""
    ids = np.concatenate([row.input_ids, np.array(completion.ids, np.int32)])
    with torch.no_grad():
        logits = model(**collate([Sample(ids, row.labels, row.images)], builder)).logits[0]
    new = torch.tensor(completion.ids)
    before = logits[len(row.input_ids) - 1 : -1] / temperature
    return before.log_softmax(-1).gather(1, new[:, None])[:, 0]


SHOWN = {"mixed": PROMPTS, "text": PROMPTS[1:2] * 2, "one": PROMPTS[:1]}
QUICK = [("qwen3_vl", "mixed"), ("qwen3_vl", "text"), ("qwen2_5_vl", "mixed"), ("qwen2_5_vl", "one")]


@pytest.mark.parametrize(("family", "shown"), slow_but(QUICK, itertools.product(FAMILIES, SHOWN)))
def test_greedy_equals_generate_on_copies(family: str, shown: str, tiny_models: dict[str, str]) -> None:
    prompts = SHOWN[shown]
    builder, model = prompt_builder(tiny_models[family]), fresh_model(tiny_models[family])
    rows = prompt_rows(builder, prompts)
    groups = sample_groups(model, rows, builder, GREEDY, SEEDS[: len(rows)], "cpu")
    _same_tokens(groups, _generate(model, rows, builder, GREEDY))
    assert not any(completion.finished for group in groups for completion in group)


@pytest.mark.parametrize(
    ("family", "load_in_4bit"),
    slow_but([("qwen3_vl", True), ("qwen2_5_vl", False)], itertools.product(FAMILIES, [False, True])),
)
def test_the_model_in_training_rolls_out_as_generate_does(
    family: str, load_in_4bit: bool, tiny_models: dict[str, str]
) -> None:
    builder, model = prompt_builder(tiny_models[family]), adapted_model(tiny_models[family], load_in_4bit)
    rows = prompt_rows(builder)
    model.base_model.model.model.visual.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    groups = sample_groups(model, rows, builder, GREEDY, SEEDS, "cpu")
    assert modes == {name: module.training for name, module in model.named_modules()}
    batch = collate([Sample(row.input_ids, row.input_ids, row.images) for row in rows], builder)
    model(**batch).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert sum(g is not None and bool(g.any()) for g in gradients) > len(gradients) / 2
    _same_tokens(groups, _generate(model.eval(), rows, builder, GREEDY))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_ends_with_its_end_token(family: str, tiny_models: dict[str, str]) -> None:
    builder, model = prompt_builder(tiny_models[family]), fresh_model(tiny_models[family])
    rows = prompt_rows(builder)
    full_ids = [group[0].ids for group in sample_groups(model, rows, builder, GREEDY, SEEDS, "cpu")]
    ends = {full_ids[0][5], full_ids[2][9]}
    model.generation_config.eos_token_id = sorted(ends)
    groups = sample_groups(model, rows, builder, GREEDY, SEEDS, "cpu")
    _same_tokens(groups, _generate(model, rows, builder, GREEDY))
    for group, tokens in zip(groups, full_ids, strict=True):
        first = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
        assert all(completion.ids == tokens[:first] for completion in group)
        assert all(completion.finished == (first is not None) for completion in group)
    assert groups[0][0].finished
    assert groups[2][0].finished


@pytest.mark.parametrize(
    ("family", "temperature"),
    slow_but([("qwen3_vl", 0), ("qwen2_5_vl", 0.7)], itertools.product(FAMILIES, [0, 0.7, 1.0])),
)
def test_logprobs_are_those_of_the_trainer_s_forward(
    family: str, temperature: float, tiny_models: dict[str, str]
) -> None:
    builder, model = prompt_builder(tiny_models[family]), adapted_model(tiny_models[family])
    rows = prompt_rows(builder)
    sampling = Sampling(num_generations=2, max_new_tokens=16, temperature=temperature, top_p=0.9, top_k=200)
    groups = sample_groups(model, rows, builder, sampling, SEEDS, "cpu")
    for row, group in zip(rows, groups, strict=True):
        for completion in group:
            expected = _scored(model, row, completion, builder, temperature or 1.0)
            assert torch.allclose(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_does_not_depend_on_its_batch(family: str, tiny_models: dict[str, str]) -> None:
    builder, model = prompt_builder(tiny_models[family]), fresh_model(tiny_models[family])
    rows = prompt_rows(builder)
    sampling = Sampling(num_generations=4, max_new_tokens=24)

    def ids(rows: Sequence[Sample], seeds: Sequence, group_batch: int | None = None) -> list[list[list[int]]]:
        groups = sample_groups(model, rows, builder, sampling, seeds, "cpu", group_batch)
        return [[completion.ids for completion in group] for group in groups]

    together = ids(rows, SEEDS)
    assert together == ids(rows, SEEDS, group_batch=1) == ids(rows, SEEDS, group_batch=3)
    assert together == ids(rows[::-1], SEEDS[::-1])[::-1]
    assert len({tuple(tokens) for group in together for tokens in group}) == 16
    assert ids(rows[:1], SEEDS[1:2]) != together[:1]
    assert ids([], []) == []
    with pytest.raises(ValueError, match="zip"):
        ids(rows, SEEDS[:1])


def _first_tokens(model: Any, builder: SampleBuilder, sampling: Sampling) -> tuple[np.ndarray, torch.Tensor]:
    """How often each token came first in four groups of one prompt, and the logits they were drawn from."""
    rows = prompt_rows(builder, PROMPTS[1:2])
    groups = sample_groups(model, rows * 4, builder, sampling, SEEDS, "cpu", group_batch=1)
    with torch.no_grad():
        logits = model(**collate(rows, builder)).logits[0, -1]
    first = [completion.ids[0] for group in groups for completion in group]
    return np.bincount(first, minlength=len(logits)), logits


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_first_tokens_come_as_often_as_they_are_likely(temperature: float, tiny_models: dict[str, str]) -> None:
    folder = tiny_models["qwen3_vl"]
    builder, model = prompt_builder(folder), fresh_model(folder)
    counts, logits = _first_tokens(model, builder, Sampling(2000, 1, temperature))
    logits[[model.config.image_token_id, model.config.video_token_id]] = -torch.inf
    expected = (logits / temperature).double().softmax(-1).numpy() * counts.sum()
    order = np.argsort(expected)
    edges = np.flatnonzero(np.diff(np.cumsum(expected[order]) // 20)) + 1  # bins of about 20 and more
    seen, due = (np.add.reduceat(values[order], [0, *edges]) for values in (counts, expected))
    assert len(due) > 50
    assert chisquare(seen, due).pvalue > 1e-3
    assert counts[expected == 0].sum() == 0


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.1}, {"top_k": 20, "top_p": 0.5}])
def test_truncation_is_that_of_transformers(options: dict[str, Any], tiny_models: dict[str, str]) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    folder = tiny_models["qwen2_5_vl"]
    builder, model = prompt_builder(folder), fresh_model(folder)
    counts, logits = _first_tokens(model, builder, Sampling(200, 1, temperature=0.5, **options))
    scores = logits[None] / 0.5
    if "top_k" in options:
        scores = TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(None, scores)
    assert set(np.flatnonzero(counts)) == set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_image_tokens_are_never_sampled(temperature: float, tiny_models: dict[str, str]) -> None:
    folder = tiny_models["qwen3_vl"]
    builder, model = prompt_builder(folder), fresh_model(folder)
    never = [model.config.image_token_id, model.config.video_token_id]

    def raise_them(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., never] += 100.0
        return logits

    rows, sampling = prompt_rows(builder), Sampling(num_generations=3, max_new_tokens=8, temperature=temperature)
    plain = sample_groups(model, rows, builder, sampling, SEEDS, "cpu")
    model.lm_head.register_forward_hook(raise_them)
    groups = sample_groups(model, rows, builder, sampling, SEEDS, "cpu")
    for group, before in zip(groups, plain, strict=True):
        assert [completion.ids for completion in group] == [completion.ids for completion in before]
        assert not {token for completion in group for token in completion.ids} & set(never)
        assert max(value for completion in group for value in completion.logprobs) < -50  # told, though banned


@pytest.mark.parametrize(
    ("family", "group_batch"),
    slow_but([("qwen3_vl", None), ("qwen3_vl", 1), ("qwen2_5_vl", 2)], itertools.product(FAMILIES, [None, 2, 1])),
)
def test_each_image_is_encoded_once(family: str, group_batch: int | None, tiny_models: dict[str, str]) -> None:
    builder, model = prompt_builder(tiny_models[family]), fresh_model(tiny_models[family])
    patches, tokens = [], []
    visual, language = model.model.visual, model.model.language_model
    visual.register_forward_pre_hook(lambda module, args, kwargs: patches.append(len(args[0])), with_kwargs=True)
    language.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    rows = prompt_rows(builder)
    sample_groups(model, rows, builder, Sampling(5, 3), SEEDS, "cpu", group_batch)
    assert sum(patches) == len(collate(rows, builder)["pixel_values"])
    assert len(patches) == {None: 1, 2: 2, 1: 3}[group_batch]  # one of the prompts has no image
    if group_batch == 1:
        assert sum(tokens) == sum(len(row.input_ids) for row in rows) + 4 * 5 * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_positions_neither_disturb_nor_change(family: str, tiny_models: dict[str, str]) -> None:
    builder, model = prompt_builder(tiny_models[family]), fresh_model(tiny_models[family])
    rows = prompt_rows(builder)
    groups = sample_groups(model, rows, builder, GREEDY, SEEDS, "cpu")
    assert model.model.rope_deltas is None
    stale = torch.full((2, 1), 77)
    model.model.rope_deltas = stale
    assert sample_groups(model, rows, builder, GREEDY, SEEDS, "cpu") == groups
    assert model.model.rope_deltas is stale
