"""The trainer's own log-probabilities of an answer, with its adapter and without it: what an engine is compared with.

A plain forward of the model that trains: one row, no layout, no cache of features, in evaluation mode and in the
arithmetic of training.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_vlm.config.train import Precision
from ray_vlm.data.collate import collate
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.engines.decoding import forward_inputs
from ray_vlm.models.backbone import base_of, evaluation_mode
from ray_vlm.models.precision import autocast

if TYPE_CHECKING:
    from torch.nn import Module

# (model, prompt, tokens of an answer, whether the adapter is on) -> log-probabilities at temperature 1 of every token
# of the vocabulary at the position of each token, `float32 [tokens, vocabulary]`
Scorer = Callable[["Module", Sample, Sequence[int], bool], np.ndarray]


def build_scorer(builder: SampleBuilder, precision: Precision, device: str) -> Scorer:
    """Return the scorer of the model that trains. It changes no weight, no mode and no random numbers."""

    def score(model: "Module", row: Sample, ids: Sequence[int], with_adapter: bool) -> np.ndarray:
        import torch

        tokens = np.concatenate([row.input_ids, np.asarray(ids, row.input_ids.dtype)])
        # Without keys the encoder reads no cached features: these could have hidden other pixels.
        answered = replace(row, input_ids=tokens, labels=tokens[:0], weights=None, image_keys=())
        adapter = nullcontext() if with_adapter else adapter_off(model)
        with torch.no_grad(), evaluation_mode(model), adapter, autocast(precision, device):
            inputs, _ = forward_inputs(base_of(model), collate([answered], builder, device))
            logits = model(**inputs, use_cache=False, logits_to_keep=len(ids) + 1).logits[0, :-1]
            return logits.float().log_softmax(dim=-1).cpu().numpy()

    return score


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Turn the adapters of PEFT's model off while the body runs. What learns and what is frozen stays as it is: PEFT
    alone would let all of the active adapter learn afterwards."""
    learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in learns:
            parameter.requires_grad = requires_grad
