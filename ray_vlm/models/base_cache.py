"""Keep a base in its process: it is loaded once, and every caller gets it as it was loaded.

A trainer changes the module tree: adapters replace layers, forwards are wrapped, hooks are registered. So each run gets
a module tree of its own, and only the frozen weights are shared.
"""

import copy
from itertools import chain
from typing import Any

from ray_vlm.config.schema import Model
from ray_vlm.config.train import Precision
from ray_vlm.models.load import load_model

_KEPT: dict[tuple, Any] = {}


def load_resident(spec: Model, precision: Precision, device: str = "cpu") -> Any:
    """Return the base as `load_model` does, but read weights only once in this process. They must not be changed."""
    key = (spec.name, spec.revision, spec.load_in_4bit, precision, device)
    if key not in _KEPT:
        _KEPT.clear()  # a GPU holds one base
        _KEPT[key] = load_model(spec, precision, device)
    return share_weights(_KEPT[key])


def keep_resident(spec: Model, precision: Precision, device: str, model: Any) -> None:
    """Let `load_resident` return `model`, which was built in this process, for `spec`."""
    _KEPT.clear()
    _KEPT[spec.name, spec.revision, spec.load_in_4bit, precision, device] = model


def share_weights(model: Any) -> Any:
    """Return a copy of the module tree with the same tensors. Quantisation states are shared too."""
    same = list(chain(model.parameters(), model.buffers()))
    same += [state for m in model.modules() if (state := getattr(m, "quant_state", None)) is not None]
    return copy.deepcopy(model, {id(value): value for value in same})
