"""The large libraries: what they print and what is imported with them, in a process of its own, and the helpers."""

import gc
import importlib
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec

import pytest

from ray_vlm.models.libraries import _Distributions, hidden, no_garbage_collection

CODE = """
import logging
from ray_vlm.models.libraries import quiet_libraries
quiet_libraries()
import bitsandbytes.backends.cpu.ops
for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.cextension"):
    logging.getLogger(name).warning("a banner of %s", name)
    logging.getLogger(name).error("an error of %s", name)
"""

# The list of models as `transformers.models` makes it itself, beside the one that it was given.
MODELS = """
from ray_vlm.models.libraries import list_models_once
list_models_once()
import transformers.models
from transformers.utils.import_utils import _LazyModule, define_import_structure
given, file = transformers.models, transformers.models.__file__
made = _LazyModule("transformers.models", file, define_import_structure(file))
assert given._modules == made._modules and len(made._modules) > 1000
assert given._class_to_module == made._class_to_module
assert given._object_missing_backend == made._object_missing_backend
assert {k: set(v) for k, v in given._import_structure.items()} == {k: set(v) for k, v in made._import_structure.items()}
"""
FROZEN = """
import gc
from ray_vlm.models.libraries import frozen
assert gc.get_freeze_count() == 0
with frozen():
    count = gc.get_freeze_count()
    assert count > 1000
    with frozen():
        pass
    assert gc.get_freeze_count() == count, "the outer body still runs"
assert gc.get_freeze_count() == 0
"""
# A module of the standard library that nothing else imports.
RARE = "this"


def test_bitsandbytes_prints_errors_only() -> None:
    """Some processors make its CPU kernels warn while they are imported."""
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    output = result.stdout + result.stderr
    assert "banner" not in output
    assert "Failed to load" not in output
    assert output.count("an error of") == 2


def test_the_list_of_models_is_the_one_that_transformers_makes() -> None:
    subprocess.run([sys.executable, "-c", MODELS], check=True)


def test_a_hidden_module_looks_as_if_it_were_not_installed_until_the_body_ends() -> None:
    with hidden(RARE):
        assert find_spec(RARE) is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(RARE)
    assert RARE not in sys.modules
    assert find_spec(RARE) is not None


def test_what_is_imported_already_is_not_hidden() -> None:
    with hidden("json", "json"):
        assert importlib.import_module("json") is sys.modules["json"] is not None
    assert sys.modules["json"] is not None


def test_a_module_that_is_hidden_twice_is_hidden_until_the_outer_body_ends() -> None:
    with hidden(RARE):
        with hidden(RARE):
            pass
        assert find_spec(RARE) is None
    assert find_spec(RARE) is not None


def test_objects_are_frozen_while_the_body_runs() -> None:
    subprocess.run([sys.executable, "-c", FROZEN], check=True)


def test_garbage_collection_is_off_in_nested_bodies_until_the_outer_one_ends() -> None:
    with no_garbage_collection():
        with no_garbage_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_distributions_are_those_of_the_complete_table() -> None:
    """`PIL` is the package of another distribution; the last one is not installed."""
    complete, known = metadata.packages_distributions(), _Distributions()
    for name in ("trl", "transformers", "PIL"):
        assert known[name] == list(dict.fromkeys(complete[name]))
    with pytest.raises(KeyError):
        known["no_such_package"]


def test_a_detector_of_transformers_can_be_trained_later_in_the_process() -> None:
    """SciPy is hidden while the losses load, and found when one of them needs it."""
    script = (
        "from ray_vlm.models.libraries import import_transformers; import_transformers(); import sys; "
        "before = 'scipy.optimize' in sys.modules; import numpy as np; "
        "from transformers.loss.loss_for_object_detection import linear_sum_assignment; "
        "print(before, [list(map(int, part)) for part in linear_sum_assignment(np.array([[2, 1], [1, 2]]))])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "False [[0, 1], [1, 0]]"
