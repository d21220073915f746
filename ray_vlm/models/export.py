"""Merge an adapter into its base: always into unquantised weights, and only if the logits stay the same.

Merging into 4-bit weights loses what was learned: an adapter's change is smaller than the step between two values.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray_vlm.config.schema import Model
from ray_vlm.config.train import Precision
from ray_vlm.errors import ModelError
from ray_vlm.models.load import load_adapter, load_config, load_model
from ray_vlm.models.precision import DTYPES

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

# Largest difference of a logit from rounding alone, as a share of the largest logit (measured in docs/LOG.md).
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


def check_mergeable(spec: Model) -> None:
    """Raise `ModelError` for a base that was published quantised."""
    quantised = getattr(load_config(spec), "quantization_config", None)
    if quantised is not None:
        kind = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
        raise ModelError(
            f"model.name={spec.name!r} is itself quantised ({kind}), and an adapter is never merged into quantised "
            "weights. Export the adapter, or name the base that this one was made from."
        )


def merge(
    spec: Model, adapter: str, batches: Sequence[dict[str, Any]], precision: Precision, device: str = "cpu"
) -> tuple[Any, dict[str, float]]:
    """Merge the adapter into the base, and compare logits before and after.

    `spec`: the base as the job names it, loaded without quantisation here; `batches`: as `data.collate.collate` makes
    them, on `device`. Return the merged model, and `compare`'s differences. Raise `ModelError` if they are larger than
    rounding explains.
    """
    check_mergeable(spec)
    model = load_adapter(load_model(spec.model_copy(update={"load_in_4bit": False}), precision, device), adapter, spec)
    model.eval()
    expected = [_logits(model, batch) for batch in batches]
    merged = model.merge_and_unload(safe_merge=True)
    difference = compare(expected, [_logits(merged, batch) for batch in batches])
    limit = TOLERANCE[DTYPES[precision]]
    largest, scale = difference["largest"], difference["scale"]
    if batches and not largest <= limit * scale:  # a NaN is refused too
        raise ModelError(
            f"{adapter}: merged, its logits differ by {largest:.3g} from base and adapter, where {limit:g} of the "
            f"largest ({scale:.3g}) would be rounding. Export the adapter, or merge with --precision fp32."
        )
    return merged, difference


def compare(expected: Sequence["Tensor"], merged: Sequence["Tensor"]) -> dict[str, float]:
    """Compare logits, `[rows, positions, tokens]` of each batch.

    Return `rows`, `largest` (difference of a logit), `scale` (largest logit), and `same_token` (share of positions
    whose likeliest token is the same)."""
    largest = scale = same = positions = 0.0
    for a, b in zip(expected, merged, strict=True):
        gap = float((a - b).abs().max())
        largest = gap if gap != gap else max(largest, gap)  # NaN is the worst
        scale = max(scale, float(a.abs().max()))
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
        positions += a.shape[0] * a.shape[1]
    rows = float(sum(len(a) for a in expected))
    return {"rows": rows, "largest": largest, "scale": scale, "same_token": same / max(positions, 1.0)}


def _logits(model: "Module", batch: dict[str, Any]) -> "Tensor":
    import torch

    with torch.inference_mode():
        return model(**{k: v for k, v in batch.items() if k not in ("labels", "loss_weights")}).logits.float().cpu()
