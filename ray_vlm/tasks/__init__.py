"""What a model is asked to do: one file a task, each with ask, answer, parse and score."""

from types import ModuleType

from ray_vlm.tasks import detection

TASKS: dict[str, ModuleType] = {"detection": detection}
