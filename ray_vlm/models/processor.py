"""Load a base's processor, and find out at once whether it can do its work.

What its files say is only used when the first image comes, and by then a run may have been going for a while. So an
image without content is put through it as it is loaded.
"""

from typing import Any

from ray_vlm.config.schema import Model
from ray_vlm.errors import ModelError
from ray_vlm.models.load import first_line, resolve_name

_SIDE = 64  # of the image that is tried, in pixels


def load_processor(spec: Model) -> Any:
    """The base's own processor. Raises `ModelError` where it is missing, damaged, or cannot render a chat."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(resolve_name(spec.name), revision=spec.revision)
    except ImportError as error:  # some families' processors need a package of their own
        raise ModelError(
            f"model.name={spec.name!r}: its processor needs a package that is not installed ({first_line(error)}). "
            "Install it with pip."
        ) from None
    except Exception as error:  # transformers' classes raise what they like, and tokenizers plain `Exception`
        raise ModelError(
            f"model.name={spec.name!r}: its processor cannot be loaded ({first_line(error)}). The folder needs the "
            "tokenizer and processor files of the base."
        ) from None
    if getattr(processor, "chat_template", None) is None:
        raise ModelError(f"model.name={spec.name!r} has no chat template. Use an instruction-tuned base.")
    if reason := _settle_ends(processor) or _image_problem(processor):
        raise ModelError(
            f"model.name={spec.name!r}: its processor cannot be used ({reason}). Fetch its files again, or use "
            "another base."
        )
    return processor


def _settle_ends(processor: Any) -> str | None:
    """Let a tokenizer without a padding token pad with its end token, as TRL does. Why it cannot be used, if so."""
    tokenizer = getattr(processor, "tokenizer", None)
    if getattr(processor, "image_processor", None) is None or tokenizer is None:
        return "it has no image processor, or no tokenizer"
    if tokenizer.eos_token is None:
        return "its tokenizer has no eos_token, so the end of an answer cannot be told"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return None


def _image_problem(processor: Any) -> str | None:
    """Why the processor cannot turn an image into tensors, if so."""
    import numpy as np
    import torch
    from PIL import Image

    try:
        blank = Image.fromarray(np.zeros((_SIDE, _SIDE, 3), np.uint8))
        made = processor.image_processor(images=[blank], return_tensors="pt")
    except Exception as error:  # of whatever its settings hold
        return f"{type(error).__name__}: {first_line(error)}"
    tensors = [value for value in made.values() if torch.is_tensor(value) and value.is_floating_point()]
    if not all(bool(torch.isfinite(value).all()) for value in tensors):
        return "an image becomes numbers that are not finite; its mean or standard deviation is wrong"
    return None
