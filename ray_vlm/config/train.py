"""The job's `train` section: the optimizer, the batches, and what is kept in memory."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ray_vlm.config.section import Largest, Section

Part = Literal["language", "connector", "vision"]  # of a model; `models/families.py` says which weights
Precision = Literal["bf16", "fp16", "fp32"]


class Train(Section):
    """The optimizer's side."""

    learning_rate: float = Field(1e-4, gt=0, description="Peak of the schedule.")
    learning_rates: dict[Part, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="Peaks of parts that differ from `learning_rate`, such as `{vision: 1.0e-5}`."
    )
    freeze: list[Part] | None = Field(
        None, min_length=1, description="Parts that stay as they are where all weights are trained (`lora: null`)."
    )
    min_lr_ratio: float = Field(0.01, ge=0, le=1, description="The cosine schedule ends at this share of the peak.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises linearly.")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's decoupled weight decay; not on norms and biases.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm. 0: no clipping.")
    num_epochs: float = Field(1.0, gt=0, description="Passes over the training rows. Ignored when `max_steps` is set.")
    max_steps: int | None = Field(None, ge=1, le=Largest, description="Stop after this many optimizer steps.")
    global_batch_size: int = Field(16, ge=1, le=Largest, description="Rows in one optimizer step, over all workers.")
    micro_batch_size: int = Field(
        1, ge=1, le=Largest, description="Rows that one worker runs at a time; accumulation follows."
    )
    tokens_per_micro_batch: int | None = Field(
        None,
        ge=1,
        le=Largest,
        description="SFT: rows that one worker runs at a time are as many as have so many tokens together, those of "
        "images counted and padded to the longest, in place of `micro_batch_size`. Rows of like length go together.",
    )
    packing: bool = Field(
        True,
        description="Short rows of a micro-batch lie behind one another in the model instead of being padded to the "
        "longest. Exact; done only where `lora.dropout` is 0.",
    )
    gradient_checkpointing: bool | Annotated[int, Field(ge=1, le=Largest)] = Field(
        True,
        description="Recompute activations in the backward pass, to save memory. A number: those of so many of the "
        "language model's first layers.",
    )
    memory: Literal["auto"] | None = Field(
        None,
        description="auto: the fewest layers that recompute, and then the largest `micro_batch_size`, with which the "
        "heaviest rows fit into `cluster.gpu_memory_gib`, in place of what is given here.",
    )
    probe: bool | None = Field(
        None,
        description="Run the heaviest batch of the plan before the first step, so that what does not fit ends the run "
        "at once. null: on GPUs.",
    )
    vision_cache: str | None = Field(
        None,
        min_length=1,
        description="Folder on a disk of each node for what a frozen image encoder makes of each image, by the image's "
        "content, for later epochs and runs.",
    )
    vision_cache_gib: float = Field(50.0, gt=0, description="What `vision_cache` may hold; no more is written then.")
    precision: Precision = Field(
        "bf16",
        description="Arithmetic and base: bfloat16; float16 with a scaled loss, for cards that only emulate bfloat16 "
        "(T4, V100); or float32. What is trained stays float32.",
    )
    bf16: bool | None = Field(
        None, exclude=True, description="Old form of `precision`: true is `bf16`, false is `fp32`. Give one of the two."
    )
    nonfinite: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="Where a step's gradient is NaN or infinite: end the run and keep nothing of the step, go on as if "
        "it had no rows, or go back to the last checkpoint and train none of the rows from there to this step. In any "
        "case `bad_steps.jsonl` has the rows.",
    )
    log_every_steps: int = Field(10, ge=1, le=Largest, description="Steps between console lines; files get every step.")
    early_stopping_patience: int | None = Field(
        None, ge=1, le=Largest, description="Stop after this many validations without a better `evaluate.metric`."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_bf16(cls, value: Any) -> Any:
        """`bf16: false`, as jobs of earlier versions have it, is `precision: fp32`."""
        if isinstance(value, dict) and isinstance(value.get("bf16"), bool) and "precision" not in value:
            return value | {"precision": "bf16" if value["bf16"] else "fp32"}
        return value

    @field_validator("bf16")
    @classmethod
    def _agrees(cls, value: bool | None, info: ValidationInfo) -> None:
        """It is in `precision` now, so that a job is the same however it was written."""
        precision = info.data.get("precision")
        if value is not None and precision is not None and value != (precision == "bf16"):
            raise ValueError(f"left out beside train.precision={precision}, which says otherwise")
