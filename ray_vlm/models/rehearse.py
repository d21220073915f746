"""Rehearse a training step with fake tensors: the real modules, adapters, checkpointing and loss, without memory.

Nothing is downloaded or computed: torch's fake tensors have shapes and dtypes only. 4-bit layers are replaced by layers
that dequantise as bitsandbytes' do; the image encoder runs block by block.
"""

import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.models import library_logging
from ray_vlm.models.backbone import language_layers, language_model, recompute
from ray_vlm.models.families import Family
from ray_vlm.models.lora import freeze_parts, lora_config
from ray_vlm.models.precision import autocast, dtype_of

if TYPE_CHECKING:
    from ray_vlm.models.live import LiveBytes

NF4 = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes of a weight in NF4 with double quantisation, blocks of 64 and 256


@dataclass(frozen=True)
class Batch:
    """The input of one forward: `rows` of `tokens` each, and `patches` of each image before merging.

    `masked`: whether attention needs a mask, for padding or for branches. `spread`: rows and tokens of TRL's batch, to
    which hidden states are copied back if rows were shared or packed. `labelled`: tokens that the head scores; None:
    all. `copies`: image inputs that stay in memory for the whole step, as a multiple of this batch's.
    """

    rows: int
    tokens: int
    patches: tuple[int, ...] = ()
    masked: bool = False
    spread: tuple[int, int] | None = None
    labelled: int | None = None
    copies: float = 1.0


@dataclass(frozen=True)
class Weights:
    """Bytes of weights. `quantised`: in 4 bit; `plain`: the rest of the base; `trained`: trained ones, in float32."""

    quantised: float
    plain: float
    trained: float


class Rehearsal:
    """A fake model of a job, to run batches through."""

    def __init__(self, config: Any, job: JobConfig, family: Family):
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        library_logging.quiet_libraries()

        self.job, self.family, self.config = job, family, config
        self.dtype = dtype_of(job.train.precision)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.model, self.base = self._build()
        _pretend(self.model, self.mode)

    @property
    def sees(self) -> bool:
        """Whether the image encoder can be rehearsed, as Qwen's towers can."""
        return hasattr(self.base.get_encoder(modality="image"), "blocks")

    @property
    def largest(self) -> float:
        """Bytes of the largest module's own weights, usually the embeddings or fused experts."""
        modules = [list(module.parameters(recurse=False)) for module in self.model.modules()]
        return float(max(sum(p.element_size() * p.numel() for p in own) for own in modules))

    def weights(self) -> Weights:
        """Return the bytes of the loaded model."""
        quantised = plain = trained = 0.0
        in_4bit = {id(m.weight) for m in self.model.modules() if type(m).__name__ == "FourBit"}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                trained += 4 * parameter.numel()
            elif id(parameter) in in_4bit:
                quantised += NF4 * parameter.numel()
            else:
                plain += parameter.element_size() * parameter.numel()
        return Weights(quantised, plain, trained)

    def run(self, batch: Batch, checkpointed: int | None = None, watch: Any = None) -> "LiveBytes":
        """Run one forward and backward, and return the live bytes beside the weights, gradients included.

        `checkpointed`: how many of the first layers recompute their activations; None: as the job says. `watch`: a
        second context that sees every operation.
        """
        from ray_vlm.models.live import LiveBytes

        layers = language_layers(self.base)
        checkpointing = self.job.train.gradient_checkpointing if checkpointed is None else checkpointed
        count = len(layers) if checkpointing is True else int(checkpointing)
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number < count
        for module in self.base.get_encoder(modality="image").modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = count > 0
        known = [*self.model.parameters(), *self.model.buffers()]
        for parameter in self.model.parameters():
            parameter.grad = None
        with self.mode, LiveBytes(known) as live, watch or nullcontext(), autocast(self.job.train.precision, "cpu"):
            live.begin("vision")
            pixels = self._pixels(batch)
            features, cached_features = self._see(batch, pixels), self._cached_features(batch)
            live.begin("forward")
            loss = self._loss(batch, features, live)
            live.begin("backward")
            loss.backward()
            del loss, features, pixels, cached_features
        return live

    def _build(self) -> tuple[Any, Any]:
        from peft import get_peft_model
        from transformers import AutoModelForImageTextToText

        job = self.job
        base = AutoModelForImageTextToText.from_config(self.config, dtype=self.dtype, attn_implementation="sdpa")
        if job.lora is None:
            return freeze_parts(base, job.train.freeze or (), self.family).float(), base
        base.requires_grad_(False)
        if job.model.load_in_4bit:
            for name, module in base.named_modules():
                if re.fullmatch(self.family.linear["language"], name):
                    module.__class__ = _four_bit()
        model = get_peft_model(base, lora_config(job.lora, self.family))
        model.train()
        recompute(base, {"use_reentrant": False})  # `run` sets which layers do
        return model, base

    @property
    def num_layers(self) -> int:
        """Layers of the language model."""
        return len(language_layers(self.base))

    def _pixels(self, batch: Batch) -> Any:
        """Return the image inputs of the batch, which live as long as the batch."""
        import torch

        if not batch.patches or not self.sees:
            return None
        values = self.base.get_encoder(modality="image").patch_embed.proj.weight[0].numel()
        return torch.empty(round(sum(batch.patches) * batch.copies), values)

    def _cached_features(self, batch: Batch) -> Any:
        """Return the features of a step's images, which DPO and GRPO keep for the step (`models/features.py`)."""
        import torch

        if not batch.patches or not self.sees or self.job.method.name == "sft":
            return None
        tower = self.base.get_encoder(modality="image")
        layers = 1 + len(getattr(tower, "deepstack_visual_indexes", ()))
        tokens = sum(batch.patches) * batch.copies / tower.spatial_merge_size**2
        width = self.base.get_input_embeddings().weight.shape[1]
        return torch.empty(round(tokens), layers * width, dtype=self.dtype)

    def _see(self, batch: Batch, pixels: Any) -> Any:
        """Run the image encoder's blocks, with autograd only if something in it is trained."""
        import torch

        tower = self.base.get_encoder(modality="image")
        if pixels is None:
            return None
        learns = any(parameter.requires_grad for parameter in tower.parameters())
        total, width = sum(batch.patches), tower.patch_embed.proj.weight.shape[0]
        with torch.set_grad_enabled(learns):
            hidden = tower.patch_embed(pixels[:total])
            hidden = hidden.reshape(total, width)
            heads = self.config.vision_config.num_heads
            turn = torch.empty(total, width // heads, dtype=torch.float32)
            ends = _Ends(batch.patches)
            for block in tower.blocks:
                hidden = block(hidden, cu_seqlens=ends, position_embeddings=(turn, turn))
            return tower.merger(hidden)

    def _loss(self, batch: Batch, features: Any, live: "LiveBytes") -> Any:
        import torch
        from trl.kernels import ChunkedLogProbFunction

        base = self.base
        ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.long)
        hidden = base.get_input_embeddings()(ids)
        if features is not None:
            image_mask = torch.zeros(batch.rows, batch.tokens, 1, dtype=torch.bool)
            hidden = hidden.masked_scatter(image_mask, features.to(hidden.dtype))
        if not hidden.requires_grad:
            hidden.requires_grad_(True)  # as `enable_input_require_grads` has it
        mask = None
        if batch.masked:
            mask = torch.zeros(batch.rows, 1, batch.tokens, batch.tokens, dtype=torch.bool)
        out = language_model(base)(inputs_embeds=hidden, attention_mask=mask, use_cache=False).last_hidden_state
        if batch.spread is not None:
            out = out.reshape(-1, out.shape[-1])[torch.zeros(batch.spread, dtype=torch.long)]
            ids = torch.zeros(batch.spread, dtype=torch.long)
        live.begin("head")
        head = base.get_output_embeddings()
        flat, targets = out[:, :-1].reshape(-1, out.shape[-1]), ids[:, 1:].reshape(-1)
        if batch.labelled is not None:
            chosen = torch.zeros(batch.labelled, dtype=torch.long)
            flat, targets = flat[chosen], targets[chosen]
        outputs = ChunkedLogProbFunction.apply(
            flat, head.weight, head.bias, targets, 1.0, _CHUNK, None, 1.0, _HEAD_OUTPUTS[self.job.method.name]
        )
        return -outputs[0].sum()


def _pretend(model: Any, mode: Any) -> None:
    """Replace all tensors on the meta device by fake tensors on the CPU; tied weights stay tied."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    fakes: dict[int, Any] = {}
    for module in model.modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is None:
                continue
            if id(value) not in fakes:
                fake = FakeTensor(mode, torch.empty_like(value, device="meta"), torch.device("cpu"))
                is_weight = isinstance(value, torch.nn.Parameter)
                fakes[id(value)] = torch.nn.Parameter(fake, value.requires_grad) if is_weight else fake
            (module._parameters if name in module._parameters else module._buffers)[name] = fakes[id(value)]


_CHUNK = 32768  # vocabulary in one tile of TRL's head
_HEAD_OUTPUTS = {  # outputs that TRL's trainers ask the head for, for each token
    "sft": ("log_probs", "entropy", "is_top1"),
    "dpo": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "grpo": ("log_probs", "entropy"),
}


class _Ends:
    """Stands for `cu_seqlens`, the ends of the images among the patches: towers take differences to get lengths."""

    def __init__(self, lengths: tuple[int, ...], started: bool = False):
        self.lengths, self.started = lengths, started

    def __getitem__(self, part: slice) -> "_Ends":
        return _Ends(self.lengths, part.start is not None)

    def __sub__(self, other: "_Ends") -> "_Ends":
        return self

    def tolist(self) -> list[int]:
        """Return the patches of each image."""
        return list(self.lengths)


def _four_bit() -> type:
    """Return a linear layer that dequantises in every forward and backward, as bitsandbytes' `Linear4bit` does."""
    import torch

    class Dequantised(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Any, weight: Any) -> Any:
            ctx.weight = weight
            return torch.nn.functional.linear(values, torch.empty(weight.shape, dtype=values.dtype))

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient @ torch.empty(ctx.weight.shape, dtype=gradient.dtype), None

    class FourBit(torch.nn.Linear):
        def forward(self, values: Any) -> Any:
            values = values.to(self.weight.dtype)
            out = Dequantised.apply(values, self.weight)
            out = out if self.bias is None else out + self.bias
            return out.clone()  # PEFT copies the output of a quantised layer

    return FourBit
