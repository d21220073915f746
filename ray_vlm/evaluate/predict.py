"""Generate answers, batch by batch, left-padded and greedy; the same code for every base and every adapter."""

from collections.abc import Callable, Sequence
from typing import Any

from ray_vlm.data.collate import collate
from ray_vlm.data.records import Record
from ray_vlm.data.rows import Preparer


def generate_answers(
    model: Any,
    records: Sequence[Record],
    preparer: Preparer,
    batch_size: int,
    max_new_tokens: int,
    device: str = "cpu",
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's answer to each record, in their order. Leaves the model in evaluation mode."""
    import torch

    tokenizer = preparer.tokenizer
    model.eval()
    answers: list[str] = []
    for start in range(0, len(records), batch_size):
        part = records[start : start + batch_size]
        batch = collate([preparer.prompt_row(record) for record in part], preparer, device, side="left")
        with torch.inference_mode():
            tokens = model.generate(
                **{k: v for k, v in batch.items() if k != "labels"},
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,  # hub models bring their own; it would punish repeated digits and labels
                use_cache=True,
                eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = tokens[:, batch["input_ids"].shape[1] :]
        answers += [preparer.text(ids) for ids in new.tolist()]
        if on_progress is not None:
            on_progress(len(answers))
    return answers
