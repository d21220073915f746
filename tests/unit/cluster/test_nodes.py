"""Nodes against the driver's machine."""

from dataclasses import replace

import pytest

from ray_vlm.cluster.nodes import SAME, Node, compare_nodes, describe_node

HERE = Node("here", "3.11", dict.fromkeys((*SAME, "bitsandbytes"), "1.0"), driver="580.65.06", cuda="13", gpus=1)


def _changed(**versions: str | None) -> Node:
    changed = {**HERE.versions, **{name.replace("_", "-"): v for name, v in versions.items()}}
    return replace(HERE, name="10.0.0.7", versions={name: v for name, v in changed.items() if v})


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (_changed(trl="0.9"), "10.0.0.7: trl 0.9, and 1.0 here"),
        (_changed(ray_vlm=None), "10.0.0.7: ray-vlm is not installed"),
        (_changed(bitsandbytes=None), "bitsandbytes is not installed"),
        (replace(HERE, python="3.12"), "Python 3.12, and 3.11 here"),
        (replace(HERE, driver=None), "no NVIDIA driver"),
        (replace(HERE, driver="535.104"), "driver 535.104, and torch for CUDA 13 needs 580"),
    ],
)
def test_what_does_not_fit_is_named(node: Node, message: str) -> None:
    assert any(message in problem for problem in compare_nodes([HERE, node], HERE, quantised=True, gpus=True))


def test_what_the_job_does_not_need_may_differ() -> None:
    assert compare_nodes([_changed(bitsandbytes=None)], HERE, quantised=False, gpus=True) == []
    assert compare_nodes([replace(HERE, driver=None)], HERE, quantised=True, gpus=False) == []
    assert compare_nodes([replace(HERE, driver=None, gpus=0)], HERE, quantised=True, gpus=True) == []
    assert len(compare_nodes([_changed(trl="2", torch="3"), _changed(ray=None)], HERE, True, True)) == 3


def test_this_machine_fits_itself() -> None:
    here = describe_node()
    assert {"ray", "torch", "bitsandbytes"} <= set(here.versions)
    assert here.cuda is not None
    assert compare_nodes([here], here, quantised=True, gpus=False) == []
