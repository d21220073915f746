"""How the command line is read: options in full, no empty values, likely fixes; and a reader who leaves."""

import subprocess
import sys
from pathlib import Path

import pytest

from ray_vlm.cli import build_parser, main
from ray_vlm.cli.cluster import command_words

ROOT = Path(__file__).parents[3]


def test_settings_are_not_called_required(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["train"])
    text = capsys.readouterr().err
    assert "[key=value ...]" in text
    assert text.rstrip().endswith("the following arguments are required: job")


def test_settings_may_stand_before_and_behind_options(capsys: pytest.CaptureFixture) -> None:
    job = str(ROOT / "jobs" / "demo_sft.yaml")
    for words in (["config", job], ["config", job, "seed=7"], ["config", job, "seed=7", "train.max_steps=3"]):
        assert main(words) == 0
        assert ("seed: 7" in capsys.readouterr().out) == ("seed=7" in words)


@pytest.mark.parametrize(
    ("words", "verb", "likely"),
    [
        ("train job.yaml --over", "train", "--overwrite"),
        ("train job.yaml --dryrun", "train", "--dry-run"),
        ("train job.yaml --dryrun=1", "train", "--dry-run"),
        ("train job.yaml --re seed=1", "train", "--resume"),
        ("evaluate job.yaml --adaptor best", "evaluate", "--adapter"),
        ("evaluate job.yaml --bas", "evaluate", "--base or --base-unquantised"),
        ("data check job.yaml --dec", "data check", "--decode"),
        ("runs plot run --outp x.png", "runs plot", "--output"),
        ("jobs list --addr http://h:1", "jobs list", "--address"),
        ("submit train job.yaml --over", "submit train", "--overwrite"),
        ("submit train job.yaml --no-w", "submit train", "--no-wait"),
        ("memory job.yaml --xyzzy", "memory", None),
    ],
)
def test_options_are_written_in_full_and_a_likely_one_is_named(
    words: str, verb: str, likely: str | None, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith(f"usage: ray-vlm {verb} [-h]")
    assert "unrecognized arguments: --" in text
    assert text.rstrip().endswith(f"; did you mean {likely}?") == (likely is not None)


@pytest.mark.parametrize(
    ("words", "argument"),
    [
        (["evaluate", "job.yaml", "--adapter", ""], "--adapter"),
        (["evaluate", "job.yaml", "--adapter=a", "--adapter="], "--adapter"),
        (["evaluate", "job.yaml", "--output", ""], "--output"),
        (["submit", "evaluate", "job.yaml", "--adapter", ""], "--adapter"),
        (["submit", "--working-dir", "", "train", "job.yaml"], "--working-dir"),
        (["tune", "job.yaml", "--space", ""], "--space"),
        (["data", "check", "job.yaml", "--bad-rows", ""], "--bad-rows"),
        (["runs", "export", "run", "--csv", ""], "--csv"),
        (["runs", "compare", "a", "b", "--html="], "--html"),
        (["runs", "show", ""], "RUN"),
        (["predict", "run", "a.png", "", "--output", "o.csv"], "INPUT"),
        (["init", ""], "folder"),
    ],
)
def test_an_empty_value_is_refused_by_its_name(words: list[str], argument: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert f"argument {argument}: the value is empty, perhaps from a shell variable" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "train job.yaml a=1 b=2 --resume",
        "train job.yaml --dry-run",
        "tune job.yaml --space=space.yaml --overwrite",
        "evaluate job.yaml --adapter=/a/best --adapter=/b/best --base --output=/o --against=/e",
        "pairs job.yaml --output=/o/p.jsonl --adapter=/a --part=eval --overwrite",
        "predict /r /in/1.png /in/2.png --output=/o.csv --draw=/d --question=it's --weights=final --num-replicas=0",
        "export /r --merged --weights=best --output=/o",
    ],
)
def test_a_verb_is_submitted_with_all_of_its_words(words: str) -> None:
    arguments = words.split()
    own = ["--address", "http://h:8265", "--no-wait", "--driver-gpus", "1"]
    for order in (["submit", *own, *arguments], ["submit", *arguments, *own]):
        args = build_parser().parse_args(order)
        assert args.submitted_verb == arguments[0]
        assert sorted(command_words(args.submitted_actions, vars(args))) == sorted(arguments[1:])
        assert (args.address, args.no_wait, args.driver_gpus, args.working_dir) == ("http://h:8265", True, 1.0, ".")


def test_a_reader_who_leaves_gets_no_traceback() -> None:
    command = [sys.executable, "-m", "ray_vlm", "config", "jobs/demo_sft.yaml"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    text = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert text == b""
