"""CPUs by affinity mask and cgroup quota, GPUs by their device files, and the space in Ray's temporary folder."""

import os
from pathlib import Path

import pytest

from ray_vlm import machine
from ray_vlm.machine import (
    GIB,
    Disk,
    count_cpus,
    count_gpus,
    count_threads,
    describe_room,
    is_in_memory,
    read_cpu_quota,
)

V1 = "4:cpu,cpuacct:/docker/ab\n3:cpuset:/docker/ab\n0::/\n"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"/sys/fs/cgroup/cpu.max": "400000"}, 4.0),
        # The limit of a group above, and the smaller one of two.
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3.0),
        (
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/cpu.max": "300000 100000",
                "/sys/fs/cgroup/a/b/cpu.max": "100000 50000",
            },
            2.0,
        ),
        # A container reads the host's path, and its own group is the root.
        ({"/proc/self/cgroup": "0::/docker/ab\n", "/sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
        ({"/proc/self/cgroup": "0::/a\n", "/sys/fs/cgroup/a/cpu.max": "not a number"}, None),
        ({"/proc/self/cgroup": "garbage\n"}, None),
    ],
)
def test_the_quota_of_cgroup_version_2(files: dict[str, str], cpus: float | None) -> None:
    assert read_cpu_quota(files.get) == cpus


@pytest.mark.parametrize(
    ("folder", "quota", "period", "cpus"),
    [
        ("cpu,cpuacct/docker/ab", "200000", "100000", 2.0),
        ("cpu,cpuacct", "250000\n", "100000\n", 2.5),
        ("cpu/docker/ab", "50000", "100000", 0.5),
        ("cpu", "-1", "100000", None),
        ("cpu", "100000", "0", None),
    ],
)
def test_the_quota_of_cgroup_version_1(folder: str, quota: str, period: str, cpus: float | None) -> None:
    files = {
        "/proc/self/cgroup": V1,
        f"/sys/fs/cgroup/{folder}/cpu.cfs_quota_us": quota,
        f"/sys/fs/cgroup/{folder}/cpu.cfs_period_us": period,
    }
    assert read_cpu_quota(files.get) == cpus


@pytest.mark.parametrize(("mask", "quota", "cpus"), [(8, None, 8), (8, 2.5, 2), (2, 16.0, 2), (8, 0.5, 1)])
def test_cpus_are_those_of_the_mask_and_of_the_quota(
    mask: int, quota: float | None, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(mask)), raising=False)
    monkeypatch.setattr(machine, "read_cpu_quota", lambda read: quota)
    assert count_cpus() == cpus
    assert count_threads(4.0) == min(4, cpus)
    assert count_threads(0.5) == 1


def test_every_count_of_cpus_is_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other module asks the system for the number of CPUs."""
    package = Path(machine.__file__).parent
    asking = [
        p.name for p in package.rglob("*.py") if "os.cpu_count" in p.read_text() or "getaffinity" in p.read_text()
    ]
    assert asking == ["machine.py"]
    threads = [line for p in package.rglob("*.py") for line in p.read_text().splitlines() if "set_num_threads(" in line]
    assert len(threads) >= 3
    assert all("count_threads(" in line or "set_num_threads(1)" in line for line in threads)


def test_cards_are_counted_by_their_device_files(tmp_path: Path) -> None:
    assert count_gpus(tmp_path, {}) == 0
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia12", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / "dev" / name).touch()
    assert count_gpus(tmp_path, {}) == 2
    assert count_gpus(tmp_path, {"CUDA_VISIBLE_DEVICES": "0,1"}) == 2
    assert count_gpus(tmp_path, {"CUDA_VISIBLE_DEVICES": ""}) == 0


def test_a_folder_in_memory_is_known_by_the_mounts() -> None:
    mounts = "/dev/vda / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/vdb /tmp/big ext4 rw 0 0\n"
    assert is_in_memory("/tmp/ray", mounts)
    assert not is_in_memory("/tmp/big/ray", mounts)
    assert not is_in_memory("/tmpfolder", mounts)
    assert not is_in_memory("/home", "")


@pytest.mark.parametrize(
    ("disk", "part"),
    [
        (Disk("/tmp/ray", 100 * GIB, 50 * GIB), None),
        (Disk("/tmp/ray", 100 * GIB, 4 * GIB), "96% full, and above 95% Ray keeps no more objects"),
        (Disk("/tmp/ray", 10 * GIB, GIB // 2 + GIB // 4), "only 0.75 GiB left"),
        (Disk("/tmp/ray", GIB, GIB, in_memory=True), "lies in memory (tmpfs) and holds only 1.0 GiB"),
        (Disk("/tmp/ray", 64 * GIB, 60 * GIB, in_memory=True), None),
    ],
)
def test_a_full_or_small_temporary_folder_is_reported(disk: Disk, part: str | None) -> None:
    note = describe_room(disk)
    assert (note is None) == (part is None)
    assert part is None or (part in str(note) and "RAY_TMPDIR" in str(note))
