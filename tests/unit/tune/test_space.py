"""Spaces: every bad key and range is told at once and before anything starts; values are resolved by arithmetic, and no
other text of a formula gets through."""

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_vlm.config.data import Window
from ray_vlm.config.load import dump_job, load_job
from ray_vlm.errors import ConfigError
from ray_vlm.tune.space import (
    Setting,
    Space,
    compute,
    examples,
    load_space,
    own_values,
    read_formula,
    resolve,
    write_overrides,
)
from ray_vlm.tune.trial import Sweep, build_trial_job

GOOD: dict[str, Any] = {
    "train.learning_rate": {"loguniform": [2e-5, 1e-3]},
    "lora.rank": {"choice": [8, 16]},
    "lora.alpha": "2 * lora.rank",
    "data.oversample": {"grid": [None, {"drain": 2.0}, {"drain": 4.0}]},
    "train.warmup_ratio": "train.learning_rate * 10",
    "data.shuffle": False,
    "method.trl.loss_type": {"value": "nll"},
}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    data = {"train": {"path": "a.json"}, "eval": 0.1}
    path.write_text(yaml.safe_dump({"model": {"name": "x"}, "task": {"labels": ["drain"]}, "data": data}))
    return path


def _write(tmp_path: Path, space: Any) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(space if isinstance(space, str) else yaml.safe_dump(space))
    return path


def test_values_are_drawn_shared_and_computed(tmp_path: Path, job: Path) -> None:
    space = load_space(_write(tmp_path, GOOD), job, [])
    assert {s.key for s in space.searched} == {"train.learning_rate", "lora.rank", "data.oversample"}
    assert space.grid_size == 3
    drawn = {"train.learning_rate": 1e-4, "lora.rank": 16, "data.oversample": {"drain": 2.0}}
    values = resolve(space, drawn, dump_job(load_job(job)))
    assert values["lora.alpha"] == 32
    assert type(values["lora.alpha"]) is int
    assert values["train.warmup_ratio"] == pytest.approx(1e-3)
    trial = load_job(job, write_overrides(values))
    assert (trial.lora.rank, trial.lora.alpha, trial.data.shuffle) == (16, 32, "none")  # type: ignore[union-attr]
    assert trial.data.oversample == {"drain": 2.0}
    assert trial.method.trl == {"loss_type": "nll"}


def test_one_class_of_a_setting_is_searched(tmp_path: Path, job: Path) -> None:
    from ray_vlm.tune.trial import Sweep, build_trial_job

    path = _write(tmp_path, {"data.oversample.toe-drain": {"uniform": [1.0, 8.0]}, "data.test.ratio": 0.2})
    space = load_space(path, job, ["data.test=0.1"])
    sweep = Sweep(dump_job(load_job(job, ["data.test=0.1"])), space, "sweep", "loss")
    assert own_values(Space(space.searched), sweep.job) == {"data.oversample.toe-drain": 1.0}, "as often as all others"
    made, values = build_trial_job(sweep, 0, {"data.oversample.toe-drain": 3.0})
    assert made.data.oversample == {"toe-drain": 3.0}
    assert made.data.test is not None
    assert made.data.test.ratio == values["data.test.ratio"] == 0.2
    with pytest.raises(ConfigError) as error:
        load_space(path, job, ["data.oversample=auto", "data.test=0.1"])
    (problem,) = error.value.problems
    assert "`data.oversample` is 'auto', not a section" in problem
    assert "search all of it: {choice: [...]}" in problem


def test_a_formula_may_use_the_job_and_another_formula(tmp_path: Path, job: Path) -> None:
    settings = {"lora.rank": {"choice": [4, 8]}, "seed": "lora.alpha + 1", "lora.alpha": "lora.rank * train.num_epochs"}
    space = load_space(_write(tmp_path, settings), job, ["train.num_epochs=3"])
    values = resolve(space, {"lora.rank": 8}, dump_job(load_job(job, ["train.num_epochs=3"])))
    assert (values["lora.alpha"], values["seed"]) == (24, 25)
    circle = Space((Setting("seed", "derived", ("lora.alpha",)), Setting("lora.alpha", "derived", ("seed",))))
    with pytest.raises(ValueError, match=r"seed, lora\.alpha are computed from one another"):
        resolve(circle, {}, {})


def test_examples_touch_every_end(tmp_path: Path, job: Path) -> None:
    space = load_space(_write(tmp_path, GOOD | {"seed": {"randint": [0, 10]}}), job, [])
    drawn = list(examples(space))
    assert {d["train.learning_rate"] for d in drawn} == {2e-5, 1e-3}
    assert {d["seed"] for d in drawn} == {0, 9}
    assert [d["data.oversample"] for d in drawn if d["data.oversample"]] == [{"drain": 2.0}, {"drain": 4.0}]
    assert len(drawn) == 1 + 1 + 1 + 2 + 1


@pytest.mark.parametrize(
    ("distribution", "reason"),
    [
        ({"loguniform": [0, 1]}, "there is no logarithm of 0"),
        ({"loguniform": [-1e-3, 1]}, "there is no logarithm"),
        ({"uniform": [2, 1]}, "is empty"),
        ({"uniform": [1, 1]}, "is empty"),
        ({"uniform": [1]}, "needs 2 numbers"),
        ({"randint": [1, 10**400]}, "is without end"),
        ({"choice": [datetime.date(2026, 1, 1), 2]}, "is a date. Use text"),
        ({"choice": [{datetime.date(2026, 1, 1): 1}, 2]}, "the key .* is not a text. Put quotes around it"),
        ({"value": b"x"}, "is a bytes. Use text"),
        ({1: 2}, "the key 1 is not a text"),
        ([datetime.date(2026, 1, 1)], "is a date. Use text"),
        ({"uniform": [1, True]}, "needs 2 numbers"),
        ({"uniform": [0, float("inf")]}, "without end"),
        ({"quniform": [0, 1, 0]}, "does not fit between the ends"),
        ({"quniform": [0, 1, 2]}, "does not fit between the ends"),
        ({"randint": [0, 1.5]}, "whole numbers"),
        ({"choice": []}, "needs a list of values"),
        ({"choice": 3}, "needs a list of values"),
        ({"choice": [1, 1]}, "lists a value twice"),
        ({"normal": [0, 1]}, "no distribution"),
        ({"choice": [1], "uniform": [0, 1]}, "no distribution"),
        ({}, "no distribution"),
        ("2 * ", "no formula"),
    ],
)
def test_a_bad_range_is_refused_with_its_line(tmp_path: Path, job: Path, distribution: Any, reason: str) -> None:
    path = _write(tmp_path, {"lora.rank": {"choice": [8]}, "train.learning_rate": distribution})
    with pytest.raises(ConfigError, match=reason) as error:
        load_space(path, job, [])
    assert "space.yaml:" in str(error.value)
    assert "`train.learning_rate`" in str(error.value)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path, job: Path) -> None:
    settings = {"cluster.num_workers": {"choice": [1]}, "a-b": 1, "train.learning_rate": {"uniform": [3, 1]}}
    with pytest.raises(ConfigError) as error:
        load_space(_write(tmp_path, settings), job, [])
    assert len(error.value.problems) == 3
    for text, reason in (
        ("- a", "mapping"),
        ("a: 1\na: 2", "set twice"),
        ("seed: 3", "nothing to search"),
        ("", "nothing"),
    ):
        with pytest.raises(ConfigError, match=reason):
            load_space(_write(tmp_path, text), job, [])
    with pytest.raises(ConfigError, match="no such"):
        load_space(tmp_path / "nowhere.yaml", job, [])


def test_keys_and_values_that_the_job_refuses_are_told_before_anything_starts(tmp_path: Path, job: Path) -> None:
    settings = {
        "train.learning_rat": {"loguniform": [1e-5, 1e-3]},
        "lora.rank": {"choice": [8, 0, "many"]},
        "train.warmup_ratio": {"uniform": [0.0, 3.0]},
        "lora.alpha": "2 / data.seed",
    }
    with pytest.raises(ConfigError) as error:
        load_space(_write(tmp_path, settings), job, [])
    text = str(error.value)
    assert "`train.learning_rat` is not a setting. Did you mean `learning_rate`?" in text
    assert "lora.alpha: data.seed is None" in text
    assert "lora.rank" in text
    assert "'many'" in text
    assert "train.warmup_ratio" in text


def test_problems_of_the_file_and_of_the_job_are_told_at_once(tmp_path: Path, job: Path) -> None:
    settings = {
        "lora.rank": {"choice": [8, 8]},
        "lora.alpha": "2 * lora.rank",
        "train.learning_rat": {"uniform": [3, 1]},
        "trian.seed": {"choice": [1]},
        "data.oversample.drain": {"uniform": [1.0]},
        "train.warmup_ratio": {"uniform": [0.0, 3.0]},
        "cluster.num_workers": {"choice": [1]},
    }
    with pytest.raises(ConfigError) as error:
        load_space(_write(tmp_path, settings), job, [])
    expected = (
        "lists a value twice",
        "`train.learning_rat`: uniform [3, 1] is empty",
        "`train.learning_rat` is not a setting. Did you mean `learning_rate`?",
        "`trian` is not",
        "uniform needs 2 numbers",
        "train.warmup_ratio",
        "`cluster` says",
    )
    text = "\n".join(error.value.problems)
    for reason in expected:
        assert reason in text, text
    assert len(error.value.problems) == len(expected), text
    with pytest.raises(ConfigError) as error:
        load_space(_write(tmp_path, {"lora.rank": {"choice": [8, 8]}}), job, ["train.learning_rat=1"])
    assert len(error.value.problems) == 2, "with those of the job itself"
    assert load_space(_write(tmp_path, GOOD), job, []).grid_size == 3


@pytest.mark.parametrize(
    ("setting", "trials"),
    [
        ({"data.shuffle": {"choice": ["full", {"window": 512}, False]}}, ["full", Window(window=512), "none"]),
        ({"data.shuffle.window": {"grid": [512, 2048]}}, [Window(window=512), Window(window=2048)]),
        ({"data.shuffle": {"value": "full"}}, ["full"]),
    ],
)
def test_every_form_of_the_shuffle_may_be_searched(setting: dict, trials: list, tmp_path: Path, job: Path) -> None:
    space = load_space(_write(tmp_path, {**setting, "lora.rank": {"choice": [8]}}), job, [])
    resolved = dump_job(load_job(job))
    jobs = [build_trial_job(Sweep(resolved, space, str(tmp_path), "loss"), 0, drawn)[0] for drawn in examples(space)]
    assert [trial.data.shuffle for trial in jobs] == trials
    key = next(iter(setting))
    with pytest.raises(ConfigError, match=r"data\.shuffle"):
        load_space(_write(tmp_path, {key: {"choice": [0.5]}}), job, [])


def test_a_key_inside_a_single_value_hides_no_other_problem(tmp_path: Path, job: Path) -> None:
    settings = {"data.oversample.toe-drain": {"uniform": [1.0, 8.0]}, "lora.rank": {"choice": [8, 0]}}
    with pytest.raises(ConfigError) as error:
        load_space(_write(tmp_path, settings), job, ["data.oversample=auto"])
    assert "not a section" in error.value.problems[0]
    assert any("lora.rank" in problem for problem in error.value.problems[1:])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 * lora.rank", 32),
        ("lora.rank / 4 + 1", 5.0),
        ("-lora.rank // 3", -6),
        ("min(lora.rank, 8) ** 2", 64),
        ("round(train.learning_rate * 1e4)", 2),
        ("int(sqrt(lora.rank))", 4),
        ("3", 3),
    ],
)
def test_arithmetic(text: str, value: float) -> None:
    assert compute(text, {"lora.rank": 16, "train.learning_rate": 2e-4}) == value


def test_the_settings_that_are_named() -> None:
    assert read_formula("lora.rank * (lora.rank + data.oversample.drain) / seed") == (
        "lora.rank",
        "data.oversample.drain",
        "seed",
    )


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "lora.rank.__class__()",
        "'a' * 3",
        "[1, 2]",
        "x if y else z",
        "lambda: 1",
        "True + 1",
        "open(1)",
        "max(1, key=2)",
        "(1).real",
        "2 *",
        "",
        "1" * 300,
        "9 ** 9 ** 9",
        "1 / 0",
        "1e308 * 10 - 1e308 * 10",
        "(-8) ** 0.5",
        "min()",
        "int(1e400)",
        "*".join(["9**12"] * 30),  # a whole number that no float holds
        "round(5, -999999999)",  # would take for ever
        "round(5, 1e999)",
    ],
)
def test_what_is_not_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        compute(text, dict.fromkeys(read_formula(text), 1))


def test_what_is_not_a_number_is_named() -> None:
    with pytest.raises(ValueError, match=r"lora\.rank is None"):
        compute("2 * lora.rank", {})
    with pytest.raises(ValueError, match=r"train\.bf16 is True"):
        compute("train.bf16 + 1", {"train.bf16": True})
