"""The parts of a model for which transformers has no common name: the backbone, which returns hidden states and which
TRL's heads call as `model.base_model`, and the language model's layers.

Llama-4's class holds an image encoder and a complete language model side by side, so its `base_model` is the model
itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel


class Backbone:
    """Llama-4's forward without the head: it returns hidden states."""

    def __init__(self, model: "PreTrainedModel"):
        self.model = model
        self.get_image_features = model.get_image_features  # `generate` encodes images through the base model

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Return what `forward` does, which may be wrapped as that of a module."""
        return self.forward(*args, **inputs)

    def forward(self, input_ids: "Tensor", pixel_values: "Tensor | None" = None, **inputs: object) -> Any:
        """Return the language model's output for a batch; `last_hidden_state` is `[rows, tokens, hidden]`."""
        model: Any = self.model
        embedded = model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            # [tiles, tokens, width]: Llama-4 cuts an image into tiles. Projected, they take the places of the image
            # tokens of all rows, in order.
            encoded = model.get_image_features(pixel_values=pixel_values, return_dict=True).last_hidden_state
            features = model.multi_modal_projector(encoded.view(-1, encoded.size(-1))).to(embedded.dtype)
            image_mask = model.get_placeholder_mask(input_ids, inputs_embeds=embedded, image_features=features)
            embedded = embedded.masked_scatter(image_mask, features)  # [rows, tokens, hidden]
        options = {name: value for name, value in inputs.items() if value is not None}
        return model.language_model.model(inputs_embeds=embedded, **options)


def base_of(model: "Module") -> Any:
    """Return the transformers model under an adapter, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)  # of a model of PEFT's
    return model if get_base_model is None else get_base_model()


def ensure_backbone(model: "Module") -> None:
    """Give the model, with or without an adapter, a `base_model` that returns hidden states, if it has none."""
    base = base_of(model)
    if base.base_model is base:
        object.__setattr__(base, base.base_model_prefix, Backbone(base))  # no submodule: its weights are registered


def language_model(base: "PreTrainedModel") -> Any:
    """Return the language model without its head: it maps embeddings to hidden states."""
    decoder = base.get_decoder()
    return decoder.model if hasattr(decoder, "lm_head") else decoder


def language_layers(base: "PreTrainedModel") -> list[Any]:
    """Return the decoder layers of the language model, in order."""
    return list(language_model(base).layers)


@contextmanager
def evaluation_mode(model: "Module") -> Iterator[None]:
    """Use evaluation mode, which also turns gradient checkpointing (it forbids caches) off; then restore all modes."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _checkpointing_word(model: "Module") -> str:
    """Return the first word of `..._checkpointing_enable`: transformers 5.23 renamed `gradient` to `activation`."""
    return "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"


def recompute(model: "Module", options: dict[str, Any] | None) -> None:
    """Turn activation checkpointing on; `options` are those of `torch.utils.checkpoint.checkpoint`."""
    word = _checkpointing_word(model)
    getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": options})


def recompute_first(model: "Module", count: int) -> None:
    """Limit activation checkpointing, once it is turned on, to the first `count` layers of the language model.

    The image encoder is not changed.
    """

    def open_rest() -> None:
        for layer in language_layers(base_of(model))[count:]:
            layer.gradient_checkpointing = False

    after_recompute(model, open_rest)


def after_recompute(model: "Module", change: Callable[[], None]) -> None:
    """Call `change` each time that activation checkpointing is turned on.

    The Trainer turns it on when it begins to train, for all layers, so what is set before would be lost.
    """
    name = f"{_checkpointing_word(model)}_checkpointing_enable"
    enable = getattr(model, name)

    def enable_and_change(*args: object, **kwargs: object) -> None:
        enable(*args, **kwargs)
        change()

    setattr(model, name, enable_and_change)


@contextmanager
def replaced_forwards(layers: "Sequence[Module]", build: "Callable[[Any], Callable[..., Any]]") -> Iterator[None]:
    """Let each of the layers run the forward that `build` makes for it. What it had before, such as a hook of
    accelerate's, comes back afterwards."""
    before = {layer: layer.__dict__["forward"] for layer in layers if "forward" in layer.__dict__}
    try:
        for layer in layers:
            layer.forward = build(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
            if layer in before:
                layer.forward = before[layer]
