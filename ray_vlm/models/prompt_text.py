"""What texts need of a base's processor: its tokenizer, its chat template, and the sizes that it gives images.

transformers loads a processor together with torch and torchvision, which takes longer than checking a thousand rows.
So rows are checked and counted with what the base's files say (`read_prompt_text`), where these are files that say all:
those of the Qwen families. What is trained, asked or drawn is put into tokens by the processor itself
(`take_prompt_text`), and a test holds that both say the same.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.config.schema import Model
from ray_vlm.errors import ModelError
from ray_vlm.models.families import FAMILIES, Family

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, bool], str]

# Tokenizers of transformers that are what `tokenizer.json` says, and nothing more.
_PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast")
_IMAGE_PROCESSOR = "Qwen2VLImageProcessor"  # of all three Qwen families; its defaults stand below
_DEFAULT_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
_DEFAULT_MEAN = (0.48145466, 0.4578275, 0.40821073)
_IMAGE_TOKEN = "<|image_pad|>"
# Files beside which the others do not say all.
_MORE_TEMPLATES = ("additional_chat_templates", "chat_templates")


@dataclass(frozen=True)
class ImageSizes:
    """How a Qwen's image processor sizes images: sides in pixels of a patch, patches of a side of a visual token,
    least and most pixels of an image, and the mean colour (0 to 1)."""

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]


@dataclass(frozen=True)
class PromptText:
    """Texts in, token ids out. `render`: messages and whether an answer is to follow -> text. `special`: tokens that
    the tokenizer reads as something else than text. `sizes`: None where the processor does everything with images."""

    tokenizer: "Tokenizer"
    render: Render
    special: tuple[str, ...]
    image_token: str
    sizes: ImageSizes | None


def take_prompt_text(processor: Any, family: Family) -> PromptText:
    """What a loaded processor says."""
    backend, images = processor.tokenizer.backend_tokenizer, processor.image_processor
    sizes = None
    if not family.stock_images:
        sizes = _check_sizes(images.patch_size, images.merge_size, dict(images.size), images.image_mean)
        if sizes is None or "image_grid_thw" not in images.model_input_names:
            raise ModelError(
                f"the base's {type(images).__name__} is not an image processor of Qwen's (patch_size="
                f"{images.patch_size!r}, merge_size={images.merge_size!r}, size={dict(images.size)}, image_mean="
                f"{images.image_mean!r}). Fetch its processor files again, or use another base."
            )

    def render(messages: Messages, answer_follows: bool) -> str:
        with _template_errors():
            return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_follows)

    special = (token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special)
    return PromptText(_whole(backend), render, tuple(special), processor.image_token, sizes)


@contextmanager
def _template_errors() -> Iterator[None]:
    """What a chat template raises about the messages that it is given, as `ValueError`; about itself, `ModelError`."""
    from jinja2 import TemplateSyntaxError

    try:
        yield
    except TemplateSyntaxError as error:
        raise ModelError(
            f"the base's chat template is damaged (line {error.lineno}: {error.message}). Fetch it again, or use "
            "another base."
        ) from None
    except Exception as error:  # a template is a program of the base's own
        raise ValueError(
            f"the base's chat template refuses its turns ({type(error).__name__}: {error}); without task.system, or "
            "with turns that the template knows, it may take them"
        ) from None


def read_prompt_text(spec: Model, folder: str) -> tuple[PromptText, Family] | None:
    """What the files of a base say, and its family; None where only its processor can tell, or where a file is missing
    or damaged, of which loading the processor then gives the reason. `folder`: its own, or its name on the hub."""
    read = _reader(spec, folder)
    try:
        family = FAMILIES.get(json.loads(read("config.json") or "{}").get("model_type"))
        settings = json.loads(read("tokenizer_config.json") or "{}")
        if family is None or family.stock_images or not _is_plain(settings):
            return None
        sizes, template, tokens = _read_sizes(read), _read_template(read), read("tokenizer.json")
        if sizes is None or template is None or tokens is None:
            return None
        tokenizer = _read_tokenizer(tokens, settings)
        image_token = _named(settings.get("image_token")) or _IMAGE_TOKEN
        if tokenizer is None or tokenizer.token_to_id(image_token) is None:
            return None
        special = tuple(t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special)
        return PromptText(tokenizer, _build_render(template, settings), special, image_token, sizes), family
    except Exception:  # files may hold anything, and the tokenizers library raises plain `Exception`
        return None


def _reader(spec: Model, folder: str) -> Callable[[str], str | None]:
    """A function that gives the text of one of the base's files, None where it is not on this machine."""
    if Path(folder).is_dir():
        return lambda name: _text_of(Path(folder) / name)
    from huggingface_hub import try_to_load_from_cache

    def from_cache(name: str) -> str | None:
        found = try_to_load_from_cache(folder, name, revision=spec.revision)
        return _text_of(Path(found)) if isinstance(found, str) else None

    return from_cache


def _text_of(path: Path) -> str | None:
    if path.name in _MORE_TEMPLATES:
        return "" if path.exists() else None
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _is_plain(settings: Mapping[str, Any]) -> bool:
    extra = settings.get("extra_special_tokens")
    return settings.get("tokenizer_class") in _PLAIN_TOKENIZERS and not isinstance(extra, Mapping)


def _named(token: Any) -> str | None:
    """A token as its text or as the mapping in which it may be saved."""
    return token.get("content") if isinstance(token, Mapping) else token


def _read_tokenizer(text: str, settings: Mapping[str, Any]) -> "Tokenizer | None":
    """None where the tokenizer has tokens beside those of its file."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    beside = [_named(token) for token in (settings.get("added_tokens_decoder") or {}).values()]
    beside += [_named(settings.get(f"{name}_token")) for name in ("eos", "pad", "bos", "unk")]
    beside += [_named(token) for token in settings.get("additional_special_tokens") or ()]
    there = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    return None if {token for token in beside if token is not None} - there else _whole(tokenizer)


def _whole(tokenizer: "Tokenizer") -> "Tokenizer":
    tokenizer.no_truncation()  # both may have been saved with a tokenizer
    tokenizer.no_padding()
    return tokenizer


def _read_sizes(read: Callable[[str], str | None]) -> ImageSizes | None:
    nested = json.loads(read("processor_config.json") or "{}").get("image_processor")
    images = nested or json.loads(read("preprocessor_config.json") or "{}")
    if not str(images.get("image_processor_type", "")).startswith(_IMAGE_PROCESSOR):
        return None
    size = dict(images.get("size") or _DEFAULT_SIZE)
    for edge, limit in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if images.get(limit) is not None:
            size[edge] = images[limit]
    patch, merge = images.get("patch_size", 14), images.get("merge_size", 2)
    return _check_sizes(patch, merge, size, images.get("image_mean") or _DEFAULT_MEAN)


def _check_sizes(patch: Any, merge: Any, size: Mapping[str, Any], mean: Any) -> ImageSizes | None:
    """The sizes, or None where a file holds something else than the numbers that are meant."""
    low, high = size.get("shortest_edge"), size.get("longest_edge")
    shares = mean if isinstance(mean, list | tuple) else ()
    if not all(isinstance(value, int) and 0 < value < 2**40 for value in (patch, merge, low, high)):
        return None
    if len(shares) != 3 or not all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares):
        return None
    return ImageSizes(patch, merge, size["shortest_edge"], size["longest_edge"], tuple(shares))


def _read_template(read: Callable[[str], str | None]) -> str | None:
    """The base's one chat template, None where there are none or several."""
    if json.loads(read("processor_config.json") or "{}").get("chat_template") is not None:
        return None
    if any(read(name) is not None for name in _MORE_TEMPLATES):
        return None
    legacy = read("chat_template.json")
    found = json.loads(legacy)["chat_template"] if legacy is not None else read("chat_template.jinja")
    return found if isinstance(found, str) else None


def _build_render(template: str, settings: Mapping[str, Any]) -> Render:
    """Renders as transformers does (`utils/chat_template_utils.py`); its own blocks, as `generation`, do not compile
    here, and what does not is left to it."""
    from datetime import datetime

    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    compiled = environment.from_string(template)
    tokens = {f"{name}_token": _named(settings.get(f"{name}_token")) for name in ("eos", "pad", "bos", "unk")}
    known = {name: token for name, token in tokens.items() if token is not None}

    def render(messages: Messages, answer_follows: bool) -> str:
        plain = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": answer_follows}
        with _template_errors():
            return compiled.render(**plain, **known)

    return render
