"""Every change to a model's forward that training makes, in order, each with its reason.

A change wraps a forward that is there already, so the order matters. `prepare_forward` stands before TRL's constructor
and `change_forward` after it: in between TRL replaces the model's forward by one with its fused head. Evaluation and
`generate` run the same wrapped forwards, which pass on every call that they are not meant for. For the time of a
rollout `dequantize.py` replaces forwards of single layers as well.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_vlm.config.train import Recompute
from ray_vlm.errors import ModelError
from ray_vlm.models.attention import attend_at_once
from ray_vlm.models.backbone import after_recompute, ensure_backbone, recompute_first
from ray_vlm.models.frozen_encoder import (
    DiskFeatureCache,
    StepFeatureCache,
    cache_features,
    run_without_autograd,
    why_not_cached,
)
from ray_vlm.models.fused_adapter import fuse_adapters, separate_adapters
from ray_vlm.models.kernels import choose_kernels, fuse_layers, separate_layers
from ray_vlm.models.layouts import PackingOptions
from ray_vlm.models.operations import OperationCounter
from ray_vlm.models.prefix_sharing import keep_scored, score_labelled, share_prefixes
from ray_vlm.models.selective import keep_products
from ray_vlm.models.self_check import Switch
from ray_vlm.models.shared_attention import attend_prefix_groups, masked_attention
from ray_vlm.models.vision_inputs import use_image_plans

if TYPE_CHECKING:
    from torch.nn import Module


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForwardOptions:
    """What a job wants of its model's forward.

    `recompute`: whether activations are recomputed in the backward pass, in how many of the language model's first
    layers, or all but products (`selective`). `packing`: which rows share prefixes and are packed. `own_processor`: the
    family's own processor handles images, and rows are left as they are. `vision_cache`: a cache on disk for
    features of images. `cache_step_features`: keep the features of a step's
    images, where a method sees an image more than once (not under ZeRO-3, where all workers must run the encoder
    together). `kernels`: fused norms, rotary embeddings and activations; `fused_adapters`: adapters that are added
    without copies (not under ZeRO-3, which gathers the weights of modules that run).
    """

    recompute: Recompute
    packing: PackingOptions
    own_processor: bool = False
    vision_cache: DiskFeatureCache | None = None
    cache_step_features: bool = False
    kernels: bool = False
    fused_adapters: bool = False


def prepare_forward(model: "Module", options: ForwardOptions) -> None:
    """Change the model, with or without an adapter, as TRL's trainers expect it. Call this before their constructor."""
    # TRL's fused head asks `model.base_model` for hidden states, and Llama-4 has no such part.
    ensure_backbone(model)
    # The Trainer turns recomputation on when it begins to train, in all layers: so the method that does so is replaced.
    if options.recompute == "selective":
        after_recompute(model, lambda: keep_products(model))
    elif options.recompute and options.recompute is not True:
        recompute_first(model, options.recompute)


def change_forward(
    model: "Module", options: ForwardOptions, recent: StepFeatureCache, operations: OperationCounter
) -> None:
    """Leave out work that the model does not need, and count what is left. Call this after TRL's constructor.

    `recent` holds the features of a step's images; the trainer starts it anew at each step. `operations` is attached to
    the model. Raise `ModelError` for a `vision_cache` that cannot be used, and for an attention that cannot pack.
    """
    # Layers before everything around them. Each gets a subclass of its class, so its hooks and wrappers stay.
    if options.kernels:
        kernels, note = choose_kernels(str(next(model.parameters()).device))
        if fuse_layers(model, kernels):
            logger.info(note)
    if options.fused_adapters:
        fuse_adapters(model)
    # First of what wraps a forward, because layouts tell the counter of tokens that no mask shows. It registers hooks,
    # which run whatever the forward is: of the language model it sees the packed row, and of the image encoder the
    # images that it is asked for.
    operations.attach(model)
    # Images and question are computed once for all answers to them, and short rows leave no padding. Rows of a family
    # with its own processor have images in layouts that only its model knows. Attention over the packed row is a
    # function of the language model's attention, and wraps no forward.
    if not options.own_processor:
        if not attend_prefix_groups(model) and (options.packing.share or options.packing.pack):
            raise ModelError(
                "the language model does not attend by torch's sdpa, and no other attention keeps the rows of a packed "
                "row apart. Set train.packing=false and method.share_prefixes=false."
            )
        share_prefixes(model, operations)
    else:
        keep_scored(model)
    # On CPUs TRL's head scores tokens without a label too. It wraps the forward with that head, and relies on `keep`,
    # which the backbone takes now.
    score_labelled(model)
    # Under sdpa Qwen's image encoders call attention once for each image or window. This sets the encoder's attention
    # function and wraps no forward, but the layers come before what wraps the encoder around them.
    attend_at_once(model)
    # transformers reads the images' grids back from the device. This passes what the host worked out from them.
    use_image_plans(model)
    # transformers makes the patch embedding require gradients, so autograd goes through a frozen encoder.
    run_without_autograd(model)
    # Last, around the forward that computes: the reference, the rollout and the trained model see the same images
    # within a step, and epochs and runs see them again. A folder that the job names must work; features of a step are
    # kept where they can be.
    if options.vision_cache is not None:
        cache_features(model, recent, options.vision_cache)
    elif options.cache_step_features and not why_not_cached(model):
        cache_features(model, recent, None)


def list_switches(model: "Module", options: ForwardOptions) -> list[Switch]:
    """Return what has been switched on in place of the plain path, for `self_check.compare_paths`."""

    @contextmanager
    def recompute_all() -> Iterator[None]:
        keep_products(model, kept=False)
        try:
            yield
        finally:
            keep_products(model)

    switches = []
    if not options.own_processor and (options.packing.share or options.packing.pack):
        keys = {"train.packing=false": options.packing.pack, "method.share_prefixes=false": options.packing.share}
        off = " and ".join(key for key, used in keys.items() if used)
        switches.append(Switch("attention over packed rows", off, lambda: masked_attention(model)))
    if options.kernels:
        switches.append(Switch("fused kernels", "model.kernels=none", lambda: separate_layers(model)))
    if options.fused_adapters:
        switches.append(Switch("fused adapters", "model.kernels=none", lambda: separate_adapters(model)))
    if options.recompute == "selective":
        switches.append(Switch("selective checkpointing", "train.gradient_checkpointing=true", recompute_all))
    return switches
