"""Who else gets the numbers of a run, and sample images: Weights & Biases, TensorBoard. Nothing here runs unless asked.

A tracker takes `log(kind, values, step)`, `pictures(images, step)` (`(caption, PIL image)` pairs) and `finish()`;
`notes` are sentences for the person who watches, such as the address of a page.
"""

import configparser
import json
import netrc
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray_vlm.runs.monitor import LINE_KEYS
from ray_vlm.runs.paths import RunPaths

_WANDB_HOSTS = ("wandb.ai", "coreweave.com")  # where W&B itself keeps its server; a company's own has a base URL
_KEPT = ("training_log.json", "tensorboard/*", "wandb/offline-run-*/**/*")  # beside `metrics.jsonl`, as the run goes on

_AGAIN_S = 60.0  # between two copies of a tracker's file, which only grows

# name in metrics.jsonl -> name in trackers
_NAMES = {
    "train": {"loss": "train/batch_loss", "learning_rate": "train/learning_rate", "epoch": "train/epoch"},
    "epoch": {"loss": "train/epoch_avg_loss", "learning_rate": "train/epoch_learning_rate"},
    "checkpoint": {"checkpoint_s": "train/checkpoint_s"},
    "energy": {"energy_kwh": "train/energy_kwh", "co2_kg": "train/co2_kg"},
}


def track_names(kind: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """A line's numbers by the names that trackers show."""
    prefix = "eval" if kind == "eval" else "train"
    named = {new: line[old] for old, new in _NAMES.get(kind, {}).items() if old in line}
    if kind not in ("train", "eval"):
        return named
    rest = {f"{prefix}/{k}": v for k, v in line.items() if k not in LINE_KEYS and k not in _NAMES.get(kind, {})}
    return named | rest


def find_wandb_login() -> dict[str, str]:
    """The variables that log in to Weights & Biases: those that are set, or what `wandb login` left on this machine (in
    its settings, or in netrc). Empty where nobody logged in."""
    if os.environ.get("WANDB_API_KEY"):
        return {"WANDB_API_KEY": os.environ["WANDB_API_KEY"]}
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return {"WANDB_IDENTITY_TOKEN_FILE": os.environ["WANDB_IDENTITY_TOKEN_FILE"]}
    settings = _wandb_settings()
    server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url")
    key = settings.get("api_key") or _netrc_key(urlsplit(server).netloc if server else None)
    return ({"WANDB_BASE_URL": server} if key and server else {}) | ({"WANDB_API_KEY": key} if key else {})


def adopt_wandb_login() -> None:
    """Set the variables of `find_wandb_login` in this process: workers on other machines get them from here."""
    for name, value in find_wandb_login().items():
        os.environ.setdefault(name, value)


def _wandb_settings() -> Mapping[str, str]:
    """The user's settings file of wandb."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")
    parser = configparser.ConfigParser(interpolation=None)
    with suppress(OSError, UnicodeDecodeError, configparser.Error):
        parser.read(Path(folder) / "settings", encoding="utf-8")
    return dict(parser["default"]) if parser.has_section("default") else {}


def _netrc_key(server: str | None) -> str | None:
    """The key that netrc has for `server`, or for W&B's own where none is named."""
    try:
        known = netrc.netrc(os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")).hosts
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return None
    mine = [host for host in known if (host == server if server else host.endswith(_WANDB_HOSTS))]
    return next((known[host][2] for host in mine if known[host][2]), None)


def build_trackers(
    paths: RunPaths,
    configuration: Mapping[str, Any],
    first_step: int,
    wandb: Mapping[str, Any],
    tensorboard: bool,
) -> "list[WandbTracker | TensorBoardTracker]":
    """The trackers of a run. `configuration`: what they show of the job; `first_step`: of this attempt; `wandb`: the
    project, entity, group and tags of Weights & Biases, empty without it."""
    trackers: list[WandbTracker | TensorBoardTracker] = []
    if wandb:
        run = json.loads(paths.store.read("run.json") or b"{}")
        about = {"name": paths.name, "id": run["id"], "dir": str(paths.root), "config": configuration}
        trackers.append(WandbTracker({**wandb, **about}, paths.address))
    if tensorboard:
        trackers.append(TensorBoardTracker(paths.root / "tensorboard", first_step))
    return trackers


class KeptFiles:
    """What is made in a run's folder as the run goes on, for a run that is kept elsewhere."""

    def __init__(self, paths: RunPaths):
        self._paths = paths
        self._sent: dict[Path, tuple[tuple[int, int], float]] = {}  # time and size of the file, and when it was sent

    def publish(self, everything: bool) -> None:
        """Copy the files that are new or have changed to where the run is kept; `everything`: also those of which an
        earlier state was sent a moment ago. Raises `OSError` where the store refuses one; that one and those after it
        are sent the next time."""
        if self._paths.remote is None:
            return
        for path in sorted(path for form in _KEPT for path in self._paths.root.glob(form) if path.is_file()):
            state, now = (path.stat().st_mtime_ns, path.stat().st_size), time.monotonic()
            sent, when = self._sent.get(path, (None, -_AGAIN_S))
            if state != sent and (everything or path.suffix == ".json" or now - when >= _AGAIN_S):
                self._paths.publish(path)
                self._sent[path] = (state, now)


class WandbTracker:
    """Weights & Biases, offline where nobody is logged in; a run that is resumed goes on under its id."""

    def __init__(self, options: Mapping[str, Any], kept: str):
        """`options`: of `wandb.init`; `kept`: where the run is kept, and with it what is written offline."""
        import wandb

        mode = os.environ.get("WANDB_MODE") or (None if find_wandb_login() else "offline")
        self._run = wandb.init(mode=mode, resume="allow", **options)  # type: ignore[arg-type]
        self._run.define_metric("eval/step")  # a validation beside training ends some steps after the one it is of
        self._run.define_metric("eval/*", step_metric="eval/step")
        self._step = 0
        if self._run.offline:
            self.notes = [
                f"Weights & Biases: offline, in wandb/ of {kept}; `wandb sync` sends it"
                + ("" if os.environ.get("WANDB_MODE") else ". `wandb login` or WANDB_API_KEY makes runs go online")
            ]
        else:
            self.notes = [f"Weights & Biases: {self._run.url}"]

    def log(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """One line's numbers."""
        self._put(track_names(kind, values) | ({"eval/step": step} if kind == "eval" else {}), step)

    def pictures(self, images: Sequence[tuple[str, Any]], step: int) -> None:
        """Sample images of a validation."""
        import wandb

        shown = [wandb.Image(image, caption=text) for text, image in images]
        self._put({"eval/samples": shown, "eval/step": step}, step)

    def log_test(self, values: Mapping[str, Any], step: int) -> None:
        """What was measured on test rows, once the run is over, of the weights of `step`."""
        self._run.define_metric("test/step")
        self._run.define_metric("test/*", step_metric="test/step")
        self._run.log({f"test/{name}": value for name, value in values.items()} | {"test/step": step})

    def _put(self, values: Mapping[str, Any], step: int) -> None:
        self._step = max(self._step, step)  # Weights & Biases drops what belongs to an earlier step
        self._run.log(dict(values), step=self._step)

    def finish(self) -> None:
        """Send what is left."""
        self._run.finish()


class TensorBoardTracker:
    """Event files in a folder, for `tensorboard --logdir`; steps that are done again replace those of before."""

    notes: Sequence[str] = ()

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def log(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """One line's numbers; what is not finite is left out."""
        for name, value in track_names(kind, values).items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def pictures(self, images: Sequence[tuple[str, Any]], step: int) -> None:
        """Sample images of a validation."""
        import numpy as np

        for i, (_, image) in enumerate(images):
            self._writer.add_image(f"eval/sample_{i}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def finish(self) -> None:
        """Write out what is left."""
        self._writer.close()
