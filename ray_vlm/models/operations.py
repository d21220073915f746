"""Model FLOPs: the floating-point operations that a step needs, counted while the model runs.

One definition for run folders, `ray-vlm runs compute` and the benchmarks. A multiplication and an addition are two
operations. A forward takes two for each weight and token, and four for each layer, channel of attention and pair of
tokens that see each other. A backward takes as many again for the gradients of activations (of attention twice as
many), and for the weights that learn two more for each weight and token. Only work that the batch needs counts: tokens
that went through the model without padding, pairs that a causal mask lets see each other, positions that the head
scored, patches that the image encoder saw. Left out are recomputed activations, dequantisation, norms, embeddings,
optimizers, and image encoders that are given no grid of patches. MFU is thus model FLOPs utilisation as Chowdhery et
al. 2022 (arXiv:2204.02311) define it, and a step that shares beginnings needs fewer operations than one that repeats
them.
"""

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from ray_vlm.models.backbone import base_of, language_layers, language_model
from ray_vlm.models.lora import num_weights

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


@dataclass(frozen=True)
class ModelSize:
    """Weights and widths that decide how many operations a model takes.

    `language`, `vision`: weights that multiply each token of the language model, each patch of the image encoder (its
    mergers, which see several patches at once, by their share); of experts those that a token uses. `*_trained`: those
    of them that learn. `head`: weights of the output projection. `language_attention`, `vision_attention`,
    `window_attention`: channels of attention, summed over the layers that look at the whole row, the whole image, or
    windows of `window` patches.
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
    """What went through a model: `tokens` of the language model without padding, `pairs` of tokens that see each other,
    positions `scored` by the head, `patches` of the image encoder, and pairs of patches of the same image."""

    tokens: int = 0
    pairs: int = 0
    scored: int = 0
    patches: int = 0
    patch_pairs: int = 0


def count_flops(size: ModelSize, work: Work, backward: bool) -> float:
    """Model FLOPs of one forward of this work, with its backward or without."""
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
    """The size of a vision-language model, under an adapter or not. 4-bit weights count whole."""
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
    whole, windows, window = _vision_attention(vision)
    return ModelSize(
        language=language,
        language_trained=language_trained,
        head=float(num_weights(head)),
        head_trained=bool(head.requires_grad),
        language_attention=heads * len(language_layers(base)),
        vision=of_vision,
        vision_trained=of_vision_trained,
        vision_attention=whole,
        window_attention=windows,
        window=window,
    )


class OperationCounter:
    """Counts what goes through a model, in every forward that is called on it until `take`.

    It hangs hooks on the model, its language model and its image encoder; counts stay on the device until they are
    taken, so nothing waits for the device in between.
    """

    def __init__(self, model: "Module"):
        self.size = measure_size(model)
        self._counts: dict[bool, dict[str, int | Tensor]] = {True: {}, False: {}}  # by whether a backward follows
        base: Any = base_of(model)
        encoder = base.get_encoder(modality="image")
        model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        language_model(base).register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True)

    def take(self) -> tuple[Work, float]:
        """The work since the last call, and its model FLOPs. Waits for the device."""
        parts = {backward: Work(**{name: int(n) for name, n in c.items()}) for backward, c in self._counts.items()}
        for counts in self._counts.values():
            counts.clear()
        work = Work(*map(sum, zip(*map(astuple, parts.values()), strict=True)))
        return work, sum(count_flops(self.size, part, backward) for backward, part in parts.items())

    def leave_out_padding(self, lengths: list[int]) -> None:
        """Padding behind packs, which their mask cannot tell from tokens: of each pack its length."""
        self._add(tokens=-sum(lengths), pairs=-sum(n * (n + 1) // 2 for n in lengths))

    def _add(self, **counts: "int | Tensor") -> None:
        import torch

        kept = self._counts[torch.is_grad_enabled()]
        for name, value in counts.items():
            kept[name] = kept.get(name, 0) + value

    def _before_model(self, module: "Module", args: tuple, kwargs: dict[str, Any]) -> None:
        labels, shifted, ids = (kwargs.get(name) for name in ("labels", "shift_labels", "input_ids"))
        if shifted is not None:
            self._add(scored=(shifted != -100).sum())
        elif labels is not None:
            self._add(scored=(labels[:, 1:] != -100).sum())
        elif ids is not None:
            self._add(scored=len(ids) * (kwargs.get("logits_to_keep") or ids.shape[1]))

    def _before_decoder(self, module: "Module", args: tuple, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        given = kwargs["input_ids"] if given is None else given
        rows, width = given.shape[:2]
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        before = cache.get_seq_length() if cache is not None else 0
        if before:  # tokens of answers that are being written; no padding among them
            self._add(tokens=rows * width, pairs=rows * (width * before + width * (width + 1) // 2))
        elif mask is None or isinstance(mask, dict):
            self._add(tokens=rows * width, pairs=rows * (width * (width + 1) // 2))
        elif mask.dim() == 2:
            lengths = mask.sum(dim=1)
            self._add(tokens=lengths.sum(), pairs=(lengths * (lengths + 1) // 2).sum())
        else:  # which token of a pack sees which
            self._add(tokens=rows * width, pairs=mask.sum())

    def _before_encoder(self, module: "Module", args: tuple, kwargs: dict[str, Any]) -> None:
        grid = kwargs.get("grid_thw")
        grid = args[1] if grid is None and len(args) > 1 else grid
        if grid is not None:
            patches, frame = grid.prod(dim=-1), grid[:, 1] * grid[:, 2]
            self._add(patches=patches.sum(), patch_pairs=(patches * frame).sum())


def _count_weights(module: "Module", without: set[int], experts: float = 1.0) -> tuple[float, float]:
    """Weights that multiply a token, and those of them that learn. `experts`: the share of experts that each uses."""
    total = trained = 0.0
    for name, parameter in module.named_parameters():
        frozen_lora = ".lora_" in f".{name}" and not parameter.requires_grad  # a reference's adapter lies beside
        if parameter.dim() < 2 or id(parameter) in without or frozen_lora:
            continue
        used = num_weights(parameter) * (experts if ".experts." in f".{name}" else 1.0)
        total += used
        trained += used if parameter.requires_grad else 0.0
    return total, trained


def _share_of_experts(text: Any) -> float:
    count = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    return getattr(text, "num_experts_per_tok", count) / count if count else 1.0


def _vision_attention(vision: Any) -> tuple[int, int, int]:
    """Channels over layers that look at the whole image, over layers that look at windows, and patches of a window."""
    depth: int = getattr(vision, "depth", None) or vision.num_hidden_layers
    width: int = getattr(vision, "embed_dim", None) or vision.hidden_size
    whole = getattr(vision, "fullatt_block_indexes", None)
    if whole is None:
        return width * depth, 0, 0
    window = (vision.window_size // vision.patch_size) ** 2
    return width * len(whole), width * (depth - len(whole)), window
