"""Make a source ready to read: one that names a function to make it is made on first use."""

from pathlib import Path

from ray_vlm.config.data import Source
from ray_vlm.config.places import import_function
from ray_vlm.errors import ConfigError, RayVlmError


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
