"""The job's `cluster` section: what it runs on."""

from typing import Annotated, Literal

from pydantic import Field

from ray_vlm.config.section import Largest, Section

BUCKET = 2**24  # numbers that DeepSpeed reduces or gathers at once; its own 5e8 would be 2 GB
GATHERED = 2 * 10**8  # weights that ZeRO-3 keeps put together; its own 1e9 would be 2 GB


class Cluster(Section):
    """What the job runs on."""

    @property
    def zero_stage(self) -> int:
        """Of `deepspeed`; 0 without."""
        return int(self.deepspeed[len("zero")]) if self.deepspeed else 0

    @property
    def least_workers(self) -> int:
        """The fewest that train together; 1 for this process."""
        return max(1, self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0])

    @property
    def most_workers(self) -> int:
        """The most that train together; 1 for this process."""
        return max(1, self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1])

    num_workers: (
        Annotated[int, Field(ge=0, le=Largest)]
        | Annotated[list[Annotated[int, Field(ge=1, le=Largest)]], Field(min_length=2, max_length=2)]
    ) = Field(
        1,
        description="Training processes. 0: this process, without starting Ray. `[2, 8]`: as many of 2 to 8 as the "
        "cluster has room for, more or fewer while the run goes on; a step has `train.global_batch_size` rows anyway.",
    )
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of one worker.")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of one worker; also its number of torch threads.")
    gpu_memory_gib: float | None = Field(None, gt=0, description="Memory of a card, for `ray-vlm memory`.")
    deepspeed: Literal["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"] | None = Field(
        None,
        description="What workers share instead of each holding all of it: zero1 the optimizer's state, zero2 the "
        "gradients as well, zero3 also the weights. _offload: what is shared lies in the computer's memory.",
    )
    max_failures: int = Field(
        3,
        ge=0,
        le=Largest,
        description="Failures after which a run goes on from its last checkpoint by itself. Workers and machines that "
        "are lost count in a row: from 0 again when the run comes further than before.",
    )
    stall_minutes: float = Field(
        30,
        gt=0,
        description="How long nothing may move in a step, a validation or a checkpoint: then `stalls/` has the stacks "
        "of all workers, and it is told which one hangs, where and with which rows.",
    )
    on_stall: Literal["restart", "stop"] = Field(
        "restart", description="What follows then: going on from the last checkpoint, as after a failure, or the end."
    )
    address: str | None = Field(None, description="Ray cluster to join. null: `RAY_ADDRESS`, or a cluster of our own.")
    startup_minutes: float = Field(
        0,
        ge=0,
        description="How long to wait for machines that the cluster does not have yet but starts when they are asked "
        "for, as with an autoscaler. 0: a job that does not fit now is refused.",
    )
