"""How many samplers the driver keeps, and which it ends first; their processes are played."""

import importlib
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ray_vlm.errors import RunError
from ray_vlm.train import samplers
from ray_vlm.train.samplers import SamplerCount, SamplerGroup, start_samplers


class Cluster:
    """What Ray does for placement groups and actors. `lost`: groups whose node is gone; `has_room`: whether anything is
    placed."""

    def __init__(self) -> None:
        self.groups: list[object] = []
        self.names: list[str] = []
        self.lost: list[object] = []
        self.busy_names: set[str] = set()
        self.has_room = True

    def placement_group(self, bundles: list[dict[str, float]]) -> object:
        group = SimpleNamespace(bundles=bundles, ready=lambda: group)
        self.groups.append(group)
        return group

    def remove_placement_group(self, group: object) -> None:
        self.groups.remove(group)

    def placement_group_table(self, group: object) -> dict[str, str]:
        return {"state": "RESCHEDULING" if group in self.lost else "CREATED"}

    def remote(self, **resources: float) -> Callable[[type], object]:
        def make(options: dict[str, Any]) -> object:
            if options["name"] in self.busy_names:
                raise ValueError(f"The name {options['name']} is already taken.")
            self.names.append(options["name"])
            return SimpleNamespace(load=SimpleNamespace(remote=lambda: None), name=options["name"])

        return lambda _: SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda *_: make(options)))

    def kill(self, actor: Any) -> None:
        self.names.remove(actor.name)

    def wait(self, groups: list[object], num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        return (groups, []) if self.has_room else ([], groups)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    played, module = (
        Cluster(),
        importlib.import_module("ray.util.placement_group"),
    )
    for name in ("placement_group", "remove_placement_group", "placement_group_table"):
        monkeypatch.setattr(module, name, getattr(played, name))
    for name in ("remote", "kill", "wait"):
        monkeypatch.setattr(f"ray.{name}", getattr(played, name))
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(
        "ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy", lambda group, **_: SimpleNamespace()
    )
    return played


def _group() -> SamplerGroup:
    spec: Any = SimpleNamespace()
    return SamplerGroup(spec, ["a", "b", "c", "d"], (2.0, 0.0))


def test_a_sampler_without_a_node_ends_first(cluster: Cluster) -> None:
    group = _group()
    group.resize(3)
    assert cluster.names == ["a", "b", "c"]
    cluster.lost = cluster.groups[:1]
    group.resize(2)
    assert cluster.names == ["b", "c"]
    group.resize(1)
    assert cluster.names == ["b"], "of those with a node, the last one"
    group.resize(4)
    assert cluster.names == ["b", "a", "c", "d"]
    group.resize(0)
    assert (cluster.names, cluster.groups, len(group)) == ([], [], 0)


def test_a_name_that_is_taken_for_a_moment_leaves_nothing_behind(cluster: Cluster) -> None:
    group = _group()
    group.resize(1)
    cluster.busy_names = {"b"}
    with pytest.raises(ValueError, match="already taken"):
        group.resize(3)
    assert (len(cluster.groups), len(group)) == (1, 1)
    cluster.busy_names = set()
    group.resize(3)
    assert cluster.names == ["a", "b", "c"]


def test_a_range_follows_the_cluster_and_all_samplers_end_with_the_run(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "_LOOK_S", 0.01)
    monkeypatch.setattr(samplers, "replace", lambda spec, samplers: samplers)
    spec: Any = SimpleNamespace()
    room, answers = 2, True

    def count_room() -> int:
        if not answers:
            raise ConnectionError("the head does not answer")
        return room

    def wait_for(count: int) -> None:
        end = time.monotonic() + 10
        while len(cluster.names) != count and time.monotonic() < end:
            time.sleep(0.01)
        assert len(cluster.names) == count

    with start_samplers(spec, SamplerCount(1, 3, 2, (2.0, 0.0)), 0.0, count_room) as names:
        assert len(names) == 3, "also of samplers that come later"  # type: ignore[arg-type]
        for room in (2, 3, 1):
            wait_for(room)
        answers = False
        time.sleep(0.05)
        assert len(cluster.names) == 1
        answers, room = True, 2
        wait_for(2)
    assert (cluster.names, cluster.groups) == ([], [])
    assert not [thread for thread in threading.enumerate() if thread.name == "ray-vlm-sampler-count"]
    with start_samplers(spec, SamplerCount(2, 2, 2, (2.0, 0.0)), 0.0, count_room):
        time.sleep(0.05)
        assert len(cluster.names) == 2, "a fixed number is not followed"
        assert not [thread for thread in threading.enumerate() if thread.name == "ray-vlm-sampler-count"]


def test_samplers_that_find_no_place(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.has_room, spec = False, SimpleNamespace()
    with (
        pytest.raises(RunError, match=r"method\.samplers=1: Ray has not placed any sampler of 2 CPU and 0 GPU\."),
        start_samplers(spec, SamplerCount(1, 3, 2, (2.0, 0.0)), 0.0, lambda: 2),  # type: ignore[arg-type]
    ):
        pass
    assert (cluster.names, cluster.groups) == ([], [])
