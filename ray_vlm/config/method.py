"""The `method` section of a job: how the model is trained, and which settings belong to which method."""

from typing import Any, Literal

from pydantic import Field

from ray_vlm.config.section import Largest, Section


class Method(Section):
    """The training method."""

    name: Literal["sft", "dpo", "grpo"] = Field(
        "sft",
        description="The training method: `sft` imitates the answers in the data, `dpo` learns to prefer one answer to "
        "another, `grpo` samples answers and learns from their rewards.",
    )
    loss_on: Literal["answer", "whole_sequence"] = Field(
        "answer", description="SFT: the tokens that the loss includes. Padding and image tokens are never included."
    )
    beta: float | None = Field(
        None,
        ge=0,
        description="DPO, GRPO: how strongly the model is kept close to the reference, which is the adapter that it "
        "starts from, or the base. null: 0.1 for DPO; 0 for GRPO, which then needs no reference.",
    )
    loss_type: str | list[str] | None = Field(
        None,
        min_length=1,
        description="DPO, GRPO: the loss, by TRL's name; for DPO also a list, weighted by `trl.loss_weights`. null: "
        "`sigmoid` for DPO, `dapo` for GRPO.",
    )
    precompute_ref_log_probs: bool = Field(
        False,
        description="DPO: run the reference on all pairs once before training and cache its log-probabilities in "
        "`<run.output_dir>/.reference`, for all epochs and later runs with the same rows and reference.",
    )
    share_prefixes: bool = Field(
        True,
        description="DPO, GRPO: compute the common prefix of rows in a batch, images and question, once. Exact; only "
        "with `lora.dropout` 0.",
    )
    num_generations: int = Field(8, ge=2, le=Largest, description="GRPO: answers sampled for each prompt.")
    num_generations_eval: int = Field(
        0,
        ge=0,
        le=Largest,
        description="GRPO: answers sampled for each validation row, as in training, for the metric `sampled_reward`, "
        "which has less noise than the reward of one greedy answer. 0: none.",
    )
    temperature: float = Field(1.0, gt=0, description="GRPO: temperature of sampling.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="GRPO: sample from the likeliest tokens of this total probability."
    )
    top_k: int = Field(0, ge=0, le=Largest, description="GRPO: sample from this many likeliest tokens. 0: all.")
    max_completion_tokens: int = Field(256, ge=1, le=Largest, description="GRPO: most tokens of a sampled answer.")
    rewards: dict[str, float] | None = Field(
        None,
        min_length=1,
        description="GRPO: weight of each part of the reward: the task's own parts, or `module:function` for your own "
        "function. null: the task's own parts, 1.0 each; for chat only `anls`.",
    )
    box_quality: Literal["iou", "giou"] = Field(
        "iou",
        description="GRPO: the overlap that scores a box. `giou` also ranks boxes that do not touch the true one.",
    )
    rollouts: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="GRPO: the engine that samples. `vllm` needs a GPU, the package, and adapters on the language "
        "model only; it has not been tested on hardware.",
    )
    trl: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of TRL's config that have no setting here, passed on unchanged.",
    )


# Settings that only some methods read; for others they would have no effect.
OF_METHODS: dict[str, tuple[str, ...]] = {
    "loss_on": ("sft",),
    "beta": ("dpo", "grpo"),
    "loss_type": ("dpo", "grpo"),
    "precompute_ref_log_probs": ("dpo",),
    "share_prefixes": ("dpo", "grpo"),
    **dict.fromkeys(("num_generations", "temperature", "top_p", "top_k", "max_completion_tokens"), ("grpo",)),
    **dict.fromkeys(("num_generations_eval", "rewards", "box_quality", "rollouts"), ("grpo",)),
}

# Metrics of each method for `evaluate.metric`, beside those of the task.
METHOD_METRICS: dict[str, tuple[str, ...]] = {
    "sft": ("loss",),
    "dpo": ("loss", "preference_accuracy", "reward_margin"),
    "grpo": ("reward", "sampled_reward"),
}
