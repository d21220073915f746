"""A base that stays in its process: loaded once, handed out again and again as it was loaded.

A trainer changes the module tree that it is given: adapters take the place of layers, forwards are wrapped, hooks are
hung in. So each run gets a tree of its own, and only the frozen weights are the same ones.
"""

import copy
from itertools import chain
from typing import Any

from ray_vlm.config.schema import Model
from ray_vlm.config.train import Precision
from ray_vlm.models.load import load_model

_KEPT: dict[tuple, Any] = {}


def load_resident(spec: Model, precision: Precision, device: str = "cpu") -> Any:
    """As `load_model`, but weights come from the disk only once in this process; nobody may change them."""
    key = (spec.name, spec.revision, spec.load_in_4bit, precision, device)
    if key not in _KEPT:
        _KEPT.clear()  # one base is what a card holds
        _KEPT[key] = load_model(spec, precision, device)
    return share_weights(_KEPT[key])


def keep_resident(spec: Model, precision: Precision, device: str, model: Any) -> None:
    """Let `load_resident` hand out this base, which has been built here, for `spec`."""
    _KEPT.clear()
    _KEPT[spec.name, spec.revision, spec.load_in_4bit, precision, device] = model


def share_weights(model: Any) -> Any:
    """A copy of the module tree around the same tensors. What quantised layers know of their values is shared too."""
    same = list(chain(model.parameters(), model.buffers()))
    same += [state for m in model.modules() if (state := getattr(m, "quant_state", None)) is not None]
    return copy.deepcopy(model, {id(value): value for value in same})
