"""What the rules let through does train: combinations chosen so that every two choices meet in one of them."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.check import check_job
from ray_vlm.config.load import dump_job, load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.demo.tiny import write_untrained
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.train.driver import train
from tests.support.parity import write_pairs
from tests.support.tiny_families import BUILDERS, write_tiny

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

FACTORS: dict[str, tuple[Any, ...]] = {
    "method": ("sft", "dpo", "grpo"),
    "family": ("qwen3_vl", "qwen2_5_vl", "qwen2_vl", "llama4"),
    "weights": ("4 bit", "bfloat16", "float32"),
    "learns": ("language", "all parts", "all weights"),
    "checkpointing": (False, 1, True),
    "cluster": (0, 2, "zero1", "zero2", "zero3", "zero3_offload"),
    "share": (True, False),
}
Combination = dict[str, Any]


def build(chosen: Combination, folder: Path = Path("x"), model: str = "x") -> JobConfig:
    """The job of a combination; `train.json` and pairs are in `folder`."""
    pairs = chosen["method"] == "dpo"
    rows = {"path": str(folder / "pairs.jsonl"), "format": "preference"} if pairs else {"path": str(folder / "t.json")}
    method = {"name": chosen["method"], "share_prefixes": chosen["share"]} if chosen["method"] != "sft" else "sft"
    if chosen["method"] == "grpo":
        rewards = {"tests.integration.test_alignment:even_tokens": 1.0}
        method |= {"num_generations": 2, "max_completion_tokens": 6, "rewards": rewards}  # type: ignore[operator]
    target = ["language"] if chosen["learns"] == "language" else ["language", "connector", "vision"]
    cluster = chosen["cluster"]
    where = {"num_workers": 2, "deepspeed": cluster} if isinstance(cluster, str) else {"num_workers": cluster}
    steps = {"max_steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3}
    precision = "bf16" if chosen["weights"] == "bfloat16" else "fp32"
    precision_options = {"precision": precision, "gradient_checkpointing": chosen["checkpointing"]}
    return load_resolved(
        {
            "method": method,
            "model": {"name": model, "load_in_4bit": chosen["weights"] == "4 bit"},
            "lora": None if chosen["learns"] == "all weights" else {"rank": 4, "alpha": 8, "target": target},
            "data": {"train": rows},
            "train": steps | precision_options,
            "cluster": where | {"max_failures": 0},
            "run": {"name": "run", "output_dir": str(folder / "runs")},
        }
    )


def allowed(chosen: Combination) -> bool:
    """Whether the rules let it through."""
    return not check_job(build(chosen))


def cover() -> Iterator[Combination]:
    """Combinations, few, in which every two values that may stand together do."""
    names = list(FACTORS)
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*FACTORS.values())]
    possible = [chosen for chosen in every if allowed(chosen)]
    met = [frozenset(itertools.combinations(((n, str(c[n])) for n in names), 2)) for c in possible]
    left = set().union(*met)
    while left:
        best = max(range(len(possible)), key=lambda i: len(met[i] & left))
        yield possible[best]
        left -= met[best]


def test_the_cover_is_whole_and_small() -> None:
    chosen = list(cover())
    assert len(chosen) <= 40
    assert {c["cluster"] for c in chosen} == set(FACTORS["cluster"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("combined")
    return {
        name: str((write_tiny if name in BUILDERS else write_untrained)(root / name, name))
        for name in FACTORS["family"]
    }


@pytest.mark.parametrize("chosen", cover(), ids=lambda c: "-".join(str(v).replace(" ", "_") for v in c.values()))
def test_it_trains(
    ray_cluster, chosen: Combination, folders: dict[str, str], tmp_path: Path, tiny_models: dict[str, str]
) -> None:
    from ray_vlm.demo.shapes import draw

    draw(tmp_path, "studio", "train", 20)
    (tmp_path / "train.json").rename(tmp_path / "t.json")
    if chosen["method"] == "dpo":
        made = write_pairs(tmp_path / "pairs", tiny_models["qwen3_vl"])
        (tmp_path / "pairs.jsonl").write_text(made.read_text())
    job = build(chosen, tmp_path, folders[chosen["family"]])
    paths = train(job, json.dumps(dump_job(job)))
    lines = [line for line in read_metrics(paths.metrics) if line["kind"] == "train"]
    assert len(lines) == 2
    assert all(math.isfinite(line["loss"]) for line in lines)
    saved = "config.json" if job.lora is None else "adapter_config.json"
    assert (paths.final / saved).exists()
