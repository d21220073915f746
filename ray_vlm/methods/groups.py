"""The parts of a GRPO step around TRL's: sample the answers to a step's prompts, score them, and add their pixels.

`trainer` is the one of `methods.grpo`: its `rows_of` and `answers` belong to the current step, group by group.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from ray_vlm.data.collate import join_pixels, read_pixels, spans_of_rows
from ray_vlm.data.parse import parse_answer
from ray_vlm.data.records import PromptRecord, Record
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.methods.rewards import Rewards, score_completions
from ray_vlm.methods.rollout import Completion, Sampling


def sample_step(trainer: Any, rows: Sequence[Sample]) -> dict[str, Any]:
    """Sample and score the answers to a step's prompts.

    Return TRL's batch, with `rows` (the prompt of each answer) and `sampled` (log-probabilities at sampling,
    `float32 [answers, longest]`)."""
    import torch

    trainer.model.train()  # TRL recognises by it that this is no evaluation
    trainer.pixels = {}
    trainer.recent.start(sum(len(row.images) for row in rows))
    group, records = trainer.job.method.num_generations, trainer.fetch_records()
    trainer.rows_of = [row for row in rows for _ in range(group)]
    turns = [trainer.builder.turns(records[row.number]) for row in rows]
    prompts = [[{"role": role, "content": text} for role, text in row_turns] for row_turns in turns]
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts for _ in range(group)])
    logps = [torch.tensor(answer.logprobs) for answer in trainer.answers]
    sampled = torch.nn.utils.rnn.pad_sequence(logps, batch_first=True).to(batch["completion_ids"].device)
    return batch | {"rows": trainer.rows_of, "sampled": sampled}


def sample_answers(trainer: Any) -> list[Completion]:
    """Sample the answers to the step's prompts, group by group. A group's random numbers depend only on the seed, the
    step, the row, and how often the row was in the step before."""
    method = trainer.job.method
    rows = trainer.rows_of[:: method.num_generations]
    seen: Counter[int] = Counter()
    seeds = []
    for row in rows:
        seeds.append((trainer.job.seed, trainer.state.global_step, row.number, seen[row.number]))
        seen[row.number] += 1
    sampling = Sampling(
        method.num_generations, method.max_completion_tokens, method.temperature, method.top_p, method.top_k
    )
    model = trainer.accelerator.unwrap_model(trainer.model)
    device, pixels = str(trainer.args.device), partial(prompt_pixels, trainer)
    groups = trainer.sample(model, rows, trainer.builder, sampling, seeds, device, pixels=pixels)
    return [answer for group in groups for answer in group]


def longest_answers(trainer: Any, rows: Sequence[Sample], device: str) -> dict[str, Any]:
    """Return a batch as TRL's loss takes it, with answers of the maximum length: it needs the most memory."""
    import torch

    job, trainer.pixels = trainer.job, {}
    group, length = min(job.method.num_generations, job.train.micro_batch_size), job.method.max_completion_tokens
    answer_rows = [row for row in rows for _ in range(group)]
    prompts = [torch.tensor(row.input_ids.tolist()) for row in answer_rows]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(prompts, batch_first=True, padding_side="left").to(device)
    mask = pad([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left").to(device)
    shape = (len(answer_rows), length)
    # Any token of text will do. First tokens differ, so that answers share only the prompt.
    answers = torch.full(shape, 20, device=device)
    answers[:, 0] += torch.arange(len(answer_rows), device=device)
    zeros = torch.zeros(shape, device=device)
    batch = {"prompt_ids": ids, "prompt_mask": mask, "completion_ids": answers, "ref_per_token_logps": zeros}
    batch |= {"completion_mask": torch.ones_like(answers), "advantages": torch.ones(len(answer_rows), device=device)}
    return batch | {"num_items_in_batch": torch.tensor(float(answers.numel())), "rows": answer_rows, "sampled": zeros}


def score_step(trainer: Any, prompts: Sequence[Any], ids: Sequence[Sequence[int]]) -> Any:
    """Return each part of the reward of all ranks' answers, `float32 [answers, parts]`; NaN where none applies."""
    import torch
    from accelerate.utils import gather

    records = trainer.fetch_records()
    scored = [records[row.number] for row in trainer.rows_of]
    texts = [trainer.builder.text(answer) for answer in ids]
    scores = score_answers(trainer.scored_by, scored, texts, ids, prompts, trainer.builder)
    table = [[float("nan") if v is None else v for v in of_answer.values()] for of_answer in scores]
    return gather(torch.tensor(table, dtype=torch.float32, device=trainer.accelerator.device))


def score_answers(
    rewards: Rewards,
    records: Sequence[Record],
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    prompts: Sequence[Any],
    builder: SampleBuilder,
) -> list[dict[str, float | None]]:
    """Return every part of the reward of each answer (text and token ids) to its record. Raise `DataError` as
    `score_completions` does."""
    distinct = {id(record): record for record in records}  # `records` has each record once for each answer
    truth = {
        key: {} if isinstance(record, PromptRecord) else builder.truth(record)  # type: ignore[arg-type]
        for key, record in distinct.items()
    }
    parsed = [parse_answer(text, r, builder) for text, r in zip(texts, records, strict=True)]
    truths = [truth[id(record)] for record in records]
    columns: dict[str, list[Any]] = {}
    if isinstance(records[0], PromptRecord):
        names = {name for r in records for name in r.columns}  # type: ignore[union-attr]
        columns = {name: [r.columns.get(name) for r in records] for name in sorted(names)}  # type: ignore[union-attr]
    else:
        columns["context"] = [r.context for r in records]  # type: ignore[union-attr]
    return score_completions(rewards, texts, parsed, truths, columns, [r.id for r in records], prompts, ids)


def pixels_of(trainer: Any, part: slice, input_ids: Any) -> dict[str, Any]:
    """Return the image inputs of a part of the answers: once for each prompt, with `image_spans`, which assigns them to
    answers (`models/prefix_sharing.py`); for families without `image_spans`, once for each answer."""
    runs, builder = _runs(trainer.rows_of[part]), trainer.builder
    kinds = {builder.kinds: (input_ids[part] == builder.image_token_id).long()} if builder.kinds else {}
    if builder.stock is not None:
        return kinds | join_pixels([pixels for row, n in runs for pixels in n * [prompt_pixels(trainer, row)]])
    if pixels := join_pixels([prompt_pixels(trainer, row) for row, _ in runs]):
        spans = zip(spans_of_rows([row for row, _ in runs]), runs, strict=True)
        pixels["image_spans"] = [span for span, (_, n) in spans for _ in range(n)]
    return kinds | pixels


def prompt_pixels(trainer: Any, row: Sample) -> dict[str, Any]:
    """Return a prompt's image inputs. They are processed once in a step, for sampling and training."""
    if id(row) not in trainer.pixels:  # the row is kept alive, so that no other gets its id
        trainer.pixels[id(row)] = row, read_pixels(row.images, trainer.builder, str(trainer.args.device))
    return trainer.pixels[id(row)][1]


def note_gap(trainer: Any, logps: Any) -> None:
    """Log how far the trainer's log-probabilities of the sampled tokens are from those at sampling."""
    sampled, mask = trainer.sampled
    total = ((logps.detach() - sampled).abs() * mask).sum() / mask.sum().clamp(min=1)
    trainer._metrics["train"]["rollout_gap"].append(float(trainer.accelerator.gather(total).mean()))


def join(values: Sequence[Any]) -> Any:
    """Concatenate the parts of a batch, or return their mean if each is a single number."""
    import torch

    if values[0] is None:
        return None
    return torch.stack(list(values)).mean() if values[0].dim() == 0 else torch.cat(list(values))


def _runs(rows: Sequence[Sample]) -> list[tuple[Sample, int]]:
    """Return runs of equal neighbouring rows, with their lengths."""
    runs: list[tuple[Sample, int]] = []
    for row in rows:
        if runs and runs[-1][0] is row:
            runs[-1] = (row, runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return runs


def split_batch(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """Split a step's answers into `parts` equal micro-batches, in order; scalars of the step go into each."""
    count = len(batch["rows"]) // parts

    def cut(value: Any, part: slice) -> Any:
        return value if getattr(value, "ndim", 1) == 0 else value[part]

    slices = [slice(i * count, (i + 1) * count) for i in range(parts)]
    return [{name: cut(value, part) for name, value in batch.items()} for part in slices]
