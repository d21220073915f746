"""The tasks, one module each, with the functions `ask`, `answer`, `parse` and `score`."""

from types import ModuleType

from ray_vlm.tasks import chat, classification, detection, gui_steps

TASKS: dict[str, ModuleType] = {
    "detection": detection,
    "classification": classification,
    "gui_steps": gui_steps,
    "chat": chat,
}
