"""Model FLOPs: the floating-point operations that a step needs, counted while the model runs.

Run folders, `ray-vlm runs compute` and the benchmarks use this definition. A multiplication and an addition are two
operations. A forward takes two for each weight and token, and four for each layer, channel of attention and pair of
tokens that attend to each other. A backward takes as many again for the gradients of activations (of attention twice as
many), and two more for each trained weight and token. Only work that the batch needs counts: tokens without padding,
pairs that the causal mask allows, positions that the head scores, patches that the image encoder sees. Not counted are
recomputed activations, dequantisation, norms, embeddings, optimizers, and image encoders without a grid of patches. MFU
is thus model FLOPs utilisation as Chowdhery et al. 2022 (arXiv:2204.02311) define it, and a step with shared prefixes
needs fewer operations than one that repeats them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ray_vlm.models.backbone import base_of, language_layers, language_model
from ray_vlm.models.lora import num_weights

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ModelSize:
    """Weights and widths that determine how many operations a model takes.

    `language`, `vision`: weights that multiply each token of the language model, or each patch of the image encoder
    (mergers, which see several patches at once, count in proportion); of experts those that a token uses.
    `*_trained`: the trained ones among them. `head`: weights of the output projection. `language_attention`,
    `vision_attention`, `window_attention`: channels of attention, summed over the layers that attend to the whole row,
    the whole image, or windows of `window` patches.
    """

    language: float
    language_trained: float
    head: float
    head_trained: bool
    language_attention: int
    vision: float = 0.0
    vision_trained: float = 0.0
    vision_attention: int = 0
    window_attention: int = 0
    window: int = 0


@dataclass(frozen=True)
class Work:
    """The inputs of a model's forwards: `tokens` of the language model without padding, `pairs` of tokens that attend
    to each other, positions `scored` by the head, `patches` of the image encoder, and pairs of patches of one frame."""

    tokens: int = 0
    pairs: int = 0
    scored: int = 0
    patches: int = 0
    patch_pairs: int = 0


def count_flops(size: ModelSize, work: Work, backward: bool) -> float:
    """Return the model FLOPs of a forward of this work, with or without its backward."""
    linear = 2 * (size.language * work.tokens + size.head * work.scored)
    attention = 4 * size.language_attention * work.pairs
    vision_linear = 2 * size.vision * work.patches
    vision_pairs = size.vision_attention * work.patch_pairs + size.window_attention * size.window * work.patches
    vision = vision_linear + 4 * vision_pairs
    if not backward:
        return linear + attention + vision
    trained = size.language_trained * work.tokens + (size.head * work.scored if size.head_trained else 0)
    language = 2 * linear + 3 * attention + 2 * trained
    if not size.vision_trained:  # a frozen encoder has no backward
        return language + vision
    return language + 2 * vision_linear + 3 * 4 * vision_pairs + 2 * size.vision_trained * work.patches


def measure_size(model: "Module") -> ModelSize:
    """Measure a vision-language model, with or without an adapter. Every 4-bit weight counts as one."""
    import torch

    base: Any = base_of(model)
    encoder, head = base.get_encoder(modality="image"), base.get_output_embeddings().weight
    text, vision = base.config.get_text_config(), base.config.vision_config
    tables = {id(m.weight) for m in base.modules() if isinstance(m, torch.nn.Embedding)} | {id(head)}
    language, language_trained = _count_weights(language_model(base), tables, _share_of_experts(text))
    patches_at_once = getattr(vision, "spatial_merge_size", 1) ** 2
    of_vision = of_vision_trained = 0.0
    for name, module in encoder.named_children():
        total, trained = _count_weights(module, tables)
        seen_at_once = patches_at_once if "merger" in name else 1
        of_vision, of_vision_trained = of_vision + total / seen_at_once, of_vision_trained + trained / seen_at_once
    heads = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    full_attention, windows, window = _vision_attention(vision)
    return ModelSize(
        language=language,
        language_trained=language_trained,
        head=float(num_weights(head)),
        head_trained=bool(head.requires_grad),
        language_attention=heads * len(language_layers(base)),
        vision=of_vision,
        vision_trained=of_vision_trained,
        vision_attention=full_attention,
        window_attention=windows,
        window=window,
    )


class OperationCounter:
    """Counts the work of every forward of the model that it is attached to until `take`.

    Counts stay on the device until they are taken, so no forward waits for the device.
    """

    def __init__(self) -> None:
        self._size: ModelSize | None = None
        self._paused = False
        self._counts: dict[bool, dict[str, int | Tensor]] = {True: {}, False: {}}  # by whether a backward follows

    def attach(self, model: "Module") -> None:
        """Measure the model, and register hooks on it, its language model and its image encoder."""
        self._size = measure_size(model)
        base: Any = base_of(model)
        encoder = base.get_encoder(modality="image")
        model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        language_model(base).register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True)
        _ATTACHED[base] = self

    def take(self) -> tuple[Work, float]:
        """Return the work since the last call, and its model FLOPs. This waits for the device."""
        parts = {backward: Work(**{name: int(n) for name, n in c.items()}) for backward, c in self._counts.items()}
        for counts in self._counts.values():
            counts.clear()
        work = Work(*map(sum, zip(*map(astuple, parts.values()), strict=True)))
        size = self._size
        return work, sum(count_flops(size, part, backward) for backward, part in parts.items()) if size else 0.0

    def leave_out(self, tokens: int, pairs: int) -> None:
        """Subtract tokens, and pairs of tokens, of the next forward that no mask shows to be needless."""
        self._add(tokens=-tokens, pairs=-pairs)

    def count_decoded(self, sequences: int, before: int) -> None:
        """Count one new token of each sequence after `before` others, for a decoding step that runs no hooks."""
        self._add(tokens=sequences, pairs=sequences * (before + 1), scored=sequences)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing while the body runs."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _add(self, **counts: "int | Tensor") -> None:
        import torch

        if self._paused:
            return
        totals = self._counts[torch.is_grad_enabled()]
        for name, value in counts.items():
            totals[name] = totals.get(name, 0) + value

    def _before_model(self, module: "Module", args: tuple, kwargs: dict[str, Any]) -> None:
        labels, shifted, ids = (kwargs.get(name) for name in ("labels", "shift_labels", "input_ids"))
        if shifted is not None:
            self._add(scored=(shifted != -100).sum())
        elif labels is not None:
            self._add(scored=(labels[:, 1:] != -100).sum())
        elif ids is not None:
            self._add(scored=len(ids) * (kwargs.get("logits_to_keep") or ids.shape[1]))

    def _before_decoder(self, module: "Module", args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("inputs_embeds")
        inputs = kwargs["input_ids"] if inputs is None else inputs
        rows, width = inputs.shape[:2]
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        before = cache.get_seq_length() if cache is not None else 0
        if before:  # decoding: new tokens after a cache, without padding
            self._add(tokens=rows * width, pairs=rows * (width * before + width * (width + 1) // 2))
        elif mask is None or isinstance(mask, dict):
            self._add(tokens=rows * width, pairs=rows * (width * (width + 1) // 2))
        else:  # [rows, tokens]
            lengths = mask.sum(dim=1)
            self._add(tokens=lengths.sum(), pairs=(lengths * (lengths + 1) // 2).sum())

    def _before_encoder(self, module: "Module", args: tuple, kwargs: dict[str, Any]) -> None:
        grid = kwargs.get("grid_thw")
        grid = args[1] if grid is None and len(args) > 1 else grid
        if grid is not None:
            patches, frame = grid.prod(dim=-1), grid[:, 1] * grid[:, 2]
            self._add(patches=patches.sum(), patch_pairs=(patches * frame).sum())


_ATTACHED: WeakKeyDictionary[Any, OperationCounter] = WeakKeyDictionary()  # by the base


def counter_of(model: "Module") -> OperationCounter:
    """Return the counter that is attached to the model, or one whose numbers nobody takes."""
    return _ATTACHED.get(base_of(model)) or OperationCounter()


def _count_weights(module: "Module", without: set[int], experts: float = 1.0) -> tuple[float, float]:
    """Return the weights that multiply a token, and the trained ones among them.

    `without`: ids of parameters that do not count. `experts`: the share of experts that a token uses."""
    total = trained = 0.0
    for name, parameter in module.named_parameters():
        frozen_lora = ".lora_" in f".{name}" and not parameter.requires_grad  # the adapter of a reference
        if parameter.dim() < 2 or id(parameter) in without or frozen_lora:
            continue
        used = num_weights(parameter) * (experts if ".experts." in f".{name}" else 1.0)
        total += used
        trained += used if parameter.requires_grad else 0.0
    return total, trained


def _share_of_experts(text: "PreTrainedConfig") -> float:
    count = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    return getattr(text, "num_experts_per_tok", count) / count if count else 1.0


def _vision_attention(vision: "PreTrainedConfig") -> tuple[int, int, int]:
    """Return channels summed over layers with full attention and over layers with windows, and patches of a window."""
    depth: int = getattr(vision, "depth", None) or vision.num_hidden_layers
    width: int = getattr(vision, "embed_dim", None) or vision.hidden_size
    full_blocks = getattr(vision, "fullatt_block_indexes", None)
    if full_blocks is None:
        return width * depth, 0, 0
    window = (vision.window_size // vision.patch_size) ** 2
    return width * len(full_blocks), width * (depth - len(full_blocks)), window
