"""An engine in processes of its own, as jobs have it. It takes a minute to start, so one script does all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1600)]
ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from multiprocessing import resource_tracker
from pathlib import Path
import psutil
from ray_vlm.config.schema import Model
from ray_vlm.engines.sampling import sample_groups
from ray_vlm.engines.vllm_start import EngineLimits, EngineSettings, start_engine
from ray_vlm.errors import RunError
from tests.support.rollouts import PROMPTS, SEEDS, prompt_rows
from tests.vllm.test_real_vllm import GREEDY, gap, make_builder, make_model, start

base, result = sys.argv[1], {}
model, builder = make_model(base, ["language"]), make_builder(base)
rows = prompt_rows(builder, PROMPTS)
engine = start(base, model)
result["in_process"] = hasattr(engine._engine.llm_engine.engine_core, "engine_core")
engine.update(model)
answers = engine.sample(rows, GREEDY, SEEDS)
own = sample_groups(model, rows, builder, GREEDY, SEEDS, "cpu")
result["equal"] = [[a.ids for a in group] for group in answers] == [[a.ids for a in group] for group in own]
result["gap"] = gap(model, rows, answers, builder, 1.0)
files = engine._files._parent
result["processes"] = len(psutil.Process().children(recursive=True))
engine.update(make_model(base, ["language"], rank=16))
try:
    engine.answer(rows, 4)
except RunError as error:
    result["refused"] = str(error)
gone, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=30)
tracker = resource_tracker._resource_tracker._pid  # Python's own, which ends with this process
result["left"] = [p.name() for p in left if p.status() != psutil.STATUS_ZOMBIE and p.pid != tracker]
result["files"] = files.exists()
try:
    settings = EngineSettings(Model(name=base, load_in_4bit=False), "fp32", 0)
    start_engine(settings, EngineLimits(1024, 2), "method.rollouts", None, kv_cache_memory_bytes=2**46)
except RunError as error:
    result["start"] = str(error)
print("RESULT " + json.dumps(result))
"""


def test_an_engine_in_its_own_process_answers_fails_and_ends_in_words(tiny_models: Any) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, tiny_models["qwen3_vl"]],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=1500,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stdout[-3000:] + run.stderr[-3000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert not result["in_process"]
    assert result["processes"]
    assert result["equal"]
    assert result["gap"] < 2e-5
    assert "LoRA rank 16 is greater than max_lora_rank 8" in result["refused"]
    assert result["left"] == []
    assert not result["files"]
    assert result["start"].startswith(
        "method.rollouts: vllm did not start on cpu (ValueError: Available memory on node"
    )
    assert "Lower train.global_batch_size" in result["start"]
