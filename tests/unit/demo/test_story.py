"""The demo's scenes are drawn by two processes as one alone would draw them; its jobs stay in its folder, each starting
where the one before ended."""

from pathlib import Path

import pytest

from ray_vlm.demo import shapes, story
from ray_vlm.demo.story import _END_S, _REPORT_S, PAIRS, _progress, demo_job, stage_job
from ray_vlm.errors import ConfigError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few scenes for each split."""
    monkeypatch.setattr(shapes, "NUM_IMAGES", {"train": 4, "eval": 2, "test": 3})


def test_all_splits_are_drawn_as_one_process_would_draw_them(tmp_path: Path) -> None:
    calls: list[str] = []
    story.draw_scenes(demo_job(tmp_path).data, lambda: calls.append("meanwhile"))
    assert calls == ["meanwhile"]
    site = tmp_path / "demo" / "data" / "site"
    for split, count in shapes.NUM_IMAGES.items():
        alone = shapes.draw(tmp_path / "alone", "site", split, count)
        assert (site / f"{split}.json").read_bytes() == alone.read_bytes()
        names = sorted(path.name for path in (site / split).iterdir())
        assert len(names) == count
        assert all((site / split / n).read_bytes() == (alone.parent / split / n).read_bytes() for n in names)


def test_a_failure_of_the_other_process_is_told(tmp_path: Path) -> None:
    job = demo_job(tmp_path, ["data.train.create=ray_vlm.demo.shapes:no_such_function"])
    with pytest.raises(ConfigError, match="no_such_function"):
        story.draw_scenes(job.data, lambda: None)


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_jobs_after_sft_stay_in_the_demo_s_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "demo"
    job = stage_job(folder, name, folder / "sft" / "best")
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
