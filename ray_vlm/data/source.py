"""Make a source ready to read: one that names a function to make it is made on first use."""

import importlib
from pathlib import Path

from ray_vlm.config.schema import Source
from ray_vlm.errors import ConfigError


def prepare_source(source: Source) -> None:
    """Call `source.create` with the path if the file is not there yet. Raises `ConfigError` if it cannot be called."""
    if source.create is None or Path(source.path).exists():
        return
    module, _, name = source.create.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"create={source.create!r} cannot be found ({error}). Write it as module:function.") from None
    function(source.path)
