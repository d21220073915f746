"""What a person sees before anything starts: the plan in numbers and the first records with trained tokens marked."""

from ray_vlm.data.balance import Balance, describe_balance
from ray_vlm.data.index import Index
from ray_vlm.data.plan import Plan
from ray_vlm.data.rows import IGNORED, Preparer, RowSpec, load_preparer

_SHOWN_RECORDS = 2


def describe_prepared(index: Index, plan: Plan, spec: RowSpec, balance: Balance) -> str:
    """Rows, steps, tokens and the mix of classes, then the token view of the first records."""
    preparer = load_preparer(spec)
    tokens = index.tokens
    step = plan.step_rows(0)
    lines = [
        f"rows {len(index)}, left out {len(index.bad)}; {plan.rows_per_epoch} shown in an epoch",
        f"steps {plan.num_steps}, {plan.steps_per_epoch} an epoch; {plan.global_batch_size} rows a step on "
        f"{plan.world_size} worker(s), {plan.accumulation} micro-batch(es) of up to {plan.micro_batch_size} each",
        f"tokens a row {tokens.min()} to {tokens.max()}, mean {tokens.mean():.0f} "
        f"({index.image_tokens.mean():.0f} of images, {index.answer_tokens.mean():.0f} trained); "
        f"first step {int(tokens[step].sum())}, mean step {tokens.mean() * plan.global_batch_size:.0f}",
        *describe_balance(balance),
        "first records, trained tokens between [[ and ]]:",
    ]
    lines += [_token_view(index, i, preparer) for i in range(min(_SHOWN_RECORDS, len(index)))]
    return "\n".join(lines)


def _token_view(index: Index, position: int, preparer: Preparer) -> str:
    record = index.records[position]
    row = preparer.train_row(record)
    pieces: list[str] = []
    image_run, trained = 0, False
    for token, label in zip(row.input_ids.tolist(), row.labels.tolist(), strict=True):
        if token == preparer.image_token_id:
            image_run += 1
            continue
        if image_run:
            pieces.append(f"<image: {image_run} tokens>")
            image_run = 0
        if (label != IGNORED) != trained:
            trained = not trained
            pieces.append("[[" if trained else "]]")
        pieces.append(preparer.tokenizer.decode([token]))
    return f"--- row {record.row} (id {record.id})\n{''.join(pieces)}{']]' if trained else ''}"
