"""Submitting without a cluster: commands, environments, exit codes."""

import io
import shlex
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_vlm.cli import cluster as cluster_verbs
from ray_vlm.cli import main
from ray_vlm.cluster import submit as submit_module
from ray_vlm.cluster.environment import FORWARDED, send_secrets
from ray_vlm.cluster.submit import (
    SUPPORTED_RAY,
    describe_jobs,
    entrypoint,
    exit_code,
    load_runtime_env,
)
from ray_vlm.config.paths import check_output_dir
from ray_vlm.errors import ConfigError
from tests.support.job_server import JobServer, start_job_server

ROOT = Path(__file__).parents[3]


def _info(status: str, code: int | None = None, message: str = "") -> Any:
    return SimpleNamespace(status=status, driver_exit_code=code, message=message)


@pytest.mark.parametrize(
    ("info", "code"),
    [
        (_info("SUCCEEDED", 0), 0),
        (_info("FAILED", 3), 3),
        (_info("FAILED", None, "the node is gone"), 1),
        (_info("STOPPED"), 130),
        (_info("STOPPED", 143), 143),
    ],
)
def test_the_exit_code_is_the_run_s_own(info: Any, code: int, capsys) -> None:
    assert exit_code(info) == code
    assert ("the node is gone" in capsys.readouterr().err) == (info.message != "")


def test_the_command_keeps_every_character() -> None:
    words = ["jobs/a.yaml", "run.output_dir=/a b", "method={name: sft, trl: {x: 1}}", "task.prompt=it's $HOME"]
    assert shlex.split(entrypoint("train", words)) == ["python", "-m", "ray_vlm", "train", *words]


def test_the_environment_is_the_folder_s_own_or_the_one_that_ships(tmp_path: Path) -> None:
    own, name = load_runtime_env(ROOT, None)
    assert {"/outputs/", "/.venv/", ".env"} <= set(own["excludes"])
    assert not {"/data/", "data/"} & set(own["excludes"]), "a user's rows lie there"
    assert int(own["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert name == "jobs/runtime_env.yaml"
    assert load_runtime_env(tmp_path, None) == (own, "jobs/runtime_env.yaml as it ships with the package")
    for text, problem in (
        ("- a list", "a mapping is needed"),
        ("excludes: data/", "`excludes` is a list of text"),
        ("working_dir: /x", "`working_dir` is what --working-dir says"),
    ):
        (tmp_path / "env.yaml").write_text(text)
        with pytest.raises(ConfigError, match=problem):
            load_runtime_env(tmp_path, str(tmp_path / "env.yaml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_runtime_env(tmp_path, str(tmp_path / "nowhere.yaml"))


JOB = """\
task: classification
model: {name: tiny}
data: {train: {path: data/train.csv, format: image_csv}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a job and its rows, which is the current one; nothing of this machine's Ray is known."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("image,x\n")
    (tmp_path / "job.yaml").write_text(JOB)
    for name in (*FORWARDED, "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # an --address is preferred to it
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server() -> Iterator[JobServer]:
    """A job server of this Ray."""
    import ray

    server = JobServer(ray.__version__)
    with start_job_server(server):
        yield server


SUBMIT = ["submit", "train", "job.yaml", "run.output_dir=/shared/outputs"]


def test_a_folder_with_data_in_it_is_sent_and_the_complete_package(folder: Path, server: JobServer, capsys) -> None:
    (folder / "jobs").mkdir()
    (folder / "jobs" / "runtime_env.yaml").write_text("excludes: [/other/, '*.log']\nenv_vars: {A: b}\n")
    (folder / "a.log").write_text("x")
    server.log, server.exit_code = "step 1\n", 3
    assert main([*SUBMIT, "--address", server.address, "--submission-id", "mine"]) == 3
    (job,) = server.jobs
    assert shlex.split(job["entrypoint"])[2:] == ["ray_vlm", *SUBMIT[1:]]
    assert job["submission_id"] == "mine"
    env = job["runtime_env"]
    assert env["env_vars"] == {"A": "b"}
    archives = [server.packages[uri.removeprefix("gcs://")] for uri in (env["working_dir"], *env["py_modules"])]
    own, package = (set(zipfile.ZipFile(io.BytesIO(data)).namelist()) for data in archives)
    assert own == {"job.yaml", "data/train.csv", "jobs/runtime_env.yaml"}
    assert {"ray_vlm/__init__.py", "ray_vlm/data/__init__.py", "ray_vlm/evaluate/report.html.j2"} <= package
    output = capsys.readouterr().out
    assert f"sends the working folder, {folder}: 3 files" in output
    assert "left out by jobs/runtime_env.yaml: a.log" in output
    assert "sends ray_vlm" in output
    assert "results go to /shared/outputs" in output
    assert output.endswith("step 1\n")
    before = len(server.requests)
    assert main([*SUBMIT, "--address", server.address, "--no-wait"]) == 0
    assert not [request for request in server.requests[before:] if request.startswith("PUT")], "both were there already"


def test_what_is_refused_is_refused_before_anything_is_sent(folder: Path, server: JobServer, capsys) -> None:
    address = ["--address", server.address]
    for words, problem in (
        (["submit", "train", "job.yaml", *address], "run.output_dir='outputs' is relative"),
        ([*SUBMIT, *address, "--working-dir", "data"], "lies outside"),
        ([*SUBMIT, *address, "--working-dir", "nowhere"], "--working-dir nowhere: no such folder"),
        ([*SUBMIT, "data.train.path=x.csv", *address], "data.train.path='x.csv' is not in"),
        ([*SUBMIT, "--address", server.address.removeprefix("http://")], "a job server's address has a scheme"),
    ):
        assert main(words) == 2
        assert problem in capsys.readouterr().err
    assert server.requests == []
    server.ray_version = "2.40.0"
    assert main([*SUBMIT, *address]) == 1
    assert "the cluster runs Ray 2.40.0, and this package needs 2.60 or newer" in capsys.readouterr().err
    server.ray_version = "2.99.1"
    assert main(["jobs", "show", "j", *address]) == 0
    assert "note: the cluster runs Ray 2.99.1" in capsys.readouterr().err
    assert server.packages == {}
    assert server.jobs == []


def test_the_supported_versions_of_ray_are_those_of_the_package() -> None:
    (requirement,) = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if '"ray[' in line]
    low, high = (".".join(map(str, limit)) for limit in SUPPORTED_RAY)
    assert f">={low},<{high.split('.')[0]}" in requirement


def test_without_a_token_and_with_a_wrong_one(
    folder: Path, server: JobServer, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    server.token = "right"
    for words in (["jobs", "list"], SUBMIT):
        assert main([*words, "--address", server.address]) == 1
        errors = capsys.readouterr().err
        assert "Missing authentication token. Set RAY_AUTH_MODE=token and" in errors
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    server.token = "x"

    def refuse(address: str | None) -> str:
        from ray.exceptions import AuthenticationError

        raise AuthenticationError("InvalidAuthToken: Authentication token is missing or incorrect")

    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.setattr("ray.dashboard.modules.job.sdk.get_address_for_submission_client", refuse)
    for words in (["jobs", "list"], SUBMIT):
        assert main(words) == 1
        errors = capsys.readouterr().err
        assert "error: the cluster's job server at the default address cannot be used: InvalidAuthToken" in errors
        assert "the cluster's own token in RAY_AUTH_TOKEN" in errors
    assert server.packages == {}


@pytest.mark.parametrize("ending", ["refuses", "stops"])
def test_a_head_that_fails_while_it_is_sent_something(folder: Path, server: JobServer, capsys, ending: str) -> None:
    answer = server.answer

    def fail(method: str, path: str, body: bytes) -> tuple[int, object]:
        if method == "PUT" and ending == "stops":
            raise ConnectionError  # the connection is cut before any answer
        return (500, "Traceback ...\n\nValueError: no room\n") if method == "PUT" else answer(method, path, body)

    server.answer = fail  # type: ignore[method-assign]
    assert main([*SUBMIT, "--address", server.address]) == 1
    errors = capsys.readouterr().err
    assert "error: the cluster did not take the job: " in errors
    assert ("ValueError: no room." in errors) == (ending == "refuses")
    assert server.jobs == []


def test_a_head_that_stops_while_a_job_is_followed(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import ray

    monkeypatch.setattr(submit_module, "PATIENCE_S", 0.3)
    monkeypatch.setattr(submit_module, "_POLL_S", 0.1)
    server = JobServer(ray.__version__, running=True)
    with start_job_server(server) as http:

        def stop() -> None:
            while not [request for request in server.requests if request.endswith("/logs")]:
                time.sleep(0.01)
            http.shutdown()
            http.server_close()

        threading.Thread(target=stop).start()
        assert main([*SUBMIT, "--address", server.address]) == 1
    captured = capsys.readouterr()
    assert "step 1" in captured.out
    assert "does not answer; it is asked again for 0 s" in captured.err
    assert "start it again, and submit the same command with --resume" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(("address", "fine"), [("outputs", False), ("./x", False), ("/x", True), ("s3://b/x", True)])
def test_where_a_job_may_write(address: str, fine: bool) -> None:
    assert (check_output_dir(address) == []) == fine


def test_tokens_go_as_a_package_that_cannot_be_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FORWARDED:
        monkeypatch.delenv(name, raising=False)
    sent: list[tuple] = []

    def request(method: str, path: str, data: bytes) -> Any:
        sent.append((method, path, data))
        return SimpleNamespace(status_code=200)

    client = SimpleNamespace(_do_request=request, _package_exists=lambda uri: False)
    assert send_secrets(client) is None
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    names = {send_secrets(client), send_secrets(client)}
    assert len(names) == 2
    assert all(name and "hf_x" not in name and len(name) > 40 for name in names)
    assert sent[0][2] == b'{"HF_TOKEN": "hf_x"}'


class _Client:
    """A job server whose job prints a line, is interrupted, and ends on a request to stop."""

    def __init__(self) -> None:
        self.polls, self.stopped = 0, False

    def get_job_status(self, job: str) -> Any:
        self.polls += 1
        if self.polls == 2:
            raise KeyboardInterrupt
        return SimpleNamespace(is_terminal=lambda: self.stopped)

    def get_job_logs(self, job: str) -> str:
        return "step 1\n" + ("checkpoint\n" if self.stopped else "")

    def get_job_info(self, job: str) -> Any:
        return _info("STOPPED")

    def stop_job(self, job: str) -> None:
        self.stopped = True


def test_ctrl_c_asks_and_then_waits_for_the_checkpoint(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(submit_module, "_POLL_S", 0.01)
    client: Any = _Client()
    monkeypatch.setattr(cluster_verbs, "_ask", lambda question: True)
    assert cluster_verbs._follow(client, "j") == 130
    assert client.stopped
    client = _Client()
    monkeypatch.setattr(cluster_verbs, "_ask", lambda question: False)
    assert cluster_verbs._follow(client, "j") == 130
    assert not client.stopped
    assert "ray-vlm jobs stop j" in capsys.readouterr().out


def test_the_table_of_jobs_names_the_newest_first() -> None:
    jobs = [
        SimpleNamespace(
            submission_id=f"j{i}", job_id=None, status="RUNNING", start_time=i * 1000, entrypoint="python x"
        )
        for i in (1, 2)
    ]
    lines = describe_jobs(jobs).splitlines()
    assert [line.split()[0] for line in lines] == ["job", "j2", "j1"]
