"""DPO and GRPO end to end in this process: the run folder, resuming, the reference, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_vlm.config.load import load_job
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.engines.own import OwnEngine
from ray_vlm.errors import ConfigError, DataError, Interrupted, RunError
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.driver import train
from ray_vlm.train.prepare import prepare
from tests.support.parity import write_pairs

LORA = {"rank": 4, "alpha": 8, "target": ["language", "connector", "vision"]}


@pytest.fixture
def dpo_job(job_file, tmp_path: Path, tiny_models: dict[str, str]) -> Any:
    """A function that writes a small DPO job."""

    def write(**sections: Any) -> Path:
        pairs = write_pairs(tmp_path, tiny_models["qwen3_vl"])
        data = {"train": {"path": str(pairs), "format": "preference"}, "eval": {"ratio": 0.2}}
        method = {"name": "dpo", **sections.pop("method", {})}
        evaluate = {"every_steps": 2, "metric": "preference_accuracy"}
        return job_file(method=method, lora=LORA, **{"data": data, "evaluate": evaluate, **sections})

    return write


@pytest.fixture
def grpo_job(job_file, scenes: Path) -> Any:
    """A function that writes a small GRPO job; its reward is one that a random model can earn."""

    def write(**sections: Any) -> Path:
        method = {"name": "grpo", "num_generations": 4, "max_completion_tokens": 12}
        method |= {"rewards": {"tests.integration.test_alignment:even_tokens": 1.0}}
        method |= sections.pop("method", {})
        data = {"eval": {"path": str(scenes / "eval.json"), "max_rows": 4}}
        evaluate = {"every_steps": 2, "max_new_tokens": 12}
        return job_file(method=method, lora=LORA, **{"data": data, "evaluate": evaluate, **sections})

    return write


def even_tokens(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward of the user's: the share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def nothing(completion_ids: list, **columns: Any) -> list[None]:
    """A user's reward that scores nothing."""
    return [None] * len(completion_ids)


def broken_later(completion_ids: list, row_id: list[str], **columns: Any) -> list[float]:
    """A user's reward that fails on what it has not seen before the third step."""
    CALLS.append(row_id)
    if len(CALLS) > 5:  # two of the self-test and its records, then one a step
        raise KeyError("no such column")
    return even_tokens(completion_ids)


CALLS: list[list[str]] = []


def _train(path: Path, *overrides: str, resume: bool = False) -> RunPaths:
    return train(load_job(path, overrides), path.read_text(), resume=resume)


def _lines(paths: RunPaths, kind: str) -> list[dict[str, Any]]:
    return [line for line in current_lines(read_metrics(paths.metrics)) if line["kind"] == kind]


def _weights(paths: RunPaths, folder: str = "final") -> bytes:
    return (paths.root / folder / "adapter_model.safetensors").read_bytes()


def test_dpo_learns_to_prefer(dpo_job) -> None:
    paths = _train(dpo_job(train={"max_steps": 4, "learning_rate": 3e-3}))
    steps, validations = _lines(paths, "train"), _lines(paths, "eval")
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)  # it starts as its own reference
    assert validations[-1]["loss"] < validations[0]["loss"] < np.log(2)
    assert validations[-1]["reward_margin"] == pytest.approx(
        validations[-1]["reward_chosen"] - validations[-1]["reward_rejected"], abs=1e-5
    )
    assert {"preference_accuracy", "reward_margin", "reward_chosen", "entropy"} <= steps[0].keys()
    names = sorted(path.name for path in paths.final.iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors", "preprocessing.json"} <= set(names)
    assert "ref" not in names
    assert (
        json.loads((paths.root / "training_log.json").read_text())["best_checkpoint"]["metrics"]["preference_accuracy"]
        >= 0
    )


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_a_stopped_run_goes_on_bit_for_bit(
    method: str, dpo_job, grpo_job, unplanned: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:

    from ray_vlm.train.callbacks.preemption import PreemptionCallback

    path = (dpo_job if method == "dpo" else grpo_job)(train={"max_steps": 4}, checkpoint={"every_steps": 2})
    undisturbed = _train(path, "run.name=whole")
    assert not unplanned
    real = PreemptionCallback.on_step_end
    steps = []

    def after_two(self: PreemptionCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps.append(state.global_step)
        self._should_stop = lambda: len(steps) == 2
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(PreemptionCallback, "on_step_end", after_two)
    with pytest.raises(Interrupted, match="stopped at step 2 of 4"):
        _train(path, "run.name=cut")
    monkeypatch.undo()
    cut = _train(path, "run.name=cut", resume=True)
    assert _weights(cut) == _weights(undisturbed)
    assert [line["loss"] for line in _lines(cut, "train")] == [line["loss"] for line in _lines(undisturbed, "train")]


def test_the_reference_is_asked_once_and_never_served_stale(dpo_job, tmp_path: Path, capsys) -> None:
    path = dpo_job(method={"precompute_ref_log_probs": True})
    known = _train(path, "run.name=known")
    plain = _train(path, "run.name=plain", "method.precompute_ref_log_probs=false")
    for a, b in zip(_lines(known, "train"), _lines(plain, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["reward_margin"] == pytest.approx(b["reward_margin"], rel=1e-4, abs=1e-6)
    cached = sorted(p.name for p in (tmp_path / "runs" / ".reference").glob("*.npy"))
    assert len(cached) == 1
    capsys.readouterr()
    once = "train.max_steps=1"
    _train(path, "run.name=again", once, "train.learning_rate=1e-4", "method.beta=0.3", "lora.rank=8")
    assert "are read from the cache" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "runs" / ".reference").glob("*.npy")) == cached
    adapter = f"model.adapter={known.root / 'final'}"
    for number, change in enumerate((adapter, "data.max_pixels=30000", "model.load_in_4bit=true", "data.eval=0.3"), 2):
        _train(path, f"run.name=changed_{number}", once, change)
        assert len(list((tmp_path / "runs" / ".reference").glob("*.npy"))) == number


def test_a_changed_image_or_answer_is_another_reference(dpo_job, tmp_path: Path) -> None:
    from ray_vlm.methods.reference import ReferenceSource, describe_reference

    job = load_job(dpo_job(method={"precompute_ref_log_probs": True}))

    def describe() -> dict[str, Any]:
        prepared = prepare(job)
        records = prepared.train.records
        source = ReferenceSource(prepared.job.model, prepared.job.train.precision, "base", prepared.train.fingerprint())
        return describe_reference(source, load_sample_builder(prepared.spec), records)

    before = describe()
    assert describe() == before
    pairs = Path(job.data.train.path)
    first = json.loads(pairs.read_text().splitlines()[0])
    image = Path(first["images"][0])
    data = image.read_bytes()
    image.write_bytes(data[:-2] + b"\x00" + data[-2:])
    assert describe()["images"] != before["images"]
    image.write_bytes(data)
    pairs.write_text(pairs.read_text().replace('"chosen": "', '"chosen": " ', 1))
    assert describe()["rows"] != before["rows"]


def test_grpo_logs_every_part_and_earns_more(grpo_job) -> None:
    path = grpo_job(train={"max_steps": 12, "global_batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-2})
    paths = _train(path, "method.beta=0.02", "method.num_generations_eval=3", "evaluate.at_start=true")
    steps = _lines(paths, "train")
    assert {"reward", "reward_std", "kl", "entropy", "completion_tokens", "truncated", "rollout_gap"} <= steps[0].keys()
    assert steps[0]["reward"] == pytest.approx(steps[0]["reward_even_tokens"])
    assert max(line["rollout_gap"] for line in steps) < 1e-4
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    validations = _lines(paths, "eval")
    assert validations[-1]["reward"] > validations[0]["reward"] + 0.2  # of greedy answers
    assert validations[0]["step"] == 0
    for line in validations:  # a model that is sure of nothing samples about as many even tokens as odd ones
        assert line["sampled_reward"] == pytest.approx(0.5, abs=0.15)
    assert {"reward", "reward_even_tokens", "f1_50", "parse_rate"} <= validations[-1].keys()
    assert (paths.root / "best").is_dir()


def test_a_gap_above_the_bound_ends_the_run_and_closes_the_engine(
    grpo_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[OwnEngine] = []
    monkeypatch.setattr(OwnEngine, "close", lambda self: closed.append(self))
    with pytest.raises(RunError, match=r"step 1: rollout_gap is .* above 1e-12 \(method\.max_rollout_gap\)"):
        _train(grpo_job(), "method.max_rollout_gap=1e-12")
    assert len(closed) == 1
    (line,) = _lines(RunPaths(tmp_path / "runs" / "run"), "train")
    assert line["rollout_gap"] > 1e-12


def test_each_image_is_processed_once_a_step(grpo_job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts of four answers, in two micro-batches, with a reference: sampled, asked about and trained."""
    from ray_vlm.data import collate

    processed: list[int] = []

    def counted(batch: Any, *args: Any) -> Any:
        processed.append(len(batch["images"].sizes))
        return add(batch, *args)

    add = collate.add_pixels
    monkeypatch.setattr(collate, "add_pixels", counted)
    train_options = {"max_steps": 2, "global_batch_size": 16, "micro_batch_size": 8}
    _train(grpo_job(train=train_options, data={"eval": None}), "method.beta=0.02", "method.num_generations=4")
    assert processed == [1] * 8


def test_prompts_with_columns_of_their_own(job_file, tmp_path: Path, scenes: Path) -> None:
    rows = json.loads((scenes / "train.json").read_text())["images"][:8]
    lines = [
        {"prompt": "<image>How many?", "images": [row["file_name"]], "wanted": i % 2} for i, row in enumerate(rows)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {"path": str(tmp_path / "prompts.jsonl"), "format": "prompt", "image_root": str(scenes)}
    method = {"name": "grpo", "num_generations": 4, "max_completion_tokens": 6}
    method |= {"rewards": {"tests.integration.test_alignment:parity_wanted": 1.0}}
    path = job_file(method=method, lora=LORA, data={"train": source}, train={"max_steps": 1})
    assert 0 <= _lines(_train(path), "train")[0]["reward"] <= 1


def parity_wanted(completion_ids: list[list[int]], wanted: list[int], **columns: Any) -> list[float]:
    """A reward that reads a column of the data."""
    if wanted[0] is None:
        raise ValueError("wanted")
    return [float(ids[0] % 2 == want) for ids, want in zip(completion_ids, wanted, strict=True)]


@pytest.mark.parametrize(
    ("rewards", "name"),
    [
        ({"boxes": 1.0}, "boxes"),
        ({"no_such_module:f": 1.0}, "no_such_module"),
        ({"tests.integration.test_alignment:missing": 1.0}, "missing"),
    ],
)
def test_rewards_that_are_none_are_refused_at_start(grpo_job, rewards: dict, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        prepare(load_job(grpo_job(method={"rewards": rewards})))


def test_an_answer_that_nothing_scores_is_named(grpo_job) -> None:
    path = grpo_job(method={"rewards": {"tests.integration.test_alignment:nothing": 1.0}})
    with pytest.raises(DataError, match=r"nothing"):
        _train(path)


def test_a_reward_that_fails_later_leaves_the_checkpoint(grpo_job) -> None:
    CALLS.clear()
    path = grpo_job(
        method={"rewards": {"tests.integration.test_alignment:broken_later": 1.0}},
        train={"max_steps": 9},
        checkpoint={"every_steps": 1},
        evaluate={"every_steps": 100},
    )
    with pytest.raises(DataError, match=r"broken_later.*(KeyError|no such column)"):
        _train(path, "run.name=hurt")
    root = load_job(path).run.output_dir
    assert list(Path(root, "hurt").glob("checkpoint-*"))


def test_pairs_that_teach_nothing_are_named(dpo_job, tmp_path: Path) -> None:
    path = dpo_job()
    pairs = Path(load_job(path).data.train.path)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5] |= {"images": [], "prompt": "What is there?"}
    pairs.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as error:
        prepare(load_job(path))
    problems = "\n".join(error.value.problems)
    assert "row 3" in problems
    assert "chosen and rejected are the same" in problems
    assert "row 5" in problems
    assert "its prompt has no image, and detection needs one" in problems


def test_pairs_of_other_image_sizes_are_refused(dpo_job) -> None:
    from ray_vlm.data.preprocessing import describe_preprocessing

    job = load_job(dpo_job())
    about = {"preprocessing": describe_preprocessing(load_sample_builder(prepare(job).spec))}
    beside = Path(f"{job.data.train.path}.about.json")
    beside.write_text(json.dumps(about))
    prepare(job)
    about["preprocessing"]["images"]["max_pixels"] //= 2
    beside.write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=r"sampled with another image sizes \(max_pixels"):
        prepare(job)


@pytest.mark.parametrize("precompute", [pytest.param(True, marks=pytest.mark.slow), False])
def test_parts_of_a_given_adapter_stay_frozen_through_the_reference(dpo_job, tmp_path: Path, precompute: bool) -> None:
    from safetensors.torch import load_file

    first = _train(dpo_job(), "run.name=first", "train.max_steps=2")
    path = dpo_job(method={"precompute_ref_log_probs": precompute}, model={"adapter": str(first.final)})
    paths = _train(path, "run.name=second", "lora.target=[language]", "evaluate.at_start=true", "train.max_steps=3")
    before, after = (load_file(run.final / "adapter_model.safetensors") for run in (first, paths))
    changed = {name for name in before if not bool((before[name] == after[name]).all())}
    assert changed
    assert not any("visual" in name for name in changed)
