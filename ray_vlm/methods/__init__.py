"""The methods: which TRL trainer, with which options. The loss is TRL's. Imports without ray."""

from types import ModuleType

from ray_vlm.methods import sft

METHODS: dict[str, ModuleType] = {"sft": sft}
