"""What this machine has: CPUs and GPUs that the process may use, disk space in Ray's temporary folder, packages.

All of it is read from system files, without importing a library or starting a process.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
_FULL = 0.95  # used share of a file system above which Ray writes no objects (its local_fs_capacity_threshold)
_MIN_FREE = 1 * GIB  # for logs, and for objects that do not fit into Ray's memory
_MIN_TMPFS = 4 * GIB  # a smaller tmpfs gets a note
_MIN_TO_START = 2**26  # bytes that Ray's own files need when it starts


def count_cpus() -> int:
    """Count the CPUs that this process may use: those of its affinity mask, limited by its cgroup's quota."""
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = read_cpu_quota(_read)
    return max(1, mask if quota is None else min(mask, int(quota)))


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    from importlib import metadata  # takes 15 ms

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def count_threads(cpus: float) -> int:
    """Return the number of threads of a process that reserves `cpus`, limited by the CPUs that it may use."""
    return max(1, min(int(cpus), count_cpus()))


def read_cpu_quota(read: Callable[[str], str | None]) -> float | None:
    """Return the CPU quota of this process's cgroups, in CPUs; None without a limit.

    `read` returns a file's text, or None. Both versions of cgroups are read. Limits of parent groups apply too.
    """
    quotas = []
    for line in ["0::/", "1:cpu:/", *(read("/proc/self/cgroup") or "").splitlines()]:
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            limits = [_quota_v2(read(f"/sys/fs/cgroup{above}/cpu.max")) for above in _with_parents(group)]
        elif "cpu" in controllers.split(","):
            mounts = {f"/sys/fs/cgroup/{controllers}", "/sys/fs/cgroup/cpu"}
            folders = [f"{mount}{above}" for mount in sorted(mounts) for above in _with_parents(group)]
            limits = [
                _quota_v1(read(f"{folder}/cpu.cfs_quota_us"), read(f"{folder}/cpu.cfs_period_us")) for folder in folders
            ]
        else:
            continue
        quotas += [quota for quota in limits if quota is not None]
    return min(quotas, default=None)


def _with_parents(group: str) -> Iterator[str]:
    """Yield `/a/b`, `/a` and the root. In a container the path may be the host's, of which only the root exists."""
    parts = group.strip("/").split("/") if group.strip("/") else []
    for length in range(len(parts), -1, -1):
        yield "".join(f"/{part}" for part in parts[:length])


def _quota_v2(text: str | None) -> float | None:
    quota, _, period = (text or "").strip().partition(" ")
    return _divide(quota, period or "100000")


def _quota_v1(quota: str | None, period: str | None) -> float | None:
    return _divide((quota or "").strip(), (period or "").strip())


def _divide(quota: str, period: str) -> float | None:
    """Return quota / period; None for no limit, which is written `max` or -1."""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(quota) and int(period) else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def count_gpus(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> int:
    """Count the NVIDIA GPUs of the machine by their device files, without torch or the driver; 0 if they are hidden."""
    if environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):  # hidden on purpose
        return 0
    return sum(path.name.removeprefix("nvidia").isdigit() for path in (root / "dev").glob("nvidia*"))


@dataclass(frozen=True)
class Disk:
    """The file system of a folder: total and free bytes, and whether it is in memory (tmpfs)."""

    folder: str
    total: int
    free: int
    in_memory: bool = False


def ray_folder() -> Path:
    """Return the folder in which Ray keeps sockets, logs and objects that do not fit into memory."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"  # noqa: S108 - as Ray has it


def read_disk(folder: Path) -> Disk:
    """Return the file system of a folder, or of its nearest existing parent."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    usage = shutil.disk_usage(existing)
    return Disk(
        str(folder), usage.total, usage.free, is_in_memory(str(existing.resolve()), _read("/proc/mounts") or "")
    )


def is_in_memory(folder: str, mounts: str) -> bool:
    """Whether a folder is on a tmpfs. `mounts` is the text of `/proc/mounts`."""
    kinds = {}
    for line in mounts.splitlines():
        _, mount, kind, *_ = [*line.split(" "), "", "", ""]
        if mount == "/" or folder == mount or folder.startswith(f"{mount}/"):
            kinds[len(mount)] = kind  # a later mount on the same folder hides the earlier one
    return bool(kinds) and kinds[max(kinds)] in ("tmpfs", "ramfs")


def cannot_hold_ray(disk: Disk) -> bool:
    """Whether there is too little space even for Ray's own files."""
    return disk.free < _MIN_TO_START


def describe_room(disk: Disk) -> str | None:
    """Return why Ray's temporary folder has too little space, and the fix; None if it has enough."""
    where = f"{disk.folder}, Ray's temporary folder,"
    fix = "Set RAY_TMPDIR to a folder with more room (a short path: sockets lie in it)"
    if disk.in_memory and disk.total < _MIN_TMPFS:
        why = f"lies in memory (tmpfs) and holds only {disk.total / GIB:.1f} GiB"
    elif 1 - disk.free / max(1, disk.total) > _FULL:
        why = f"is {1 - disk.free / max(1, disk.total):.0%} full, and above {_FULL:.0%} Ray keeps no more objects there"
    elif disk.free < _MIN_FREE:
        why = f"has only {disk.free / GIB:.2f} GiB left"
    else:
        return None
    return f"{where} {why}. {fix}, or make room."
