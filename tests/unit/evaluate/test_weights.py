"""Names that hold no weights are refused before anything is loaded, with what to give instead."""

import json
from pathlib import Path

import pytest
import yaml

from ray_vlm.config.load import load_job
from ray_vlm.errors import RunError
from ray_vlm.evaluate import weights
from ray_vlm.evaluate.pairs import make_pairs
from ray_vlm.evaluate.weights import find_answerer, trained_weights, weights_of
from ray_vlm.runs.read import read_run
from ray_vlm.storage import Store


def _run(folder: Path, *folders: str) -> Path:
    """A stopped run with folders of weights."""
    for name in folders:
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text("{}")
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"status": "interrupted", "attempts": []}))
    (folder / "resolved.json").write_text(json.dumps({"model": {"name": "x"}}))
    (folder / "metrics.jsonl").write_text("")
    return folder


@pytest.mark.parametrize("name", ["run/best", "run/final", "nothing", "no/such/folder", "empty"])
def test_an_adapter_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _run(tmp_path / "run", "checkpoint-5-a1-abc")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({"model": {"name": "x"}, "data": {"train": {"path": "a.json"}}}))
    for path in (name, str(tmp_path / name)):
        with pytest.raises(RunError) as error:
            trained_weights(path)
        assert ("checkpoint-5-a1-abc" in str(error.value)) == name.startswith("run/")
        with pytest.raises(RunError):
            make_pairs(load_job(job), path, "train", str(tmp_path / "pairs.jsonl"))
    with pytest.raises(RunError):
        find_answerer(str(tmp_path / name))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "job.yaml", "run"]


def test_an_address_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "Store", lambda address: Store(tmp_path / "none"))
    with pytest.raises(RunError, match=r"s3://bucket/run/best cannot be used: .*Give a run's best/ or final/"):
        trained_weights("s3://bucket/run/best")


def test_folders_with_weights_are_what_they_are_called(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", "final", "checkpoint-5-a1-abc")
    assert trained_weights(str(run)) == str(run / "final")
    for name in ("final", "checkpoint-5-a1-abc"):
        assert trained_weights(str(run / name)) == str(run / name)
    with pytest.raises(RunError, match=r"has no best\. There is: final\."):
        weights_of(read_run(str(run)), "best")


def test_a_stopped_run_names_its_checkpoints_and_the_way_on(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", "checkpoint-51-a1-abc", "checkpoint-9-a1-def")
    for name in (str(run), str(run / "best")):
        with pytest.raises(RunError) as error:
            trained_weights(name)
        text = str(error.value)
        assert "only checkpoint-9-a1-def, checkpoint-51-a1-abc" in text, "in the order of their steps"
        assert "--resume" in text
        assert text.endswith(str(run / "checkpoint-51-a1-abc"))
    with pytest.raises(RunError, match=r"has no best/ or final/, and no checkpoint yet.*--resume"):
        trained_weights(str(_run(tmp_path / "young")))
