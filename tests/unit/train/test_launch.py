"""When a run is restarted, and how failures are reported. No cluster."""

import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ControllerError, WorkerGroupError

from ray_vlm.config.train import Train
from ray_vlm.errors import DataError, Interrupted, RunError
from ray_vlm.models.out_of_memory import advise_training, is_out_of_memory
from ray_vlm.train.restarts import Failure, RewindToCheckpoint, describe_failure, restart_backoff, should_restart


class _Raised(Exception):
    """As Ray Train wraps what a worker raised."""

    def __init__(self, error: Exception):
        self._base_exc = error


@dataclass(frozen=True)
class _Spec:
    samplers: tuple[str, ...]
    attempt: int = 1


def _death() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def test_deaths_are_retried_within_the_budget() -> None:
    death = Failure("worker 1 died", step=3)
    assert should_restart([death], 1)
    assert should_restart([death, death], 2)
    assert not should_restart([death, death], 1)
    assert not should_restart([death], 0)


def test_deaths_count_in_a_row_and_errors_in_all() -> None:
    """Deaths with progress between them never end a run; errors and repeated rewinds do."""
    deaths = [Failure("worker 1 died", step=step) for step in range(0, 500, 5)]
    assert should_restart(deaths, 1)
    assert should_restart([*deaths, Failure("worker 1 died", step=495)], 2)
    assert not should_restart([*deaths, Failure("worker 0 died", step=470)], 1), "no step further than before"
    rewinds = [Failure(f"step {step}: not finite", raised=True, step=step) for step in (7, 8, 9)]
    assert should_restart(rewinds[:2], 2)
    assert not should_restart(rewinds, 2)


def test_what_this_package_refused_is_not_tried_again() -> None:
    assert not should_restart([Failure("bad row", own=DataError("bad row"), raised=True)], 9)


def test_the_same_error_twice_at_the_same_step_is_final() -> None:
    error = Failure("worker 0: OutOfMemoryError: 40 GiB", raised=True, step=7)
    assert should_restart([error], 9)
    assert not should_restart([error, error], 9)
    assert should_restart([error, Failure(error.text, raised=True, step=8)], 9)


def _out_of_memory() -> Exception:
    import torch

    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 39.38 GiB of which 1.19 GiB is "
    )
    return torch.OutOfMemoryError(text + "free. Including non-PyTorch memory, this process has 38.18 GiB in use.")


def test_a_card_without_room_is_our_error_and_is_not_tried_again() -> None:
    """Also if another worker reports only that the one without memory is gone, or died of it."""
    lost = RuntimeError("Connection closed by peer")
    for others in ({}, {0: _Raised(lost)}, {0: _death()}):
        failure = describe_failure(WorkerGroupError("x", {**others, 1: _Raised(_out_of_memory())}), 7, "Lower it.")
        assert failure.own is not None
        assert failure.own.problems == [
            "worker 1 ran out of GPU memory after step 7: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a "
            "total capacity of 39.38 GiB of which 1.19 GiB is free. Lower it."
        ]
        assert not should_restart([failure], 9)


def test_what_else_is_reported_of_a_full_card_is_known_and_the_computer_s_memory_is_not_meant() -> None:
    from ray.exceptions import OutOfMemoryError

    known = ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
    known += ["validation failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB."]
    assert all(is_out_of_memory(RuntimeError(text)) for text in known)
    assert not is_out_of_memory(OutOfMemoryError("the node is running low on memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_the_advice_names_what_the_job_has_not_used_yet() -> None:
    advice = advise_training(Train(micro_batch_size=4, gradient_checkpointing=False), 8)
    assert "lower train.micro_batch_size (now 4); or set train.gradient_checkpointing=true; or" in advice
    spent = advise_training(Train(micro_batch_size=1, gradient_checkpointing=True), 8)
    assert "micro_batch_size" not in spent
    assert "gradient_checkpointing" not in spent
    assert "evaluate.batch_size (now 8)" in spent
    assert "lower train.tokens_per_micro_batch (now 900)" in advise_training(Train(tokens_per_micro_batch=900), 8)


def test_a_run_of_this_process_tells_a_full_card_alike(monkeypatch, tmp_path) -> None:
    import ray_vlm.train.launch as launch
    from ray_vlm.config.schema import JobConfig
    from ray_vlm.runs.paths import RunPaths

    def start_worker(spec: Any, should_stop: Any) -> None:
        raise _out_of_memory()

    monkeypatch.setattr(launch, "start_worker", start_worker)
    job = JobConfig.model_validate({"model": {"name": "x"}, "data": {}, "cluster": {"num_workers": 0}})
    with pytest.raises(RunError, match=r"this process ran out of GPU memory after step 0: CUDA.*not tried again"):
        launch.launch(job, None, RunPaths(tmp_path))  # type: ignore[arg-type]


def test_the_cause_is_reported_before_what_followed_from_it() -> None:
    lost = RuntimeError("Connection closed by peer")
    failure = describe_failure(WorkerGroupError("x", {0: _Raised(lost), 1: _death()}), 4)
    assert (failure.text, failure.raised, failure.step) == ("worker 1 died", False, 4)
    own = DataError("row 5 (id 5): gone")
    failure = describe_failure(WorkerGroupError("x", {0: _Raised(lost), 1: _Raised(own)}), 4)
    assert failure.own is own
    failure = describe_failure(WorkerGroupError("x", {0: _Raised(lost), 1: _Raised(lost)}), 4)
    assert failure.text == "worker 0 lost its connection to another (Connection closed by peer)"


def test_a_failing_controller_can_be_retried() -> None:
    assert should_restart([describe_failure(ControllerError(RuntimeError("gloo: connectFullMesh failed")), 0)], 1)
    assert should_restart([describe_failure(_death(), 0)], 1)


def test_interrupted_survives_a_process_border_with_its_code() -> None:
    again = pickle.loads(pickle.dumps(Interrupted("stopped", 15)))
    assert (again.exit_code, again.problems) == (143, ["stopped"])


def test_the_environment_is_set_before_anything_else(monkeypatch) -> None:
    import os
    from types import SimpleNamespace

    import ray_vlm.train.launch as launch
    from ray_vlm.cluster.environment import Environment, read_environment

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    environment = read_environment()
    assert "hf_secret" not in repr(environment)
    monkeypatch.delenv("HF_TOKEN")
    seen = []
    monkeypatch.setattr(launch, "start_worker", lambda spec, in_ray: seen.append(os.environ.get("HF_TOKEN")))
    launch.run_ray_worker({"spec": SimpleNamespace(environment=Environment(dict(environment.values)))})
    assert seen == ["hf_secret"]


def test_the_pause_grows_only_while_nothing_is_gained() -> None:
    at = [Failure("died", step=step) for step in (3, 3, 3, 8, 8)]
    assert [restart_backoff(at[:n]) for n in range(1, 6)] == [2, 4, 8, 2, 4]
    assert restart_backoff([Failure("died")] * 40) == 64


def test_a_rewind_is_no_refusal() -> None:
    error = WorkerGroupError(
        "failed", {1: _Raised(RewindToCheckpoint("step 7: not finite")), 0: _Raised(RewindToCheckpoint("step 7"))}
    )
    failure = describe_failure(error, 6)
    assert failure.own is None
    assert should_restart([failure], 1)


def test_a_lost_connection_is_no_error_of_the_worker_that_tells_it() -> None:
    text = "[gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:43681: Connection reset by peer. Check\nmore"
    failure = describe_failure(WorkerGroupError("failed", {0: _Raised(RuntimeError(text))}), 6)
    message = "Read error [10.0.0.2]:43681: Connection reset by peer"
    assert failure.text == f"worker 0 lost its connection to another ({message})"
    assert should_restart([failure, failure], 9), "machines may go twice at the same step"


def test_a_signal_that_ray_s_own_handler_took_is_a_stop(monkeypatch, tmp_path) -> None:
    """While Ray starts, its own handlers are installed, which end the process with 15 or 1."""
    import ray_vlm.train.launch as launch
    from ray_vlm.config.schema import JobConfig
    from ray_vlm.runs.paths import RunPaths

    def take(*args: object) -> None:
        raise SystemExit(15)

    monkeypatch.setattr(launch, "_train_in_ray", take)
    job = JobConfig.model_validate({"model": {"name": "x"}, "data": {}, "cluster": {"num_workers": 1}})
    with pytest.raises(Interrupted, match="stopped before the first step; --resume goes on") as stopped:
        launch.launch(job, None, RunPaths(tmp_path))  # type: ignore[arg-type]
    assert stopped.value.exit_code == 143


def test_after_a_stall_the_samplers_are_started_again(monkeypatch, tmp_path) -> None:
    """One that hangs would hold up the next attempt too. Meanwhile no further ones take the place of the workers."""
    import ray_vlm.train.launch as launch
    from ray_vlm.config.cluster import Cluster

    request: Any = SimpleNamespace(trained=False, wanted=False)
    ends: list[Failure | None] = [Failure("worker 0 hangs", raised=True, stalled=True), Failure("died", step=3), None]
    restarted: list[tuple[tuple[str, ...], bool]] = []

    def fit(cluster: Any, spec: Any, paths: Any, request: Any) -> None:
        assert not request.trained
        request.trained = True
        if ends[0] is not None:
            raise _death()
        ends.pop(0)

    monkeypatch.setattr(launch, "_fit", fit)
    monkeypatch.setattr(launch, "living_nodes", set)
    monkeypatch.setattr(launch, "_explain", lambda *_: ends.pop(0))
    monkeypatch.setattr(launch, "_next_attempt", lambda *_: 2 if not request.trained else pytest.fail("still training"))
    monkeypatch.setattr(launch, "restart_backoff", lambda failures: 0.0)
    monkeypatch.setattr(launch, "MIN_RESTART_GAP_S", 0.0)
    monkeypatch.setattr(launch, "restart_samplers", lambda names: restarted.append((names, request.trained)))
    spec = _Spec(("a", "b"))
    paths: Any = SimpleNamespace(take_result=lambda: {"step": 4}, refresh=lambda path: None, metrics=None)
    assert launch._retry(Cluster(max_failures=3), spec, paths, request, "") == {"step": 4}  # type: ignore[arg-type]
    assert restarted == [(("a", "b"), False)]
