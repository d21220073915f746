"""Configurations of known models, so that memory can be planned without a download: `presets.json`, by hub name.

`parameters` is the count that the publisher gives, if any; a test compares the configuration with it.
"""

import difflib
import json
from functools import cache
from pathlib import Path
from typing import Any

from ray_vlm.errors import ModelError


@cache
def read_presets() -> dict[str, dict[str, Any]]:
    """Return `{hub name: {"model_type", "parameters", "config"}}`."""
    return json.loads((Path(__file__).parent / "presets.json").read_text(encoding="utf-8"))


def load_preset(name: str) -> Any:
    """Return the transformers configuration of a model by its hub name, or by the last part of it.

    Raise `ModelError`, with the nearest names, if there is none.
    """
    from transformers import AutoConfig

    presets = read_presets()
    preset = presets.get(name) or next((p for n, p in presets.items() if n.rpartition("/")[2] == name), None)
    if preset is None:
        near = difflib.get_close_matches(name, presets, n=3, cutoff=0.3) or list(presets)
        raise ModelError(f"{name!r} is no preset. The nearest: {', '.join(near)}.")
    return AutoConfig.for_model(preset["model_type"], **preset["config"])


def build_empty(config: Any) -> Any:
    """Build the model of a configuration on the meta device: shapes and names, no weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return model


def count_parameters(model: Any) -> int:
    """Count the weights of a model; weights that two modules share count once."""
    return sum(parameter.numel() for parameter in model.parameters())
