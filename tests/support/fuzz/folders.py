"""Mutations of folders for `fuzz`: adapters, checkpoints, runs. `inputs` defines an attempt."""

import copy
import json
import os
import pickle
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ray_vlm.config.load import dump_job, fill_defaults
from ray_vlm.data.preprocessing import ABOUT, changed_since, describe_preprocessing, read_preprocessing
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import sample_spec
from tests.support.fuzz.inputs import Attempt, make_job, write_base
from tests.support.fuzz.mutations import break_bytes, break_tree, pick

_WEIGHTS, _CONFIG, _MADE = "adapter_model.safetensors", "adapter_config.json", "preprocessing.json"


class _Payload:
    """What must never be unpickled: it would leave a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def of_adapters(folder: Path) -> Attempt:
    """Return an attempt on adapters with a file cut, changed, exchanged or missing; the loaded weights must equal the
    file's."""
    import torch

    from ray_vlm.config.schema import Model
    from ray_vlm.models.load import load_adapter, load_model

    job = make_job(write_base(folder), "coco", {"path": str(folder / "rows.json")}, ["dog", "cat"])
    spec = sample_spec(job, [])
    base = load_model(Model(name=job.model.name, load_in_4bit=False), precision="fp32")
    whole = _write_adapter(folder, base, SampleBuilder(spec))
    ids = torch.arange(20, 30)[None]

    def attempt(rng: np.random.Generator) -> int:
        broken = folder / "adapter" / "best"
        shutil.rmtree(broken.parent, ignore_errors=True)
        shutil.copytree(whole, broken)
        _break_adapter(broken, rng)
        if rng.random() < 0.2:
            shutil.copy(folder / "about", folder / f"pairs.jsonl{ABOUT}")
            _break_json(folder / f"pairs.jsonl{ABOUT}", rng)
            changed_since(str(folder / "pairs.jsonl"), load_sample_builder(spec))
        saved_spec = read_preprocessing(str(broken), spec) or spec
        SampleBuilder(saved_spec)
        model = load_adapter(copy.deepcopy(base), str(broken), job.model)
        lost = _apart(model, broken) + (folder / "run").exists()
        with torch.no_grad():
            finite = torch.isfinite(model(input_ids=ids).logits).all()
        return lost + (not finite)

    return attempt


def _write_adapter(folder: Path, base: Any, builder: SampleBuilder) -> Path:
    import torch
    from peft import get_peft_model

    from ray_vlm.config.schema import Lora
    from ray_vlm.models.families import FAMILIES
    from ray_vlm.models.lora import lora_config

    torch.manual_seed(0)
    lora = Lora(rank=4, target=["language", "vision"], ranks={"vision": 2})
    model = get_peft_model(copy.deepcopy(base), lora_config(lora, FAMILIES["qwen3_vl"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "whole")
    made = json.dumps(describe_preprocessing(builder))
    (folder / "whole" / _MADE).write_text(made)
    (folder / "about").write_text(json.dumps({"preprocessing": json.loads(made)}))
    return folder / "whole"


def _break_adapter(broken: Path, rng: np.random.Generator) -> None:
    kind = rng.random()
    if kind < 0.35:
        _break_json(broken / _CONFIG, rng)
    elif kind < 0.6:
        _break_json(broken / _MADE, rng)
    elif kind < 0.75:
        (broken / _WEIGHTS).write_bytes(break_bytes((broken / _WEIGHTS).read_bytes(), rng))
    elif kind < 0.92:
        _break_tensors(broken, rng)
    else:
        path = broken / pick(rng, [_WEIGHTS, _CONFIG, _MADE])
        path.unlink()
        if rng.random() < 0.5:
            path.mkdir()


def _break_json(path: Path, rng: np.random.Generator) -> None:
    if rng.random() < 0.4:
        path.write_bytes(break_bytes(path.read_bytes(), rng))
    else:
        path.write_text(json.dumps(break_tree(json.loads(path.read_text()), rng)))


def _break_tensors(broken: Path, rng: np.random.Generator) -> None:
    """Weights of other names, shapes and kinds; a pickle in their place."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / _WEIGHTS)
    name, kind = pick(rng, sorted(tensors)), int(rng.integers(9))
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[pick(rng, ["x", f"{name}.x", name.replace("layers.0", "layers.9"), ""])] = tensors.pop(name)
    elif kind == 2:
        tensors[name] = tensors[name][..., :1].contiguous()
    elif kind == 3:
        tensors[name] = tensors[name].to(pick(rng, [torch.float16, torch.int64, torch.bool, torch.bfloat16]))
    elif kind == 4:
        tensors[name].view(-1)[0] = pick(rng, [float("nan"), float("inf")])
    elif kind == 5:
        tensors = {}
    elif kind == 6:
        tensors = {key: value.flatten() for key, value in tensors.items()}
    if kind < 7:
        save_file(tensors, broken / _WEIGHTS)
        return
    (broken / _WEIGHTS).unlink()
    name = _WEIGHTS if kind == 7 else "adapter_model.bin"
    (broken / name).write_bytes(pickle.dumps(_Payload(broken.parents[1] / "run")))


def _apart(model: Any, broken: Path) -> int:
    """How many weights of the file are not the model's, or the model's not the file's."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved, loaded = load_file(broken / _WEIGHTS), get_peft_model_state_dict(model)
    same = [name for name in saved if name in loaded and torch.equal(saved[name].to(loaded[name].dtype), loaded[name])]
    unusable = [name for name in saved if not torch.isfinite(saved[name]).all()]
    return len(saved) + len(loaded) - 2 * len(same) + len(unusable)


def of_checkpoints(folder: Path) -> Attempt:
    """Return an attempt on two checkpoints whose newest is broken: what opens is one of them, complete, or none."""
    from ray_vlm.runs.checkpoints import MANIFEST, checkpoint_name, commit, open_newest, prune, sweep, write_part
    from ray_vlm.storage import Store

    whole, contents = Store(folder / "run"), {}
    for step in (1, 2):
        content = bytes(np.random.default_rng(step).integers(0, 255, 500, np.uint8))
        name = contents[step] = checkpoint_name(step, 1, "ff")

        def fill(path: Path, content: bytes = content) -> None:
            (path / "weights.bin").write_bytes(content)
            (path / "state.json").write_text('{"step": 1}')

        commit(whole, name, write_part(whole, name, "0", fill), step, score=0.5, base="x")
    saved_bytes = {name: (folder / "run" / name / "weights.bin").read_bytes() for name in contents.values()}

    def attempt(rng: np.random.Generator) -> int:
        broken = folder / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder / "run", broken)
        path = broken / contents[2] / pick(rng, [MANIFEST, MANIFEST, "weights.bin", "state.json"])
        kind = rng.random()
        if kind < 0.1:
            path.unlink()
            if rng.random() < 0.5:
                path.mkdir()
        elif kind < 0.15:
            (path.parent / pick(rng, ["more.bin", "weights.bin.tmp"])).write_bytes(b"x")
        elif path.name == MANIFEST and kind < 0.6:
            path.write_text(json.dumps(break_tree(json.loads(path.read_text()), rng)))
        else:
            path.write_bytes(break_bytes(path.read_bytes(), rng))
        store = Store(broken)
        newest = open_newest(store)
        lost = newest is None or (newest[1] / "weights.bin").read_bytes() != saved_bytes[newest[0].name]
        sweep(store)
        prune(store, 2, 1)
        return int(lost or open_newest(store) is None)

    return attempt


def of_runs(folder: Path) -> Attempt:
    """Return an attempt on run folders: listed, shown, compared, exported, costed and drawn as far as possible."""
    whole = _write_run(folder / "runs" / "whole", dump_job(make_job("tiny", "coco", {"path": "a.json"})))

    def attempt(rng: np.random.Generator) -> int:
        broken = folder / "runs" / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        path = broken / pick(rng, ["run.json", "resolved.json", "metrics.jsonl", "evaluate/best/metrics.json"])
        if path.suffix == ".jsonl" and rng.random() < 0.6:
            lines = break_tree([json.loads(line) for line in path.read_text().splitlines()], rng)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines) if isinstance(lines, list) else "")
        elif path.suffix == ".jsonl":
            path.write_bytes(break_bytes(path.read_bytes(), rng))
        else:
            _break_json(path, rng)
        return _read_run(str(broken), str(whole), rng.random() < 0.01)

    return attempt


def _read_run(broken: str, whole: str, draw: bool) -> int:
    from ray_vlm.config.resume import check_resume
    from ray_vlm.evaluate.compare import write_comparison
    from ray_vlm.evaluate.predictor import Predictor
    from ray_vlm.runs.card import write_card
    from ray_vlm.runs.compare import compare_runs, describe_comparison, run_titles
    from ray_vlm.runs.compute import measure_compute, sum_compute, write_markdown
    from ray_vlm.runs.manifest import check_not_driven, end_attempt, find_run, start_attempt
    from ray_vlm.runs.monitor import write_training_log
    from ray_vlm.runs.plot import plot_runs
    from ray_vlm.runs.read import find_runs, read_run
    from ray_vlm.runs.show import describe_run, describe_runs, write_table

    runs = [read_run(address) for address in (broken, whole)]
    describe_run(runs[0])
    describe_runs(runs)
    comparison = compare_runs(runs)
    describe_comparison(comparison)
    write_comparison(runs, comparison).encode()
    write_table(runs[0]).encode()
    costs = [measure_compute(run) for run in runs]
    write_markdown(["a", "b", "all"], [*costs, sum_compute(runs, costs)])
    json.dumps(costs)
    write_card(runs[0], "adapter", "best").encode()
    if draw:
        plot_runs(runs, run_titles(runs), None, "svg")
    lost = len(find_runs(str(Path(broken).parent))) != 2
    paths = find_run(str(Path(broken).parent), "broken", "x")
    assert paths is not None
    check_resume(fill_defaults(json.loads(paths.resolved.read_text())), dict(runs[1].job))
    check_not_driven(paths.store, "--resume")
    start_attempt(paths)
    end_attempt(paths, "failed")
    write_training_log(paths, "failed")
    Predictor.from_run(broken)
    return int(lost)


def _write_run(folder: Path, job: dict[str, Any]) -> Path:
    """A run of three steps in two attempts, as training writes it."""
    (folder / "evaluate" / "best").mkdir(parents=True)
    (folder / "best").mkdir()
    (folder / "resolved.json").write_text(json.dumps(job))
    driver = {"host": platform.node(), "pid": 1, "started": 1.0}
    attempt = {"attempt": 1, "started": 1000.0, "ended": 1090.0, "status": "failed", "error": "a\nb", "driver": driver}
    second = {"attempt": 2, "started": 1100.0, "driver": driver}
    run = {"status": "running", "attempts": [attempt, second], "result": {"num_steps": 3}, "git_commit": "abc"}
    run |= {"versions": {"ray-vlm": "0.1", "torch": "2"}, "hardware": {"memory_gib": 8.0, "cpus": 2}, "command": ["x"]}
    (folder / "run.json").write_text(json.dumps(run))
    step = {"loss": 3.0, "learning_rate": 1e-3, "tokens_per_s": 100.0, "step_s": 1.0, "images": 2, "data_s": 0.1}
    start = {"kind": "start", "step": 0, "trainable": {"language": {"trainable": 5, "total": 9}}, "num_steps": 3}
    lines = [start | {"device": "A100"}, *({"kind": "train", "step": i} | step for i in (1, 2))]
    lines += [{"kind": "eval", "step": 2, "loss": 2.0, "validation_s": 9.0}, {"kind": "checkpoint", "step": 2}]
    lines += [start | {"step": 1, "attempt": 2}, *({"kind": "train", "step": i, "attempt": 2} | step for i in (2, 3))]
    lines += [{"kind": "energy", "step": 3, "energy_kwh": 0.1, "co2_kg": 0.1}, {"kind": "note", "step": 3, "text": "x"}]
    metrics = [{"attempt": 1, "time": 1000.0 + i, "epoch": 0.5} | line for i, line in enumerate(lines)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    scores = {"task": "detection", "overall": {"f1_50": 0.5, "map": None}, "num_rows": 4, "test": "t", "per_class": {}}
    (folder / "evaluate" / "best" / "metrics.json").write_text(json.dumps(scores))
    return folder
