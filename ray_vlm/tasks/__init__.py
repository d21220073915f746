"""What a model is asked to do: one file a task, each with ask, answer, parse and score."""

from types import ModuleType

from ray_vlm.tasks import chat, classification, detection, gui_steps

TASKS: dict[str, ModuleType] = {
    "detection": detection,
    "classification": classification,
    "gui_steps": gui_steps,
    "chat": chat,
}
