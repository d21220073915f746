"""The tiny base: small enough to ship, and it can really find things on its own domain."""

from pathlib import Path

from ray_vlm.demo.tiny import measure
from ray_vlm.models.load import resolve_name


def test_the_shipped_weights_are_small_and_safe() -> None:
    files = list(Path(resolve_name("tiny")).iterdir())
    assert sum(f.stat().st_size for f in files) <= 8_000_000
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jinja", ".md"}


def test_the_shipped_base_finds_objects_on_its_own_domain(tmp_path: Path) -> None:
    scores = measure(Path(resolve_name("tiny")), tmp_path, num_images=64)
    assert scores["parse_rate"] >= 0.95
    assert scores["f1_50"] >= 0.80
