"""Shared parts of the tests: tiny models on disk, drawn scenes, jobs around them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

FAMILIES = ("qwen3_vl", "qwen2_5_vl")  # whose code paths differ most
QWEN = (*FAMILIES, "qwen2_vl")


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
        job: dict[str, Any] = {
            "model": {"name": tiny_models[family], "load_in_4bit": False},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"train": {"path": str(scenes / "train.json")}},
            "train": {"global_batch_size": 8, "micro_batch_size": 4, "max_steps": 3, "bf16": False},
            "cluster": {"num_workers": 0},
            "run": {"name": "run", "output_dir": str(tmp_path / "runs")},
        }
        job["train"] |= {"gradient_checkpointing": False, "learning_rate": 1e-3}
        for name, values in sections.items():
            job[name] = {**job.get(name, {}), **values} if isinstance(values, dict) else values
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        return path

    return write


@pytest.fixture(scope="session")
def ray_cluster() -> Any:
    """One Ray cluster of this process for all tests that need one; with the dashboard, which job stops rely on."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
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

        from ray_vlm.runs.store import full_address

        fs.S3FileSystem(endpoint_override=f"http://{host}:{port}", allow_bucket_creation=True).create_dir("runs")
        yield full_address("s3://runs")
    server.stop()


@pytest.fixture(scope="module")
def stumbling() -> Iterator[tuple[str, Any]]:
    """The address of a bucket, and what makes its requests fail."""
    from tests.faults import stumbling_store

    with stumbling_store() as found:
        yield found
