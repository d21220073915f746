"""Tables are plain text of any width where output is piped, and readable on a narrow terminal."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

from ray_vlm.runs.text import format_markdown, format_table
from tests.unit.runs.test_read import write_run

_LIST = [sys.executable, "-c", "import sys; from ray_vlm.cli import main; main(sys.argv[1:])", "runs", "list"]


def _write_runs(folder: Path) -> list[str]:
    for name in ("drains_sft-001", "drains_sft-002"):
        write_run(folder / name)
    return [*_LIST, str(folder)]


def _on_terminal(command: list[str], columns: int, folder: Path) -> list[str]:
    """Return the lines that a command writes to a terminal of so many columns, without colours."""
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "dumb", "NO_COLOR": "1"}
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, cwd=folder)
    os.close(terminal)
    written = b""
    while True:
        try:
            part = os.read(screen, 2**16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(screen)
    assert process.wait() == 0
    return written.decode().replace("\r\n", "\n").splitlines()


def test_piped_tables_are_plain_and_lose_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"COLUMNS": "40"}
    command = _write_runs(tmp_path)
    output = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, text=True, check=True).stdout
    head, *rows = output.splitlines()
    assert output.isascii()
    assert output.replace("\n", "").isprintable()
    assert head.split() == [
        "run",
        "status",
        "method",
        "task",
        "model",
        "steps",
        "best",
        "on",
        "test",
        "started",
        "time",
    ]
    assert [row.split()[:5] for row in rows] == [
        [name, "finished", "sft", "detection", "tiny"] for name in ("drains_sft-001", "drains_sft-002")
    ]
    assert len({len(line) for line in (head, *rows)}) == 1


def test_a_narrow_terminal_shows_each_row_as_a_list(tmp_path: Path) -> None:
    lines = _on_terminal(_write_runs(tmp_path), 40, tmp_path)
    assert max(map(len, lines)) <= 40
    assert [line for line in lines if not line.startswith(" ")] == ["run", "drains_sft-001", "drains_sft-002"]
    assert lines[2:5] == [
        "    status: finished, method: sft,",
        "    task: detection, model: tiny,",
        "    steps: 2, best: f1_50 0.100,",
    ]
    assert not any("\x1b" in line for line in lines)


def test_a_wide_terminal_shows_the_table_that_a_pipe_gets(tmp_path: Path) -> None:
    command = _write_runs(tmp_path)
    piped = subprocess.run(command, capture_output=True, cwd=tmp_path, text=True, check=True).stdout
    assert _on_terminal(command, 200, tmp_path) == piped.splitlines()


def test_characters_of_two_columns_are_aligned() -> None:
    assert format_table([["类", "n"], ["水管", "12"], ["a", "1"], ["é", "2"]]).splitlines() == [
        "类     n",
        "水管  12",
        "a      1",
        "é      2",
    ]


def test_columns_are_aligned_as_asked() -> None:
    rows = [["n", "name", "x"], ["10", "a", "1"], ["2", "long" * 20, ""]]
    assert format_table(rows, left=(1,), longest=20).splitlines() == [
        " n  name                  x",
        "10  a                     1",
        " 2  longlong...glonglong",
    ]


def test_a_markdown_table_keeps_its_cells() -> None:
    assert format_markdown([["", "a|b"], ["<x>", 1]], numbers=True) == "| | a\\|b |\n|---|---:|\n| &lt;x> | 1 |"
