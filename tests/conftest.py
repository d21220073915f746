"""Shared parts of the tests: tiny models on disk, drawn scenes, jobs around them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import write_job
from tests.support.lines import kept_lines
from tests.support.quick import compile_templates_once, freeze_imports
from tests.support.wheel import install_wheel

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes would wait for one another's cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

FAMILIES = ("qwen3_vl", "qwen2_5_vl")  # whose code paths differ most
QWEN = (*FAMILIES, "qwen2_vl")
ROOMS = ("cluster", "integration", "unit")  # in the order of what their tests take; all others come last


def pytest_configure(config: pytest.Config) -> None:
    compile_templates_once()


@pytest.hookimpl(tryfirst=True)  # pytest-xdist's own hook reads the marks, and would run before this one
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say which tests stay together, where pytest-xdist shares them out, and begin with what takes longest.

    Those of a file share what its fixtures made. All that start a Ray cluster are one group, so that there is one
    cluster, and that tests which look for Ray's processes find their own.
    """

    def position(item: pytest.Item) -> int:
        if item.get_closest_marker("cluster"):
            return 0
        room = item.path.relative_to(here).parts[0]
        return ROOMS.index(room) if room in ROOMS else len(ROOMS)

    here = Path(__file__).parent
    items.sort(key=position)
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            group = "cluster" if item.get_closest_marker("cluster") else str(item.path.relative_to(here))
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_setup() -> None:
    freeze_imports()


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the package logs for the user."""
    with kept_lines() as lines:
        yield lines


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random tiny checkpoints on disk, by model type."""
    from ray_vlm.demo.tiny import write_untrained

    root = tmp_path_factory.mktemp("models")
    return {name: str(write_untrained(root / name, name)) for name in QWEN}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.json`, `eval.json` and `test.json` of drawn scenes."""
    from ray_vlm.demo.shapes import draw

    folder = tmp_path_factory.mktemp("scenes")
    for split, count in (("train", 50), ("eval", 12), ("test", 12)):
        draw(folder, "studio", split, count)
    return folder


@pytest.fixture
def job_file(tmp_path: Path, scenes: Path, tiny_models: dict[str, str]) -> Any:
    """A function that writes a small job and returns its path; keyword sections are merged over the defaults."""

    def write(family: str = "qwen3_vl", **sections: Any) -> Path:
        return write_job(tmp_path, scenes, tiny_models[family], **sections)

    return write


@pytest.fixture(scope="session")
def ray_cluster() -> Any:
    """One Ray cluster of this process for all tests that need one; with the dashboard, which job stops rely on."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # as a cluster of a run's own has it
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    ray.init(num_cpus=8, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """An S3 bucket in this process's neighbour; the variables are those that every S3 client reads."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        from pyarrow import fs

        from ray_vlm.storage import full_address

        fs.S3FileSystem(endpoint_override=f"http://{host}:{port}", allow_bucket_creation=True).create_dir("runs")
        yield full_address("s3://runs")
    server.stop()


@pytest.fixture(scope="module")
def stumbling() -> Iterator[tuple[str, Any]]:
    """The address of a bucket, and what makes its requests fail."""
    from tests.support.faults import stumbling_store

    with stumbling_store() as store:
        yield store


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin/` of an environment that has the wheel of this checkout."""
    return install_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The grids whose encoder's inputs were not worked out on the host before the forward."""
    from transformers import vision_utils

    grids: list[Any] = []
    plain = vision_utils.get_vision_cu_seqlens

    def get(grid_thw: Any, merge_temporal: bool = False, kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is not None and kwargs.get("cu_seqlens") is None:  # called by an encoder
            grids.append(grid_thw)
        return plain(grid_thw, merge_temporal, kwargs=kwargs)

    monkeypatch.setattr(vision_utils, "get_vision_cu_seqlens", get)
    return grids
