"""Each rule across sections refuses its combination, and a plain job passes them all."""

import re
from pathlib import Path

import pytest
import yaml

from ray_vlm.config.check import RULES, check_job
from ray_vlm.config.load import load_job
from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import ConfigError

PLAIN = {"model": {"name": "x"}, "data": {"train": {"path": "a"}}}
TRAIN = {"train": {"path": "a"}}
CLASSES = {"name": "classification"}
WHOLE = {"name": "x", "load_in_4bit": False}
PAIRS = {"train": {"path": "a", "format": "preference"}}
VLLM = {"name": "grpo", "rollouts": "vllm"}
SERVER = {"name": "grpo", "rollouts": "server", "sampler_url": "http://host:8000/v1"}
APART = {"name": "grpo", "samplers": 2}
KNOWN = {"name": "dpo", "precompute_ref_log_probs": True}
BROKEN = [
    {"data": TRAIN | {"eval": {"path": "b", "ratio": 0.1}}},
    {"data": TRAIN | {"eval": {"ratio": 0.1, "max_rows": 5}}},
    {"data": TRAIN | {"eval": {"path": "b", "weight": 2.0}}},
    {"data": {"train": {"ratio": 0.5}}},
    {"data": {"mix": [{"path": "a"}]}},
    {"data": TRAIN | {"eval": 0.5, "test": 0.5}},
    {"data": {"train": {"path": "a", "format": "coco", "max_tasks": 3}}},
    {"data": {"train": {"path": ["a", "b"], "create": "my_code:make"}}},
    {"data": TRAIN | {"condition_weights": "inverse"}},
    {"task": "chat", "data": {"train": {"path": "a", "format": "llava"}, "oversample": "auto"}},
    {"data": TRAIN | {"oversample_threshold": 0.1}},
    {"data": TRAIN | {"pad_color": [1, 2, 300], "resize": "pad"}},
    {"data": TRAIN | {"pad_place": "center"}},
    {"task": CLASSES | {"labels": ["a"]}, "data": {"train": {"path": "a", "format": "image_csv"}}},
    {"lora": None},
    {"lora": None, "model": {"name": "x", "load_in_4bit": False, "adapter": "a"}},
    {"lora": {"ranks": {"vision": 4}}},
    {"lora": {"target": ["language", "experts"], "dropout": 0.1}},
    {"train": {"learning_rates": {"vision": 1e-5}}},
    {"train": {"freeze": ["vision"]}},
    {"lora": None, "model": WHOLE, "train": {"freeze": ["vision", "connector", "language"]}},
    {"train": {"vision_cache": "s3://bucket/features"}},
    {"train": {"vision_cache": "features"}, "lora": {"target": ["language", "connector"]}},
    {"task": {"labels": ["a", "a"]}},
    {"evaluate": {"metric": "accuracy"}},
    {"train": {"early_stopping_patience": 2}},
    {"evaluate": {"asynchronous": True}, "cluster": {"num_workers": 0}, "data": TRAIN | {"eval": 0.1}},
    {"evaluate": {"asynchronous": True}},
    {"evaluate": {"memory": "model"}},
    {"track": {"energy": True}},
    {"track": {"wandb_group": "night"}},
    {"data": {"eval": {"path": "a"}, "test": {"path": "a"}}},
    {"data": TRAIN | {"test_on_eval": True}},
    {"data": TRAIN | {"eval": 0.1, "test": {"path": "b"}, "test_on_eval": True}},
    {"data": {"train": {"path": "a"}, "test": {"path": "a"}}},
    {"data": {"train": {"path": "a"}, "min_pixels": 9, "max_pixels": 4}},
    {"pairs": {"temperature": [-0.1, 1.0]}},
    {"run": {"name": "a/b"}},
    {"run": {"output_dir": "ftp://bucket/runs"}},
    {"train": {"tokens_per_micro_batch": 4096}, "method": "dpo", "data": PAIRS},
    {"train": {"tokens_per_micro_batch": 4096, "memory": "auto"}, "cluster": {"gpu_memory_gib": 40}},
    {"lora": None, "model": WHOLE, "method": "dpo", "data": PAIRS},
    {"lora": None, "model": WHOLE, "method": VLLM, "cluster": {"gpus_per_worker": 1}},
    {"method": VLLM | {"top_p": 0.9}},
    {"method": VLLM | {"temperature": 2.5}},
    {"method": VLLM, "lora": {"modules_to_save": ["embed_tokens"]}},
    {"method": SERVER, "lora": {"target": ["language", "vision"]}},
    {"method": SERVER | {"sampler_url": None}, "lora": {"target": ["language"]}},
    {"method": SERVER | {"sampler_url": "host:8000"}, "lora": {"target": ["language"]}},
    {"evaluate": {"sampler_url": "http://host:8000"}},
    {"evaluate": {"engine": "samplers", "num_replicas": 2}},
    {"evaluate": {"engine": "server", "sampler_url": "ftp://host"}},
    {"evaluate": {"engine": "vllm"}, "pairs": {"temperature": [0.5, 2.5]}},
    {"method": {"name": "grpo", "sampler_sleep": 2}},
    {"method": APART, "cluster": {"num_workers": 0}},
    {"method": APART | {"rollouts": "server", "sampler_url": "http://127.0.0.1:8000/v1"}},
    {"method": APART | {"sampling_batch": 2}, "train": {"global_batch_size": 16}},
    {"method": {"name": "grpo", "samplers": [2, 2]}, "train": {"global_batch_size": 16}},
    {"method": APART, "tune": {"resident": True}},
    {"method": {"name": "grpo", "max_staleness": 1}},
    {"method": {"name": "grpo", "cpus_per_sampler": 2}},
    {"method": VLLM | {"sampling_batch": 2}},
    {"tune": {"resident": True}, "cluster": {"num_workers": 2}},
    {"tune": {"resident": True}, "lora": None, "model": WHOLE},
    {"tune": {"resident": True}, "evaluate": {"asynchronous": True}, "data": TRAIN | {"eval": 0.1}},
    {"train": {"memory": "auto"}},
    {"train": {"probe": True}, "cluster": {"deepspeed": "zero3"}},
    {"train": {"nonfinite": "skip"}, "cluster": {"deepspeed": "zero2"}},
    {"train": {"precision": "fp16"}, "cluster": {"deepspeed": "zero2"}},
    {"train": {"optimizer": "paged_adamw_8bit"}},
    {"train": {"optimizer": "adamw_8bit"}, "cluster": {"deepspeed": "zero2"}},
    {"train": {"gradient_checkpointing": "selective"}, "cluster": {"deepspeed": "zero3"}},
    {"train": {"vision_cache": "features"}, "cluster": {"deepspeed": "zero3"}},
    {"cluster": {"num_workers": 32}},
    {"cluster": {"num_workers": [2, 2]}},
    {"cluster": {"num_workers": [1, 2], "deepspeed": "zero2"}},
    {"cluster": {"num_workers": [1, 2]}, "data": TRAIN | {"eval": 0.1}, "evaluate": {"asynchronous": True}},
    {"cluster": {"gpus_per_worker": 0.5}},
    {"cluster": {"deepspeed": "zero2", "num_workers": 0}},
    {"cluster": {"deepspeed": "zero1"}, "tune": {"resident": True}},
    {"cluster": {"deepspeed": "zero3"}, "method": "grpo"},
    {"cluster": {"deepspeed": "zero3"}, "method": "dpo", "data": PAIRS, "lora": {"target": ["language", "vision"]}},
    {"cluster": {"deepspeed": "zero3"}, "method": KNOWN, "data": PAIRS},
    {"cluster": {"deepspeed": "zero3"}, "data": TRAIN | {"eval": 0.1}, "evaluate": {"metric": "f1_50"}},
]


@pytest.mark.parametrize("value", [float("inf"), {1: 2}, [float("nan")], b"x"])
def test_trl_options_that_would_change_on_the_way_are_refused(value: object) -> None:
    job = JobConfig.model_validate(PLAIN | {"method": {"name": "sft", "trl": {"some_option": value}}})
    assert [key for key, _ in check_job(job)] == ["method.trl.some_option"]


def test_what_the_feed_decides_cannot_be_set_behind_its_back() -> None:
    from ray_vlm.config.check_method import DECIDED_BY_PLAN, NAMED_IN_JOB
    from ray_vlm.data.plan import Plan
    from ray_vlm.train.build import shared_options

    options = shared_options(JobConfig.model_validate(PLAIN), Plan(4, 2, 1, 1), has_eval=True)
    assert set(options) - {"router_aux_loss_coef"} <= {*DECIDED_BY_PLAN, *NAMED_IN_JOB}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"tune": {"metric": "anls"}}, "tune.metric"),
        ({"tune": {"metric": ["f1_50", "f1_50"]}}, "tune.metric"),
        ({"tune": {"metric": []}}, "tune.metric"),
    ],
)
def test_sweeps_that_cannot_be_ranked_or_kept_are_refused(changes: dict, key: str) -> None:
    assert [broken for broken, _ in check_job(JobConfig.model_validate(PLAIN | changes))] == [key]
    good = {"tune": {"metric": ["f1_50", "loss"], "resident": True}}
    assert check_job(JobConfig.model_validate(PLAIN | good)) == []


def test_the_table_is_made_by_the_rules(capsys: pytest.CaptureFixture) -> None:
    """It is symmetric, says no for the known reasons, and prints every rule."""
    from ray_vlm.cli import main
    from ray_vlm.config.docs import CHOICES, merge, refuse

    assert refuse("sft", "dpo") is None
    assert refuse("zero3", "4 bit") == ""
    assert "gather the whole model" in (refuse("zero3", "grpo") or "")
    assert all(refuse(one, other) == refuse(other, one) for one in CHOICES for other in CHOICES)
    assert all(refuse(name, name) == "" for name in CHOICES)
    assert merge({"a": {"b": 1}}, {"a": {"c": 2}}, {"d": None}) == {"a": {"b": 1, "c": 2}, "d": None}
    with pytest.raises(SystemExit) as end:
        main(["config", "--compatibility"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert all(reason in output for _, _, reason in RULES)
    assert max(map(len, output.split("Why not:")[0].splitlines())) <= 80


def test_a_rule_is_silent_about_keys_that_could_not_be_read() -> None:
    job = JobConfig.model_validate(PLAIN | {"train": {"early_stopping_patience": 2}})
    assert check_job(job, {"data.eval"}) == []
    assert len(check_job(job, {"model.name"})) == 1


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", " ", "x\0", "\ud800", ".hidden"])
def test_names_that_are_no_folder_are_refused(name: str) -> None:
    assert [key for key, _ in check_job(JobConfig.model_validate(PLAIN | {"run": {"name": name}}))] == ["run.name"]


@pytest.mark.parametrize(
    ("task", "key", "value"),
    [
        ("detection", "position", True),
        ("gui_steps", "labels", ["a"]),
        ("chat", "prompt", "x"),
        ("chat", "short_memory", 1),
    ],
)
def test_options_that_the_task_does_not_read_are_refused(task: str, key: str, value: object, tmp_path: Path) -> None:
    kind = {"detection": "coco", "gui_steps": "gui_csv", "chat": "llava"}[task]
    changes = {"task": {"name": task, key: value}, "data": {"train": {"path": "a", "format": kind}}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(PLAIN | changes, sort_keys=False))
    with pytest.raises(ConfigError) as error:
        load_job(tmp_path / "job.yaml")
    (problem,) = error.value.problems
    assert re.search(rf"job\.yaml:\d+: `task\.{key}`: {task} does not use it; .*Remove it\.", problem)


def test_weights_are_of_the_plain_loss() -> None:
    changes = {"data": TRAIN | {"class_weights": "inverse"}, "method": {"trl": {"loss_type": "dft"}}}
    assert [key for key, _ in check_job(JobConfig.model_validate(PLAIN | changes))] == ["data.class_weights"]


def test_plain_job_passes() -> None:
    assert check_job(JobConfig.model_validate(PLAIN)) == []


@pytest.mark.parametrize(("number", "changes"), list(enumerate(BROKEN)))
def test_each_rule_has_a_job_that_breaks_it_alone(number: int, changes: dict) -> None:
    broken = check_job(JobConfig.model_validate(PLAIN | changes))
    assert [key for key, _ in broken] == [RULES[number][1][0]]
    assert len(BROKEN) == len(RULES)
