"""What this process may use of its machine: CPUs, the cards in sight, and the room in Ray's temporary folder.

Read from files of the system alone: nothing is imported for it and no process is started.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
_FULL = 0.95  # share of a file system above which Ray keeps no more objects there (its local_fs_capacity_threshold)
_LEAST_ROOM = 1 * GIB  # for logs and for objects that Ray's memory does not hold
_LEAST_MEMORY_ROOM = 4 * GIB  # size of a tmpfs that counts as small
_TO_START = 2**26  # bytes that Ray's own files take as it starts


def count_cpus() -> int:
    """CPUs that this process may use: those of its affinity mask, and no more than its cgroup's quota pays for."""
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = read_cpu_quota(_read)
    return max(1, mask if quota is None else min(mask, int(quota)))


def count_threads(cpus: float) -> int:
    """Threads of a process that reserves `cpus`: no more than it may really use."""
    return max(1, min(int(cpus), count_cpus()))


def read_cpu_quota(read: Callable[[str], str | None]) -> float | None:
    """How many CPUs' time the cgroups of this process grant it, None without a limit. `read`: a file's text, or None.

    Version 2 and version 1 of cgroups. The limits of the groups above count too.
    """
    quotas = []
    for line in ["0::/", "1:cpu:/", *(read("/proc/self/cgroup") or "").splitlines()]:
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            found = [_quota_v2(read(f"/sys/fs/cgroup{above}/cpu.max")) for above in _with_parents(group)]
        elif "cpu" in controllers.split(","):
            mounts = {f"/sys/fs/cgroup/{controllers}", "/sys/fs/cgroup/cpu"}
            folders = [f"{mount}{above}" for mount in sorted(mounts) for above in _with_parents(group)]
            found = [
                _quota_v1(read(f"{folder}/cpu.cfs_quota_us"), read(f"{folder}/cpu.cfs_period_us")) for folder in folders
            ]
        else:
            continue
        quotas += [quota for quota in found if quota is not None]
    return min(quotas, default=None)


def _with_parents(group: str) -> Iterator[str]:
    """`/a/b`, `/a` and the root. In a container a group's path may be the host's: only the root is there then."""
    parts = group.strip("/").split("/") if group.strip("/") else []
    for length in range(len(parts), -1, -1):
        yield "".join(f"/{part}" for part in parts[:length])


def _quota_v2(text: str | None) -> float | None:
    quota, _, period = (text or "").strip().partition(" ")
    return _divide(quota, period or "100000")


def _quota_v1(quota: str | None, period: str | None) -> float | None:
    return _divide((quota or "").strip(), (period or "").strip())


def _divide(quota: str, period: str) -> float | None:
    """`max` and -1 stand for no limit."""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(quota) and int(period) else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def count_gpus(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> int:
    """NVIDIA cards that this process may see, by their device files: neither torch nor the driver is asked."""
    if environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):  # hidden on purpose
        return 0
    return sum(path.name.removeprefix("nvidia").isdigit() for path in (root / "dev").glob("nvidia*"))


@dataclass(frozen=True)
class Disk:
    """The file system of a folder: bytes in all and free, and whether it lies in memory."""

    folder: str
    total: int
    free: int
    in_memory: bool = False


def ray_folder() -> Path:
    """Where Ray keeps sockets, logs and objects that do not fit into memory."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"  # noqa: S108 - as Ray has it


def read_disk(folder: Path) -> Disk:
    """The file system on which a folder lies, or will lie once it is made."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    usage = shutil.disk_usage(there)
    return Disk(str(folder), usage.total, usage.free, is_in_memory(str(there.resolve()), _read("/proc/mounts") or ""))


def is_in_memory(folder: str, mounts: str) -> bool:
    """Whether a folder lies on a tmpfs, by the text of `/proc/mounts`."""
    kinds = {}
    for line in mounts.splitlines():
        _, mount, kind, *_ = [*line.split(" "), "", "", ""]
        if mount == "/" or folder == mount or folder.startswith(f"{mount}/"):
            kinds[len(mount)] = kind  # of two mounts in one place the later one is seen
    return bool(kinds) and kinds[max(kinds)] in ("tmpfs", "ramfs")


def cannot_hold_ray(disk: Disk) -> bool:
    """Whether Ray could not even write its own files there."""
    return disk.free < _TO_START


def describe_room(disk: Disk) -> str | None:
    """What is wrong with the room in Ray's temporary folder, and the fix; None where there is enough."""
    where = f"{disk.folder}, Ray's temporary folder,"
    fix = "Set RAY_TMPDIR to a folder with more room (a short path: sockets lie in it)"
    if disk.in_memory and disk.total < _LEAST_MEMORY_ROOM:
        why = f"lies in memory (tmpfs) and holds only {disk.total / GIB:.1f} GiB"
    elif 1 - disk.free / max(1, disk.total) > _FULL:
        why = f"is {1 - disk.free / max(1, disk.total):.0%} full, and above {_FULL:.0%} Ray keeps no more objects there"
    elif disk.free < _LEAST_ROOM:
        why = f"has only {disk.free / GIB:.2f} GiB left"
    else:
        return None
    return f"{where} {why}. {fix}, or make room."
