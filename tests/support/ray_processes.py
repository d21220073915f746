"""The processes of this process's Ray cluster: who they are, how one is killed, and what the object store holds."""

import contextlib

import psutil


def processes(title: str = "") -> list[psutil.Process]:
    """Return the processes of this process's Ray cluster that have this title in Ray, ordered by pid."""
    matching = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                matching.append(process)
    return sorted(matching, key=lambda process: process.pid)


def kill_process(title: str, number: int = 0) -> bool:
    """Send SIGKILL to the `number`-th of those processes; return whether there was one."""
    victims = processes(title)
    if victims:
        victims[number % len(victims)].kill()
    return bool(victims)


def store_mib() -> float:
    """Return the MiB now in Ray's object store."""
    import ray
    from ray._private.internal_api import node_stats

    node = ray.nodes()[0]
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return stats.store_stats.object_store_bytes_used / 2**20
