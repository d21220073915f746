"""How many samplers the driver keeps, and which it ends first; their processes are played."""

import importlib
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RaySystemError

from ray_vlm.cluster.preflight import SamplerRoom
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


def test_further_samplers_without_a_place_end(cluster: Cluster) -> None:
    group = _group()
    group.resize(3)
    cluster.lost = list(cluster.groups)
    assert group.drop_unplaced(2) == 1
    assert len(group) == 2, "the fewest wait for a place"
    cluster.lost = []
    group.resize(4)
    assert group.drop_unplaced(2) == 0


def test_all_end_also_where_ray_refuses_one(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    group, kill = _group(), cluster.kill
    group.resize(3)

    def refuse(actor: Any) -> None:
        if actor.name == "b":
            raise RaySystemError("the head does not answer")
        kill(actor)

    monkeypatch.setattr("ray.kill", refuse)
    group.close()
    assert cluster.names == ["b"]
    monkeypatch.setattr("ray.kill", kill)
    group.close()
    assert (cluster.names, cluster.groups) == ([], [])


def _wait_for(cluster: Cluster, count: int) -> None:
    end = time.monotonic() + 10
    while len(cluster.names) != count and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(cluster.names) == count


def _followers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ray-vlm-sampler-count"]


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(samplers, "_LOOK_S", 0.01)
    monkeypatch.setattr(samplers, "replace", lambda spec, samplers: samplers)
    return SimpleNamespace()


def test_a_range_follows_the_cluster_and_all_samplers_end_with_the_run(
    cluster: Cluster, spec: Any, caplog: pytest.LogCaptureFixture
) -> None:
    room: SamplerRoom | None = None
    answers = True

    def look() -> SamplerRoom | None:
        if not answers:
            raise RaySystemError("the head does not answer")
        return room

    with start_samplers(spec, SamplerCount(1, 3, (2.0, 0.0)), 0.0, look) as names:
        assert len(names) == 3, "also of samplers that come later"  # type: ignore[arg-type]
        _wait_for(cluster, 1)  # the workers do not train yet
        room = SamplerRoom(3, 0)
        _wait_for(cluster, 1)  # others use what is there
        room = SamplerRoom(3, 1)
        _wait_for(cluster, 3)  # one more at each look
        room = SamplerRoom(1, 9)
        _wait_for(cluster, 1)
        answers, room = False, SamplerRoom(2, 1)
        _wait_for(cluster, 1)
        answers = True
        _wait_for(cluster, 2)
        caplog.clear()
        cluster.lost = cluster.groups[1:]
        _wait_for(cluster, 1)  # it has lost its place, and is not tried again at once
        assert caplog.messages == ["1 sampler, 2 before: the cluster has changed"]
        room = None
    assert (cluster.names, cluster.groups, _followers()) == ([], [], [])


def test_a_fixed_number_is_not_followed(cluster: Cluster, spec: Any) -> None:
    with start_samplers(spec, SamplerCount(2, 2, (2.0, 0.0)), 0.0, lambda: SamplerRoom(1, 1)):
        _wait_for(cluster, 2)
        assert not _followers()
        cluster.lost = list(cluster.groups)
        _wait_for(cluster, 2)
    assert (cluster.names, cluster.groups) == ([], [])


def test_samplers_that_find_no_place(cluster: Cluster, spec: Any) -> None:
    cluster.has_room = False
    with (
        pytest.raises(RunError, match=r"method\.samplers: Ray has placed none of 1 samplers of 2 CPU and 0 GPU\."),
        start_samplers(spec, SamplerCount(1, 3, (2.0, 0.0)), 0.0, lambda: None),
    ):
        pass
    assert (cluster.names, cluster.groups) == ([], [])
