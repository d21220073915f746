"""Trackers of a run's numbers and sample images: Weights & Biases and TensorBoard, both off by default."""

import configparser
import json
import logging
import netrc
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ray_vlm.runs.monitor import LINE_KEYS
from ray_vlm.runs.paths import RunPaths

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)
_WANDB_HOSTS = ("wandb.ai", "coreweave.com")  # of W&B's own servers; a self-hosted one has a base URL
# Copied to an object store during the run, beside `metrics.jsonl`.
_KEPT = ("training_log.json", "tensorboard/*", "wandb/offline-run-*/**/*")
_AGAIN_S = 60.0  # between two copies of a tracker's file, which grows all the time

# name in metrics.jsonl -> name in trackers
_NAMES = {
    "train": {"loss": "train/batch_loss", "learning_rate": "train/learning_rate", "epoch": "train/epoch"},
    "epoch": {"loss": "train/epoch_avg_loss", "learning_rate": "train/epoch_learning_rate"},
    "checkpoint": {"checkpoint_s": "train/checkpoint_s"},
    "energy": {"energy_kwh": "train/energy_kwh", "co2_kg": "train/co2_kg"},
}


def track_names(kind: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line's numbers under their names in trackers."""
    names = _NAMES.get(kind, {})
    named = {new: line[old] for old, new in names.items() if old in line}
    if names and kind != "train":  # what these kinds have beside is of no use there
        return named
    return named | {f"{kind}/{k}": v for k, v in line.items() if k not in LINE_KEYS and k not in names}


def find_wandb_login() -> dict[str, str]:
    """Return the environment variables that log in to Weights & Biases: those that are set, or those for the key that
    `wandb login` stored on this machine (in its settings or in netrc). Empty without a login."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(name):
            return {name: os.environ[name]}
    settings = _wandb_settings()
    server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url")
    key = settings.get("api_key") or _netrc_key(urlsplit(server).netloc if server else None)
    return ({"WANDB_BASE_URL": server} if key and server else {}) | ({"WANDB_API_KEY": key} if key else {})


def adopt_wandb_login() -> None:
    """Set the variables of `find_wandb_login` in this process, from which workers on other machines get them."""
    for name, value in find_wandb_login().items():
        os.environ.setdefault(name, value)


def _wandb_settings() -> Mapping[str, str]:
    """Return the settings in the user's wandb settings file."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")
    parser = configparser.ConfigParser(interpolation=None)
    with suppress(OSError, UnicodeDecodeError, configparser.Error):
        parser.read(Path(folder) / "settings", encoding="utf-8")
    return dict(parser["default"]) if parser.has_section("default") else {}


def _netrc_key(server: str | None) -> str | None:
    """Return the key in netrc for `server`, or for W&B's own servers without one."""
    try:
        known = netrc.netrc(os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")).hosts
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return None
    hosts = [host for host in known if (host == server if server else host.endswith(_WANDB_HOSTS))]
    return next((known[host][2] for host in hosts if known[host][2]), None)


def build_trackers(
    paths: RunPaths,
    configuration: Mapping[str, Any],
    first_step: int,
    wandb: Mapping[str, Any],
    tensorboard: bool,
) -> "list[WandbTracker | TensorBoardTracker]":
    """Build the trackers of a run. `configuration`: the job to show; `first_step`: of this attempt; `wandb`: project,
    entity, group and tags for Weights & Biases, empty without it."""
    trackers: list[WandbTracker | TensorBoardTracker] = []
    if wandb:
        run = json.loads(paths.store.read("run.json") or b"{}")
        about = {"name": paths.name, "id": run["id"], "dir": str(paths.root), "config": configuration}
        trackers.append(WandbTracker({**wandb, **about}, paths.address))
    if tensorboard:
        trackers.append(TensorBoardTracker(paths.root / "tensorboard", first_step))
    return trackers


class KeptFiles:
    """Copies files that a run keeps changing (training log, trackers) to an object store."""

    def __init__(self, paths: RunPaths):
        self._paths = paths
        # Of each file: (time, size) as it was copied, and when.
        self._sent: dict[Path, tuple[tuple[int, int], float]] = {}

    def publish(self, everything: bool) -> None:
        """Copy new and changed files to the store; with `everything` also those copied less than `_AGAIN_S` ago.

        Raises `OSError` if the store fails; the remaining files are copied by the next call.
        """
        if self._paths.remote is None:
            return
        for path in sorted(path for form in _KEPT for path in self._paths.root.glob(form) if path.is_file()):
            state, now = (path.stat().st_mtime_ns, path.stat().st_size), time.monotonic()
            sent, when = self._sent.get(path, (None, -_AGAIN_S))
            if state != sent and (everything or path.suffix == ".json" or now - when >= _AGAIN_S):
                self._paths.publish(path)
                self._sent[path] = (state, now)


class WandbTracker:
    """Weights & Biases, offline without a login; a resumed run keeps its id."""

    def __init__(self, options: Mapping[str, Any], address: str):
        """`options`: of `wandb.init`; `address`: of the run, shown in the note on offline files."""
        import wandb

        mode = os.environ.get("WANDB_MODE") or (None if find_wandb_login() else "offline")
        self._run = wandb.init(mode=mode, resume="allow", **options)  # type: ignore[arg-type]
        self._run.define_metric("eval/step")  # an asynchronous validation ends some steps after its own step
        self._run.define_metric("eval/*", step_metric="eval/step")
        self._step = 0
        if self._run.offline:
            login = "" if os.environ.get("WANDB_MODE") else ". `wandb login` or WANDB_API_KEY makes runs go online"
            logger.info(f"Weights & Biases: offline, in wandb/ of {address}; `wandb sync` sends it{login}")
        else:
            logger.info(f"Weights & Biases: {self._run.url}")

    def log(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Log one line's numbers."""
        self._put(track_names(kind, values) | ({"eval/step": step} if kind == "eval" else {}), step)

    def pictures(self, images: "Sequence[tuple[str, Image]]", step: int) -> None:
        """Log sample images of a validation."""
        import wandb

        shown = [wandb.Image(image, caption=text) for text, image in images]
        self._put({"eval/samples": shown, "eval/step": step}, step)

    def log_test(self, values: Mapping[str, Any], step: int) -> None:
        """Log the test metrics of the weights of `step`, after the run."""
        self._run.define_metric("test/step")
        self._run.define_metric("test/*", step_metric="test/step")
        self._run.log({f"test/{name}": value for name, value in values.items()} | {"test/step": step})

    def _put(self, values: Mapping[str, Any], step: int) -> None:
        self._step = max(self._step, step)  # Weights & Biases drops numbers of an earlier step
        self._run.log(dict(values), step=self._step)

    def finish(self) -> None:
        """Send the remaining data and end the run."""
        self._run.finish()


class TensorBoardTracker:
    """Event files in a folder, for `tensorboard --logdir`; repeated steps replace the earlier ones."""

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def log(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Log one line's numbers except those that are not finite."""
        for name, value in track_names(kind, values).items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def pictures(self, images: "Sequence[tuple[str, Image]]", step: int) -> None:
        """Log sample images of a validation."""
        import numpy as np

        for i, (_, image) in enumerate(images):
            self._writer.add_image(f"eval/sample_{i}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def finish(self) -> None:
        """Write the remaining data."""
        self._writer.close()
