"""Merge an adapter into its base: always into unquantised weights, and only where the result says what the two said.

Merging into 4-bit weights loses what was learned: an adapter's change is smaller than the step between two values.
"""

from collections.abc import Sequence
from typing import Any

from ray_vlm.config.schema import Model
from ray_vlm.config.train import Precision
from ray_vlm.errors import ModelError
from ray_vlm.models.load import load_adapter, load_config, load_model
from ray_vlm.models.precision import DTYPES

# Largest difference of a logit, as a share of the largest logit, that rounding explains (measured in docs/LOG.md).
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


def check_mergeable(spec: Model) -> None:
    """Raise `ModelError` for a base whose own weights are quantised: there is nothing to merge into."""
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
    """The base with the adapter merged in, and how far its logits are from the two apart.

    `spec`: the base as the job names it, loaded without quantisation here; `batches`: as `data.collate.collate` makes
    them, on `device`. The second: `rows`, `largest` (difference of a logit), `scale` (largest logit), `same_token`
    (share of positions whose likeliest token is the same). Raises `ModelError` where they differ more than rounding
    explains.
    """
    check_mergeable(spec)
    model = load_adapter(load_model(spec.model_copy(update={"load_in_4bit": False}), precision, device), adapter, spec)
    model.eval()
    apart = [_logits(model, batch) for batch in batches]
    merged = model.merge_and_unload(safe_merge=True)
    found = compare(apart, [_logits(merged, batch) for batch in batches])
    limit = TOLERANCE[DTYPES[precision]]
    if batches and not found["largest"] <= limit * found["scale"]:
        raise ModelError(
            f"{adapter}: merged, its logits differ by {found['largest']:.3g} from base and adapter, where {limit:g} of "
            f"the largest ({found['scale']:.3g}) would be rounding. Export the adapter, or merge with "
            "--precision fp32."
        )
    return merged, found


def compare(apart: Sequence[Any], merged: Sequence[Any]) -> dict[str, float]:
    """Differences of logits `[rows, positions, tokens]`, batch by batch."""
    largest = scale = same = positions = 0.0
    for a, b in zip(apart, merged, strict=True):
        difference = float((a - b).abs().max())
        largest = difference if difference != difference else max(largest, difference)  # NaN is the worst
        scale = max(scale, float(a.abs().max()))
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
        positions += a.shape[0] * a.shape[1]
    rows = float(sum(len(a) for a in apart))
    return {"rows": rows, "largest": largest, "scale": scale, "same_token": same / max(positions, 1.0)}


def _logits(model: Any, batch: dict[str, Any]) -> Any:
    import torch

    with torch.inference_mode():
        return model(**{k: v for k, v in batch.items() if k not in ("labels", "loss_weights")}).logits.float().cpu()
