"""Energy: each GPU once, each machine's processor and memory once, and no unknown country."""

import sys

import pytest

from ray_vlm.config.schema import Track
from ray_vlm.errors import ConfigError
from ray_vlm.train.callbacks.energy import add_up
from ray_vlm.train.prepare import check_energy


def _track(country: str) -> Track:
    return Track(energy=True, country=country)


def test_ranks_of_one_machine_share_its_processor_and_memory() -> None:
    one = {"gpu_kwh": 1.0, "cpu_kwh": 0.5, "memory_kwh": 0.25, "kg_per_kwh": 0.4}
    totals = add_up([("a", one), ("a", one), ("b", one), ("c", {})])
    assert (totals["gpu_kwh"], totals["cpu_kwh"], totals["memory_kwh"], totals["energy_kwh"]) == (3.0, 1.0, 0.5, 4.5)
    assert totals["co2_kg"] == pytest.approx(4.5 * 0.4)
    assert add_up([("a", {}), ("b", {})]) == {}


def test_an_unknown_country_and_a_missing_package_are_reported_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_energy(_track("DEU"))
    with pytest.raises(ConfigError, match=r"track\.country='GERMANY'"):
        check_energy(_track("GERMANY"))
    monkeypatch.setitem(sys.modules, "codecarbon.input", None)
    with pytest.raises(ConfigError, match="codecarbon is not installed"):
        check_energy(_track("DEU"))
