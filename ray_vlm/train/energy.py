"""Energy and carbon dioxide of a run (`track.energy`): codecarbon's estimate, offline, so nothing calls home.

A rank reads its own card. Processor and memory are those of the whole machine, once for each machine, with whatever
else runs there. What was used between the last checkpoint and a crash is not known.
"""

import platform
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import ConfigError
from ray_vlm.train.attempt import Place

_SAMPLE_S = 15.0


class Meter:
    """Adds up what this process's machine uses, from now on until `close`. `country`: three letters (ISO 3166)."""

    def __init__(self, country: str):
        from codecarbon import OfflineEmissionsTracker

        self._total: Any = None
        nothing: dict[str, Any] = dict.fromkeys(("save_to_file", "save_to_api", "save_to_logger"), False)
        self._tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            output_handlers=[self],
            measure_power_secs=_SAMPLE_S,
            tracking_mode="machine",
            allow_multiple_runs=True,
            log_level="critical",
            **nothing,
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
            "gpu_kwh": found.gpu_energy,
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


def sum_energy(meter: Meter | None, place: Place) -> dict[str, float]:
    """What all ranks have used so far in this attempt; every rank calls it at the same step. Empty without meters."""
    return add_up(place.gather((platform.node(), meter.read() if meter is not None else {})))


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
