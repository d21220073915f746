"""The methods: which TRL trainer, fed with what, with which options. The losses are TRL's. Imports without ray.

Each module has `trainer_class()`, `EXAMPLE_ROW`, `build_args(job, shared)`, `extras(job)` (what else TRL's constructor
takes), `collate(rows, builder, device)` (what a micro-batch becomes) and `logged(logs)` (TRL's numbers by our names).
"""

from types import ModuleType

from ray_vlm.methods import dpo, grpo, sft

METHODS: dict[str, ModuleType] = {"sft": sft, "dpo": dpo, "grpo": grpo}
