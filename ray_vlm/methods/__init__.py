"""The training methods: TRL's trainer, its inputs and its options for each. The losses are TRL's. Imports no ray.

Each module has `trainer_class()`, `EXAMPLE_ROW`, `build_args(job, shared)`, `extras(job)` (further arguments of TRL's
constructor), `collate(rows, builder, device)` (the tensors of a micro-batch) and `logged(logs)` (TRL's numbers under
this package's names).
"""

from types import ModuleType

from ray_vlm.methods import dpo, grpo, sft

METHODS: dict[str, ModuleType] = {"sft": sft, "dpo": dpo, "grpo": grpo}
