"""The model card: a header for the hub, numbers with intervals, and no local paths."""

import json
from pathlib import Path

import yaml

from ray_vlm.runs.card import ADAPTER, MERGED, write_card
from ray_vlm.runs.read import read_run
from tests.unit.runs.test_read import write_run


def test_a_card_of_each_kind(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    run = read_run(str(folder))
    for kind, library in ((ADAPTER, "peft"), (MERGED, "transformers")):
        checked = {"rows": 8.0, "largest": 1e-5, "scale": 20.0, "same_token": 1.0} if kind == MERGED else None
        card = write_card(run, kind, "best", "apache-2.0", checked)
        head = yaml.safe_load(card.split("---")[1])
        assert (head["library_name"], head["license"]) == (library, "apache-2.0")
        assert ("1e-05" in card) == (kind == MERGED)
        assert str(tmp_path) not in card


def test_names_from_data_cannot_become_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    job = json.loads((folder / "resolved.json").read_text())
    job["data"] = {"train": {"path": "/x/a|b <script>`.json"}}
    job["model"]["name"] = "evil: [\n---\n# x"
    (folder / "resolved.json").write_text(json.dumps(job))
    card = write_card(read_run(str(folder)), ADAPTER, "final")
    assert "<script" not in card
    assert yaml.safe_load(card.split("\n---\n")[0].removeprefix("---"))["base_model"] == "evil: [\n---\n# x"
    assert "license" not in card.split("\n---\n")[0]


def test_numbers_stand_with_their_intervals(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "evaluate" / "best").mkdir(parents=True, exist_ok=True)
    metrics = {
        "overall": {"f1_50": 0.5, "map": None},
        "intervals": {"f1_50": [0.4, 0.6], "map": [None, None]},
        "num_rows": 7,
    }
    (folder / "evaluate" / "best" / "metrics.json").write_text(json.dumps(metrics))
    card = write_card(read_run(str(folder)), ADAPTER, "best")
    assert "On 7 test rows" in card
    assert "| f1_50 | 0.500 | 0.400 to 0.600 |" in card
    assert "| map | - | - |" in card
