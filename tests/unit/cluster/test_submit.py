"""Submitting without a cluster: commands, environments, exit codes."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_vlm.cluster.secrets import send_secrets
from ray_vlm.cluster.submit import check_job_file, describe_jobs, entrypoint, exit_code, follow_job, plan_runtime_env
from ray_vlm.config.resume import check_output_dir
from ray_vlm.errors import ConfigError

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
    words = ["run.output_dir=/a b", "method={name: sft, trl: {x: 1}}", "task.prompt=it's $HOME"]
    assert shlex.split(entrypoint("train", "jobs/a.yaml", words))[5:] == words


def test_what_the_job_takes_along(tmp_path: Path) -> None:
    own = plan_runtime_env(ROOT, None)
    assert {"/outputs/", "/.venv/", "/data/"} <= set(own["excludes"])
    assert int(own["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert "py_modules" not in own
    elsewhere = plan_runtime_env(tmp_path, None)
    assert Path(elsewhere["py_modules"][0]).name == "ray_vlm"
    (tmp_path / "env.yaml").write_text("- a list")
    with pytest.raises(ConfigError, match="a mapping is needed"):
        plan_runtime_env(tmp_path, tmp_path / "env.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        plan_runtime_env(tmp_path, tmp_path / "nowhere.yaml")


def test_a_job_file_outside_the_folder_is_refused(tmp_path: Path) -> None:
    assert check_job_file(str(ROOT / "jobs" / "demo_sft.yaml"), ROOT) == "jobs/demo_sft.yaml"
    with pytest.raises(ConfigError, match="lies outside"):
        check_job_file(str(tmp_path / "a.yaml"), ROOT)


@pytest.mark.parametrize(("address", "fine"), [("outputs", False), ("./x", False), ("/x", True), ("s3://b/x", True)])
def test_where_a_job_may_write(address: str, fine: bool) -> None:
    assert (check_output_dir(address) == []) == fine


def test_tokens_go_as_a_package_that_cannot_be_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_vlm.cluster.environment import FORWARDED

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
    """A job server whose job prints a line, is interrupted, and ends when it is told to stop."""

    def __init__(self) -> None:
        self.asked, self.stopped = 0, False

    def get_job_status(self, job: str) -> Any:
        self.asked += 1
        if self.asked == 2:
            raise KeyboardInterrupt
        return SimpleNamespace(is_terminal=lambda: self.stopped)

    def get_job_logs(self, job: str) -> str:
        return "step 1\n" + ("checkpoint\n" if self.stopped else "")

    def get_job_info(self, job: str) -> Any:
        return _info("STOPPED")

    def stop_job(self, job: str) -> None:
        self.stopped = True


def test_ctrl_c_asks_and_then_waits_for_the_checkpoint(capsys) -> None:
    client = _Client()
    assert follow_job(client, "j", ask=lambda question: True) == 130
    assert client.stopped
    client = _Client()
    assert follow_job(client, "j", ask=lambda question: False) == 130
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
