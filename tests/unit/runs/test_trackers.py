"""Weights & Biases: the login, the note on a run's page, and the group of its runs."""

from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.load import dump_job
from ray_vlm.config.schema import JobConfig
from ray_vlm.runs.trackers import WandbTracker, adopt_wandb_login, find_wandb_login, track_names

KEY, COMPANY = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home directory without a login."""
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_BASE_URL",
        "WANDB_IDENTITY_TOKEN_FILE",
        "NETRC",
        "WANDB_CONFIG_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


class Fake:
    """A stand-in for wandb's run."""

    def __init__(self, mode: str | None = None, **options: Any):
        self.offline, self.url, self.options = mode == "offline", "https://wandb.ai/me/p/runs/1", options

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        """Taken and forgotten."""


def _start(monkeypatch: pytest.MonkeyPatch) -> WandbTracker:
    import wandb

    monkeypatch.setattr(wandb, "init", Fake)
    return WandbTracker({"project": "p", "entity": "team", "group": "g", "tags": ["t"]}, "outputs/a")


def _log_in(home: Path, host: str = "api.wandb.ai", key: str = KEY) -> None:
    """Store a key as `wandb login` does."""
    with open(home / ".netrc", "a") as file:
        file.write(f"machine {host}\n  login user\n  password {key}\n")
    (home / ".netrc").chmod(0o600)


@pytest.mark.parametrize("host", ["api.wandb.ai", "api.forge.coreweave.com"])
def test_a_login_by_wandb_login_counts(nobody: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_wandb_login() == {}
    _log_in(nobody, "example.org", "c" * 40)
    assert find_wandb_login() == {}
    _log_in(nobody, host)
    assert find_wandb_login() == {"WANDB_API_KEY": KEY}
    adopt_wandb_login()
    from ray_vlm.cluster.environment import read_environment

    assert read_environment().values["WANDB_API_KEY"] == KEY, "workers on other machines get it"
    assert KEY not in repr(read_environment())
    monkeypatch.delenv("WANDB_API_KEY")


def test_a_login_at_a_server_of_one_s_own_counts_there_alone(nobody: Path) -> None:
    _log_in(nobody)
    _log_in(nobody, "wandb.company.com", COMPANY)
    settings = nobody / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.company.com\n")
    assert find_wandb_login() == {"WANDB_API_KEY": COMPANY, "WANDB_BASE_URL": "https://wandb.company.com"}
    settings.write_text(f"[default]\napi_key = {KEY}\n")
    assert find_wandb_login() == {"WANDB_API_KEY": KEY}
    settings.write_text("no settings at all")
    assert find_wandb_login() == {"WANDB_API_KEY": KEY}, "netrc's"


def test_the_page_s_address_is_reported_or_where_the_files_are(
    nobody: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    _start(monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    _start(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    _start(monkeypatch)
    assert "offline, in wandb/ of outputs/a" in lines[0]
    assert "wandb login" in lines[0]
    assert lines[1] == "Weights & Biases: https://wandb.ai/me/p/runs/1"
    assert "offline" in lines[2]
    assert "wandb login" not in lines[2], "it was asked for"
    assert len(lines) == 3


def test_an_epoch_has_its_mean_loss_and_its_learning_rate() -> None:
    line = {"kind": "epoch", "attempt": 1, "step": 7, "time": 0.0, "epoch": 1.0, "loss": 0.5, "learning_rate": 1e-4}
    assert track_names("epoch", line) == {"train/epoch_avg_loss": 0.5, "train/epoch_learning_rate": 1e-4}


def test_trials_are_a_group_of_their_sweep() -> None:
    from ray_vlm.tune.space import Space
    from ray_vlm.tune.trial import Sweep, build_trial_job

    job = {"model": {"name": "x"}, "data": {"train": {"path": "a"}, "eval": 0.1}, "track": {"wandb": True}}
    for track, group in ((job["track"], "night-rates"), ({"wandb": True, "wandb_group": "mine"}, "mine"), ({}, None)):
        resolved = dump_job(JobConfig.model_validate(job | {"track": track}))
        sweep = Sweep(resolved, Space(()), "/runs/night-rates", "loss")
        assert build_trial_job(sweep, 3, {})[0].track.wandb_group == group
