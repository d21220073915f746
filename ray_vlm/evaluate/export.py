"""`ray-vlm export RUN`: write files that load without this package: the adapter with its card, or a merged model.

Adapters are merged into unquantised weights only: merging into 4-bit weights loses what was learned, because an
adapter's change is smaller than the step between two values. A merged model is checked before it is written: its logits
on the run's own rows must match those of base and adapter.
"""

import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.config.schema import JobConfig, Model
from ray_vlm.config.train import Precision
from ray_vlm.data.collate import collate
from ray_vlm.data.parts import load_parts
from ray_vlm.data.plan import plan_sample
from ray_vlm.data.preprocessing import PREPROCESSING, read_preprocessing
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import sample_spec
from ray_vlm.errors import ConfigError, ModelError, RunError
from ray_vlm.evaluate.weights import load_run_job, weights_of
from ray_vlm.models.load import load_adapter, load_config, load_model, resolve_name
from ray_vlm.models.precision import DTYPES
from ray_vlm.models.processor import load_processor
from ray_vlm.runs.card import ADAPTER, MERGED, TITLES, WHOLE, write_card
from ray_vlm.runs.checkpoints import MANIFEST, fetch_folder
from ray_vlm.runs.paths import write_folder
from ray_vlm.runs.read import Run, read_run
from ray_vlm.storage import is_remote, split_address

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
# Largest difference of a logit from rounding alone, as a share of the largest logit (measured in docs/dev/LOG.md).
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
_CHECKED_ROWS = 8  # rows whose logits are compared, one at a time
_LOGITS_BYTES = 256 * 2**20  # of a row's logits in float32; of a longer row the last positions are compared
_POSITIONS = 32  # of a row that are compared at a time
_SHARD = "5GB"


def export_run(
    address: str,
    output: str | None = None,
    merged: bool = False,
    weights: str | None = None,
    precision: Precision | None = None,
) -> Path:
    """Write the export of a run and return its folder; by default `<run>/export/adapter`, `.../merged`, or
    `.../model` where all weights were trained.

    `weights`: `best` or `final`; None takes `best` where there is one. `precision`: of a merged model, by default that
    of the run.

    Raise `RunError` for a run without weights, and `ModelError` for a base that cannot be merged or a merged model with
    other logits.
    """
    run = read_run(address)
    job, source = load_run_job(run), weights_of(run, weights)
    name = split_address(source)[1]
    if job.lora is None and merged:
        raise ConfigError(
            f"{run.address} trained all weights: {name}/ is a whole model already. Export it without --merged."
        )
    if precision is not None and not merged:
        raise ConfigError(f"--precision {precision} is for --merged; an adapter is exported as it was trained.")
    kind = kind_of(run, merged)
    folder = _resolve_output(run, output, kind)
    files, licence = fetch_folder(source), read_licence(job.model.name)
    if merged:
        device = "cuda:0" if job.cluster.gpus_per_worker else "cpu"
        batches = check_batches(job, files, device)
        model, checked = merge(job.model, files, batches, precision or job.train.precision, device)
        logger.info(
            f"merged: on {checked['rows']:.0f} rows no logit differs by more than {checked['largest']:.3g} (largest "
            f"{checked['scale']:.3g}); {checked['same_token']:.2%} of the likeliest tokens are the same"
        )

    def fill(new: Path) -> None:
        if merged:
            model.save_pretrained(new, max_shard_size=_SHARD)
            load_processor(job.model).save_pretrained(new)
            shutil.copy2(Path(files) / PREPROCESSING, new)
        else:
            shutil.copytree(files, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST, "README.md"))
        card = write_card(run, kind, name, licence, checked if merged else None)
        (new / "README.md").write_text(card, encoding="utf-8")

    write_folder(folder, fill)
    logger.info(f"{TITLES[kind]} of {run.name}/{name} in {folder}")
    return folder


def kind_of(run: Run, merged: bool) -> str:
    """Return the kind of the run's export: an adapter, a merged model, or the model where all weights were trained."""
    if run.job.get("lora") is None:
        return WHOLE
    return MERGED if merged else ADAPTER


def _resolve_output(run: Run, output: str | None, kind: str) -> Path:
    if output:
        folder = Path(output)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"--output {output}: something is there already. Give a new folder.")
        return folder
    if is_remote(run.address):
        raise ConfigError(
            f"{run.address} lies in an object store, and an export is written to a local folder. Give --output."
        )
    return Path(run.address) / "export" / kind


def check_batches(job: JobConfig, adapter: str, device: str) -> Sequence[dict[str, Any]]:
    """Collate a few of the job's own rows into batches of one. Raise `DataError` where they cannot be read."""
    part = next((p for p in ("test", "eval", "train") if getattr(job.data, p) is not None), None)
    if part is None:
        raise ConfigError("the run's job has no rows on which logits could be compared. Export it without --merged.")
    parts = load_parts(job, [part], read_preprocessing(adapter, sample_spec(job, [])))
    records, builder = getattr(parts, part).records, load_sample_builder(parts.spec)
    rows = [builder.prompt_row(records[i]) for i in plan_sample(len(records), _CHECKED_ROWS)]
    return [collate([row], builder, device) for row in rows]


def read_licence(base: str) -> str | None:
    """Return the licence in the base's own card; None where its folder is not on this machine or names none."""
    try:
        text = (Path(resolve_name(base)) / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    head = text.split("---")[1] if text.startswith("---") else ""
    match = re.search(r"^license:\s*[\"']?([\w.+-]+)", head, re.MULTILINE)
    return match[1] if match else None


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
    """Merge the adapter into the base, and compare logits before and after, of as many of a row's last positions as
    memory is set aside for.

    `spec`: the base as the job names it, loaded without quantisation here; `batches`: as `data.collate.collate` makes
    them, on `device`. Return the merged model, and `compare`'s differences. Raise `ModelError` if they are larger than
    rounding explains.
    """
    check_mergeable(spec)
    model = load_adapter(load_model(spec.model_copy(update={"load_in_4bit": False}), precision, device), adapter, spec)
    model.eval()
    expected = [_logits(model, batch) for batch in batches]
    merged = model.merge_and_unload(safe_merge=True)
    difference = compare(expected, (_logits(merged, batch) for batch in batches))
    limit = TOLERANCE[DTYPES[precision]]
    largest, scale = difference["largest"], difference["scale"]
    if batches and not largest <= limit * scale:  # a NaN is refused too
        raise ModelError(
            f"{adapter}: merged, its logits differ by {largest:.3g} from base and adapter, where {limit:g} of the "
            f"largest ({scale:.3g}) would be rounding. Export the adapter, or merge with --precision fp32."
        )
    return merged, difference


def compare(expected: Sequence["Tensor"], merged: Iterable["Tensor"]) -> dict[str, float]:
    """Compare logits, `[rows, positions, tokens]` of each batch, those of `merged` one batch after another.

    Return `rows`, `largest` (difference of a logit), `scale` (largest logit), and `same_token` (share of positions
    whose likeliest token is the same)."""
    largest = scale = same = positions = 0.0
    for one, other in zip(expected, merged, strict=True):
        for some, others in zip(one.split(_POSITIONS, dim=1), other.split(_POSITIONS, dim=1), strict=True):
            a, b = some.float(), others.float()
            gap = float((a - b).abs().max())
            if not gap <= largest:  # NaN is the worst, and stays
                largest = largest if largest != largest else gap
            scale = max(scale, float(a.abs().max()))
            same += float((a.argmax(-1) == b.argmax(-1)).sum())
            positions += a.shape[0] * a.shape[1]
    rows = float(sum(len(a) for a in expected))
    return {"rows": rows, "largest": largest, "scale": scale, "same_token": same / max(positions, 1.0)}


def _logits(model: Any, batch: dict[str, Any]) -> "Tensor":
    """Return the logits of the last positions of a batch, in the model's precision, on the host."""
    import torch

    inputs = {name: value for name, value in batch.items() if name not in ("labels", "loss_weights")}
    position_bytes = 4 * len(batch["input_ids"]) * model.get_output_embeddings().weight.shape[0]
    with torch.inference_mode():
        return model(**inputs, logits_to_keep=max(1, _LOGITS_BYTES // position_bytes)).logits.cpu()
