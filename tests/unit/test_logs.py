"""Where lines go: the terminal, also of those who only import the package, and the log files of a run."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ray_vlm.logs import PROGRESS, TERMINAL, run_output
from ray_vlm.runs import log_file
from ray_vlm.runs.log_file import log_to_file
from ray_vlm.runs.paths import RunPaths, open_run
from ray_vlm.storage import Store
from tests.support.lines import kept_lines

LOGGER = logging.getLogger("ray_vlm.somewhere")


def _log_everything() -> None:
    LOGGER.debug("a detail")
    LOGGER.info("a line")
    LOGGER.warning("mind this")
    LOGGER.error("a fault")
    PROGRESS.info("half done")


def test_lines_go_to_stdout_and_what_is_beside_them_to_stderr(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _log_everything()
    assert capsys.readouterr() == ("a line\nnote: mind this\n", "a fault\nhalf done\n")
    with run_output():
        _log_everything()
    assert capsys.readouterr() == ("a line\nnote: mind this\nhalf done\n", "a fault\n")
    monkeypatch.setattr(TERMINAL, "level", logging.DEBUG)
    _log_everything()
    assert capsys.readouterr().err == "ray_vlm.somewhere: a detail\na fault\nhalf done\n"


_END = ":ray_vlm.a:a line\nWARNING:ray_vlm.a:mind\n"
_USE = "import ray_vlm; logging.getLogger('ray_vlm.a').info('a line'); logging.getLogger('ray_vlm.a').warning('mind')"


@pytest.mark.parametrize(
    ("before", "after", "out", "err"),
    [
        ("", "", "a line\nnote: mind\n", ""),
        ("logging.basicConfig(level='INFO')", "", "a line\nnote: mind\n", ""),
        ("", "log.setLevel('WARNING')", "note: mind\n", ""),
        ("", "log.handlers.clear(); log.propagate = True; logging.basicConfig()", "", f"INFO{_END}"),
        ("log.addHandler(logging.StreamHandler(sys.stdout)); log.propagate = False", "", "a line\nmind\n", ""),
        ("log.addHandler(logging.NullHandler())", "", "", ""),
    ],
)
def test_who_only_imports_the_package_sees_its_lines_and_can_redirect_them(
    before: str, after: str, out: str, err: str
) -> None:
    code = f"import logging, sys; log = logging.getLogger('ray_vlm')\n{before}\nimport ray_vlm\n{after}\n{_USE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (out, err)


def test_a_log_file_has_every_line_of_every_attempt_and_the_error_that_ended_one(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)

    def fail() -> None:
        with log_to_file(paths, "rank-1"):
            LOGGER.debug("a detail")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    with log_to_file(paths, "rank-1"):
        LOGGER.info("ü")
    LOGGER.info("afterwards")
    text = (tmp_path / "logs" / "rank-1.log").read_text(encoding="utf-8")
    assert "DEBUG ray_vlm.somewhere: a detail\n" in text
    assert "ValueError: broken\n" in text
    assert "INFO ray_vlm.somewhere: ü\n" in text
    assert "afterwards" not in text


def test_a_log_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "_MAX_BYTES", 1000)
    with log_to_file(RunPaths(tmp_path), "driver"):
        for _ in range(100):
            LOGGER.debug("x" * 50)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "logs").iterdir()}
    assert set(sizes) == {"driver.log", "driver.log.1"}
    assert max(sizes.values()) <= 1000


@pytest.mark.parametrize("when", ["at first", "later"])
def test_a_log_that_cannot_be_written_is_one_note_and_no_error(tmp_path: Path, when: str) -> None:
    paths = RunPaths(tmp_path)
    if when == "at first":
        paths.logs.write_text("a file where the folder should be")
    with kept_lines() as lines, log_to_file(paths, "driver"):
        if when == "later":
            (handler,) = [each for each in logging.getLogger("ray_vlm").handlers if hasattr(each, "doRollover")]
            handler.stream = open("/dev/full", "w")  # type: ignore[attr-defined]  # noqa: SIM115
        for _ in range(3):
            LOGGER.info("a line")
    notes = [line for line in lines if line != "a line"]
    assert len(notes) == 1
    assert "driver.log cannot be written (" in notes[0]
    assert lines.count("a line") == 3


def test_a_log_file_arrives_in_an_object_store(bucket: str) -> None:
    address = bucket.replace("/runs?", "/runs/logged?")
    for text in ("first attempt", "second attempt"):
        paths = open_run(address)  # each process has a folder of its own
        with log_to_file(paths, "rank-0"):
            LOGGER.info(text)
        paths.discard()
    text = (Store(address).read("logs/rank-0.log") or b"").decode()
    assert text.index("first attempt") < text.index("second attempt")
