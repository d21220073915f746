"""The blocks of the benchmark, in order of importance, each with its time limit.

A card may be available for minutes only, so the limits together stay under `WHOLE_S`, and the most important blocks
come first. A block is a function of a `Bench` (`benchmarks/gpu/bench.py`) that writes each figure as soon as it is
measured.
"""

from dataclasses import dataclass

WHOLE_S = 540.0  # a command on a borrowed card ends after 10 minutes; transfers and installing take some of them
_TRAINING = ("bitsandbytes", "datasets", "peft", "pydantic", "transformers", "trl")


@dataclass(frozen=True)
class Block:
    """`call`: `module:function`. `limit_s`: seconds after which the block is ended. `needs`: packages that it requires.
    `must`: no other block can run if this one fails."""

    name: str
    call: str
    limit_s: float
    needs: tuple[str, ...] = ("torch",)
    must: bool = False


BLOCKS = (
    Block("card", "benchmarks.gpu.card:inspect_card", 40, must=True),
    Block("sft", "benchmarks.gpu.training:sft", 120, _TRAINING),
    Block("grpo", "benchmarks.gpu.training:grpo", 105, _TRAINING),
    Block("rollouts", "benchmarks.gpu.rollouts:rollouts", 65, _TRAINING),
    Block("dpo", "benchmarks.gpu.training:dpo", 25, _TRAINING),
    Block("kernels", "benchmarks.gpu.kernels:kernels", 45, _TRAINING),
    Block("qwen2.5", "benchmarks.gpu.training:qwen2_5", 50, _TRAINING),
    Block("fused", "benchmarks.gpu.fused:fused", 40, _TRAINING),
    Block("run", "benchmarks.gpu.end_to_end:run_job", 30, _TRAINING),
    Block("profile", "benchmarks.gpu.step_profile:profile_step", 20, _TRAINING),
)
assert sum(block.limit_s for block in BLOCKS) <= WHOLE_S


def choose_blocks(names: str | None) -> tuple[Block, ...]:
    """Return the blocks with these comma-separated names, in their own order, after those that must run; None: all.

    Raise `ValueError` with the names that are unknown.
    """
    if names is None:
        return BLOCKS
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {block.name for block in BLOCKS}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--blocks: there is no {unknown[0]!r}. There are: {', '.join(b.name for b in BLOCKS)}.")
    return tuple(block for block in BLOCKS if block.must or block.name in wanted)
