"""Read a source; one that names a function to make it is made on first use."""

from pathlib import Path
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.config.paths import import_function
from ray_vlm.data.formats import read_rows
from ray_vlm.errors import ConfigError, RayVlmError
from ray_vlm.runs.progress import lasting


def read_source(source: Source) -> tuple[list[Any], list[str]]:
    """What `formats.read_rows` gives for the source, made first where it is not there. Raises as that does, and
    `ConfigError` where it cannot be made."""
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
