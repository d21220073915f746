"""The `train` section of a job: the optimizer, the batches, and the memory of training."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ray_vlm.config.section import Count, Section

Part = Literal["language", "connector", "vision"]  # of a model; `models/families.py` defines their weights
LoraPart = Literal[Part, "experts"]  # of a mixture: the routed experts of the language model
Precision = Literal["bf16", "fp16", "fp32"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
Recompute = bool | Count | Literal["selective"]  # of layers' activations: all, none, the first so many, or not products


class Train(Section):
    """The optimizer, the batches and the memory of training."""

    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of the schedule.")
    learning_rates: dict[Part, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="Peak learning rates of parts that differ from `learning_rate`, such as `{vision: 1.0e-5}`."
    )
    freeze: list[Part] | None = Field(
        None, min_length=1, description="Parts that are not trained, for full fine-tuning (`lora: null`)."
    )
    min_lr_ratio: float = Field(0.01, ge=0, le=1, description="The cosine schedule ends at this share of the peak.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises linearly.")
    optimizer: Optimizer = Field(
        "adamw",
        description="`adamw` keeps two float32 moments of each trained weight. `adamw_8bit` (bitsandbytes) keeps them "
        "in 8 bits, for full fine-tuning. `paged_adamw_8bit` also lets them leave a GPU that runs full for the "
        "computer's memory.",
    )
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's decoupled weight decay; not on norms and biases.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm. 0: no clipping.")
    num_epochs: float = Field(1.0, gt=0, description="Passes over the training rows. Ignored when `max_steps` is set.")
    max_steps: Count | None = Field(None, description="Stop after this many optimizer steps.")
    global_batch_size: Count = Field(16, description="Rows in one optimizer step, over all workers.")
    micro_batch_size: Count = Field(
        1, description="Rows that one worker runs at a time; gradients are accumulated to the global batch."
    )
    tokens_per_micro_batch: Count | None = Field(
        None,
        description="SFT: instead of `micro_batch_size`, one worker runs as many rows at a time as fit into this many "
        "tokens, including image tokens and padding. Rows of similar length are grouped.",
    )
    packing: bool = Field(
        True,
        description="Concatenate short rows of a micro-batch instead of padding them to the longest. Exact; only with "
        "`lora.dropout` 0.",
    )
    gradient_checkpointing: Recompute = Field(
        True,
        description="Recompute activations in the backward pass, to save memory. A number: only in this many of the "
        "language model's first layers. selective: in all layers, but keep the outputs of their matrix products and of "
        "attention, so that no 4-bit weight is dequantised again.",
    )
    memory: Literal["auto"] | None = Field(
        None,
        description="auto: replace `gradient_checkpointing` by what recomputes least (`false`, `selective`, or a "
        "number of layers), and then `micro_batch_size` by the largest number, with which the largest rows fit into "
        "92 % of `cluster.gpu_memory_gib`. Answers of GRPO are sampled in portions that fit.",
    )
    probe: bool | None = Field(
        None,
        description="Run the largest batch of the plan before the first step, so that a job that does not fit into "
        "memory fails at once. null: on GPUs.",
    )
    vision_cache: str | None = Field(
        None,
        min_length=1,
        description="Folder on each node's disk that caches a frozen image encoder's features of each image, by its "
        "content, for later epochs and runs.",
    )
    vision_cache_gib: float = Field(
        50.0, gt=0, description="Largest size of `vision_cache`; beyond it no more is written."
    )
    precision: Precision = Field(
        "bf16",
        description="Precision of the base and the arithmetic: bfloat16; float16 with a scaled loss, for GPUs that "
        "only emulate bfloat16 (T4, V100); or float32. Trained weights stay float32.",
    )
    bf16: bool | None = Field(
        None, exclude=True, description="Old form of `precision`: true is `bf16`, false is `fp32`. Give one of the two."
    )
    nonfinite: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="If a step's gradient is NaN or infinite: `stop` the run and discard the step, `skip` the step as "
        "if it had no rows, or `rewind` to the last checkpoint and leave out the rows from there to this step. In any "
        "case the rows are in `bad_steps.jsonl`.",
    )
    log_every_steps: Count = Field(10, description="Steps between console lines; files get every step.")
    early_stopping_patience: Count | None = Field(
        None, description="Stop after this many validations without a better `evaluate.metric`."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_bf16(cls, value: object) -> object:
        """Convert `bf16: false`, from jobs of earlier versions, to `precision: fp32`."""
        if isinstance(value, dict) and isinstance(value.get("bf16"), bool) and "precision" not in value:
            return value | {"precision": "bf16" if value["bf16"] else "fp32"}
        return value

    @field_validator("bf16")
    @classmethod
    def _agrees(cls, value: bool | None, info: ValidationInfo) -> None:
        """Check `bf16` against `precision` and drop it, so that both forms of a job are equal."""
        precision = info.data.get("precision")
        if value is not None and precision is not None and value != (precision == "bf16"):
            raise ValueError(f"left out beside train.precision={precision}, which says otherwise")
