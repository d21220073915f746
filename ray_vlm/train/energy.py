"""Energy and carbon dioxide of a run (`track.energy`): codecarbon's estimate, offline, so nothing calls home.

A rank reads its own card. Processor and memory are those of the whole machine, once for each machine, with whatever
else runs there. What was used between the last checkpoint and a crash is not known.
"""

import os
import platform
from collections.abc import Callable
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import ConfigError
from ray_vlm.runs.monitor import Monitor
from ray_vlm.train.context import DistributedContext

_SAMPLE_S = 15.0


class Meter:
    """Adds up what this process's card and machine use, from now on until `close`. `country`: three letters (ISO 3166);
    `device`: `cpu` or `cuda:<number among the cards that this process sees>`."""

    def __init__(self, country: str, device: str):
        from codecarbon import OfflineEmissionsTracker

        self._total: Any = None
        self._cards = _card(device)
        self._tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            gpu_ids=self._cards or None,
            output_methods=[],  # said aloud, as all that could call home: a user's own settings must not turn it on
            emissions_endpoint=None,
            electricitymaps_api_token=None,
            output_handlers=[self],
            measure_power_secs=_SAMPLE_S,
            tracking_mode="machine",
            allow_multiple_runs=True,
            log_level="critical",
        )
        self._tracker.start()

    def read(self) -> dict[str, float]:
        """Kilowatt-hours of this rank's card, of the machine's processor and of its memory, and kilograms of carbon
        dioxide for each kilowatt-hour; empty where nothing can be measured."""
        self._tracker.flush()
        found = self._total
        if found is None or not found.energy_consumed:
            return {}
        return {
            "gpu_kwh": found.gpu_energy if self._cards else 0.0,
            "cpu_kwh": found.cpu_energy,
            "memory_kwh": found.ram_energy,
            "kg_per_kwh": found.emissions / found.energy_consumed,
        }

    def close(self) -> None:
        """End the sampling."""
        self._tracker.stop()

    def out(self, total: Any, delta: Any) -> None:
        """Called by codecarbon with what it has added up."""
        self._total = total

    def live_out(self, total: Any, delta: Any) -> None:
        """Called by codecarbon in between."""

    def exit(self) -> None:
        """Called by codecarbon at its end."""


def _card(device: str) -> list[str]:
    """The card as the driver of the machine counts it; Ray shows a worker those of its neighbours too."""
    if not device.startswith("cuda"):
        return []
    number = int(device.partition(":")[2] or 0)
    visible = [card.strip() for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card.strip()]
    return [visible[number] if number < len(visible) else str(number)]


def check_energy(job: JobConfig) -> None:
    """Raise `ConfigError` where energy is asked for and cannot be estimated."""
    if not job.track.energy:
        return
    try:
        from codecarbon.input import DataSource
    except ImportError as error:
        raise ConfigError(
            f"track.energy: codecarbon is not installed ({error}). Run `pip install 'ray-vlm[energy]'`, or leave it."
        ) from None
    known = DataSource().get_global_energy_mix_data()
    if job.track.country not in known:
        raise ConfigError(
            f"track.country={job.track.country!r}: no such country is known, and the carbon dioxide of a kilowatt-hour "
            "depends on it. Give the three letters of ISO 3166, such as DEU, FRA, IND or USA."
        )


def sum_energy(meter: Meter, context: DistributedContext) -> dict[str, float]:
    """What all ranks have used so far in this attempt; every rank calls it at the same step. Empty where
    nothing can be measured."""
    return add_up(context.all_gather((platform.node(), meter.read())))


def add_up(found: list[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """`energy_kwh` with its parts and `co2_kg` of `(machine, Meter.read())` of every rank."""
    sums = dict.fromkeys(("energy_kwh", "gpu_kwh", "cpu_kwh", "memory_kwh", "co2_kg"), 0.0)
    machines: set[str] = set()
    for machine, of_rank in found:
        if not of_rank:
            continue
        parts = ("gpu_kwh",) if machine in machines else ("gpu_kwh", "cpu_kwh", "memory_kwh")
        machines.add(machine)
        for part in parts:
            sums[part] += of_rank[part]
            sums["energy_kwh"] += of_rank[part]
            sums["co2_kg"] += of_rank[part] * of_rank["kg_per_kwh"]
    return sums if machines else {}


def energy_writer(
    meter: Meter | None, monitor: Monitor | None, context: DistributedContext, trainer: Any
) -> Callable[[], None]:
    """A function that all ranks call at the same steps, to write down what they have used; without meters nothing."""

    def write() -> None:
        if meter is not None and (found := sum_energy(meter, context)) and monitor is not None:
            monitor.write("energy", trainer.state.global_step, trainer.state.epoch or 0.0, found)

    return write
