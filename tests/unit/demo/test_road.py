"""The road's jobs: the shipped ones, each starting where the one before ended, with all paths in the demo's folder."""

from pathlib import Path

import pytest

from ray_vlm.demo.road import PAIRS, road_job
from ray_vlm.demo.story import _END_S, _REPORT_S, _progress, demo_job


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_jobs_of_the_road_stay_in_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "demo"
    job = road_job(folder, name, folder / "sft" / "best")
    assert (job.method.name, job.run.name, job.run.output_dir) == (name, name, str(folder))
    assert job.model.adapter == str(folder / "sft" / "best")
    sources = (job.data.train, job.data.eval, job.data.test)
    paths = [source.path for source in sources if source is not None and source.path]
    assert len(paths) == (2 if name == "dpo" else 3)
    assert all(Path(path).is_relative_to(folder) for path in paths)
    assert (Path(paths[0]).name == PAIRS) == (name == "dpo")
    assert job.evaluate.at_start, "what it began with is measured too"
    assert demo_job(tmp_path).data.test.path == job.data.test.path


def test_every_stage_is_announced_with_what_is_left(capsys) -> None:
    import time

    say = _progress(time.monotonic() - (_END_S[True] - _REPORT_S), whole=True)
    for stage in ("draw scenes", "zero-shot", "fine-tune", "evaluate", "pairs", "DPO", "GRPO", "report"):
        say(stage)
    stages = capsys.readouterr().out.split("\n\n")
    assert stages[0].strip().startswith("[1/8] draw scenes")
    assert "[8/8] report  (about 5 s left)" in stages[-1]
