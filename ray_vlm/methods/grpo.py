"""Group-relative policy optimisation: TRL's `GRPOTrainer` (Shao et al. 2024, arXiv:2402.03300) on sampled answers.

Every optimizer step samples `num_generations` answers to each prompt, scores them, and learns from how each differs
from its group. All answers of a group are on one worker. This package provides the prompts, the engine that
samples (`engines/`), the rewards (`rewards.py`), and processes each image once. Advantages, loss and their options are
TRL's.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from ray_vlm.config.method import GrpoMethod, Method
from ray_vlm.config.train import Precision
from ray_vlm.data.collate import (
    attach_plan,
    batch_rows,
    join_pixels,
    mark_images,
    plan_rows,
    read_pixels,
    spans_of_rows,
    upload,
)
from ray_vlm.data.plan import Plan
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.engines.actors import SamplerPool
from ray_vlm.engines.adapter_check import CheckedEngine
from ray_vlm.engines.dealing import cut
from ray_vlm.engines.interface import Completion, Engine, Sampling
from ray_vlm.engines.own import OwnEngine
from ray_vlm.engines.rollout_gap import describe_gap, largest_gap
from ray_vlm.errors import RunError
from ray_vlm.methods.ahead import SampledAhead, seeds_of
from ray_vlm.methods.rewards import Rewards, score_answers
from ray_vlm.methods.trainer import PlannedTrainer, TrainerInputs
from ray_vlm.models.backbone import base_of, evaluation_mode
from ray_vlm.models.cast_adapter import half_precision_of
from ray_vlm.models.frozen_encoder import why_not_cached
from ray_vlm.models.layouts import LayoutPlanner
from ray_vlm.models.memory import token_bytes
from ray_vlm.models.precision import autocast

_LOGGED = {
    **{name: name for name in ("loss", "learning_rate", "grad_norm", "reward", "reward_std", "kl", "entropy")},
    "completions/mean_length": "completion_tokens",
    "completions/clipped_ratio": "truncated",
    "frac_reward_zero_std": "groups_without_signal",
    "rollout_gap": "rollout_gap",
    **{name: name for name in ("staleness", "corrected", "waiting_s", "sampling_s", "samplers_idle_s", "samplers")},
    "clip_ratio/region_mean": "clipped",
}
_ANY_TOKEN = 20  # of text, for answers that are only measured
_FEW_TOKENS = 2  # of each answer that is sampled for its memory alone


class PlannedGRPOTrainer(PlannedTrainer, GRPOTrainer):
    """TRL's trainer, which samples answers to this package's rows and scores them with its rewards."""

    EXAMPLE_ROW = MappingProxyType({"prompt": [{"role": "user", "content": ""}]})

    def __init__(self, model: PreTrainedModel, args: GRPOConfig, inputs: TrainerInputs):
        assert isinstance(inputs.method, GrpoMethod)
        assert inputs.rewards is not None
        self.method, self.rewards = inputs.method, inputs.rewards
        super().__init__(model, args, inputs, reward_funcs=[_stand_in(name) for name in self.rewards.weights])
        # The engine runs a model of its own, whose log-probabilities differ: TRL then corrects for them.
        # So does an adapter that is a step older.
        self.use_vllm = self.method.rollouts != "transformers" or self.method.max_staleness > 0
        self.engine: Engine = inputs.engine or OwnEngine(self.model, self.builder, str(args.device))
        self.largest_gap = self._largest_gap()
        self.rows: list[Sample] = []  # the prompt of each current answer
        self.answers: list[Completion] = []
        self.ids: Sequence[Sequence[int]] = ()  # tokens of the answers to `rows`
        self.sampled: tuple[torch.Tensor, torch.Tensor] | None = None  # log-probabilities and mask, [answers, tokens]
        self.pixels: dict[int, tuple[Sample, dict[str, Any]]] = {}  # image inputs of the step's prompts
        self.ahead: SampledAhead | None = None  # what samplers beside this worker answer
        pool = self.engine.engine if isinstance(self.engine, CheckedEngine) else self.engine
        if isinstance(pool, SamplerPool):
            self.ahead = SampledAhead(pool)

    @classmethod
    def build_args(cls, method: Method, shared: Mapping[str, Any], plan: Plan, rewards: Rewards | None) -> GRPOConfig:
        """Build TRL's options. Batch sizes count answers; the plan's micro-batch has all prompts of a worker's step."""
        assert isinstance(method, GrpoMethod)
        assert rewards is not None
        micro = shared["per_device_train_batch_size"]
        accumulation = plan.micro_batch_size * method.num_generations // micro
        own: dict[str, Any] = {
            "beta": method.beta or 0.0,
            "num_generations": method.num_generations,
            "temperature": method.temperature,
            "max_completion_length": method.max_completion_tokens,
            "reward_weights": list(rewards.weights.values()),
            "per_device_eval_batch_size": method.num_generations,
            "gradient_accumulation_steps": accumulation,
            "steps_per_generation": accumulation,
            "remove_unused_columns": False,
        }
        if method.loss_type is not None:
            own["loss_type"] = method.loss_type
        return GRPOConfig(**{**shared, **own, **method.trl})

    @staticmethod
    def collate(rows: list[Sample], builder: SampleBuilder, planner: LayoutPlanner | None) -> list[Sample]:
        """Return the prompts themselves: tensors are built when their answers are sampled."""
        return rows

    @staticmethod
    def logged(logs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the numbers of a step that are logged, under this package's names, with `reward_<part>` of every part
        and `reward_<function>` of every user's function."""
        parts = {
            f"reward_{name.split('/')[1].rpartition(':')[2]}": value
            for name, value in logs.items()
            if name.startswith("rewards/") and name.endswith("/mean")
        }
        return {key: logs[trl_name] for trl_name, key in _LOGGED.items() if trl_name in logs} | parts

    def heaviest_batch(self, rows: list[Sample]) -> dict[str, Any]:
        """Return the batch of these prompts with answers of the maximum length."""
        self.current_gradient_accumulation_steps, self.pixels, device = 1, {}, self.args.device
        length = self.method.max_completion_tokens
        group = min(self.method.num_generations, self.args.per_device_train_batch_size)
        answer_rows = [row for row in rows for _ in range(group)]
        prompts = [torch.tensor(row.input_ids.tolist()) for row in answer_rows]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(prompts, batch_first=True, padding_side="left").to(device)
        mask = pad([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left").to(device)
        shape = (len(answer_rows), length)
        answers = torch.full(shape, _ANY_TOKEN, device=device)
        answers[:, 0] += torch.arange(len(answer_rows), device=device)  # so that answers share only the prompt
        zeros = torch.zeros(shape, device=device)
        return {
            "prompt_ids": ids,
            "prompt_mask": mask,
            "completion_ids": answers,
            "completion_mask": torch.ones_like(answers),
            "ref_per_token_logps": zeros,
            "advantages": torch.ones(len(answer_rows), device=device),
            "num_items_in_batch": torch.tensor(float(answers.numel())),
            "rows": answer_rows,
            "answers": answers.tolist(),
            "sampled": zeros,
        }

    def next_batches(self, epoch_iterator: Iterator, num_batches: int, device: object) -> tuple:
        """Sample and score the answers to the next step's prompts, and split them into micro-batches."""
        rows = next(epoch_iterator, None)
        return (split_tensor_dict(self._sample_step(rows), num_batches) if rows else []), None

    def _sample_step(self, rows: Sequence[Sample]) -> dict[str, Any]:
        """Return TRL's batch for these prompts, with `rows` (the prompt of each answer) and `sampled`
        (log-probabilities at sampling, `float32 [answers, tokens]`), and `answers`, their tokens on the host."""
        self.model.train()  # TRL recognises by it that this is no evaluation
        self.pixels = {}
        self.recent.start(sum(len(row.images) for row in rows))
        group, records = self.method.num_generations, self.inputs.rows
        self.rows = [row for row in rows for _ in range(group)]
        turns = [self.builder.turns(records[row.number]) for row in rows]
        prompts = [[{"role": role, "content": text} for role, text in row_turns] for row_turns in turns]
        batch = self._generate_and_score_completions([{"prompt": prompt} for prompt in prompts for _ in range(group)])
        logps = [torch.tensor(answer.logprobs) for answer in self.answers]
        sampled = torch.nn.utils.rnn.pad_sequence(logps, batch_first=True).to(batch["completion_ids"].device)
        if (ratio := batch.get("importance_sampling_ratio")) is not None:
            self._log_corrected(ratio, batch["completion_mask"])
        return batch | {"rows": self.rows, "answers": self.ids, "sampled": sampled}

    def _sample_answers(self) -> list[Completion]:
        """Sample the answers to the step's prompts, group by group."""
        method, step = self.method, self.state.global_step
        rows = self.rows[:: method.num_generations]
        sampling = Sampling(
            method.num_generations, method.max_completion_tokens, method.temperature, method.top_p, method.top_k
        )
        model = self.accelerator.unwrap_model(self.model)
        self.engine.update(model)
        seeds = seeds_of(rows, self.inputs.seed, step)
        if self.ahead is not None:
            if isinstance(self.engine, CheckedEngine):
                self.engine.check(rows, method.max_completion_tokens)
            coming = self.inputs.batches.peek() if method.max_staleness else None
            self.ahead.submit(step, step, rows, seeds, sampling)
            if coming:
                self.ahead.submit(step + 1, step, coming, seeds_of(coming, self.inputs.seed, step + 1), sampling)
            self._encode_images(rows, self.ahead.portion_size(len(rows)))
            groups, logged = self.ahead.collect(step)
            for name, value in logged.items():
                self._metrics["train"][name].append(value)
        else:
            groups = []
            for portion, _ in cut([0.0] * len(rows), method.sampling_batch or max(1, len(rows))):
                part = slice(portion.start, portion.stop)
                groups += self.engine.sample(rows[part], sampling, seeds[part], self.prompt_pixels)
        return [answer for group in groups for answer in group]

    def _encode_images(self, rows: Sequence[Sample], size: int) -> None:
        """Compute the features of a frozen encoder that the step keeps (`StepFeatureCache`), `size` prompts at a time,
        as sampling in this worker does: in other batches they round in another way."""
        base, device = base_of(self.model), str(self.args.device)
        forwards = self.inputs.forwards
        keeps = (forwards.cache_step_features or forwards.vision_cache is not None) and not why_not_cached(self.model)
        if self.builder.stock is not None or not keeps:
            return
        dtype = half_precision_of(self.model)
        cast = nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)
        with torch.no_grad(), evaluation_mode(self.model), cast:
            for portion, _ in cut([0.0] * len(rows), size):
                shown = [rows[i] for i in portion if rows[i].images]
                if shown:
                    pixels = join_pixels([self.prompt_pixels(row) for row in shown], self.builder, device)
                    attach_plan(pixels, plan_rows(shown, self.builder), device)
                    base.base_model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"])

    def try_rollout(self, rows: list[Sample], precision: Precision) -> int | None:
        """Sample the first tokens of the answers to as many prompts as are sampled at a time, each as long as the
        longest of these rows, while the keys and values of all further tokens are held."""
        engine = self.engine
        if not isinstance(engine, OwnEngine):
            return None
        method, args, device = self.method, self.args, str(self.args.device)
        few = min(_FEW_TOKENS, method.max_completion_tokens)
        later = method.num_generations * (method.max_completion_tokens - few)  # tokens of a prompt's answers
        prompts = max(1, args.per_device_train_batch_size * args.gradient_accumulation_steps // method.num_generations)
        prompts = min(engine.group_batch or prompts, prompts)
        sampling = Sampling(method.num_generations, few, method.temperature, method.top_p, method.top_k)
        longest = max(rows, key=lambda row: len(row.input_ids))
        seeds = [(self.inputs.seed, number) for number in range(prompts)]
        self.pixels = {}
        self.recent.start(len(longest.images))
        engine.update(self.model)
        try:
            with torch.random.fork_rng([device] if device.startswith("cuda") else []), autocast(precision, device):
                held = later * token_bytes(self.model.config, precision)
                return engine.try_sampling([longest] * prompts, sampling, seeds, self.prompt_pixels, held)
        finally:
            self.pixels = {}
            self.recent.start(0)

    def prompt_pixels(self, row: Sample) -> dict[str, Any]:
        """Return a prompt's image inputs. They are processed once in a step, for sampling and training."""
        if id(row) not in self.pixels:  # the row is kept alive, so that no other gets its id
            self.pixels[id(row)] = row, read_pixels(row.images, self.builder, str(self.args.device))
        return self.pixels[id(row)][1]

    def _inputs_of(self, part: slice, input_ids: torch.Tensor, keep: int) -> dict[str, Any]:
        """Return the image inputs of a part of the answers: once for each prompt, with the layout of the part's rows;
        for families with their own processor, once for each answer.

        `input_ids`: of all answers, `[answers, tokens]`; the last `keep` columns are those of answers.
        """
        runs, builder, planner = _runs(self.rows[part]), self.builder, self.inputs.planner
        kinds = {builder.kinds: mark_images(input_ids[part], builder)} if builder.kinds else {}
        if builder.stock is not None:
            each = [pixels for row, n in runs for pixels in n * [self.prompt_pixels(row)]]
            return kinds | join_pixels(each, builder, str(self.args.device))
        assert planner is not None
        shown, answers = [row for row, _ in runs], self.ids[part]
        inputs = kinds | join_pixels([self.prompt_pixels(row) for row in shown], builder, str(self.args.device))
        if "image_grid_thw" in inputs:
            attach_plan(inputs, plan_rows(shown, builder), str(self.args.device))
        spans = [span for span, (_, n) in zip(spans_of_rows(shown), runs, strict=True) for _ in range(n)]
        tokens = [np.concatenate([row.input_ids, ids]) for row, ids in zip(self.rows[part], answers, strict=True)]
        prompts, columns = [len(row.input_ids) for row in self.rows[part]], input_ids.shape[1]
        ends = [columns - keep + len(ids) for ids in answers]
        layout = planner.plan(batch_rows(tokens, prompts, spans, shown, builder, ends, columns))
        return inputs | upload({"layout": layout}, str(self.args.device))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs  # sampled and scored by `next_batches`

    def _tokenize_prompts(self, prompts: list) -> tuple:
        return [row.input_ids.tolist() for row in self.rows], None, {}

    def _generate_single_turn(self, prompt_ids: list, *args: object, **kwargs: object) -> tuple:
        self.answers = self._sample_answers()
        self.ids = [answer.ids for answer in self.answers]
        return [a.ids for a in self.answers], [a.logprobs for a in self.answers] if self.use_vllm else None

    def _calculate_rewards(
        self, inputs: list, prompts: Sequence[list], completions: list, ids: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Return each part of the reward of all ranks' answers, `float32 [answers, parts]`; NaN where none applies."""
        records = self.inputs.rows
        scored = [records[row.number] for row in self.rows]
        texts = [self.builder.text(answer) for answer in ids]
        scores = score_answers(self.rewards, scored, texts, ids, prompts, self.builder)
        table = [[float("nan") if v is None else v for v in of_answer.values()] for of_answer in scores]
        return gather(torch.tensor(table, dtype=torch.float32, device=self.accelerator.device))

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        self.rows, self.ids = inputs["rows"], inputs["answers"]
        self.sampled = inputs["sampled"], inputs["completion_mask"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self, model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, keep: int, **options: Any
    ) -> tuple:
        size = options.pop("batch_size", None) or len(ids)
        computed = {name: options[name] for name in ("compute_entropy", "compute_aux_loss") if name in options}
        parts = [slice(start, start + size) for start in range(0, len(ids), size)]
        forward = super()._get_per_token_logps_and_entropies
        # A part's images are bound to the model directly: TRL would split them by rows, in some families' layout.
        outputs = [
            forward(partial(model, **self._inputs_of(p, ids, keep)), ids[p], mask[p], keep, **computed) for p in parts
        ]
        logps, entropies, aux = (_join(values) for values in zip(*outputs, strict=True))
        if computed.get("compute_entropy"):
            assert logps is not None
            self._log_rollout_gap(logps)
        return logps, entropies, aux

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log the step's numbers as TRL does, which takes plain numbers only: the device is read once a step.

        Raise `RunError` after a step whose `rollout_gap` is above the bound, on all ranks."""
        gap = 0.0
        if gaps := self._metrics["train"].get("rollout_gap"):
            gaps[:] = torch.stack(gaps).tolist()
            gap = sum(gaps) / len(gaps)
        super().log(*args, **kwargs)
        if gap > self.largest_gap:
            raise RunError(describe_gap(self.state.global_step, gap, self.largest_gap, self.method.rollouts))

    def _largest_gap(self) -> float:
        """Return the largest `rollout_gap` that does not end the run. By default dropout, which only training has,
        and an older adapter leave no bound."""
        drops = any(module.p > 0 for module in self.model.modules() if isinstance(module, torch.nn.Dropout))
        if self.method.max_rollout_gap is None and (drops or self.method.max_staleness):
            return math.inf
        precision: Precision = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32"
        return largest_gap(self.method.max_rollout_gap, precision, str(self.args.device))

    def _log_corrected(self, ratio: torch.Tensor, mask: torch.Tensor) -> None:
        """Keep for `log` the share of answers, or of tokens, whose importance ratio TRL has cut or masked."""
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        bounds = [bound for bound in (low, high, 0.0) if bound is not None]
        changed = torch.stack([ratio == bound for bound in bounds]).any(dim=0)
        counted = mask.bool() if ratio.shape == mask.shape else torch.ones_like(changed)
        share = (changed & counted).sum() / counted.sum().clamp(min=1)
        self._metrics["train"]["corrected"].append(self.accelerator.gather(share).mean().item())

    def _log_rollout_gap(self, logps: torch.Tensor) -> None:
        """Keep for `log` how far the trainer's log-probabilities of the sampled tokens are from those at sampling."""
        assert self.sampled is not None
        sampled, mask = self.sampled
        total = ((logps.detach() - sampled).abs() * mask).sum() / mask.sum().clamp(min=1)
        self._metrics["train"]["rollout_gap"].append(self.accelerator.gather(total).mean())


def _stand_in(name: str) -> Callable[..., object]:
    """Return a placeholder for a reward, by whose name TRL logs it; `_calculate_rewards` returns the values."""

    def reward(**columns: object) -> object:
        raise RunError(f"TRL asked the stand-in of reward {name!r} for values. Please report this.")

    reward.__name__ = name
    return reward


def _join(values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Concatenate the parts of a batch, or return their mean if each is a single number."""
    tensors = [value for value in values if value is not None]
    if not tensors:
        return None
    return torch.stack(tensors).mean() if tensors[0].dim() == 0 else torch.cat(tensors)


def _runs(rows: Sequence[Sample]) -> list[tuple[Sample, int]]:
    """Return runs of equal neighbouring rows, with their lengths."""
    runs = [list(run) for _, run in groupby(rows, key=id)]
    return [(run[0], len(run)) for run in runs]
