"""Energy and carbon dioxide of a run (`track.energy`), estimated by codecarbon offline, without network access.

Each rank reads its own GPU. Processor and memory are measured once for each machine, with everything that runs there.
The energy between the last checkpoint and a crash is not counted.
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
    """Measures the energy of this process's GPU and machine until `close`. `country`: three letters (ISO 3166);
    `device`: `cpu` or `cuda:<index among the GPUs that this process sees>`."""

    def __init__(self, country: str, device: str):
        from codecarbon import OfflineEmissionsTracker

        self._total: Any = None
        self._cards = _card(device)
        self._tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            gpu_ids=self._cards or None,
            # Explicit: a codecarbon settings file of the user could turn on outputs that use the network.
            output_methods=[],
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
        """Return the kilowatt-hours of this rank's GPU, of the machine's processor and of its memory, and the kilograms
        of carbon dioxide per kilowatt-hour; an empty dictionary if nothing can be measured."""
        self._tracker.flush()
        total = self._total
        if total is None or not total.energy_consumed:
            return {}
        return {
            "gpu_kwh": total.gpu_energy if self._cards else 0.0,
            "cpu_kwh": total.cpu_energy,
            "memory_kwh": total.ram_energy,
            "kg_per_kwh": total.emissions / total.energy_consumed,
        }

    def close(self) -> None:
        """Stop measuring."""
        self._tracker.stop()

    def out(self, total: Any, delta: Any) -> None:
        """Take codecarbon's sum; codecarbon calls this."""
        self._total = total

    def live_out(self, total: Any, delta: Any) -> None:
        """Do nothing; codecarbon calls this between sums."""

    def exit(self) -> None:
        """Do nothing; codecarbon calls this at its end."""


def _card(device: str) -> list[str]:
    """Return the machine-wide index of the GPU: `device` counts only those in CUDA_VISIBLE_DEVICES."""
    if not device.startswith("cuda"):
        return []
    number = int(device.partition(":")[2] or 0)
    visible = [card.strip() for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card.strip()]
    return [visible[number] if number < len(visible) else str(number)]


def check_energy(job: JobConfig) -> None:
    """Raise `ConfigError` if `track.energy` is set and energy cannot be estimated."""
    if not job.track.energy:
        return
    try:
        from codecarbon.input import DataSource
    except ImportError as error:
        raise ConfigError(
            f"track.energy: codecarbon is not installed ({error}). Run `pip install 'ray-vlm[energy]'`, or remove it."
        ) from None
    known = DataSource().get_global_energy_mix_data()
    if job.track.country not in known:
        raise ConfigError(
            f"track.country={job.track.country!r}: unknown country, on which the carbon dioxide of a kilowatt-hour "
            "depends. Give the three letters of ISO 3166, such as DEU, FRA, IND or USA."
        )


def sum_energy(meter: Meter, context: DistributedContext) -> dict[str, float]:
    """Return the energy of all ranks so far in this attempt, or {} if nothing is measured. Every rank must call it."""
    return add_up(context.all_gather((platform.node(), meter.read())))


def add_up(readings: list[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """Return `energy_kwh`, its parts and `co2_kg`. `readings`: `(machine, Meter.read())` of every rank."""
    sums = dict.fromkeys(("energy_kwh", "gpu_kwh", "cpu_kwh", "memory_kwh", "co2_kg"), 0.0)
    machines: set[str] = set()
    for machine, reading in readings:
        if not reading:
            continue
        parts = ("gpu_kwh",) if machine in machines else ("gpu_kwh", "cpu_kwh", "memory_kwh")
        machines.add(machine)
        for part in parts:
            sums[part] += reading[part]
            sums["energy_kwh"] += reading[part]
            sums["co2_kg"] += reading[part] * reading["kg_per_kwh"]
    return sums if machines else {}


def energy_writer(
    meter: Meter | None, monitor: Monitor | None, context: DistributedContext, trainer: Any
) -> Callable[[], None]:
    """Return a function that writes the energy so far, called by all ranks at the same steps; it does nothing without
    meters."""

    def write() -> None:
        if meter is not None and (totals := sum_energy(meter, context)) and monitor is not None:
            monitor.write("energy", trainer.state.global_step, trainer.state.epoch or 0.0, totals)

    return write
