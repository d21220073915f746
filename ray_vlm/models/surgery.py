"""Every change to a model's forward, in order, each with its reason."""

from dataclasses import dataclass
from pathlib import Path

from ray_vlm.methods.head import score_labelled
from ray_vlm.methods.prefix_sharing import share_prefixes
from ray_vlm.models.backbone import ensure_backbone, recompute_first
from ray_vlm.models.features import DiskFeatureCache, StepFeatureCache, keep_features, why_not_kept
from ray_vlm.models.frozen_encoder import run_frozen_tower_plainly
from ray_vlm.models.operations import OperationCounter
from ray_vlm.models.packing import PackingOptions


@dataclass(frozen=True)
class ForwardOptions:
    """TEMP."""

    recompute: bool | int
    packing: PackingOptions
    own_processor: bool = False
    vision_cache: Path | None = None
    vision_cache_bytes: int = 0
    cache_step_features: bool = False


def prepare_forward(model, options) -> None:  # type: ignore
    """TEMP."""
    ensure_backbone(model)
    if (layers := options.recompute) and layers is not True:
        recompute_first(model, layers)


def change_forward(model, options, recent: StepFeatureCache, operations: OperationCounter) -> None:  # type: ignore
    """TEMP."""
    operations.attach(model)
    if not options.own_processor:
        share_prefixes(model, options.packing, operations)
    if options.packing.share or options.packing.pack:
        score_labelled(model)
    run_frozen_tower_plainly(model)
    if options.vision_cache is not None:
        keep_features(model, recent, DiskFeatureCache(options.vision_cache, options.vision_cache_bytes, model))
    elif options.cache_step_features and not why_not_kept(model):
        keep_features(model, recent)
