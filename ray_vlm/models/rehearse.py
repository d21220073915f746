"""Rehearse a training step with fake tensors: the real modules, adapters, checkpointing and loss, without memory.

Nothing is downloaded or computed: torch's fake tensors have shapes and dtypes only. 4-bit layers and experts are
replaced by ones that dequantise as the real ones do; the image encoder runs block by block. `LiveBytes` counts what is
alive meanwhile, `estimate` adds what does not depend on activations, and `choose` looks for the largest batch that
fits.
"""

import math
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ray_vlm.config.train import Recompute
from ray_vlm.models.architectures import choose_attention
from ray_vlm.models.attention import attend_at_once
from ray_vlm.models.backbone import language_layers, language_model, recompute
from ray_vlm.models.engine_memory import engine_of
from ray_vlm.models.families import Family
from ray_vlm.models.fused_adapter import fuse_adapters
from ray_vlm.models.head_tiles import cuda_tiles
from ray_vlm.models.kernels import Kernels, fuse_layers
from ray_vlm.models.layouts import PackedRow, plan_keys
from ray_vlm.models.libraries import quiet_libraries
from ray_vlm.models.lora import freeze_parts, lora_config
from ray_vlm.models.memory import (
    FRAGMENTATION,
    NF4,
    Batch,
    Choice,
    Estimate,
    RowSize,
    StepSettings,
    Weights,
    count_groups,
    cuda_parts,
    fit_groups,
    group_bytes,
    merge_of,
    micro_sizes,
    plan_batch,
    shared_out,
)
from ray_vlm.models.precision import autocast, dtype_of
from ray_vlm.models.prefix_sharing import plan_packing
from ray_vlm.models.rehearsed_layers import FourBit, FourBitExperts, rehearse_experts
from ray_vlm.models.selective import keep_products
from ray_vlm.models.shared_attention import attend_prefix_groups

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SELECTIVE_FROM = 0.4  # of the layers: all layers' elementwise work costs about as much as so many layers as a whole
_CHUNK = 32768  # vocabulary in one tile of TRL's head
_HEAD_OUTPUTS = {  # outputs that TRL's trainers ask the head for, for each token
    "sft": ("log_probs", "entropy", "is_top1"),
    "dpo": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "grpo": ("log_probs", "entropy"),
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that torch allocates while it is active, until it frees them, on any device.

    Works with real tensors and with fake ones. `known`: earlier tensors that do not count. `now`, `peak`: bytes.
    `peaks`: the peak of each phase, by its name; `begin` starts another.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self.phase, self.peaks = "", {"": 0}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._note(value)
        return out

    def begin(self, phase: str) -> None:
        """Start a phase: count the peak from here on under this name."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.now)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()  # views share it
        key = storage._cdata
        if key in self._known or key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


class Rehearsal:
    """A fake model of a job, to run batches through. `packing`: which rows share prefixes and are packed; `merge`:
    patches along a side of a visual token; `num_layers`: of the language model."""

    def __init__(self, config: "PreTrainedConfig", family: Family, settings: StepSettings):
        quiet_libraries()
        self.settings, self.family, self.config = settings, family, config
        self.packing = plan_packing(settings.method, settings.lora, settings.train.packing, family, config)
        self.merge = merge_of(config)
        self.dtype = dtype_of(settings.train.precision)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.model, self.base = self._build()
        _pretend(self.model, self.mode)
        attend_at_once(self.model)
        attend_prefix_groups(self.model)
        self.encoder: Any = self.base.get_encoder(modality="image")
        self.num_layers = len(language_layers(self.base))

    @property
    def sees(self) -> bool:
        """Whether the image encoder can be rehearsed, as Qwen's can."""
        return hasattr(self.encoder, "blocks")

    @property
    def largest(self) -> float:
        """Bytes of the largest module's own weights, usually the embeddings or fused experts."""
        in_4bit = self._in_4bit()

        def size(parameter: Tensor) -> float:
            return (NF4 if id(parameter) in in_4bit else parameter.element_size()) * parameter.numel()

        return float(max(sum(map(size, module.parameters(recurse=False))) for module in self.model.modules()))

    def weights(self) -> Weights:
        """Return the bytes of the loaded model."""
        quantised = plain = trained = embedded = 0.0
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, torch.nn.Embedding)}
        in_4bit = self._in_4bit()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                trained += 4 * parameter.numel()
                embedded += 4 * parameter.numel() if id(parameter) in embeddings else 0
            elif id(parameter) in in_4bit:
                quantised += NF4 * parameter.numel()
            else:
                plain += parameter.element_size() * parameter.numel()
        return Weights(quantised, plain, trained, embedded)

    def _in_4bit(self) -> set[int]:
        """Return the ids of the weights that are held in 4 bit."""
        kinds = (FourBit, FourBitExperts)
        layers = [module for module in self.model.modules() if isinstance(module, kinds)]
        return {id(weight) for layer in layers for weight in layer.parameters(recurse=False)}

    def run(
        self, batch: Batch, checkpointed: Recompute | None = None, watch: AbstractContextManager | None = None
    ) -> LiveBytes:
        """Run one forward and backward, and return the live bytes beside the weights, gradients included.

        `checkpointed`: how many of the first layers recompute their activations, or `selective`; None: as the job says.
        `watch`: a second context that sees every operation.
        """
        checkpointing = self.settings.train.gradient_checkpointing if checkpointed is None else checkpointed
        count = self.num_layers if checkpointing in (True, "selective") else int(checkpointing)
        keep_products(self.model, checkpointing == "selective")
        for number, layer in enumerate(language_layers(self.base)):
            layer.gradient_checkpointing = number < count
        for module in self.encoder.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = count > 0
        known = [*self.model.parameters(), *self.model.buffers()]
        self.model.zero_grad()
        as_trained = autocast(self.settings.train.precision, "cpu")
        with self.mode, LiveBytes(known) as live, watch or nullcontext(), as_trained:
            live.begin("vision")
            pixels = self._pixels(batch)
            features, cached_features = self._see(batch, pixels), self._cached_features(batch)
            live.begin("forward")
            loss = self._loss(batch, features, live)
            live.begin("backward")
            with self._head_path():
                loss.backward()
            del loss, features, pixels, cached_features
        return live

    def _build(self) -> tuple[Any, Any]:
        from peft import get_peft_model
        from transformers import AutoModelForImageTextToText

        settings = self.settings
        attention: Any = choose_attention(self.config)
        base = AutoModelForImageTextToText.from_config(self.config, dtype=self.dtype, attn_implementation=attention)
        if settings.lora is None:
            return freeze_parts(base, settings.train.freeze or (), self.family).float(), base
        base.requires_grad_(False)
        if settings.load_in_4bit:
            for name, module in base.named_modules():
                if re.fullmatch(self.family.linear["language"], name):
                    module.__class__ = FourBit
                    module.copied = not settings.kernels or settings.cluster.zero_stage == 3  # by PEFT
            rehearse_experts(base, "cuda" if settings.cluster.gpus_per_worker else "cpu")
        model = get_peft_model(base, lora_config(settings.lora, self.family))
        if settings.kernels:
            # The norm alone of the kernels: this process may not have those that the workers have.
            fuse_layers(model, Kernels("stand-ins", norm=_FusedNorm.apply))
            if settings.cluster.zero_stage < 3:
                fuse_adapters(model)
        model.train()
        recompute(base, {"use_reentrant": False})  # `run` sets which layers do
        return model, base

    def _pixels(self, batch: Batch) -> Tensor | None:
        """Return the image inputs of the batch, which live as long as the batch."""
        if not batch.patches or not self.sees:
            return None
        values = self.encoder.patch_embed.proj.weight[0].numel()
        return torch.empty(round(sum(batch.patches) * batch.copies), values)

    def _cached_features(self, batch: Batch) -> Tensor | None:
        """Return the features of a step's images, which DPO and GRPO keep for the step (`StepFeatureCache`)."""
        if not batch.patches or not self.sees or self.settings.method.name == "sft":
            return None
        layers = 1 + len(getattr(self.encoder, "deepstack_visual_indexes", ()))
        tokens = sum(batch.patches) * batch.copies / self.encoder.spatial_merge_size**2
        width = self.base.get_input_embeddings().weight.shape[1]
        return torch.empty(round(tokens), layers * width, dtype=self.dtype)

    def _see(self, batch: Batch, pixels: Tensor | None) -> Tensor | None:
        """Run the image encoder's blocks, with autograd only if something in it is trained."""
        if pixels is None:
            return None
        encoder = self.encoder
        learns = any(parameter.requires_grad for parameter in encoder.parameters())
        total, width = sum(batch.patches), encoder.patch_embed.proj.weight.shape[0]
        with torch.set_grad_enabled(learns):
            hidden = encoder.patch_embed(pixels[:total])
            hidden = hidden.reshape(total, width)
            heads = self.config.vision_config.num_heads
            rotary = torch.empty(total, width // heads, dtype=torch.float32)  # [patches, width of a head]
            ends = _Ends(batch.patches)
            for block in encoder.blocks:
                hidden = block(hidden, cu_seqlens=ends, position_embeddings=(rotary, rotary))
            return encoder.merger(hidden)

    def _loss(self, batch: Batch, features: Tensor | None, live: LiveBytes) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        base = self.base
        ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.long)
        hidden = base.get_input_embeddings()(ids)  # [rows, tokens, hidden]
        if features is not None:
            image_mask = torch.zeros(batch.rows, batch.tokens, 1, dtype=torch.bool)
            hidden = hidden.masked_scatter(image_mask, features.to(hidden.dtype))
        if not hidden.requires_grad:
            hidden.requires_grad_(True)  # as `enable_input_require_grads` has it
        # Positions as the model has them: without any, transformers looks for packed rows and makes a mask.
        text = self.config.get_text_config()
        by_axis = "mrope_section" in str(text.rope_parameters) or not self.family.stock_images  # of Qwen
        positions = torch.zeros(*(3,) * by_axis, batch.rows, batch.tokens, dtype=torch.long)
        options: dict[str, Any] = {"attention_mask": None, "position_ids": positions, "use_cache": False}
        if width := getattr(text, "hidden_size_per_layer_input", 0):  # Gemma 4: an embedding for each layer
            layers = (text.num_hidden_layers, width)
            options["per_layer_inputs"] = torch.empty(batch.rows, batch.tokens, *layers, dtype=self.dtype)
        if batch.masked:
            options["attention_mask"] = torch.zeros(batch.rows, 1, batch.tokens, batch.tokens, dtype=torch.bool)
        if batch.groups:
            keys = plan_keys(batch.groups) if self.settings.cluster.gpus_per_worker else None
            options["packed_row"] = PackedRow(batch.groups, keys)
        out = language_model(base)(inputs_embeds=hidden, **options).last_hidden_state
        if batch.spread is not None:  # as `share_prefixes` copies hidden states back to TRL's batch
            out = out.reshape(-1, out.shape[-1])[torch.zeros(batch.spread, dtype=torch.long)]
            ids = torch.zeros(batch.spread, dtype=torch.long)
        live.begin("head")
        head = base.get_output_embeddings()
        flat, targets = out[:, :-1].reshape(-1, out.shape[-1]), ids[:, 1:].reshape(-1)
        if batch.labelled is not None:
            chosen = torch.zeros(batch.labelled, dtype=torch.long)
            flat, targets = flat[chosen], targets[chosen]
        with self._head_path():
            outputs = ChunkedLogProbFunction.apply(
                flat, head.weight, head.bias, targets, 1.0, _CHUNK, None, 1.0, _HEAD_OUTPUTS[self.settings.method.name]
            )
        return -outputs[0].sum()

    def _head_path(self) -> AbstractContextManager[None]:
        """Return the context in which TRL's head takes as much as on the job's device."""
        return cuda_tiles() if self.settings.cluster.gpus_per_worker else nullcontext()


def _pretend(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Replace all tensors on the meta device by fake tensors on the CPU; tied weights stay tied."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is None:
                continue
            if id(value) not in fakes:
                fake = FakeTensor(mode, torch.empty_like(value, device="meta"), torch.device("cpu"))
                is_weight = isinstance(value, torch.nn.Parameter)
                fakes[id(value)] = torch.nn.Parameter(fake, value.requires_grad) if is_weight else fake
            tensors: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
            tensors[name] = fakes[id(value)]


class _Ends:
    """Stands for `cu_seqlens`, the ends of the images among the patches: encoders take differences to get lengths, and
    the largest of them.

    Fake tensors have no values, so the differences of a tensor of ends would not be known."""

    def __init__(self, lengths: tuple[int, ...], started: bool = False):
        self.lengths, self.started = lengths, started

    def __getitem__(self, part: slice) -> "_Ends":
        return _Ends(self.lengths, part.start is not None)

    def __sub__(self, other: "_Ends") -> "_Ends":
        return self

    def max(self) -> "_Ends":
        """Return the lengths of which `item` returns the largest."""
        return self

    def item(self) -> int:
        """Return the patches of the largest image."""
        return max(self.lengths)

    def tolist(self) -> list[int]:
        """Return the patches of each image."""
        return list(self.lengths)


class _FusedNorm(torch.autograd.Function):
    """RMSNorm as torch and Liger have it on GPUs: one kernel, which keeps its input and a number for each row."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(values, torch.empty(values.shape[:-1], dtype=torch.float32))
        ctx.learns, ctx.weight = weight.requires_grad, weight
        return torch.empty_like(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return torch.empty_like(gradient), torch.empty_like(ctx.weight) if ctx.learns else None, None


def estimate(
    rehearsal: Rehearsal,
    sizes: Sequence[RowSize],
    layers: Recompute | None = None,
    settings: StepSettings | None = None,
    room: float | None = None,
) -> Estimate:
    """Estimate the memory of one worker for a micro-batch of these rows.

    `layers`: how many of the first layers recompute their activations, or `selective`; None: as the job says.
    `settings`: in place of the rehearsal's, with another micro-batch size. `room`: bytes into which the answers that
    are sampled at a time must fit; None: those to all prompts of a step are sampled at once."""
    settings, weights = settings or rehearsal.settings, rehearsal.weights()
    live = rehearsal.run(plan_batch(settings, sizes, rehearsal.merge, rehearsal.packing), layers)
    train = settings.train
    parts = shared_out(settings.cluster, train.precision, weights, rehearsal.largest, train.optimizer)
    step = max(0.0, live.peak - weights.trained)  # without gradients, which `shared_out` counts
    when = max((name for name in live.peaks if name), key=lambda name: live.peaks[name])
    beside, slack = cuda_parts(settings), FRAGMENTATION if settings.cluster.gpus_per_worker else 0.0
    longest = max(sizes, key=lambda size: size.tokens)
    sampled, portion = group_bytes(settings, rehearsal.config, longest), None
    engine = engine_of(settings, rehearsal.config, weights, longest)
    if engine is not None:  # in its own process: it is awake while answers are sampled, and torch holds none of it
        beside |= {"vLLM, all the time": engine.asleep}
        awake = engine.total - engine.asleep
        if awake > step:
            parts |= {"sampling of answers": awake} | beside
            return Estimate(parts, "sampling", step)
    if sampled:
        groups = portion = count_groups(settings)
        if room is not None:
            left = (room - sum(parts.values()) - sum(beside.values())) / (1 + slack)
            portion = fit_groups(left, sampled, groups)
        sampled *= portion
        portion = portion if portion < groups else None
    if sampled > step:
        parts["sampling of answers"], when = sampled, "sampling"
    else:
        parts["activations and buffers"] = step
    parts |= beside | {"fragmentation": slack * max(step, sampled)}
    return Estimate({name: value for name, value in parts.items() if value}, when, step, portion)


def choose(rehearsal: Rehearsal, size: RowSize, micros: Sequence[int], room: float) -> Choice | None:
    """Choose what recomputes least with the smallest of `micros` (ascending) in `room` bytes: no layer, all layers but
    not their products, or the fewest layers. Then choose the largest of `micros` that fits with that. Return None if
    nothing fits.

    Answers of GRPO are sampled in portions that fit."""

    def estimate_at(micro: int, layers: Recompute) -> Estimate:
        settings = rehearsal.settings.with_rows(micro)
        return estimate(rehearsal, micro_sizes(settings.method, settings.train, size), layers, settings, room)

    smallest, fastest = estimate_at(micros[0], rehearsal.num_layers), estimate_at(micros[0], 0)
    layers: Recompute = 0
    estimated = fastest
    if fastest.peak > room:
        if smallest.peak > room:
            return None
        per_layer = (fastest.peak - smallest.peak) / rehearsal.num_layers  # memory falls evenly with the layers
        count = min(rehearsal.num_layers, math.ceil((fastest.peak - room) / per_layer))
        while (estimated := estimate_at(micros[0], count)).peak > room:
            count += 1
        layers = count
        if count > _SELECTIVE_FROM * rehearsal.num_layers:
            kept = estimate_at(micros[0], "selective")
            layers, estimated = ("selective", kept) if kept.peak <= room else (layers, estimated)
    micro = micros[0]
    if len(micros) > 1:
        more = estimate_at(micros[1], layers)
        per_row = (more.peak - estimated.peak) / (micros[1] - micros[0])  # memory grows evenly with the rows
        likely = [m for m in reversed(micros[1:]) if estimated.peak + per_row * (m - micros[0]) <= room]
        for larger in likely:
            if (larger_estimate := estimate_at(larger, layers)).peak <= room:
                return Choice(larger, layers, larger_estimate)
    return Choice(micro, layers, estimated)
