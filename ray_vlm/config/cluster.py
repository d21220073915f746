"""The `cluster` section of a job: what it runs on."""

from typing import Annotated, Literal

from pydantic import Field

from ray_vlm.config.section import Count, CountOrZero, Section

BUCKET = 2**24  # numbers that DeepSpeed reduces or gathers at a time; its default of 5e8 takes 2 GB
GATHERED = 2 * 10**8  # most weights that ZeRO-3 keeps gathered; its default of 1e9 takes 2 GB


class Cluster(Section):
    """What the job runs on."""

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage of `deepspeed`; 0 without it."""
        return int(self.deepspeed[len("zero")]) if self.deepspeed else 0

    @property
    def least_workers(self) -> int:
        """The fewest workers that train together; 1 for a job in this process."""
        return max(1, self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0])

    @property
    def most_workers(self) -> int:
        """The most workers that train together; 1 for a job in this process."""
        return max(1, self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1])

    num_workers: CountOrZero | Annotated[list[Count], Field(min_length=2, max_length=2)] = Field(
        1,
        description="Training processes. 0: this process, without Ray. `[2, 8]`: from 2 to 8, as many as fit on the "
        "cluster at any time during the run; a step always has `train.global_batch_size` rows.",
    )
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of one worker.")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of one worker; also its number of torch threads.")
    gpu_memory_gib: float | None = Field(
        None,
        gt=0,
        description="Memory of one GPU, for `ray-vlm memory` and `train.memory`. The sizes of labels (16, 24, 32, 40, "
        "48, 80, 141) stand for what torch has of such a card; any other number counts as it is.",
    )
    deepspeed: Literal["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"] | None = Field(
        None,
        description="What is partitioned among the workers: zero1 the optimizer's state, zero2 also the gradients, "
        "zero3 also the weights. _offload: the partitions are kept in CPU memory.",
    )
    max_failures: CountOrZero = Field(
        3,
        description="Failures after which a run continues from its last checkpoint. Lost workers and machines are "
        "counted in a row: the count restarts when the run gets further than before.",
    )
    stall_minutes: float = Field(
        30,
        gt=0,
        description="Minutes without progress in a step, a validation or a checkpoint until the run counts as stalled: "
        "then `stalls/` gets the stacks of all workers, and a message names the worker that hangs and its rows.",
    )
    on_stall: Literal["restart", "stop"] = Field(
        "restart", description="After a stall: continue from the last checkpoint, as after a failure, or stop the run."
    )
    address: str | None = Field(None, description="Ray cluster to join. null: `RAY_ADDRESS`, or a new local cluster.")
    startup_minutes: float = Field(
        0,
        ge=0,
        description="Minutes to wait for machines that an autoscaling cluster starts on demand. 0: a job that does not "
        "fit on the present machines is refused.",
    )
