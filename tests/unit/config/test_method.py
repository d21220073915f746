"""What a job may ask of each method: rows, settings, batch sizes, metrics."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_vlm.config.load import dump_job, fill_defaults, load_job
from ray_vlm.errors import ConfigError


def _load(tmp_path: Path, method: Any, **sections: Any) -> Any:
    train = {"path": "rows.jsonl", "format": "preference" if "dpo" in str(method) else "coco"}
    job = {"method": method, "model": {"name": "tiny"}, "data": {"train": train}}
    for name, values in sections.items():
        job[name] = {**job.get(name, {}), **values}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return load_job(path)


def _problems(tmp_path: Path, method: Any, **sections: Any) -> str:
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, method, **sections)
    return "\n".join(error.value.problems)


def test_defaults_that_follow_the_method(tmp_path: Path) -> None:
    assert _load(tmp_path, "dpo").evaluate.metric == "loss"
    assert _load(tmp_path, "grpo").evaluate.metric == "reward"
    assert _load(tmp_path, "grpo", evaluate={"metric": "f1_50"}).evaluate.metric == "f1_50"


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [("sft", "beta", 0.1), ("sft", "rewards", {"bbox": 1.0}), ("dpo", "num_generations", 4), ("grpo", "loss_on", "x")],
)
def test_settings_of_other_methods_are_refused(tmp_path: Path, method: str, key: str, value: Any) -> None:
    problems = _problems(tmp_path, {"name": method, key: "whole_sequence" if value == "x" else value})
    assert re.search(rf"job\.yaml:\d+: `method\.{key}`: {method} does not use it", problems)


def test_settings_of_other_methods_are_dropped_at_their_default(tmp_path: Path) -> None:
    """Earlier versions wrote the settings of all methods into `resolved.json`, and so did `ray-vlm config`."""
    every = {"beta": None, "loss_on": "answer", "num_generations": 8, "share_prefixes": True, "trl": {}}
    for name in ("sft", "dpo", "grpo"):
        job = _load(tmp_path, {"name": name, **every})
        assert job == _load(tmp_path, name)
        written = dump_job(job)
        assert fill_defaults(written | {"method": every | written["method"]}) == written
        assert "num_generations" in written["method"] or name != "grpo"
        assert ("loss_on" in written["method"]) == (name == "sft")


@pytest.mark.parametrize("name", ["ppo", 3, None, ["sft"]])
def test_an_unknown_method_is_told_with_those_that_are_known(tmp_path: Path, name: Any) -> None:
    problems = _problems(tmp_path, {"name": name, "beta": 0.1}, run={"name": "a/b"})
    assert f"`method.name` is {name!r}, but should be one of 'sft', 'dpo', 'grpo'." in problems
    assert "`run.name`" in problems, "other problems are told too"


def test_misspelt_settings_are_named_for_the_method(tmp_path: Path) -> None:
    assert "Did you mean `temperature`?" in _problems(tmp_path, {"name": "grpo", "temprature": 0.5})
    assert "`method.temprature` is not a setting. Known here: name, trl, loss_on." in _problems(
        tmp_path, {"temprature": 0.5}
    )


@pytest.mark.parametrize(
    ("method", "part", "form"),
    [
        ("dpo", "train", "coco"),
        ("sft", "train", "preference"),
        ("sft", "eval", "prompt"),
        ("grpo", "eval", "preference"),
        ("dpo", "test", "preference"),
        ("grpo", "test", "prompt"),
        ("sft", "train", "rec"),
        ("grpo", "test", "rec"),
        ("sft", "train", "image_folder"),
        ("grpo", "train", "openai"),
        ("grpo", "train", "messages"),
    ],
)
def test_rows_of_another_method_are_refused(tmp_path: Path, method: str, part: str, form: str) -> None:
    problems = _problems(tmp_path, method, data={part: {"path": f"{part}.jsonl", "format": form}})
    assert f"data.{part}.format" in problems
    assert f"{form} holds no rows for {method} of detection" in problems


@pytest.mark.parametrize(
    ("train", "workers", "message"),
    [
        ({"global_batch_size": 20}, 1, "8 does not divide train.global_batch_size=20"),
        ({"global_batch_size": 8}, 2, "2 workers cannot share 8 sampled answers in 1 groups evenly"),
        ({"global_batch_size": 32, "micro_batch_size": 5}, 2, "5 does not divide the 16 sampled answers of one worker"),
    ],
)
def test_groups_that_do_not_divide(tmp_path: Path, train: dict, workers: int, message: str) -> None:
    assert message in _problems(tmp_path, "grpo", train=train, cluster={"num_workers": workers})
    _load(tmp_path, "grpo", train={"global_batch_size": 32, "micro_batch_size": 16}, cluster={"num_workers": 2})
    _load(tmp_path, "grpo", train={"global_batch_size": 32, "micro_batch_size": 4}, cluster={"num_workers": 2})


def test_pairs_that_do_not_divide(tmp_path: Path) -> None:
    assert "3 workers cannot share 16 pairs evenly" in _problems(tmp_path, "dpo", cluster={"num_workers": 3})


def test_a_reference_needs_an_adapter(tmp_path: Path) -> None:
    full = {"lora": None, "model": {"name": "tiny", "load_in_4bit": False}}
    path = tmp_path / "job.yaml"
    job = {"method": "dpo", "data": {"train": {"path": "p.jsonl", "format": "preference"}}, **full}
    path.write_text(yaml.safe_dump(job))
    with pytest.raises(ConfigError, match="the reference is the model with its adapter off"):
        load_job(path)


def test_metrics_of_each_method(tmp_path: Path) -> None:
    assert "Use one of: loss, preference_accuracy, reward_margin." in _problems(
        tmp_path, "dpo", evaluate={"metric": "f1_50"}
    )
    assert "Use one of: reward, f1_50" in _problems(tmp_path, "grpo", evaluate={"metric": "loss"})
    for name in ("prompt", "rec"):
        prompts = {"eval": {"path": "eval.jsonl", "format": name}}
        assert "Use one of: reward." in _problems(tmp_path, "grpo", data=prompts, evaluate={"metric": "f1_50"})


def test_weights_and_oversampling_need_classes(tmp_path: Path) -> None:
    assert "grpo has none" in _problems(tmp_path, "grpo", data={"class_weights": "inverse_sqrt"})
    assert "have no classes" in _problems(tmp_path, "dpo", data={"oversample": "auto"})
    rec = {"train": {"path": "rows.jsonl", "format": "rec"}, "oversample": "auto"}
    assert "rows of rec have no classes" in _problems(tmp_path, "grpo", data=rec)


def test_trl_options_that_the_job_names(tmp_path: Path) -> None:
    problems = _problems(tmp_path, {"name": "grpo", "trl": {"num_generations": 4, "num_iterations": 2}})
    assert "this job sets that as `method.num_generations`" in problems
    assert "decided by how rows are fed to TRL" in problems
