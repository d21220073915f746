"""Log-probabilities of DPO's reference model for every pair, computed once before training and cached for later runs.

The cache is `<run.output_dir>/.reference/`. Its key is a hash of all that the numbers depend on: the base (name,
revision, contents, quantisation, dtype), the reference adapter, the pairs with their images, the chat template and the
image sizes. A change of any of them gives another key, so no stale entry is ever read.
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
    """Return the log-probabilities of the chosen and the rejected answers under the reference, `float64 [pairs, 2]`.

    They are read from the cache, or computed by all ranks together and cached. `task`: the `WorkerSpec`.
    """
    records = trainer.fetch_records()
    store = Store(join(job.run.output_dir, ".reference"))
    description = describe_reference(job, trainer.builder, records, base, task.rows) if context.rank == 0 else {}
    key = context.broadcast(hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:24])
    data = context.broadcast(store.read(f"{key}.npy") if context.rank == 0 else None)
    if data is None:
        if monitor is not None:
            monitor.note(0, f"computing the reference's log-probabilities of {len(records)} pairs")
        data = _ask(job, trainer, records, context)
        if context.rank == 0:
            store.write(f"{key}.json", json.dumps(description, indent=1).encode())
            store.write(f"{key}.npy", data)
    elif monitor is not None:
        monitor.note(0, f"the reference's log-probabilities of {len(records)} pairs are read from the cache ({key})")
    return _numbers(data)


def describe_reference(
    job: JobConfig, builder: SampleBuilder, records: Sequence[Record], base: str, rows: str
) -> dict[str, Any]:
    """Return all that the reference's log-probabilities depend on, as plain data.

    `base`, `rows`: fingerprints of the base's weights and of the pairs.
    """
    import transformers

    images = hashlib.sha256()
    for record in records:
        for image in record.images:
            fingerprint = describe_file(image) if isinstance(image, str) else hashlib.sha256(image).hexdigest()
            images.update(f"{fingerprint}\n".encode())
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
    """Return a hash of the reference adapter's weights and settings, or None without an adapter."""
    if adapter is None:
        return None
    folder = Path(fetch_folder(adapter))
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _ask(job: JobConfig, trainer: Any, records: Sequence[Record], context: DistributedContext) -> bytes:
    """Run the reference over each rank's share of the pairs. Return all results as the bytes of a `.npy` file."""
    import numpy as np
    import torch

    shard = range(context.rank, len(records), context.world_size)
    size = job.train.micro_batch_size
    out = np.zeros((len(records), 2))
    was_training = trainer.model.training
    trainer.model.eval()
    for start in range(0, len(shard), size):
        positions = list(shard[start : start + size])
        rows = [trainer.builder.pair_row(records[i]) for i in positions]
        batch = collate_pairs(rows, trainer.builder, context.device)
        both = trainer.compute_ref_log_probs(trainer.model, batch)
        out[positions] = torch.stack(both, dim=1).double().cpu().numpy()
    trainer.model.train(was_training)
    log_probs = sum(context.all_gather(out))  # each rank has zeros in the rows of the others
    file = io.BytesIO()
    np.save(file, log_probs, allow_pickle=False)
    return file.getvalue()


def _numbers(data: bytes) -> Any:
    import numpy as np

    return np.load(io.BytesIO(data), allow_pickle=False)
