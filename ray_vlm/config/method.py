"""`method`: how the model learns, and which of its settings belong to which method."""

from typing import Any, Literal

from pydantic import Field

from ray_vlm.config.section import Largest, Section


class Method(Section):
    """How the model learns."""

    name: Literal["sft", "dpo", "grpo"] = Field(
        "sft",
        description="How the model learns: `sft` imitates the answers in the data, `dpo` prefers one answer to "
        "another, `grpo` samples answers and learns from their rewards.",
    )
    loss_on: Literal["answer", "whole_sequence"] = Field(
        "answer", description="SFT: which text is trained. Padding and image tokens never are."
    )
    beta: float | None = Field(
        None,
        ge=0,
        description="DPO, GRPO: how strongly the model is held to the reference, which is the adapter that it starts "
        "from, or the base. null: 0.1 for DPO; 0 for GRPO, which then needs no reference.",
    )
    loss_type: str | list[str] | None = Field(
        None,
        min_length=1,
        description="DPO, GRPO: the loss, by TRL's name; for DPO also a list, weighted by `trl.loss_weights`. null: "
        "`sigmoid` for DPO, `dapo` for GRPO.",
    )
    precompute_ref_log_probs: bool = Field(
        False,
        description="DPO: run the reference over all pairs once before training and keep what it says under "
        "`<run.output_dir>/.reference`, for every epoch and every later run with the same rows and reference.",
    )
    share_prefixes: bool = Field(
        True,
        description="DPO, GRPO: what rows of a batch have in common, images and question, goes through the model once. "
        "Exact; done only where `lora.dropout` is 0.",
    )
    num_generations: int = Field(8, ge=2, le=Largest, description="GRPO: answers sampled for each prompt.")
    num_generations_eval: int = Field(
        0,
        ge=0,
        le=Largest,
        description="GRPO: answers sampled for each validation row as in training, for `sampled_reward`: what training "
        "raises, with less noise than the reward of one greedy answer. 0: none.",
    )
    temperature: float = Field(1.0, gt=0, description="GRPO: temperature of sampling.")
    top_p: float = Field(1.0, gt=0, le=1, description="GRPO: sample from the likeliest tokens of this total share.")
    top_k: int = Field(0, ge=0, le=Largest, description="GRPO: sample from this many likeliest tokens. 0: from all.")
    max_completion_tokens: int = Field(256, ge=1, le=Largest, description="GRPO: longest sampled answer.")
    rewards: dict[str, float] | None = Field(
        None,
        min_length=1,
        description="GRPO: weight of each part of the reward: the task's own parts, or `module:function` for a "
        "function of yours. null: the task's own parts, 1.0 each; of chat `anls` alone.",
    )
    box_quality: Literal["iou", "giou"] = Field(
        "iou", description="GRPO: how near a box is. `giou` tells boxes apart that do not touch the true one."
    )
    rollouts: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="GRPO: what samples. `vllm` needs a GPU and the package, and adapters on the language model only; "
        "it has not been tried on hardware.",
    )
    trl: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of TRL's own config that this file does not name, passed on as they are.",
    )


# Settings that only some methods read; for others they would do nothing.
OF_METHODS: dict[str, tuple[str, ...]] = {
    "loss_on": ("sft",),
    "beta": ("dpo", "grpo"),
    "loss_type": ("dpo", "grpo"),
    "precompute_ref_log_probs": ("dpo",),
    "share_prefixes": ("dpo", "grpo"),
    **dict.fromkeys(("num_generations", "temperature", "top_p", "top_k", "max_completion_tokens"), ("grpo",)),
    **dict.fromkeys(("num_generations_eval", "rewards", "box_quality", "rollouts"), ("grpo",)),
}

# What `evaluate.metric` may name beside the task's own metrics.
METHOD_METRICS: dict[str, tuple[str, ...]] = {
    "sft": ("loss",),
    "dpo": ("loss", "preference_accuracy", "reward_margin"),
    "grpo": ("reward", "sampled_reward"),
}
