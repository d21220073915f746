"""The demo's scenes: all splits drawn, the training scenes by another process, as one process alone would draw them."""

from pathlib import Path

import pytest

from ray_vlm.demo import shapes, story
from ray_vlm.errors import ConfigError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few scenes for each split, and no libraries."""
    monkeypatch.setattr(shapes, "NUM_IMAGES", {"train": 4, "eval": 2, "test": 3})
    monkeypatch.setattr(story, "_import_libraries", lambda job: None)


def test_all_splits_are_drawn_as_one_process_would_draw_them(tmp_path: Path) -> None:
    story.draw_scenes(story.demo_job(tmp_path))
    site = tmp_path / "demo" / "data" / "site"
    for split, count in shapes.NUM_IMAGES.items():
        alone = shapes.draw(tmp_path / "alone", "site", split, count)
        assert (site / f"{split}.json").read_bytes() == alone.read_bytes()
        names = sorted(path.name for path in (site / split).iterdir())
        assert len(names) == count
        assert all((site / split / n).read_bytes() == (alone.parent / split / n).read_bytes() for n in names)


def test_a_failure_of_the_other_process_is_told(tmp_path: Path) -> None:
    job = story.demo_job(tmp_path, ["data.train.create=ray_vlm.demo.shapes:no_such_function"])
    with pytest.raises(ConfigError, match="no_such_function"):
        story.draw_scenes(job)
