"""Who else gets the numbers of a run, and sample images: Weights & Biases, TensorBoard. Nothing here runs unless asked.

A tracker takes `log(kind, values, step)`, `pictures(images, step)` (`(caption, PIL image)` pairs) and `finish()`.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_vlm.runs.monitor import LINE_KEYS

# name in metrics.jsonl -> name in trackers
_NAMES = {
    "train": {"loss": "train/batch_loss", "learning_rate": "train/learning_rate", "epoch": "train/epoch"},
    "epoch": {"loss": "train/epoch_avg_loss"},
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


class WandbTracker:
    """Weights & Biases, offline where there is no key; a run that is resumed goes on under its id."""

    def __init__(self, options: Mapping[str, Any]):
        """`options`: project, name, id, config, dir."""
        import wandb

        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        self._run = wandb.init(mode=os.environ.get("WANDB_MODE", mode), resume="allow", **options)  # type: ignore[arg-type]
        self._run.define_metric("eval/step")  # a validation beside training ends some steps after the one it is of
        self._run.define_metric("eval/*", step_metric="eval/step")
        self._step = 0

    def log(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """One line's numbers."""
        self._put(track_names(kind, values) | ({"eval/step": step} if kind == "eval" else {}), step)

    def pictures(self, images: Sequence[tuple[str, Any]], step: int) -> None:
        """Sample images of a validation."""
        import wandb

        shown = [wandb.Image(image, caption=text) for text, image in images]
        self._put({"eval/samples": shown, "eval/step": step}, step)

    def _put(self, values: Mapping[str, Any], step: int) -> None:
        self._step = max(self._step, step)  # Weights & Biases drops what belongs to an earlier step
        self._run.log(dict(values), step=self._step)

    def finish(self) -> None:
        """Send what is left."""
        self._run.finish()


class TensorBoardTracker:
    """Event files in a folder, for `tensorboard --logdir`; steps that are done again replace those of before."""

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
