"""Read a source, and create its file on first use if it names a function for that."""

from pathlib import Path
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.config.paths import import_function
from ray_vlm.data.formats import read_rows
from ray_vlm.errors import ConfigError, RayVlmError
from ray_vlm.runs.console import lasting


def read_source(source: Source) -> tuple[list[Any], list[str]]:
    """Return `formats.read_rows` of the source, after creating its file if needed. Raise as `read_rows` does, and
    `ConfigError` if the file cannot be created."""
    with lasting(f"reading {source.path}"):
        prepare_source(source)
        return read_rows(source)


def prepare_source(source: Source) -> None:
    """Call `source.create` with the path if the file is not there yet. Raises `ConfigError` if it cannot be called."""
    if source.create is None or Path(source.path).exists():
        return
    try:
        import_function(source.create)(source.path)
    except RayVlmError:
        raise
    except Exception as error:  # a user's own function
        raise ConfigError(
            f"create={source.create!r} failed for {source.path} ({type(error).__name__}: {error}). "
            "It is module:function, called with the path."
        ) from error
