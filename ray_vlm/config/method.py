"""The `method` section of a job: how the model is trained. Each method has a section of its own."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ray_vlm.config.section import Count, CountOrZero, Largest, Section, read_variant


class _Method(Section):
    """What the sections of all methods have."""

    name: str
    trl: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of TRL's config that have no setting here, passed on unchanged.",
    )


class SftMethod(_Method):
    """Supervised fine-tuning imitates the answers in the data."""

    name: Literal["sft"] = Field("sft", description="Supervised fine-tuning: imitate the answers in the data.")
    loss_on: Literal["answer", "whole_sequence"] = Field(
        "answer", description="The tokens that the loss includes. Padding and image tokens are never included."
    )


class AlignmentMethod(_Method):
    """What the methods have that compare answers to the same prompt."""

    share_prefixes: bool = Field(
        True,
        description="Compute the common prefix of rows in a batch, images and question, once. Exact; only with "
        "`lora.dropout` 0.",
    )


class DpoMethod(AlignmentMethod):
    """Direct preference optimisation learns to prefer one answer to another."""

    name: Literal["dpo"] = Field(
        "dpo", description="Direct preference optimisation: learn to prefer one answer to another."
    )
    beta: float | None = Field(
        None,
        ge=0,
        description="How strongly the model is kept close to the reference, which is the adapter that it starts from, "
        "or the base. null: 0.1.",
    )
    loss_type: str | list[str] | None = Field(
        None,
        min_length=1,
        description="The loss, by TRL's name, or a list of losses, weighted by `trl.loss_weights`. null: `sigmoid`.",
    )
    precompute_ref_log_probs: bool = Field(
        False,
        description="Run the reference on all pairs once before training and cache its log-probabilities in "
        "`<run.output_dir>/.reference`, for all epochs and later runs with the same rows and reference.",
    )


class GrpoMethod(AlignmentMethod):
    """Group-relative policy optimisation samples answers and learns from their rewards."""

    name: Literal["grpo"] = Field(
        "grpo", description="Group-relative policy optimisation: sample answers and learn from their rewards."
    )
    beta: float | None = Field(
        None,
        ge=0,
        description="How strongly the model is kept close to the reference, which is the adapter that it starts from, "
        "or the base. null: 0, which needs no reference.",
    )
    loss_type: str | None = Field(None, min_length=1, description="The loss, by TRL's name. null: `dapo`.")
    num_generations: int = Field(8, ge=2, le=Largest, description="Answers sampled for each prompt.")
    num_generations_eval: CountOrZero = Field(
        0,
        description="Answers sampled for each validation row, as in training, for the metric `sampled_reward`, which "
        "has less noise than the reward of one greedy answer. 0: none.",
    )
    temperature: float = Field(1.0, gt=0, description="Temperature of sampling.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens of this total probability.")
    top_k: CountOrZero = Field(0, description="Sample from this many likeliest tokens. 0: all.")
    max_completion_tokens: Count = Field(256, description="Most tokens of a sampled answer.")
    rewards: dict[str, float] | None = Field(
        None,
        min_length=1,
        description="Weight of each part of the reward: the task's own parts, or `module:function` for your own "
        "function. null: the task's own parts, 1.0 each; for chat only `anls`.",
    )
    box_quality: Literal["iou", "giou"] = Field(
        "iou",
        description="The overlap that scores a box. `giou` also ranks boxes that do not touch the true one.",
    )
    rollouts: Literal["transformers", "vllm", "server"] = Field(
        "transformers",
        description="The engine that samples: the package's own loop, vLLM (`ray_vlm[vllm]`), or an OpenAI-compatible "
        "server that already runs (`sampler_url`). vLLM has been tried with its build for CPUs, and not on a GPU.",
    )
    sampler_url: str | None = Field(
        None,
        min_length=1,
        description="Address of the server of `rollouts: server`, such as `http://127.0.0.1:8000/v1`.",
    )
    sampler_sleep: Literal[0, 1, 2] | None = Field(
        None,
        description="What vLLM gives back of a GPU between samplings: 0 nothing; 1 its cache, and its weights wait in "
        "the computer's memory; 2 both, and the weights are read again. null: 1, or 2 where the memory is too small.",
    )
    check_sampler_every: Count = Field(
        10,
        description="Pushes of the adapter between two proofs that vLLM or the server uses it: a prompt is scored with "
        "the adapter, without it, and by the trainer. Also done after the first push and whenever the engine wakes.",
    )
    max_rollout_gap: float | None = Field(
        None,
        gt=0,
        description="Largest `rollout_gap`, the mean difference between log-probabilities at sampling and in training, "
        "before the run ends. null: 0.001 in fp32 on CPUs, otherwise 0.1, as GPUs multiply fp32 in TF32.",
    )
    samplers: CountOrZero | Annotated[list[Count], Field(min_length=2, max_length=2)] = Field(
        0,
        description="Processes beside the workers that sample, each with an engine of `rollouts` of its own. 0: each "
        "worker samples the answers to its prompts itself. `[2, 8]`: 2 at the start, and up to 8 while the cluster has "
        "room for them beside the workers.",
    )
    cpus_per_sampler: float | None = Field(
        None,
        gt=0,
        description="CPUs of one sampler; also its number of torch threads. null: `cluster.cpus_per_worker`.",
    )
    gpus_per_sampler: Literal[0, 1] | None = Field(
        None, description="GPUs of one sampler. null: 1 if workers have GPUs, otherwise 0."
    )
    max_staleness: Literal[0, 1] = Field(
        0,
        description="Steps between the adapter that samples and the one that learns. 0: each waits for the other. 1: "
        "the answers of the next step are sampled while this one trains, and TRL corrects for the older adapter.",
    )
    sampling_batch: Count | None = Field(
        None,
        description="Prompts whose answers are sampled at a time. null: all of a worker's step; with samplers 1, or "
        "equal shares for vLLM. Other numbers give other roundings, and so other tokens here and there.",
    )

    @property
    def worker_engine(self) -> Literal["transformers", "vllm", "server", "samplers"]:
        """What samples for a worker: an engine of `rollouts` in the worker itself, or samplers."""
        return "samplers" if self.samplers else self.rollouts

    @property
    def least_samplers(self) -> int:
        """The fewest samplers that the run begins with."""
        return self.samplers if isinstance(self.samplers, int) else self.samplers[0]

    @property
    def most_samplers(self) -> int:
        """The most samplers that sample together."""
        return self.samplers if isinstance(self.samplers, int) else self.samplers[1]


Method = Annotated[
    SftMethod | DpoMethod | GrpoMethod, Field(discriminator="name"), read_variant(SftMethod, DpoMethod, GrpoMethod)
]

# Metrics of each method for `evaluate.metric`, beside those of the task.
METHOD_METRICS: dict[str, tuple[str, ...]] = {
    "sft": ("loss",),
    "dpo": ("loss", "preference_accuracy", "reward_margin"),
    "grpo": ("reward", "sampled_reward"),
}
