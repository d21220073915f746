"""Mutations of job files and search spaces for `fuzz`. `inputs` defines an attempt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ray_vlm.config.load import dump_job, load_job, load_resolved
from ray_vlm.config.schema import JobConfig
from tests.support.fuzz.inputs import Attempt
from tests.support.fuzz.mutations import break_bytes, break_text, break_tree, odd_value, pick, places

ROOT = Path(__file__).parents[3]
_ROWS = {  # of the job that a space is for, by the space's name
    "dpo": "method: dpo\ndata: {train: {path: a.jsonl, format: preference}, eval: 0.1}\n",
    "grpo": "method: grpo\ndata: {train: {path: a.json}, eval: 0.1}\n",
    "rare_classes": "task: classification\ndata: {train: {path: a.csv, format: image_csv}, eval: 0.1}\n",
}
_JOB = "model: {name: x}\nlora: {rank: 16}\ntrain: {global_batch_size: 16}\n"
_FORMULA = [
    *("2", "lora.rank", "train.learning_rate", "+", "-", "*", "/", "//", "%", "**", "(", ")", "min(", "max(", "round("),
    *("int(", "sqrt(", ",", "9**12", "1e308", "-999999999", "0", "x.y", "lora", "'a'", "[1]", "1j", "lambda: 0"),
    *("round(5, -999999999)", "9**9**9", "(-8)**0.5", "2 * lora.rank", "min(1, 2)", "*".join(["9**12"] * 30), "1 if 1"),
]


def of_jobs(folder: Path) -> Attempt:
    """Return an attempt on job files with changed bytes, settings of other types, and `key=value` overrides."""
    texts = [path.read_text() for path in sorted((ROOT / "jobs").glob("*_*.yaml")) if "runtime" not in path.name]
    keys = [".".join(map(str, p)) for text in texts for p in places(dump_job(_job_of(folder, text))) if p]

    def attempt(rng: np.random.Generator) -> int:
        text, overrides, kind = pick(rng, texts), [], rng.random()
        if kind < 0.35:
            data = break_bytes(text.encode(), rng)
        elif kind < 0.7:
            data = _as_yaml(break_tree(yaml.safe_load(text), rng)).encode("utf-8", "surrogatepass")
        elif kind < 0.75:
            data = text.encode() + _laughs(rng).encode()
        else:
            data = text.encode()
            overrides = [_override(pick(rng, keys), rng) for _ in range(int(rng.integers(1, 4)))]
        path = folder / "job.yaml"
        path.write_bytes(data)
        job = load_job(path, overrides)
        dumped = json.loads(json.dumps(dump_job(job), allow_nan=False))
        yaml.safe_dump(dumped, allow_unicode=True).encode()
        return int(load_resolved(dumped) != job)

    return attempt


def _job_of(folder: Path, text: str) -> JobConfig:
    (folder / "job.yaml").write_text(text)
    return load_job(folder / "job.yaml")


def _as_yaml(tree: Any) -> str:
    try:
        return yaml.safe_dump(tree, allow_unicode=True, default_flow_style=None, width=10**6)
    except RecursionError:  # JSON, which is YAML too, may be nested deeper
        return json.dumps(tree, default=str)


def _override(key: str, rng: np.random.Generator) -> str:
    value = odd_value(rng)
    text = value if isinstance(value, str) else json.dumps(value)
    override = f"{key}={text}" if rng.random() < 0.9 else break_text(f"{key}={text}", rng)
    return f"{key}={_laughs(rng).strip()}" if rng.random() < 0.03 else override


def _laughs(rng: np.random.Generator) -> str:
    """A section whose aliases stand for far more than the file holds, or for themselves."""
    width, depth, merge = int(rng.integers(2, 10)), int(rng.integers(3, 40)), rng.random() < 0.3
    lines = ["{a0: &a0 {x: 1}" if merge else "{a0: &a0 [x]"]
    for i in range(1, depth):
        inner = ", ".join([f"*a{i - 1}"] * width)
        same = ", ".join(f"{'y' if rng.random() < 0.5 else 'z'}: *a{i - 1}" for _ in range(width))
        lines.append(
            pick(
                rng,
                [f"a{i}: &a{i} {{<<: [{inner}]}}" if merge else f"a{i}: &a{i} [{inner}]"] * 3
                + [f"a{i}: &a{i} {{{same}}}", f"? &a{i} [{inner}]\n: 1", f"a{i}: &a{i} [*a{i}]"],
            )
        )
    return f"\n{pick(rng, ['x', 'method', 'data', 'lora'])}: " + ", ".join(lines) + "}\n"


def of_spaces(folder: Path) -> Attempt:
    """Return an attempt on search spaces, with the job that they belong to, and the values of a trial."""
    from ray_vlm.tune.space import examples, load_space, own_values, resolve, write_overrides

    texts = []
    for path in sorted((ROOT / "tune_spaces").glob("*.yaml")):
        job = folder / f"{path.stem}.yaml"
        job.write_text(_JOB + _ROWS.get(path.stem, "data: {train: {path: a.json}, eval: 0.1}\n"))
        texts.append((path.read_text(), str(job), dump_job(load_job(job))))

    def attempt(rng: np.random.Generator) -> int:
        (text, job, resolved), kind = pick(rng, texts), rng.random()
        if kind < 0.3:
            data = break_bytes(text.encode(), rng)
        elif kind < 0.5:
            formula = " ".join(pick(rng, _FORMULA) for _ in range(int(rng.integers(1, 12))))
            data = _as_yaml(yaml.safe_load(text) | {"lora.alpha": formula}).encode()
        else:
            data = _as_yaml(break_tree(yaml.safe_load(text), rng)).encode("utf-8", "surrogatepass")
        path = folder / "space.yaml"
        path.write_bytes(data)
        space = load_space(path, job, [])
        own_values(space, resolved)
        for drawn in examples(space):
            json.loads(json.dumps(drawn))
            load_job(job, write_overrides(resolve(space, drawn, resolved)))
        return 0

    return attempt
