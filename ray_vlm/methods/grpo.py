"""Group-relative policy optimisation: TRL's `GRPOTrainer` (Shao et al. 2024, arXiv:2402.03300) on sampled answers.

Every optimizer step samples `num_generations` answers to each prompt, scores them, and learns from how each differs
from its group. All answers of a group are on one worker. This package provides the prompts, the rollout
(`rollout.py`), the rewards (`rewards.py`), and processes each image once (`groups.py`). Advantages, loss and their
options are TRL's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.errors import RunError
from ray_vlm.methods.groups import (
    join,
    longest_answers,
    note_gap,
    pixels_of,
    sample_answers,
    sample_step,
    score_step,
    split_batch,
)
from ray_vlm.methods.options import check_trl_options
from ray_vlm.methods.rewards import Rewards, load_rewards
from ray_vlm.methods.rollout import Completion, sample_groups
from ray_vlm.methods.vllm import EngineSettings, build_sampler

EXAMPLE_ROW = {"prompt": [{"role": "user", "content": ""}]}
_LOGGED = {
    **{name: name for name in ("loss", "learning_rate", "grad_norm", "reward", "reward_std", "kl", "entropy")},
    "completions/mean_length": "completion_tokens",
    "completions/clipped_ratio": "truncated",
    "frac_reward_zero_std": "groups_without_signal",
    "rollout_gap": "rollout_gap",
    "clip_ratio/region_mean": "clipped",
}


def collate(rows: list[Sample], builder: SampleBuilder, device: str) -> list[Sample]:
    """Return the prompts themselves: tensors are built when their answers are sampled."""
    return rows


def heaviest(trainer: Any, rows: list[Sample], device: str) -> dict[str, Any]:
    """Return the batch of these prompts that takes the most memory."""
    trainer.current_gradient_accumulation_steps = 1
    return longest_answers(trainer, rows, device)


def trainer_class(job: JobConfig) -> type:
    """Return TRL's trainer, which samples answers to this package's rows and scores them with its rewards.

    The worker sets `builder`, `fetch_records` and `recent` (a `frozen_encoder.StepFeatureCache`) before it trains.
    """
    from trl import GRPOTrainer

    class PlannedGRPOTrainer(GRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            if job.model.adapter is None and job.method.beta:  # the reference is the base; TRL keeps a copy of the new
                kwargs["model"].delete_adapter("ref")
            self.job, self.scored_by = job, job_rewards(job)
            self.use_vllm = job.method.rollouts == "vllm"  # TRL then corrects for vLLM's other log-probabilities
            engine = EngineSettings(job.model, job.train.precision, job.seed)
            self.sample = build_sampler(engine, job.lora, self.args) if self.use_vllm else sample_groups
            self.rows_of: list[Sample] = []  # the prompt of each current answer
            self.answers: list[Completion] = []
            self.pixels: dict[int, tuple[Sample, dict[str, Any]]] = {}  # image inputs of the step's prompts

        def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple:
            rows = next(epoch_iterator, None)
            return (split_batch(sample_step(self, rows), num_batches) if rows else []), None

        def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return inputs  # sampled and scored by get_batch_samples

        def _tokenize_prompts(self, prompts: list) -> tuple:
            return [row.input_ids.tolist() for row in self.rows_of], None, {}

        def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> tuple:
            self.answers = sample_answers(self)
            return [a.ids for a in self.answers], [a.logprobs for a in self.answers] if self.use_vllm else None

        def _calculate_rewards(self, inputs: list, prompts: list, completions: list, ids: list) -> Any:
            return score_step(self, prompts, ids)

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            self.rows_of, self.sampled = inputs["rows"], (inputs["sampled"], inputs["completion_mask"])
            return super()._compute_loss(model, inputs)

        def _get_per_token_logps_and_entropies(self, model: Any, ids: Any, mask: Any, keep: int, **options: Any) -> Any:
            size = options.pop("batch_size", None) or len(ids)
            computed = {name: options[name] for name in ("compute_entropy", "compute_aux_loss") if name in options}
            parts = [slice(start, start + size) for start in range(0, len(ids), size)]
            forward = super()._get_per_token_logps_and_entropies
            # A part's images are bound to the model directly: TRL would split them by rows, in some families' layout.
            outputs = [
                forward(partial(model, **pixels_of(self, p, ids)), ids[p], mask[p], keep, **computed) for p in parts
            ]
            logps, entropies, aux = (join(values) for values in zip(*outputs, strict=True))
            if computed.get("compute_entropy"):
                note_gap(self, logps)
            return logps, entropies, aux

    return PlannedGRPOTrainer


def job_rewards(job: JobConfig, labels: Sequence[str] = ()) -> Rewards:
    """Return the rewards that score the job's answers. Raise `ConfigError` for those that cannot."""
    source = job.data.train
    has_truth = source is None or source.format != "prompt"
    return load_rewards(job.task.name, job.method.rewards, job.method.box_quality, has_truth, labels)


# Values that TRL checks only when it trains (`grpo_trainer.py`); a test checks that TRL has each of them.
CHOICES: dict[str, tuple[Any, ...]] = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}


def check_options(job: JobConfig) -> None:
    """Raise `ConfigError` for options that TRL's `GRPOConfig` or its trainer does not take."""
    if job.method.trl or job.method.loss_type is not None:
        from trl import GRPOConfig

        check_trl_options(job, GRPOConfig, CHOICES)


def extras(job: JobConfig) -> dict[str, Any]:
    """Return a placeholder for each reward, by whose name TRL logs it; `_calculate_rewards` returns the values."""

    def stand_in(name: str) -> Callable[..., Any]:
        def reward(**columns: Any) -> Any:
            raise RunError(f"TRL asked the stand-in of reward {name!r} for values. Please report this.")

        reward.__name__ = name
        return reward

    return {"reward_funcs": [stand_in(name) for name in job_rewards(job).weights]}


def build_args(job: JobConfig, shared: dict[str, Any]) -> Any:
    """Build TRL's `GRPOConfig`: `shared` (the options that all methods have), then the job's."""
    from trl import GRPOConfig

    method, micro = job.method, job.train.micro_batch_size
    accumulation = job.train.global_batch_size // job.cluster.least_workers // micro
    own: dict[str, Any] = {
        "beta": method.beta or 0.0,
        "num_generations": method.num_generations,
        "temperature": method.temperature,
        "max_completion_length": method.max_completion_tokens,
        "reward_weights": list(job_rewards(job).weights.values()),
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": method.num_generations,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": accumulation,
        "remove_unused_columns": False,
    }
    if method.loss_type is not None:
        own["loss_type"] = method.loss_type
    return GRPOConfig(**{**shared, **own, **method.trl})


def logged(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a step that are logged, under this package's names, with `reward_<part>` of every part and
    `reward_<function>` of every user's function."""
    parts = {
        f"reward_{name.split('/')[1].rpartition(':')[2]}": value
        for name, value in logs.items()
        if name.startswith("rewards/") and name.endswith("/mean")
    }
    return {key: logs[trl_name] for trl_name, key in _LOGGED.items() if trl_name in logs} | parts
