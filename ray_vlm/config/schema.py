"""The job: every setting with its type, default and description. `docs/jobs.md` is generated from this file.

It imports neither torch nor ray nor transformers. Sections are frozen and refuse unknown keys; rules across sections
are in `check.py`.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ray_vlm.config.cluster import Cluster
from ray_vlm.config.data import Data
from ray_vlm.config.method import Method, SftMethod
from ray_vlm.config.section import Count, CountOrZero, Largest, Section
from ray_vlm.config.task import DetectionTask, Task
from ray_vlm.config.train import LoraPart, Train


class Model(Section):
    """The base model and the adapter to start from."""

    name: str = Field(min_length=1, description="The base: a name on the hub, or a folder.")
    revision: str | None = Field(None, description="Commit or tag of a hub model, to pin the download.")
    load_in_4bit: bool = Field(
        True, description="Language-model weights in NF4 with double quantisation (bitsandbytes). Needs `lora`."
    )
    kernels: Literal["auto", "none"] = Field(
        "auto",
        description="auto: on GPUs, train with fused norms, rotary embeddings and activations (Liger's, with "
        "`ray_vlm[kernels]`; otherwise torch's norm) and with adapters that are added without copies. none: "
        "transformers' and PEFT's own. On CPUs both are the same.",
    )
    adapter: str | None = Field(
        None, description="Adapter to continue training, such as another run's `best/`; its own rank and targets apply."
    )


class Lora(Section):
    """The LoRA adapter on the base."""

    rank: Count = Field(16, description="Rank of the update matrices.")
    alpha: Count = Field(32, description="Updates are scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target: list[LoraPart] = Field(
        default=["language"],
        min_length=1,
        description="Parts of the model that get adapters; with `model.adapter`, the parts that are trained further. "
        "`language` are the linear layers of the language model, of a mixture also its shared experts; `experts` are "
        "the routed ones.",
    )
    ranks: dict[LoraPart, Count] | None = Field(
        None,
        description="Ranks of parts that differ from `rank`, such as `{vision: 8}`; alpha / rank is the same for all.",
    )
    modules_to_save: list[str] | None = Field(
        None,
        min_length=1,
        description="Modules that are fully trained and saved with the adapter, such as `[embed_tokens]`.",
    )


class Checkpoint(Section):
    """Checkpoints during training."""

    every_steps: Count | None = Field(None, description="Steps between checkpoints. null: once an epoch.")
    keep: Count = Field(3, description="How many of the newest checkpoints are kept; `best/` and `final/` always are.")
    keep_best: CountOrZero = Field(
        1, description="How many of the best checkpoints by `evaluate.metric` are kept as well."
    )


class Evaluate(Section):
    """Validation during training, and evaluation."""

    every_steps: Count | None = Field(None, description="Steps between validations. null: once an epoch.")
    at_start: bool = Field(
        False,
        description="Also validate before the first step, so that `best/` is never worse than the start.",
    )
    asynchronous: bool = Field(
        False,
        description="Validate in a separate process, with the resources of one more worker, while training continues.",
    )
    metric: str = Field(
        "loss",
        description="Metric that chooses `best/`: `loss`, or a metric of the task on generated answers, such as "
        "`f1_50`; for DPO also `preference_accuracy` or `reward_margin`; for GRPO `reward` (its default) or a task "
        "metric.",
    )
    num_samples: Count | None = Field(200, description="Validation rows, evenly spaced. null: all.")
    batch_size: Count = Field(8, description="Rows that are answered at a time.")
    num_replicas: CountOrZero | None = Field(
        None,
        description="Processes of `ray-vlm evaluate` that hold the model, each with the resources of a worker; 0: "
        "only the command's own process. null: `cluster.num_workers` on GPUs, 0 on a CPU.",
    )
    engine: Literal["transformers", "vllm", "server", "samplers"] = Field(
        "transformers",
        description="The engine of `evaluate`, `predict` and `pairs`: the package's own loop, vLLM (`ray_vlm[vllm]`), "
        "an OpenAI-compatible server that already runs (`sampler_url`), or the samplers of the GRPO run that the "
        "adapter is of, while it goes on. vLLM has been tried with its build for CPUs, and not on a GPU.",
    )
    sampler_url: str | None = Field(
        None, min_length=1, description="Address of the server of `engine: server`, such as `http://127.0.0.1:8000/v1`."
    )
    max_new_tokens: Count = Field(512, description="Most tokens of an answer.")
    memory: Literal["truth", "model"] = Field(
        "truth",
        description="GUI steps: the earlier steps in the questions of `ray-vlm evaluate`: those of the data "
        "(`truth`), or the model's own answers (`model`). Validation during training uses those of the data.",
    )


class Pairs(Section):
    """Preference data from a model's own answers (`ray-vlm pairs`)."""

    num_samples: int = Field(8, ge=2, le=Largest, description="Answers sampled for each row.")
    temperature: float | list[float] = Field(
        1.0,
        description="Temperature of sampling; with two, `[0.5, 1.5]`, the temperatures of a row's answers are evenly "
        "spaced between them.",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens of this total probability.")
    min_margin: float = Field(
        0.1,
        gt=0,
        description="Smallest difference in reward between the best and the worst answer for the two to make a pair.",
    )
    rewards: dict[str, float] | None = Field(
        None,
        min_length=1,
        description="The reward that scores the answers, as `method.rewards`. null: the task's own parts.",
    )


class Tune(Section):
    """A sweep over a space of settings (`ray-vlm tune`)."""

    num_trials: Count = Field(
        16,
        description="Number of trials in all; with grids, rounded down so that each combination is run equally often.",
    )
    search: Literal["random", "optuna"] = Field(
        "random", description="How values are chosen: at random, or by TPE (optuna)."
    )
    scheduler: Literal["asha", "median", "none"] = Field(
        "asha", description="How trials that are behind the others at the same step are stopped early."
    )
    reduction_factor: int = Field(
        4, ge=2, le=Largest, description="ASHA continues one in this many trials at each of its rungs."
    )
    grace_steps: Count | None = Field(
        None, description="Steps before a trial may be stopped. null: until its first validation."
    )
    metric: str | list[str] | None = Field(
        None, description="Metric that ranks trials, as `evaluate.metric`, its default; of several the first."
    )
    default_first: bool = Field(True, description="Run the job with its own settings as the first trial.")
    max_concurrent: Count | None = Field(
        None, description="Trials at the same time. null: as many as fit on the cluster."
    )
    max_retries: CountOrZero = Field(1, description="How often a failed trial is continued from its checkpoint.")
    export: Literal["adapter", "merged"] | None = Field(
        "adapter", description="The form in which the best trial is exported."
    )
    resident: bool = Field(
        False,
        description="Keep the base in one process and run the trials on it one after another; their results are the "
        "same.",
    )


class Track(Section):
    """Tracking services that get the metrics."""

    wandb: bool = Field(False, description="Send metrics to Weights & Biases; offline without a login.")
    wandb_project: str = Field("ray-vlm", description="Project name in Weights & Biases.")
    wandb_entity: str | None = Field(
        None, min_length=1, description="Team or user in Weights & Biases. null: the login's own."
    )
    wandb_group: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="Group of runs in Weights & Biases. null: none; for a trial, its sweep.",
    )
    wandb_tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(
        (), strict=False, description="Tags in Weights & Biases, a list of words."
    )
    tensorboard: bool = Field(False, description="Write event files for TensorBoard into the run's `tensorboard/`.")
    energy: bool = Field(
        False, description="Estimate energy and carbon dioxide with codecarbon, offline; needs `ray_vlm[energy]`."
    )
    country: str | None = Field(
        None, description="Country of the electricity for `energy`, three letters (ISO 3166), such as `DEU`."
    )


class Run(Section):
    """The name and the folder of the run."""

    name: str | None = Field(None, description="Name of the run's folder. null: method, model, task and a counter.")
    output_dir: str = Field(
        "outputs",
        min_length=1,
        description="Folder of all runs, or `s3://bucket/...`; a run writes nowhere else.",
    )


class JobConfig(Section):
    """A complete job. Read it with `ray_vlm.config.load.load_job`."""

    method: Method = Field(default_factory=SftMethod, description="The training method, by default `sft`.")
    task: Task = Field(default_factory=DetectionTask, description="The task of the model, by default `detection`.")
    model: Model = Field(description="The base model and the adapter to start from.")
    lora: Lora | None = Field(default_factory=Lora, description="The LoRA adapter. null: all weights are trained.")
    data: Data = Field(description="The rows for training, validation and testing.")
    train: Train = Field(default_factory=Train, description="The optimizer, the batches and the memory of training.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="Checkpoints during training.")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="Validation during training, and evaluation.")
    pairs: Pairs = Field(
        default_factory=Pairs, description="Preference data from a model's own answers (`ray-vlm pairs`)."
    )
    tune: Tune = Field(default_factory=Tune, description="A sweep over a space of settings (`ray-vlm tune`).")
    cluster: Cluster = Field(default_factory=Cluster, description="The processes and resources that the job runs on.")
    track: Track = Field(default_factory=Track, description="Tracking services that get the metrics.")
    run: Run = Field(default_factory=Run, description="The name and the folder of the run.")
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Seed of the initial weights, the order of rows, and sampling."
    )

    @model_validator(mode="before")
    @classmethod
    def _set_metric(cls, value: object) -> object:
        """Set the default metric of GRPO, the reward: its loss does not measure progress."""
        if not isinstance(value, dict):
            return value
        method, evaluate = value.get("method"), value.get("evaluate", {})
        name = method.get("name") if isinstance(method, dict) else method
        is_sampled = name == "grpo" and isinstance(evaluate, dict)
        return value | {"evaluate": {"metric": "reward"} | evaluate} if is_sampled else value
