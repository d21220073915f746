"""Whether a cluster can run a job: everything missing is reported at once, and Ray Data always has a CPU."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ray_vlm.cluster.connect import sampler_room
from ray_vlm.cluster.preflight import (
    ClusterDemand,
    Layout,
    SamplerRoom,
    build_demand,
    count_samplers,
    count_threads,
    cpus_needed,
    expected_resources,
    plan_layout,
)
from ray_vlm.config.schema import Cluster, JobConfig
from ray_vlm.errors import RunError


def _demand(**cluster) -> ClusterDemand:
    return ClusterDemand(Cluster(**cluster))


@pytest.mark.parametrize(
    ("cluster", "cpus", "layout"),
    [
        ({"num_workers": 1}, 2, Layout(1, 1.0)),
        ({"num_workers": 2}, 3, Layout(1, 0.5)),
        ({"num_workers": 3}, 4, Layout(1, 0.33)),
        ({"num_workers": 2, "cpus_per_worker": 4}, 20, Layout(6, 1.0)),
        ({"num_workers": 1}, 64, Layout(8, 1.0)),
    ],
)
def test_loaders_share_what_the_workers_leave(cluster: dict, cpus: int, layout: Layout) -> None:
    assert plan_layout(_demand(**cluster), {"CPU": cpus}) == layout
    total = layout.num_loaders * layout.cpus_per_loader * cluster["num_workers"]
    assert total + cluster["num_workers"] * cluster.get("cpus_per_worker", 1) <= cpus


def test_a_worker_that_fits_on_no_node_is_reported() -> None:
    nodes = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}]
    with pytest.raises(RunError, match="fits on no node; the largest has 8"):
        plan_layout(_demand(num_workers=1, cpus_per_worker=12), {"CPU": 16, "GPU": 1}, nodes)
    assert plan_layout(_demand(num_workers=1, cpus_per_worker=8), {"CPU": 16, "GPU": 1}, nodes)


def test_everything_missing_is_reported_at_once() -> None:
    with pytest.raises(RunError) as error:
        plan_layout(_demand(num_workers=4, cpus_per_worker=8, gpus_per_worker=1), {"CPU": 16, "GPU": 2})
    assert len(error.value.problems) == 2
    assert "need 32, but the cluster has 16" in error.value.problems[0]
    assert "GPU need 4, but the cluster has 2" in error.value.problems[1]


def test_a_cluster_whose_workers_leave_no_cpu_is_refused() -> None:
    with pytest.raises(RunError, match="Ray Data needs at least one"):
        plan_layout(_demand(num_workers=2), {"CPU": 2})


def test_validation_beside_training_needs_one_process_more() -> None:
    sections = {"cluster": {"num_workers": 2, "cpus_per_worker": 2}, "evaluate": {"asynchronous": True}}
    demand = build_demand(JobConfig.model_validate({"model": {"name": "x"}, "data": {}, **sections}))
    assert cpus_needed(demand) == 8
    assert plan_layout(demand, {"CPU": 8}) == Layout(1, 1.0)
    with pytest.raises(RunError, match=r"2 workers and one for evaluate\.asynchronous of 2 CPU need 6"):
        plan_layout(demand, {"CPU": 5})


def test_elastic_workers_need_room_for_the_fewest_and_leave_a_cpu_wherever_they_are() -> None:
    """Ray Train fills what is left of the cluster with workers: on a node that is left alone, one CPU must stay."""
    demand = _demand(num_workers=[1, 2], cpus_per_worker=2)
    three = {"CPU": 3.0}
    assert plan_layout(demand, {"CPU": 6}, [three, three]) == Layout(1, 1.0)
    assert plan_layout(demand, {"CPU": 3}, [three]) == Layout(1, 1.0)
    assert cpus_needed(demand) == 6
    with pytest.raises(RunError, match="Ray Data needs at least one"):
        plan_layout(demand, {"CPU": 8}, [{"CPU": 4.0}, {"CPU": 4.0}])
    assert plan_layout(demand, {"CPU": 9}, [{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 1.0}])
    with pytest.raises(RunError, match="1 workers of 2 CPU need 2, but the cluster has 1"):
        plan_layout(demand, {"CPU": 1})


def test_our_own_cluster_is_large_enough() -> None:
    for workers in (1, 2, 3):
        demand = _demand(num_workers=workers, cpus_per_worker=1.5)
        assert plan_layout(demand, {"CPU": cpus_needed(demand)}).num_loaders == 1


def test_a_cluster_at_rest_is_taken_to_come_to_what_a_job_needs() -> None:
    demand = _demand(num_workers=2, gpus_per_worker=1)
    assert expected_resources({"CPU": 0.0, "memory": 1.0}, demand) == {"CPU": 4.0, "GPU": 2.0, "memory": 1.0}
    assert expected_resources({"CPU": 64.0}, demand, at_once=3) == {"CPU": 64.0, "GPU": 6.0}


@pytest.mark.parametrize(
    ("nodes", "cluster", "at_once", "beside"),
    [
        ([{"CPU": 2.0}], {"num_workers": 1}, 1, True),
        ([{"CPU": 2.0}, {"CPU": 2.0}], {"num_workers": 2}, 1, True),
        ([{"CPU": 3.0}, {"CPU": 1.0}], {"num_workers": 2}, 1, False),  # the second has a CPU for a worker alone
        ([{"CPU": 1.0, "GPU": 1.0}, {"CPU": 64.0}], {"num_workers": 1, "gpus_per_worker": 1}, 1, False),
        ([{"CPU": 16.0, "GPU": 1.0}, {"CPU": 64.0}], {"num_workers": 1, "gpus_per_worker": 1}, 1, True),
        ([{"CPU": 4.0}], {"num_workers": 1}, 2, True),  # of two runs that share the node, each has half of it
        ([{"CPU": 3.0}, {"CPU": 1.0}], {"num_workers": 1}, 2, False),
        ([{"CPU": 4.0}], {"num_workers": [1, 2]}, 1, False),  # workers that come and go
    ],
)
def test_loaders_are_threads_where_their_cpus_are_on_the_nodes_of_the_workers(
    nodes: list, cluster: dict, at_once: int, beside: bool
) -> None:
    total = {name: sum(node.get(name, 0.0) for node in nodes) / at_once for name in ("CPU", "GPU")}
    layout = plan_layout(ClusterDemand(Cluster(**cluster), 2), total, nodes, at_once)
    assert layout.beside_workers == beside
    demands = {loaders: ClusterDemand(Cluster(**cluster), 2, loaders) for loaders in (None, "ray_data", "threads")}
    small, large = 640 * 480, 1600 * 1200
    assert count_threads(demands[None], layout, small) == (2 if beside else 0)
    assert count_threads(demands[None], layout, large) == 0
    assert count_threads(demands["ray_data"], layout, small) == 0
    if beside:
        assert count_threads(demands["threads"], layout, large) == 2
    else:
        with pytest.raises(RunError, match=r"data\.loaders=threads: .* CPUs of one node"):
            plan_layout(demands["threads"], total, nodes, at_once)


def _apart(samplers: int | list[int], cluster: dict, **method: object) -> ClusterDemand:
    sections = {"cluster": cluster, "method": {"name": "grpo", "samplers": samplers, **method}}
    data = {"num_loaders": 1}
    return build_demand(JobConfig.model_validate({"model": {"name": "x"}, "data": data, **sections}))


def test_samplers_take_their_cards_before_the_workers() -> None:
    demand = _apart(2, {"num_workers": 2, "gpus_per_worker": 1, "cpus_per_worker": 4}, cpus_per_sampler=2)
    assert demand.sampler == (2, 1)
    assert cpus_needed(demand) == 2 * 4 + 2 * 2 + 2
    assert expected_resources({}, demand) == {"CPU": 14.0, "GPU": 4.0}
    card = {"CPU": 8.0, "GPU": 2.0}
    layout = plan_layout(demand, {"CPU": 16, "GPU": 4}, [card, card])
    assert layout == Layout(1, 1.0, beside_workers=True)
    with pytest.raises(RunError, match=r"2 workers of 1 GPU need 2 beside 2 samplers, but the cluster has 1\."):
        plan_layout(demand, {"CPU": 16, "GPU": 3})
    with pytest.raises(RunError, match=r"method\.samplers=2: samplers of 1 GPU need 2, but the cluster has 1, and"):
        plan_layout(demand, {"CPU": 16, "GPU": 1})


@pytest.mark.parametrize(
    ("nodes", "count"),
    [
        ([4], 2),  # two workers have two cards of four
        ([3], 1),
        ([2, 2, 2], 4),
        ([8, 8], 4),
        ([1, 1, 1], 1),
    ],
)
def test_as_many_samplers_as_the_fewest_workers_leave_room_for(nodes: list[int], count: int) -> None:
    demand = _apart([1, 4], {"num_workers": [2, 8], "gpus_per_worker": 1})
    cards = [{"CPU": 16.0, "GPU": float(gpus)} for gpus in nodes]
    total = {name: sum(node[name] for node in cards) for name in ("CPU", "GPU")}
    assert count_samplers(demand, total, cards) == count
    assert plan_layout(demand, total, cards).num_loaders == 1


def test_samplers_never_take_the_cpus_of_workers_and_loaders() -> None:
    demand = _apart([1, 3], {"num_workers": 1})
    assert [count_samplers(demand, {"CPU": cpus}, [{"CPU": cpus}]) for cpus in (2.0, 3.0, 4.0, 5.0, 9.0)] == [
        *(1, 1, 2, 3, 3)
    ]
    assert cpus_needed(demand) == 1 + 1 + 1, "the fewest"
    assert expected_resources({}, demand)["CPU"] == 3
    apart = [{"CPU": 2.0}, {"CPU": 2.0}]  # two runs share the nodes, and have a worker, a loader and a sampler each
    assert count_samplers(_apart([1, 2], {"num_workers": 1}), {"CPU": 3.0}, [{"CPU": 6.0}], at_once=2) == 1
    assert count_samplers(_apart([1, 2], {"num_workers": 1}, cpus_per_sampler=2), {"CPU": 4.0}, apart) == 1
    assert count_samplers(_apart(2, {"num_workers": 1}), {"CPU": 0.0}) == 2, "a fixed number is what the user asks for"
    with pytest.raises(RunError, match=r"method\.samplers=1: samplers of 1 CPU need 1, but the cluster has 0"):
        plan_layout(demand, {"CPU": 0.0})


def _can_place(processes: Sequence[tuple[float, float]], nodes: Sequence[tuple[float, float]]) -> bool:
    """Whether all processes find a node: every way is tried."""
    if not processes:
        return True
    (cpus, gpus), rest = processes[0], processes[1:]
    for i, (free_cpus, free_gpus) in enumerate(nodes):
        left = (free_cpus - cpus, free_gpus - gpus)
        if min(left) > -1e-6 and _can_place(rest, [*nodes[:i], left, *nodes[i + 1 :]]):
            return True
    return False


def test_a_range_never_asks_for_more_than_a_number_would_be_given() -> None:
    """On any cluster on which the fewest samplers run: the run starts, and what is counted would start as a fixed
    number too, with a whole CPU for each loader, and with a node for each process."""
    rng, more = np.random.default_rng(0), 0
    for _ in range(400):
        workers: object = [1, int(rng.integers(2, 4))] if rng.random() < 0.5 else int(rng.integers(1, 3))
        each = {"cpus_per_worker": float(rng.choice([1, 1.1, 2])), "gpus_per_worker": int(rng.integers(0, 2))}
        cluster, at_once = {"num_workers": workers, **each}, int(rng.integers(1, 3))
        sampler = {"cpus_per_sampler": float(rng.choice([1, 1.1, 2]))}
        nodes = [
            {"CPU": float(rng.integers(1, 9)), "GPU": float(rng.integers(0, 4))} for _ in range(rng.integers(1, 4))
        ]
        share = {name: sum(node[name] for node in nodes) / at_once for name in ("CPU", "GPU")}
        loaders: Any = rng.choice(["ray_data", "threads"])
        demand, fewest = (replace(_apart(samplers, cluster, **sampler), loaders=loaders) for samplers in ([1, 4], 1))
        try:
            plan_layout(fewest, share, nodes, at_once)
        except RunError:
            continue
        count = count_samplers(demand, share, nodes, at_once)
        plan_layout(demand, share, nodes, at_once)
        fixed = replace(_apart(count, cluster, **sampler), loaders=loaders)
        layout = plan_layout(fixed, share, nodes, at_once)
        if count == 1:
            continue
        more += 1
        assert layout.cpus_per_loader == 1.0
        sets = [fixed.sampler] * count + [(each["cpus_per_worker"], each["gpus_per_worker"])] * (
            fixed.cluster.least_workers
        )
        assert _can_place(sets * at_once, [(node["CPU"], node["GPU"]) for node in nodes])
    assert more > 40


def test_fractional_cpus_leave_no_sampler_out() -> None:
    demand = _apart([1, 50], {"num_workers": 1}, cpus_per_sampler=1.1)
    assert count_samplers(demand, {"CPU": 57.0}, [{"CPU": 57.0}]) == 50


@pytest.mark.parametrize(("at_once", "room"), [(1, (4, 6)), (2, (1, 6))])
def test_the_room_for_samplers_now(at_once: int, room: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the cluster's nodes, shared by all runs, and of what nothing uses."""
    nodes = [{"Alive": True, "Resources": {"CPU": 7.0}}, {"Alive": False, "Resources": {"CPU": 99.0}}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 7.0})
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 6.5})
    assert sampler_room(_apart([1, 4], {"num_workers": 1}), at_once) == SamplerRoom(*room)


def test_samplers_on_cores_and_on_nodes() -> None:
    demand = _apart(2, {"num_workers": 1})
    assert demand.sampler == (1, 0)
    assert plan_layout(demand, {"CPU": cpus_needed(demand)}).num_loaders == 1
    assert _apart(1, {"num_workers": 1, "gpus_per_worker": 1}, gpus_per_sampler=0).sampler == (1, 0)
    large = _apart(1, {"num_workers": 1}, cpus_per_sampler=6)
    with pytest.raises(RunError, match=r"a sampler of 6 CPU fits on no node; the largest has 4"):
        plan_layout(large, {"CPU": 8}, [{"CPU": 4.0}, {"CPU": 4.0}])
    # The samplers leave two nodes a CPU for the worker or its loader, but none for both.
    nodes = [{"CPU": 2.0}, {"CPU": 2.0}]
    assert not plan_layout(demand, {"CPU": 4}, nodes).beside_workers
    assert plan_layout(_apart(0, {"num_workers": 1}), {"CPU": 4}, nodes).beside_workers
