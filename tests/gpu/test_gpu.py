"""The benchmark for a card. Without one: that whatever a block does the others run, and that its code runs at all."""

import dataclasses
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import supervise
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.blocks import BLOCKS, WHOLE_S, Block
from benchmarks.gpu.card import check_card
from benchmarks.gpu.carry import PACKAGES, read_versions, strip_wheel
from benchmarks.gpu.figure_file import ALLOCATED, FigureFile, write_plans, write_table
from benchmarks.gpu.profiler import kind_of
from benchmarks.gpu.supervise import Events, Refused, run_children
from tests.gpu.fake_blocks import block

ROOT = Path(__file__).parents[2]


def _run(tmp_path: Path, blocks: Sequence[Block], whole_s: float = 30.0) -> tuple[bool, dict[str, Any]]:
    """Whether all ended as planned, and of each block its last figure."""
    figures = FigureFile(tmp_path / "figures.json")
    figures.clear()

    def start(names: Sequence[str]) -> subprocess.Popen:
        block_specs = json.dumps([dataclasses.asdict(one) for one in blocks if one.name in names])
        command = [sys.executable, "-m", "tests.gpu.fake_blocks", str(tmp_path), str(whole_s), block_specs]
        return subprocess.Popen(command, cwd=ROOT)

    all_ended = run_children(blocks, start, Events(tmp_path / "events.jsonl"), figures, whole_s)
    return all_ended, {entry["block"]: entry for entry in figures.read()}


def test_blocks_that_end_as_planned_share_a_process(tmp_path: Path) -> None:
    again = dataclasses.replace(block("good"), name="again")
    all_ended, entries = _run(tmp_path, [block("good"), again])
    assert all_ended
    assert entries["good"]["value"] == entries["again"]["value"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (block("fails_halfway"), "RuntimeError: something broke"),
        (block("slow", limit_s=1.2), "ended after its 1 s"),
        (block("good", needs=("no_such_package",)), "no_such_package cannot be imported here"),
        (block("refuses"), "torch sees no NVIDIA card"),
    ],
    ids=lambda value: value.name if isinstance(value, Block) else "",
)
def test_a_block_that_fails_costs_no_other(bad: Block, reason: str, tmp_path: Path) -> None:
    bad = dataclasses.replace(bad, name="bad")
    all_ended, entries = _run(tmp_path, [bad, block("good")])
    assert not all_ended
    assert reason in entries["bad"]["note"]
    assert not entries["bad"]["ok"]
    assert entries["good"]["name"] == "process"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (block("hangs", limit_s=1.5), "it hung"),
        (block("dies"), "exit code 9"),
        (block("breaks_the_card"), "CUDA error"),
        (block("imports_slowly", limit_s=1.5), "ended after its 2 s"),
    ],
    ids=lambda value: value.name if isinstance(value, Block) else "",
)
def test_a_block_that_takes_its_process_along_costs_no_other(
    bad: Block, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left runs in a new process, which is prepared by the blocks that must run."""
    monkeypatch.setattr(supervise, "GRACE_S", 0.5)
    first = dataclasses.replace(block("good", must=True), name="first")
    all_ended, entries = _run(tmp_path, [first, bad, block("good")])
    assert not all_ended
    assert reason in entries[bad.name]["note"]
    processes = [one["value"] for one in json.loads((tmp_path / "figures.json").read_text()) if one["unit"] == ""]
    assert len(set(processes) - {0}) == 2, "the card's state is not trusted any more"
    assert entries["first"]["value"] == entries["good"]["value"]


def test_what_was_measured_before_a_failure_stays(tmp_path: Path) -> None:
    _run(tmp_path, [block("fails_halfway")])
    names = [entry["name"] for entry in json.loads((tmp_path / "figures.json").read_text())]
    assert names == ["before it failed", "ended as planned"]


def test_without_what_must_run_nothing_is_begun(tmp_path: Path) -> None:
    all_ended, entries = _run(tmp_path, [block("refuses", must=True), block("good")])
    assert not all_ended
    assert "no NVIDIA card" in entries["refuses"]["note"]
    assert entries["good"]["note"] == "not begun: block refuses failed"


def test_blocks_for_which_no_time_is_left_are_named(tmp_path: Path) -> None:
    all_ended, entries = _run(tmp_path, [block("slow", limit_s=20), block("good")], whole_s=2.0)
    assert not all_ended
    assert "ended after" in entries["slow"]["note"]
    assert "not begun" in entries["good"]["note"]


def test_limits_and_names() -> None:
    assert sum(one.limit_s for one in BLOCKS) <= WHOLE_S <= 540
    assert main(["--blocks", "sft,no_such_block"]) == 2


def test_a_card_that_nothing_can_be_measured_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refused, match="no NVIDIA card"):
        check_card()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(Refused, match=r"Tesla T4 has compute capability 7\.5"):
        check_card()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (5 * 2**30, 80 * 2**30))
    with pytest.raises(Refused, match=r"14 GiB are needed and 5\.0 GiB"):
        check_card()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (60 * 2**30, 80 * 2**30))
    check_card()


def test_plans_are_put_beside_what_was_measured(tmp_path: Path) -> None:
    figures = FigureFile(tmp_path / "figures.json")
    for case, gib in (("one", 10.0), ("other", 10.0), ("late", 10.0)):
        figures.add("sft", f"{case}{ALLOCATED}", gib, "GiB", 40.0)
    write_plans(figures, {"one": {"allocated": 10.4 * 2**30}, "other": {"allocated": 9.5 * 2**30}}, bars=True)
    entries = {one["name"]: one for one in figures.read()}
    assert entries["one: planned over measured"]["value"] == pytest.approx(0.04)
    assert entries["one: planned over measured"]["ok"]
    assert not entries["other: planned under measured"]["ok"], "a plan must not be 5 % too low"
    assert "not done" in entries["late: planned"]["note"]
    assert "MISSED" in write_table(figures.read())


def test_a_value_that_is_no_number_is_kept_out_of_the_file(tmp_path: Path) -> None:
    figures = FigureFile(tmp_path / "figures.json")
    figures.add("a", "known", float("nan"), "s")
    figures.add("a", "asked for", float("inf"), "s", 1.0)
    assert [(entry["value"], entry["ok"]) for entry in json.loads(figures.path.read_text())] == [
        (None, True),
        (None, False),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopB_NTN", "products"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantise"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::vectorized_elementwise_kernel<4, silu_kernel>", "norms, activations, adapters"),
        ("something_new", "other"),
    ],
)
def test_kernels_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_bitsandbytes_travels_with_one_version_of_cuda(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        for kind in ("cpu", "cuda126", "cuda130", "rocm70"):
            made.writestr(f"bitsandbytes/libbitsandbytes_{kind}.so", kind * 1000)
        made.writestr("bitsandbytes/__init__.py", "")
        made.writestr("bitsandbytes-0.50.2.dist-info/RECORD", "old")
    with pytest.raises(ValueError, match=r"no kernels for cuda124\. It has cuda126, cuda130"):
        strip_wheel(wheel, "124")
    strip_wheel(wheel, "130")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        listed = {
            line.partition(",")[0] for line in archive.read("bitsandbytes-0.50.2.dist-info/RECORD").decode().split()
        }
    assert names == listed
    assert {name for name in names if name.endswith(".so")} == {
        "bitsandbytes/libbitsandbytes_cpu.so",
        "bitsandbytes/libbitsandbytes_cuda130.so",
    }


def test_what_travels_has_the_tested_versions(tmp_path: Path) -> None:
    assert len(read_versions(ROOT / "constraints.txt")) == len(PACKAGES)
    (tmp_path / "constraints.txt").write_text("trl==1.16.0\n")
    with pytest.raises(ValueError, match="peft is not pinned"):
        read_versions(tmp_path / "constraints.txt")


@pytest.mark.slow
def test_a_rehearsal_runs_every_block(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert main(["--rehearse", "--json", str(path), "--limit", "300"]) == 0
    figures = json.loads(path.read_text())
    assert {entry["block"] for entry in figures} == {one.name for one in BLOCKS}
    apart = [entry["value"] for entry in figures if entry["name"].endswith("gradients apart, bfloat16")]
    assert len(apart) >= 6
    assert max(apart) < 0.05, "the same step on both sides"
    shared = [entry["value"] for entry in figures if "model FLOPs, TRL's over ours" in entry["name"]]
    assert max(shared) > 2, "a group's prompt is computed once"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
def test_on_a_card_the_shipped_job_takes_what_was_planned(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    main(["--json", str(path), "--blocks", "sft"])
    entries = {one["name"]: one for one in json.loads(path.read_text())}
    assert entries["sft, 2 rows: planned over measured"]["ok"]
    assert entries["sft, 2 rows: planned under measured"]["ok"]
