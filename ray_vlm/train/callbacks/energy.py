"""Energy and carbon dioxide of a run (`track.energy`), estimated by codecarbon offline, without network access.

Each rank reads its own GPU. Processor and memory are measured once for each machine, with everything that runs there.
The energy between the last checkpoint and a crash is not counted.
"""

import os
import platform
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ray_vlm.train.run_context import RunContext

if TYPE_CHECKING:
    from codecarbon.output import EmissionsData

_SAMPLE_S = 15.0


class Meter:
    """Measures the energy of this process's GPU and machine until `close`. `country`: three letters (ISO 3166);
    `device`: `cpu` or `cuda:<index among the GPUs that this process sees>`."""

    def __init__(self, country: str, device: str):
        from codecarbon import OfflineEmissionsTracker

        self._total: EmissionsData | None = None
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

    def out(self, total: "EmissionsData", delta: object) -> None:
        """Take codecarbon's sum; codecarbon calls this."""
        self._total = total

    def live_out(self, total: "EmissionsData", delta: object) -> None:
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


def add_up(readings: list[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """Return `energy_kwh`, its parts and `co2_kg`, or {} if nothing was measured.

    `readings`: `(machine, Meter.read())` of every rank."""
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


class EnergyCallback(TrainerCallback):
    """Writes the energy of the attempt so far at every checkpoint. `meter`: of this rank; every rank has one."""

    def __init__(self, run: RunContext, meter: Meter):
        self._run, self._meter = run, meter

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Write the energy of all ranks."""
        self.write(state)

    def write(self, state: TrainerState) -> None:
        """Write the energy so far. Every rank must call it at the same step."""
        readings = self._run.distributed.gather((platform.node(), self._meter.read()))
        if totals := add_up(readings):  # on rank 0
            self._run.write("energy", state.global_step, state.epoch, totals)

    def close(self) -> None:
        """Stop measuring."""
        self._meter.close()
