"""The step of fixed shape writes the tokens of the plain loop, also when it is recorded and repeated as a graph is."""

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ray_vlm.data.samples import SampleBuilder
from ray_vlm.engines import sampling as sampling_module
from ray_vlm.engines import static_step
from ray_vlm.engines.decoding import _axes
from ray_vlm.engines.fixed_cache import FixedCache
from ray_vlm.engines.interface import Completion, Sampling
from ray_vlm.engines.sampling import sample_groups
from ray_vlm.engines.static_step import StaticSteps
from ray_vlm.models.backbone import base_of
from ray_vlm.models.operations import OperationCounter
from tests.conftest import FAMILIES
from tests.support.graphs import RecordedSteps
from tests.support.rollouts import SEEDS, adapted_model, fresh_model, prompt_builder, prompt_rows

SAMPLED = Sampling(num_generations=4, max_new_tokens=20, temperature=0.8, top_p=0.95)
Answers = list[list[Completion]]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[StaticSteps]]:
    """Let `sample_groups` use static steps with this capture on the CPU; return those that it has built."""

    def set_up(capture: Any) -> list[StaticSteps]:
        built: list[StaticSteps] = []

        def build(model: Any, builder: SampleBuilder, device: str, capacity: int) -> StaticSteps:
            built.append(StaticSteps(model, _axes(base_of(model)), capture, capacity))
            return built[-1]

        monkeypatch.setattr(sampling_module, "build_static_steps", build)
        return built

    return set_up


def _sample(
    model: Any, builder: SampleBuilder, sampling: Sampling = SAMPLED, group_batch: int | None = None
) -> Answers:
    return sample_groups(model, prompt_rows(builder), builder, sampling, SEEDS, "cpu", group_batch)


def _assert_same(one: Sequence[list[Completion]], other: Sequence[list[Completion]]) -> None:
    assert [[answer.ids for answer in group] for group in one] == [[a.ids for a in group] for group in other]
    for group, expected in zip(one, other, strict=True):
        for a, b in zip(group, expected, strict=True):
            assert a.finished == b.finished
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize(("family", "load_in_4bit"), [*((f, False) for f in FAMILIES), ("qwen3_vl", True)])
def test_same_answers_as_the_plain_loop(
    family: str, load_in_4bit: bool, tiny_models: dict[str, str], use: Callable[[Any], list[StaticSteps]]
) -> None:
    builder, model = prompt_builder(tiny_models[family]), adapted_model(tiny_models[family], load_in_4bit)
    plain = _sample(model, builder)
    some = {answer.ids[5 + 3 * number] for number, answer in enumerate(plain[0])}
    base_of(model).generation_config.eos_token_id = sorted(some)  # so that sequences end, at different tokens
    plain = _sample(model, builder)
    assert len({len(answer.ids) for group in plain for answer in group}) > 2
    use(None)
    _assert_same(_sample(model, builder), plain)
    recorded = RecordedSteps()
    static = use(recorded)
    _assert_same(_sample(model, builder), plain)
    assert static[0].captures == len(recorded.sizes) == 1  # too few tokens to come for another
    assert recorded.replays > 5


def test_sizes_are_halved_and_captured_once_for_all_portions(
    tiny_models: dict[str, str], use: Callable[[Any], list[StaticSteps]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_step, "_WORTH", 0)
    builder, model = prompt_builder(tiny_models["qwen3_vl"]), fresh_model(tiny_models["qwen3_vl"])
    plain = _sample(model, builder)
    model.generation_config.eos_token_id = sorted({answer.ids[2 + n] for n, answer in enumerate(plain[0])})
    plain = _sample(model, builder)
    recorded = RecordedSteps()
    static = use(recorded)
    _assert_same(_sample(model, builder, group_batch=2), plain)
    assert len(static) == 1
    assert 1 < len(recorded.sizes) <= 4  # of 8, 4, 2 and 1 sequences


def test_a_step_that_cannot_be_captured_runs_as_it_is(
    tiny_models: dict[str, str], use: Callable[[Any], list[StaticSteps]], caplog: pytest.LogCaptureFixture
) -> None:
    builder, model = prompt_builder(tiny_models["qwen3_vl"]), fresh_model(tiny_models["qwen3_vl"])
    plain = _sample(model, builder)

    def read(module: Any, args: Any, output: torch.Tensor) -> None:
        float(output.flatten()[0])

    handle = model.model.language_model.norm.register_forward_hook(read)
    static = use(RecordedSteps())
    _assert_same(_sample(model, builder), plain)
    handle.remove()
    assert static[0].captures == 0
    lines = [record.message for record in caplog.records if "CUDA graph" in record.message]
    assert len(lines) == 1
    assert "_local_scalar_dense reads the device during a capture" in lines[0]


def test_the_stand_in_notices_a_number_of_python_s() -> None:
    total, added = torch.zeros(1), 1.0
    replay = RecordedSteps()(lambda: total.fill_(added))
    added = 2.0
    replay()
    assert float(total) == 1.0


def test_out_of_memory_in_a_capture_is_not_passed_over(
    tiny_models: dict[str, str], use: Callable[[Any], list[StaticSteps]]
) -> None:
    builder, model = prompt_builder(tiny_models["qwen3_vl"]), fresh_model(tiny_models["qwen3_vl"])

    def fail(step: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    use(fail)
    with pytest.raises(torch.OutOfMemoryError):
        _sample(model, builder)


def test_the_cache_is_free_when_the_rollout_ends(
    tiny_models: dict[str, str], use: Callable[[Any], list[StaticSteps]], monkeypatch: pytest.MonkeyPatch
) -> None:
    builder, model = prompt_builder(tiny_models["qwen3_vl"]), fresh_model(tiny_models["qwen3_vl"])
    kept: list[weakref.ref] = []

    class Seen(FixedCache):
        def __init__(self, *args: Any):
            super().__init__(*args)
            kept.append(weakref.ref(self))

    monkeypatch.setattr(static_step, "FixedCache", Seen)
    built = use(RecordedSteps())
    gc.collect()
    gc.disable()
    try:
        _sample(model, builder)
        built.clear()
        assert [reference() for reference in kept] == [None]
    finally:
        gc.enable()


def test_replays_count_the_same_operations(
    tiny_models: dict[str, str], use: Callable[[Any], list[StaticSteps]]
) -> None:
    builder, model = prompt_builder(tiny_models["qwen3_vl"]), fresh_model(tiny_models["qwen3_vl"])
    counter = OperationCounter()
    counter.attach(model)
    counts = []
    for capture in (None, RecordedSteps()):
        if capture is not None:
            use(capture)
        _sample(model, builder)
        counts.append(counter.take())
    assert counts[0] == counts[1]
    assert counts[0][0].tokens > 0
