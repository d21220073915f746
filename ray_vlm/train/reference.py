"""What DPO's reference says of every pair, computed once before training and kept for later runs.

It lies under `<run.output_dir>/.reference/` by a key of all that it depends on: the base (name, revision, contents,
quantisation, dtype), the adapter that the reference is, the pairs with their images, the chat template and the image
sizes. Whatever of these changes makes another key, so nothing stale is ever read.
"""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.collate import collate_pairs
from ray_vlm.data.files import describe_file
from ray_vlm.data.records import Record
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.runs.monitor import Monitor
from ray_vlm.runs.store import Store, join
from ray_vlm.train.context import DistributedContext


def find_reference(
    job: JobConfig,
    task: Any,
    trainer: Any,
    context: DistributedContext,
    base: str,
    monitor: Monitor | None,
) -> Any:
    """Log-probabilities of the chosen and the rejected answer of every pair under the reference, `float64 [pairs, 2]`.

    Read where an earlier run kept them, else computed by all ranks, each its share, and kept. `task` is the worker's.
    """
    records = trainer.fetch_records()
    store = Store(join(job.run.output_dir, ".reference"))
    told = describe_reference(job, trainer.builder, records, base, task.rows) if context.rank == 0 else {}
    key = context.broadcast(hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24])
    kept = context.broadcast(store.read(f"{key}.npy") if context.rank == 0 else None)
    if kept is None:
        if monitor is not None:
            monitor.note(0, f"asking the reference about {len(records)} pairs, once")
        kept = _ask(job, trainer, records, context)
        if context.rank == 0:
            store.write(f"{key}.json", json.dumps(told, indent=1).encode())
            store.write(f"{key}.npy", kept)
    elif monitor is not None:
        monitor.note(0, f"the reference's log-probabilities of {len(records)} pairs are known ({key})")
    return _numbers(kept)


def describe_reference(
    job: JobConfig, builder: SampleBuilder, records: Sequence[Record], base: str, rows: str
) -> dict[str, Any]:
    """All that the reference's log-probabilities depend on, as plain data. `base`: fingerprint of the base's weights;
    `rows`: that of the pairs."""
    import transformers

    images = hashlib.sha256()
    for record in records:
        for image in record.images:
            told = describe_file(image) if isinstance(image, str) else hashlib.sha256(image).hexdigest()
            images.update(f"{told}\n".encode())
    return {
        "base": base,
        "model": [os.path.basename(job.model.name), job.model.revision, job.model.load_in_4bit],
        "precision": job.train.precision,
        "adapter": _fingerprint(job.model.adapter),
        "rows": rows,
        "images": images.hexdigest(),
        "template": hashlib.sha256(str(builder.processor.chat_template).encode()).hexdigest(),
        "vocabulary": hashlib.sha256(builder.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "image_sizes": asdict(builder.image_spec),
        "ld_alpha": job.method.trl.get("ld_alpha"),
        "transformers": transformers.__version__,
    }


def _fingerprint(adapter: str | None) -> str | None:
    """A hash of the weights and settings of the adapter that the reference is."""
    if adapter is None:
        return None
    folder = Path(fetch_folder(adapter))
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _ask(job: JobConfig, trainer: Any, records: Sequence[Record], context: DistributedContext) -> bytes:
    """All ranks run the reference over their share; every rank gets the whole, as a `.npy` file's bytes."""
    import numpy as np
    import torch

    mine = range(context.rank, len(records), context.world_size)
    size = job.train.micro_batch_size
    out = np.zeros((len(records), 2))
    was_training = trainer.model.training
    trainer.model.eval()
    for start in range(0, len(mine), size):
        positions = list(mine[start : start + size])
        rows = [trainer.builder.pair_row(records[i]) for i in positions]
        batch = collate_pairs(rows, trainer.builder, context.device)
        both = trainer.compute_ref_log_probs(trainer.model, batch)
        out[positions] = torch.stack(both, dim=1).double().cpu().numpy()
    trainer.model.train(was_training)
    whole = sum(context.all_gather(out))
    file = io.BytesIO()
    np.save(file, whole, allow_pickle=False)
    return file.getvalue()


def _numbers(kept: bytes) -> Any:
    import numpy as np

    return np.load(io.BytesIO(kept), allow_pickle=False)
