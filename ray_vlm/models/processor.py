"""Load a base's processor, and check at once that it works.

A processor uses most settings of its files only when the first image arrives, which may be long after a run has
started. So a blank image is processed as soon as the processor is loaded.
"""

from pathlib import Path
from typing import Any

from ray_vlm.config.schema import Model
from ray_vlm.errors import ModelError
from ray_vlm.models.load import advise_hub, first_line, load_config, resolve_name

_SIDE = 64  # side of the blank image, in pixels


def load_processor(spec: Model) -> Any:
    """Load the base's own processor. Raise `ModelError` if it is missing, damaged, or has no chat template."""
    return load_config_and_processor(spec)[1]


def load_config_and_processor(spec: Model) -> tuple[Any, Any]:
    """Load the base's configuration and its processor. Raise `ModelError` as `load_config` and `load_processor` do."""
    from transformers import AutoProcessor

    config = load_config(spec)  # first: a missing base or a damaged config.json is not reported as a missing tokenizer
    name = resolve_name(spec.name)
    try:
        processor = AutoProcessor.from_pretrained(name, revision=spec.revision)
    except ImportError as error:  # some families' processors need a package of their own
        raise ModelError(
            f"model.name={spec.name!r}: its processor needs a package that is not installed ({first_line(error)}). "
            "Install it with pip."
        ) from None
    except Exception as error:  # transformers' classes raise many types, and tokenizers plain `Exception`
        fix = advise_hub(error)
        if fix is None and Path(name).is_dir():
            fix = "The folder needs the tokenizer and processor files of the base."
        elif fix is None:  # offline, transformers hides the hub's error if only some files are in the cache
            fix = (
                "The hub has no usable tokenizer and processor files for it, or the cache lacks them and the hub "
                "cannot be reached. Fetch them again, or give a folder."
            )
        raise ModelError(
            f"model.name={spec.name!r}: its processor cannot be loaded ({first_line(error)}). {fix}"
        ) from None
    if getattr(processor, "chat_template", None) is None:
        raise ModelError(f"model.name={spec.name!r} has no chat template. Use an instruction-tuned base.")
    if reason := _settle_ends(processor) or _image_problem(processor):
        raise ModelError(
            f"model.name={spec.name!r}: its processor cannot be used ({reason}). Fetch its files again, or use "
            "another base."
        )
    return config, processor


def _settle_ends(processor: Any) -> str | None:
    """Let a tokenizer without a padding token pad with its end token, as TRL does. Return why the processor cannot be
    used, or None."""
    tokenizer = getattr(processor, "tokenizer", None)
    if getattr(processor, "image_processor", None) is None or tokenizer is None:
        return "it has no image processor, or no tokenizer"
    if tokenizer.eos_token is None:
        return "its tokenizer has no eos_token, so the end of an answer cannot be recognised"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return None


def _image_problem(processor: Any) -> str | None:
    """Return why the processor cannot turn an image into tensors, or None."""
    import numpy as np
    import torch
    from PIL import Image

    try:
        blank = Image.fromarray(np.zeros((_SIDE, _SIDE, 3), np.uint8))
        outputs = processor.image_processor(images=[blank], return_tensors="pt")
    except Exception as error:  # the settings may hold anything
        return f"{type(error).__name__}: {first_line(error)}"
    tensors = [value for value in outputs.values() if torch.is_tensor(value) and value.is_floating_point()]
    if not all(bool(torch.isfinite(value).all()) for value in tensors):
        return "an image becomes numbers that are not finite; its mean or standard deviation is wrong"
    return None
