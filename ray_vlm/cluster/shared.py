"""Check that every node sees the folder of the runs: on a local disk the files of other nodes would be missing."""

import uuid

from ray_vlm.errors import RunError
from ray_vlm.runs.store import Store, is_remote


def check_shared(address: str) -> None:
    """Raise `RunError` with the nodes of the joined cluster that do not see the folder; object stores are all seen."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if is_remote(address) or len(nodes) < 2:
        return
    store, name = Store(address), f".seen-{uuid.uuid4().hex[:8]}"
    store.write(name, b"")
    try:
        sees = ray.remote(num_cpus=0)(_sees)
        answers = [sees.options(**_on(node["NodeID"])).remote(address, name) for node in nodes]
        blind = [node["NodeManagerAddress"] for node, seen in zip(nodes, ray.get(answers), strict=True) if not seen]
    finally:
        store.remove(name)
    if blind:
        raise RunError(
            f"run.output_dir: {address} is not seen by {', '.join(sorted(blind))}. Give a folder on a file system that "
            "all nodes share, or s3://..."
        )


def _on(node: str) -> dict:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node, soft=False)}


def _sees(address: str, name: str) -> bool:
    return Store(address).read(name) is not None
