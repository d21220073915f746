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
    assert "no column image or file_name; it has picture, label" in results[0][1]
    assert "no column image or file_name; it has picture, label" in results[1][1]
    assert results[1][1].startswith("sft of "), "what is being read is said before it is read"
    assert "none.json" in results[2][1]
    assert "rows 50, usable 50" in results[3][1]
    assert "usable 0, bad 50" in results[4][1]
    assert [modules for _, _, modules in results] == [[], [], [], [], []]


# Optional libraries that TRL, transformers and Accelerate import when they find them, and what `torch.compile` needs.
_UNUSED = ("wandb", "deepspeed", "boto3", "scipy", "torch._inductor.compile_fx", "torch._inductor.lowering", "networkx")
_RUN = """
import gc, importlib.util, json, sys
from ray_vlm.cli import main
assert main(["train", sys.argv[1]]) == 0
names = json.loads(sys.argv[2])
print(json.dumps([name for name in names if name in sys.modules]))
assert gc.isenabled() and gc.get_freeze_count() == 0
import importlib.metadata, transformers
assert importlib.metadata.packages_distributions.__module__ == "importlib.metadata"
assert transformers.utils.is_scipy_available() == (importlib.util.find_spec("scipy") is not None)
"""


def test_a_run_imports_no_library_that_it_does_not_use(tmp_path: Path, scenes: Path) -> None:
    """A run in 4 bit in its own process, of one step. Afterwards the process is as it was: nothing stays hidden."""
    job = write_job(tmp_path, scenes, "tiny", model={"load_in_4bit": True}, train={"max_steps": 1})
    command = [sys.executable, "-c", _RUN, str(job), json.dumps(_UNUSED)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(out.splitlines()[-1]) == []
