"""The job: every setting, its type, its default and one line on what it does. `docs/jobs.md` is made from this file.

No torch, ray or transformers here. Sections are frozen and refuse unknown keys; rules that span sections live in
`check.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ray_vlm.config.cluster import Cluster
from ray_vlm.config.data import Data
from ray_vlm.config.method import Method
from ray_vlm.config.section import Largest, Section
from ray_vlm.config.train import Part, Train


def _named(value: Any) -> Any:
    """`sft` is short for `{name: sft}`."""
    return {"name": value} if isinstance(value, str) else value


def _with_reward(job: dict) -> dict:
    """GRPO has no loss worth choosing by: its default metric is the reward."""
    method, evaluate = job.get("method"), job.get("evaluate", {})
    if isinstance(method, dict) and method.get("name") == "grpo" and isinstance(evaluate, dict):
        return job | {"evaluate": {"metric": "reward"} | evaluate}
    return job


class Task(Section):
    """What the model is asked to do."""

    name: Literal["detection", "classification", "gui_steps", "chat"] = Field(
        "detection", description="What the model is asked to do."
    )
    prompt: str | None = Field(
        None,
        min_length=1,
        description="The question. `{labels}` is replaced by the class names; each task has its own placeholders too. "
        "null: the task's own wording.",
    )
    system: str | None = Field(None, min_length=1, description="System message before the question. null: none.")
    labels: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        strict=False,  # a YAML list becomes a tuple, which can be hashed
        description="Class names in the order of the question; classification: `attribute=value`. null: those in the "
        "training data.",
    )
    codec: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"] | None = Field(
        None, description="Whose way of writing boxes and points to use. null: the model's own."
    )
    position: bool = Field(
        False, description="Classification: tell the model where the row's box is, by its centre and its region."
    )
    regions: tuple[Annotated[tuple[str, ...], Field(strict=False, min_length=1)], ...] = Field(
        (
            ("upper left", "upper centre", "upper right"),
            ("middle left", "centre", "middle right"),
            ("lower left", "lower centre", "lower right"),
        ),
        min_length=1,
        strict=False,
        description="Words for the parts of an image: a list of rows from the top, each from left to right.",
    )
    class_regions: bool = Field(
        False, description="Classification: tell the model in which region each class mostly is in the training data."
    )
    short_memory: int = Field(3, ge=0, le=Largest, description="GUI steps: the last steps that are told in full.")
    long_memory_tokens: int = Field(
        256, ge=0, le=Largest, description="GUI steps: tokens for the task's earlier steps; the oldest are cut first."
    )


class Model(Section):
    """The base that learns."""

    name: str = Field(min_length=1, description="A hub name or a folder.")
    revision: str | None = Field(None, description="Commit or tag of a hub model; pins what is downloaded.")
    load_in_4bit: bool = Field(
        True, description="Language-model weights in NF4 with double quantisation (bitsandbytes). Needs `lora`."
    )
    adapter: str | None = Field(
        None, description="Adapter to go on training, such as another run's `best/`; its own rank and targets hold."
    )


class Lora(Section):
    """Adapters on the base."""

    rank: int = Field(16, ge=1, le=Largest, description="Rank of the update matrices.")
    alpha: int = Field(32, ge=1, le=Largest, description="Updates are scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target: list[Part] = Field(
        default=["language"],
        min_length=1,
        description="Which parts of the model get adapters; of `model.adapter`, which go on learning.",
    )
    ranks: dict[Part, Annotated[int, Field(ge=1, le=Largest)]] | None = Field(
        None, description="Ranks of parts that differ from `rank`, such as `{vision: 8}`; alpha / rank stays the same."
    )
    modules_to_save: list[str] | None = Field(
        None, min_length=1, description="Modules that are trained whole and saved with the adapter: `[embed_tokens]`."
    )


class Checkpoint(Section):
    """What is saved on the way."""

    every_steps: int | None = Field(
        None, ge=1, le=Largest, description="Steps between checkpoints. null: once an epoch."
    )
    keep: int = Field(3, ge=1, le=Largest, description="How many of the newest stay; `best/` and `final/` always do.")
    keep_best: int = Field(
        1, ge=0, le=Largest, description="How many of the best by `evaluate.metric` stay beside them, to go on from."
    )


class Evaluate(Section):
    """How progress is measured."""

    every_steps: int | None = Field(
        None, ge=1, le=Largest, description="Steps between validations. null: once an epoch."
    )
    at_start: bool = Field(
        False,
        description="Also validate before the first step, so that `best/` is never worse than what one began with.",
    )
    asynchronous: bool = Field(
        False,
        description="Validate in a process of its own, with the resources of one more worker, while training goes on.",
    )
    metric: str = Field(
        "loss",
        description="What chooses `best/`: `loss`, or a task metric measured by generating, such as `f1_50`; for DPO "
        "also `preference_accuracy` or `reward_margin`; for GRPO `reward`, which is its default, or a task metric.",
    )
    num_samples: int | None = Field(200, ge=1, le=Largest, description="Validation rows, evenly spaced. null: all.")
    batch_size: int = Field(8, ge=1, le=Largest, description="Rows that are generated at a time.")
    num_replicas: int | None = Field(
        None,
        ge=0,
        le=Largest,
        description="Processes of `ray-vlm evaluate` that hold the model, each with the resources of a worker; "
        "0 is the command's own. null: `cluster.num_workers` on GPUs, 0 on a CPU.",
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="What answers in `evaluate` and `predict`. `vllm` needs a GPU and the package, and adapters on the "
        "language model only; it has not been tried on hardware.",
    )
    max_new_tokens: int = Field(512, ge=1, le=Largest, description="Longest answer.")
    memory: Literal["truth", "model"] = Field(
        "truth",
        description="GUI steps: whose earlier steps `ray-vlm evaluate` tells the model: those of the truth, or what it "
        "answered to them itself. Validation during training tells the truth's.",
    )


class Pairs(Section):
    """Preference data from a model's own answers (`ray-vlm pairs`)."""

    num_samples: int = Field(8, ge=2, le=Largest, description="Answers sampled for each row.")
    temperature: float | list[float] = Field(
        1.0,
        description="Temperature of sampling; of two, `[0.5, 1.5]`, a row's answers are spread evenly from one to the "
        "other.",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens of this total share.")
    min_margin: float = Field(
        0.1, gt=0, description="Least reward by which the best answer must beat the worst for the two to make a pair."
    )
    rewards: dict[str, float] | None = Field(
        None, min_length=1, description="What scores the answers, as `method.rewards`. null: the task's own parts."
    )


class Tune(Section):
    """A sweep over a space of settings (`ray-vlm tune`)."""

    num_trials: int = Field(16, ge=1, le=Largest, description="Trials in all; of grids every combination as often.")
    search: Literal["random", "optuna"] = Field("random", description="What draws values: at random, or by TPE.")
    scheduler: Literal["asha", "median", "none"] = Field(
        "asha", description="What ends trials early: those behind the others at the same step, or none."
    )
    reduction_factor: int = Field(
        4, ge=2, le=Largest, description="ASHA goes on with one of so many trials at each of its steps."
    )
    grace_steps: int | None = Field(
        None, ge=1, le=Largest, description="Steps before a trial may be ended. null: its first validation."
    )
    metric: str | list[str] | None = Field(
        None, description="What ranks trials, as `evaluate.metric`, which it is by default; of several the first."
    )
    default_first: bool = Field(True, description="Whether the first trial is the job as it stands.")
    max_concurrent: int | None = Field(
        None, ge=1, le=Largest, description="Trials at once. null: as many as the cluster holds."
    )
    max_retries: int = Field(1, ge=0, le=Largest, description="How often a failed trial goes on from its checkpoint.")
    export: Literal["adapter", "merged"] | None = Field("adapter", description="What the best trial is exported as.")
    resident: bool = Field(
        False, description="Keep the base in one process and run trial after trial on it, each as it would run alone."
    )


class Track(Section):
    """Who else gets the numbers."""

    wandb: bool = Field(False, description="Send numbers to Weights & Biases; offline where nobody is logged in.")
    wandb_project: str = Field("ray-vlm", description="Project name in Weights & Biases.")
    wandb_entity: str | None = Field(None, min_length=1, description="Team or user there. null: the login's own.")
    wandb_group: str | None = Field(
        None, min_length=1, max_length=128, description="Group of runs there. null: none, or of a trial its sweep."
    )
    wandb_tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(
        (), strict=False, description="Tags there, a list of words."
    )
    tensorboard: bool = Field(False, description="Write event files for TensorBoard into the run's `tensorboard/`.")
    energy: bool = Field(
        False, description="Estimate energy and carbon dioxide by codecarbon, offline; needs `ray_vlm[energy]`."
    )
    country: str | None = Field(
        None, description="Where the electricity comes from, three letters (ISO 3166), such as `DEU`; for `energy`."
    )


class Run(Section):
    """Where results go."""

    name: str | None = Field(None, description="Name of the run's folder. null: method, model, task and a counter.")
    output_dir: str = Field(
        "outputs",
        min_length=1,
        description="Folder of all runs, or `s3://bucket/...`; the only place that a run writes to.",
    )


class JobConfig(Section):
    """What to do, whole. Read it with `ray_vlm.config.load.load_job`."""

    method: Method = Field(default_factory=Method, description="How to learn.")
    task: Task = Field(default_factory=Task, description="What to learn.")
    model: Model = Field(description="What learns.")
    lora: Lora | None = Field(default_factory=Lora, description="Adapter settings. null: all weights are trained.")
    data: Data = Field(description="What to learn from.")
    train: Train = Field(default_factory=Train, description="The optimizer's side.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="What is saved on the way.")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="How progress is measured.")
    pairs: Pairs = Field(default_factory=Pairs, description="Preference data from a model's own answers.")
    tune: Tune = Field(default_factory=Tune, description="A search for better settings.")
    cluster: Cluster = Field(default_factory=Cluster, description="What it runs on.")
    track: Track = Field(default_factory=Track, description="Who else gets the numbers.")
    run: Run = Field(default_factory=Run, description="Where results go.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of weights, order and sampling.")

    @model_validator(mode="before")
    @classmethod
    def _expand_names(cls, value: Any) -> Any:
        if isinstance(value, dict):
            value = {k: _named(v) if k in ("method", "task") else v for k, v in value.items()}
            return _with_reward(value)
        return value
