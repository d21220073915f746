"""Every change to a model's forward that training makes, in order, each with its reason.

A change wraps a forward that is there already, so the order matters. `prepare_forward` stands before TRL's constructor
and `change_forward` after it: in between TRL replaces the model's forward by one with its fused head. Evaluation and
`generate` run the same wrapped forwards, which pass on every call that they are not meant for. For the time of a
rollout `dequantize.py` replaces forwards of single layers as well.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_vlm.models.attention import attend_at_once
from ray_vlm.models.backbone import ensure_backbone, recompute_first
from ray_vlm.models.frozen_encoder import (
    DiskFeatureCache,
    StepFeatureCache,
    cache_features,
    run_without_autograd,
    why_not_cached,
)
from ray_vlm.models.operations import OperationCounter
from ray_vlm.models.prefix_sharing import PackingOptions, score_labelled, share_prefixes

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(frozen=True)
class ForwardOptions:
    """What a job wants of its model's forward.

    `recompute`: whether activations are recomputed in the backward pass, or in how many of the language model's first
    layers. `packing`: which rows share prefixes and are packed. `own_processor`: the family's own processor handles
    images, and rows are left as they are. `vision_cache`: a folder for features of images, and `vision_cache_bytes` the
    most that it may hold. `cache_step_features`: keep the features of a step's images, where a method sees an image
    more than once (not under ZeRO-3, where all workers must run the encoder together).
    """

    recompute: bool | int
    packing: PackingOptions
    own_processor: bool = False
    vision_cache: Path | None = None
    vision_cache_bytes: float = 0.0
    cache_step_features: bool = False


def prepare_forward(model: "Module", options: ForwardOptions) -> None:
    """Change the model, with or without an adapter, as TRL's trainers expect it. Call this before their constructor."""
    # TRL's fused head asks `model.base_model` for hidden states, and Llama-4 has no such part.
    ensure_backbone(model)
    # The Trainer turns recomputation on when it begins to train, in all layers: so the method that does so is replaced.
    if options.recompute and options.recompute is not True:
        recompute_first(model, options.recompute)


def change_forward(
    model: "Module", options: ForwardOptions, recent: StepFeatureCache, operations: OperationCounter
) -> None:
    """Leave out work that the model does not need, and count what is left. Call this after TRL's constructor.

    `recent` holds the features of a step's images; the trainer starts it anew at each step. `operations` is attached to
    the model. Raise `ModelError` for a `vision_cache` that cannot be used.
    """
    # First, because packing tells the counter of padding that no mask shows. It registers hooks, which run whatever the
    # forward is: of the language model it sees the packed batch, and of the image encoder the images that it is asked
    # for.
    operations.attach(model)
    # Images and question are computed once for all answers to them, and short rows leave no padding. Rows of a family
    # with its own processor have images in layouts that only its model knows.
    if not options.own_processor:
        share_prefixes(model, options.packing, operations)
    # On CPUs TRL's head scores tokens without a label too. It wraps the forward with that head, and relies on `keep`,
    # which `share_prefixes` gave the backbone.
    if options.packing.share or options.packing.pack:
        score_labelled(model)
    # Under sdpa Qwen's image encoders call attention once for each image or window. This sets the encoder's attention
    # function and wraps no forward, but the layers come before what wraps the encoder around them.
    attend_at_once(model)
    # transformers makes the patch embedding require gradients, so autograd goes through a frozen encoder.
    run_without_autograd(model)
    # Last, around the forward that computes: the reference, the rollout and the trained model see the same images
    # within a step, and epochs and runs see them again. A folder that the job names must work; features of a step are
    # kept where they can be.
    if options.vision_cache is not None:
        disk_cache = DiskFeatureCache(options.vision_cache, options.vision_cache_bytes, model)
        cache_features(model, recent, disk_cache)
    elif options.cache_step_features and not why_not_cached(model):
        cache_features(model, recent, None)
