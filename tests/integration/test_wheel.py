"""The wheel, installed where no checkout is, has all it needs; the demo runs from it in an empty folder."""

import json
import os
import subprocess
from pathlib import Path

import pytest


def test_the_wheel_brings_its_job_weights_and_template(installed: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; import ray_vlm; from ray_vlm.demo.story import find_job, demo_job\n"
        "assert 'venv' in ray_vlm.__file__, ray_vlm.__file__\n"
        "from ray_vlm.models.load import load_config\n"
        "job = demo_job(Path('outputs').absolute())\n"
        "print(find_job('demo_sft.yaml'), load_config(job.model).model_type)\n"
        "for file in ('evaluate/report.html.j2', 'py.typed'):\n"
        "    assert (Path(ray_vlm.__file__).parent / file).is_file(), file\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # or a checkout there would be imported
    command = [installed / "python", "-c", code]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert "starter/jobs/demo_sft.yaml qwen3_vl" in out.stdout


@pytest.mark.slow
def test_the_demo_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    subprocess.run([installed / "ray-vlm", "demo"], cwd=tmp_path, check=True, timeout=560)
    summary = json.loads((tmp_path / "outputs" / "demo" / "summary.json").read_text())
    before, after = (stage["metrics"] for stage in summary["stages"])
    assert summary["wall_s"] < 360
    assert before["parse_rate"] >= 0.9
    assert after["f1_50"] - before["f1_50"] >= 0.30
    assert after["recall_rare"] - before["recall_rare"] >= 0.30
    assert {p.name for p in tmp_path.iterdir()} == {"outputs"}, "the demo writes nowhere else"
