"""What is told of a job's data is told before torch and transformers are imported, which takes longer than a look."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.jobs import write_job

_HEAVY = ("torch", "torchvision", "transformers", "ray", "trl", "peft", "datasets", "matplotlib")
_CODE = """
import contextlib, io, json, sys
from ray_vlm.cli import main
found = []
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(words)
    found.append([code, out.getvalue(), [name for name in json.loads(sys.argv[2]) if name in sys.modules]])
print(json.dumps(found))
"""


def test_a_look_at_rows_imports_no_model_library(tmp_path: Path, scenes: Path) -> None:
    """A wrong column, a missing file, and every row of good ones, with their tokens counted."""
    job = str(write_job(tmp_path, scenes, "tiny"))
    bad = "data.train={path: " + str(tmp_path / "rows.csv") + ", format: image_csv}"
    (tmp_path / "rows.csv").write_text("picture,label\na.png,dog\n")
    verbs = [
        ["data", "check", job, bad, "task=classification"],
        ["train", job, bad, "task=classification"],
        ["train", job, f"data.train.path={tmp_path / 'none.json'}"],
        ["data", "check", job],
        ["data", "check", job, "data.max_tokens=10"],
    ]
    command = [sys.executable, "-c", _CODE, json.dumps(verbs), json.dumps(_HEAVY)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results = json.loads(out.splitlines()[-1])
    assert [code for code, _, _ in results] == [1, 1, 1, 0, 1], results
    assert "no column image; it has picture, label" in results[0][1]
    assert "no column image; it has picture, label" in results[1][1]
    assert results[1][1].startswith("sft of "), "what is being read is said before it is read"
    assert "none.json" in results[2][1]
    assert "rows 50, usable 50" in results[3][1]
    assert "usable 0, bad 50" in results[4][1]
    assert [modules for _, _, modules in results] == [[], [], [], [], []]
