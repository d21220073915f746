"""Create the file of a source on first use, or fetch it from the hub."""

from pathlib import Path

from ray_vlm.config.data import Source
from ray_vlm.config.paths import import_function
from ray_vlm.data.sources.hub import hub_files, is_hub
from ray_vlm.errors import ConfigError, RayVlmError


def prepare_source(source: Source) -> None:
    """Call `source.create` with the path if the file is not there yet; fetch a data set of the hub. Raise `ConfigError`
    if `create` cannot be called, and `DataError`."""
    if is_hub(source):
        hub_files(source)
    if source.create is None or Path(source.paths[0]).exists():
        return
    try:
        import_function(source.create)(source.paths[0])
    except RayVlmError:
        raise
    except Exception as error:  # a user's own function
        raise ConfigError(
            f"create={source.create!r} failed for {source.name} ({type(error).__name__}: {error}). "
            "It is module:function, called with the path."
        ) from error
