"""Compare the faster paths that a run uses with the plain one, on a small part of its heaviest batch."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ray_vlm.config.train import Precision
from ray_vlm.distributed import DistributedContext
from ray_vlm.methods.trainer import PlannedTrainer
from ray_vlm.models.self_check import Difference, compare_paths
from ray_vlm.models.surgery import list_switches

_ROWS = 2  # of the batch: two rows show what one of them sees of the other


def compare_with_plain(
    trainer: PlannedTrainer, rows: Sequence[int], precision: Precision, context: DistributedContext
) -> str | None:
    """Compare the trainer's model with its plain path on the first of these rows, and return a sentence on it; None
    where nothing is switched on. Every rank must call it. Raise `ModelError` if they differ."""
    switches = list_switches(trainer.model, trainer.inputs.forwards)
    if not switches:
        return None
    samples = [trainer.inputs.rows.sample(trainer.builder, number) for number in rows[:_ROWS]]

    def run(look: Callable[[Tensor], None]) -> None:
        trainer.try_heaviest_batch(samples, precision, look)

    def agree(own: Difference) -> Difference:
        gathered = context.gather((own.loss, own.gradient))  # empty on the other ranks
        loss, gradient = map(_largest, zip(*gathered, strict=True)) if gathered else (0.0, 0.0)
        return context.broadcast(Difference(loss, gradient))

    return compare_paths(trainer.model, switches, run, precision, agree)


def _largest(values: Sequence[float]) -> float:
    """Return the largest value; NaN where one is."""
    return max(values, key=lambda value: (value != value, value))
