"""Log-probabilities of DPO's reference model for every pair, computed once before training and cached for later runs.

The cache is `<run.output_dir>/.reference/`. Its key is a hash of all that the numbers depend on: the base (name,
revision, contents, quantisation, dtype), the reference adapter, the pairs with their images, the chat template and the
image sizes. A change of any of them gives another key, so no stale entry is ever read.
"""

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_vlm.config.schema import Model
from ray_vlm.config.train import Precision
from ray_vlm.data.images import read_image
from ray_vlm.data.plan import MicroBatch
from ray_vlm.data.records import Record
from ray_vlm.data.rows import Rows
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.data.stream import stream_micro_batches
from ray_vlm.distributed import DistributedContext
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.storage import Store, describe_file

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceSource:
    """What the reference's log-probabilities depend on, beside the pairs and the processor.

    `base`, `rows`: fingerprints of the base's weights and of the pairs. `ld_alpha`: TRL's option, which changes them.
    """

    model: Model
    precision: Precision
    base: str
    rows: str
    ld_alpha: float | None = None


@dataclass(frozen=True)
class ReferenceCache:
    """The cache of a run. `store`: its folder; `batch_size`: pairs at a time; `threads`: that read pairs meanwhile."""

    store: Store
    source: ReferenceSource
    context: DistributedContext
    batch_size: int
    threads: int = 1

    def find(
        self,
        records: Rows,
        builder: SampleBuilder,
        ask: "Callable[[list[Sample]], torch.Tensor]",
    ) -> np.ndarray:
        """Return the reference's log-probabilities of the chosen and the rejected answers, `float64 [pairs, 2]`.

        They are read from the cache, or computed by all ranks together and cached. `ask` returns those of some pairs.
        """
        context, store = self.context, self.store
        description = describe_reference(self.source, builder, records) if context.rank == 0 else {}
        key = context.broadcast(hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:24])
        data = context.broadcast(store.read(f"{key}.npy") if context.rank == 0 else None)
        if data is None:
            logger.info(f"computing the reference's log-probabilities of {len(records)} pairs")
            data = self._compute(records, builder, ask)
            if context.rank == 0:
                store.write(f"{key}.json", json.dumps(description, indent=1).encode())
                store.write(f"{key}.npy", data)
        else:
            logger.info(f"the reference's log-probabilities of {len(records)} pairs are read from the cache ({key})")
        return np.load(io.BytesIO(data), allow_pickle=False)

    def _compute(self, records: Rows, builder: SampleBuilder, ask: "Callable[[list[Sample]], torch.Tensor]") -> bytes:
        """Run the reference over each rank's share of the pairs, which threads read ahead. Return all results as the
        bytes of a `.npy` file."""
        rank, world_size = self.context.rank, self.context.world_size
        shard = range(rank, len(records), world_size)
        starts = range(0, len(shard), self.batch_size)
        micros = (MicroBatch(tuple(shard[start : start + self.batch_size])) for start in starts)
        # Threads of this process, wherever its training rows are made: Ray Data's loaders hold their CPUs already.
        with closing(stream_micro_batches(micros, records, lambda: builder, self.threads)) as stream:
            parts = [ask(rows).double() for rows in stream]  # not copied here, so that the device need not wait
        share = np.concatenate([part.cpu().numpy() for part in parts]) if parts else np.zeros((0, 2))
        log_probs, file = np.zeros((len(records), 2)), io.BytesIO()
        for other, gathered in enumerate(self.context.gather(share)):
            log_probs[other::world_size] = gathered
        if rank == 0:
            np.save(file, log_probs, allow_pickle=False)
        return self.context.broadcast(file.getvalue())


def describe_reference(source: ReferenceSource, builder: SampleBuilder, records: Sequence[Record]) -> dict[str, Any]:
    """Return all that the reference's log-probabilities depend on, as plain data."""
    import transformers

    images = hashlib.sha256()
    for record in records:
        for image in record.images:
            fingerprint = (
                describe_file(image) if isinstance(image, str) else hashlib.sha256(read_image(image)).hexdigest()
            )
            images.update(f"{fingerprint}\n".encode())
    model = source.model
    return {
        "base": source.base,
        "model": [os.path.basename(model.name), model.revision, model.load_in_4bit],
        "precision": source.precision,
        "adapter": _fingerprint(model.adapter),
        "rows": source.rows,
        "images": images.hexdigest(),
        "template": hashlib.sha256(str(builder.processor.chat_template).encode()).hexdigest(),
        "vocabulary": hashlib.sha256(builder.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "image_sizes": asdict(builder.image_spec),
        "ld_alpha": source.ld_alpha,
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
