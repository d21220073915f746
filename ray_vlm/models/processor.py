"""A base's processor: loaded and tried at once, or the parts of it that texts need, read from the base's files.

A processor uses most settings of its files only when the first image arrives, which may be long after a run has
started. So a blank image is processed as soon as the processor is loaded.

transformers loads a processor together with torch and torchvision, which takes longer than checking a thousand rows.
So rows are checked and counted from the base's files (`read_prompt_text`) if these are complete, as those of the Qwen
families are. Rows to train, predict or draw are tokenised by the processor itself (`take_prompt_text`); a test checks
that both agree.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ray_vlm.config.schema import Model
from ray_vlm.errors import ModelError
from ray_vlm.models.checkpoint_version import advise_version
from ray_vlm.models.families import FAMILIES, Family
from ray_vlm.models.load import advise_hub, first_line, load_config, resolve_name

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.sandbox import SandboxedEnvironment
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, ProcessorMixin

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, bool], str]
_T = TypeVar("_T")

# Tokenizers of transformers that `tokenizer.json` describes completely.
_PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast")
_IMAGE_PROCESSOR = "Qwen2VLImageProcessor"  # of all three Qwen families; its defaults are below
_DEFAULT_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
_DEFAULT_MEAN = (0.48145466, 0.4578275, 0.40821073)
_IMAGE_TOKEN = "<|image_pad|>"
# Folders with more chat templates: if one exists, the other files are not complete.
_MORE_TEMPLATES = ("additional_chat_templates", "chat_templates")
_PROCESSOR_FILES = (".json", ".jinja", ".txt", ".model")  # suffixes
_SIDE = 64  # side of the blank image, in pixels


def load_processor(spec: Model) -> Any:
    """Load the base's own processor. Raise `ModelError` if it is missing, damaged, or has no chat template."""
    return load_config_and_processor(spec)[1]


def load_config_and_processor(spec: Model) -> tuple["PreTrainedConfig", Any]:
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
        fix = advise_hub(error) or advise_version(name, spec.revision)
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


def _settle_ends(processor: "ProcessorMixin") -> str | None:
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


def _image_problem(processor: "ProcessorMixin") -> str | None:
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


@dataclass(frozen=True)
class ImageSizes:
    """How a Qwen's image processor sizes images: pixels along a side of a patch, patches along a side of a visual
    token, minimum and maximum pixels of an image, and the mean colour (0 to 1)."""

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]


@dataclass(frozen=True)
class PromptText:
    """Maps texts to token ids. `render`: messages, and whether an answer follows -> text. `tracer`: renders messages
    whose texts are unknown, if the chat template can be followed. `special`: tokens that the tokenizer does not read as
    text. `sizes`: None if the processor handles images by itself."""

    tokenizer: "Tokenizer"
    render: Render
    tracer: "TemplateTracer | None"
    special: tuple[str, ...]
    image_token: str
    sizes: ImageSizes | None


def take_prompt_text(processor: Any, family: Family, head: str = "") -> PromptText:
    """Build a `PromptText` from a loaded processor. `head`: text that it writes before conversations that do not begin
    with it. Raise `ModelError` if its image processor is not the family's."""
    backend, images = processor.tokenizer.backend_tokenizer, processor.image_processor
    sizes = None
    if not family.stock_images:
        sizes = _build_sizes(images.patch_size, images.merge_size, dict(images.size), images.image_mean)
        if sizes is None or "image_grid_thw" not in images.model_input_names:
            raise ModelError(
                f"the base's {type(images).__name__} is not an image processor of Qwen's (patch_size="
                f"{images.patch_size!r}, merge_size={images.merge_size!r}, size={dict(images.size)}, image_mean="
                f"{images.image_mean!r}). Fetch its processor files again, or use another base."
            )

    def render(messages: Messages, answer_follows: bool) -> str:
        with _template_errors():
            text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_follows)
        return text if text.startswith(head) else head + text

    special = (token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special)
    tracer = _build_tracer(processor.chat_template, processor.tokenizer.special_tokens_map)
    return PromptText(_without_limits(backend), render, tracer, tuple(special), processor.image_token, sizes)


@contextmanager
def _template_errors() -> Iterator[None]:
    """Raise what a chat template raises about its messages as `ValueError`, and about itself as `ModelError`."""
    from jinja2 import TemplateSyntaxError

    try:
        yield
    except TemplateSyntaxError as error:
        raise ModelError(
            f"the base's chat template is damaged (line {error.lineno}: {error.message}). Fetch it again, or use "
            "another base."
        ) from None
    except Exception as error:  # a template is a program, and may raise anything
        raise ValueError(
            f"the base's chat template refuses its turns ({type(error).__name__}: {error}); without task.system, or "
            "with turns that the template knows, it may take them"
        ) from None


def read_prompt_text(spec: Model, folder: str) -> tuple[PromptText, Family] | None:
    """Build a `PromptText` from the files of a base, and return it with the base's family.

    Return None if the files are not complete, or if one is missing or damaged: loading the processor then reports it.
    `folder`: the base's folder or hub name."""
    read = _reader(spec, folder)
    try:
        family = FAMILIES.get(json.loads(read("config.json") or "{}").get("model_type"))
        settings = json.loads(read("tokenizer_config.json") or "{}")
        if family is None or family.stock_images or not _is_plain(settings):
            return None
        sizes, template, vocabulary = _read_sizes(read), _read_template(read), read("tokenizer.json")
        if sizes is None or template is None or vocabulary is None:
            return None
        tokenizer = _read_tokenizer(vocabulary, settings)
        image_token = _named(settings.get("image_token")) or _IMAGE_TOKEN
        if tokenizer is None or tokenizer.token_to_id(image_token) is None:
            return None
        special = tuple(t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special)
        tokens = {f"{name}_token": _named(settings.get(f"{name}_token")) for name in ("eos", "pad", "bos", "unk")}
        known = {name: token for name, token in tokens.items() if token is not None}
        render, tracer = _build_render(_template_environment(), template, known), _build_tracer(template, known)
        return PromptText(tokenizer, render, tracer, special, image_token, sizes), family
    except Exception:  # files may hold anything, and the tokenizers library raises plain `Exception`
        return None


def _reader(spec: Model, folder: str) -> Callable[[str], str | None]:
    """Return a function that reads one of the base's files as text; None for a file that is not on this machine."""
    if Path(folder).is_dir():
        return lambda name: _text_of(Path(folder) / name)
    from huggingface_hub import try_to_load_from_cache

    def from_cache(name: str) -> str | None:
        path = try_to_load_from_cache(folder, name, revision=spec.revision)
        return _text_of(Path(path)) if isinstance(path, str) else None

    return from_cache


def fingerprint_processor(spec: Model, folder: str) -> str:
    """Return a hash of the base's files that decide how text and images are prepared; empty for a base whose files are
    not on this machine. `folder`: as in `read_prompt_text`."""
    path = Path(folder)
    if not path.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(folder, "config.json", revision=spec.revision)
        if not isinstance(config, str):
            return ""
        path = Path(config).parent
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in _PROCESSOR_FILES and file.is_file() and not file.name.endswith(".index.json"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _text_of(path: Path) -> str | None:
    if path.name in _MORE_TEMPLATES:
        return "" if path.exists() else None
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _is_plain(settings: Mapping[str, Any]) -> bool:
    extra = settings.get("extra_special_tokens")
    return settings.get("tokenizer_class") in _PLAIN_TOKENIZERS and not isinstance(extra, Mapping)


def _named(token: Mapping[str, str] | str | None) -> str | None:
    """Return the text of a token, which may be saved as a mapping."""
    return token.get("content") if isinstance(token, Mapping) else token


def _read_tokenizer(text: str, settings: Mapping[str, Any]) -> "Tokenizer | None":
    """Return the tokenizer, or None if the settings name tokens that its file does not have."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    beside = [_named(token) for token in (settings.get("added_tokens_decoder") or {}).values()]
    beside += [_named(settings.get(f"{name}_token")) for name in ("eos", "pad", "bos", "unk")]
    beside += [_named(token) for token in settings.get("additional_special_tokens") or ()]
    there = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    return None if {token for token in beside if token is not None} - there else _without_limits(tokenizer)


def _without_limits(tokenizer: "Tokenizer") -> "Tokenizer":
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
    return _build_sizes(patch, merge, size, images.get("image_mean") or _DEFAULT_MEAN)


def _build_sizes(patch: Any, merge: Any, size: Mapping[str, Any], mean: Any) -> ImageSizes | None:
    """Build the sizes; None if they are not valid numbers."""
    low, high = size.get("shortest_edge"), size.get("longest_edge")
    shares = mean if isinstance(mean, list | tuple) else ()
    if not all(isinstance(value, int) and 0 < value < 2**40 for value in (patch, merge, low, high)):
        return None
    if len(shares) != 3 or not all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares):
        return None
    return ImageSizes(patch, merge, size["shortest_edge"], size["longest_edge"], tuple(shares))


def _read_template(read: Callable[[str], str | None]) -> str | None:
    """Return the base's only chat template; None if there are none or several."""
    if json.loads(read("processor_config.json") or "{}").get("chat_template") is not None:
        return None
    if any(read(name) is not None for name in _MORE_TEMPLATES):
        return None
    legacy = read("chat_template.json")
    template = json.loads(legacy)["chat_template"] if legacy is not None else read("chat_template.jinja")
    return template if isinstance(template, str) else None


def _template_environment() -> "SandboxedEnvironment":
    """Return an environment in which templates render as transformers does (`utils/chat_template_utils.py`).

    transformers' own blocks, such as `generation`, raise an error here, and such templates are left to it."""
    from datetime import datetime

    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _build_render(environment: "SandboxedEnvironment", template: str, tokens: Mapping[str, Any]) -> Render:
    compiled = environment.from_string(template)

    def render(messages: Messages, answer_follows: bool) -> str:
        plain = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": answer_follows}
        with _template_errors():
            return compiled.render(**plain, **tokens)

    return render


def _build_tracer(template: object, tokens: Mapping[str, Any]) -> "TemplateTracer | None":
    """Return a tracer of a chat template, or None if what it does with texts cannot be followed."""
    from jinja2 import TemplateError

    try:
        return TemplateTracer(template, tokens) if isinstance(template, str) else None
    except (TemplateError, ValueError):
        return None


# What a template may be made of for its texts to be followed. Blocks whose output becomes a value are not among them.
_FOLLOWED = (
    *("Template", "Output", "TemplateData", "For", "If", "Macro", "Assign", "Name", "NSRef", "Const", "Tuple", "List"),
    *("Dict", "Pair", "Keyword", "CondExpr", "Filter", "Test", "Call", "Getitem", "Getattr", "Slice", "Concat", "And"),
    *("Compare", "Operand", "Mul", "Div", "FloorDiv", "Add", "Sub", "Mod", "Or", "Not", "Neg", "Break", "Continue"),
)
_FILTERS = {"trim", "length", "count", "default", "d", "first", "last", "list", "string"}
_TESTS = {"defined", "undefined", "none", "string", "mapping", "number", "boolean", "true", "false", "iterable"}
_TESTS |= {"sequence", "odd", "even", "equalto", "eq", "==", "ne", "!="}
# A text's methods, but for those of every object that tell nothing of what it holds.
_LOOKING = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__repr__", "__format__"}
_LOOKING |= {*dir(str), "__bool__", "__int__", "__float__", "__index__", "__reversed__"} - {*dir(object)}
_SCOPES = ("_loop_vars", "_block_vars")  # handed to every function; those of templates do not see them
MARK = re.compile(r"\x01(\d+)(s?)\x02")  # number of a text, and whether the spaces around it are stripped


class TemplateTracer:
    """Renders messages whose texts are unknown: each is a mark, and every use of it but writing it out is noticed.

    A template is a program, and may write a text differently for what the text holds. If it only writes its texts out,
    with or without the spaces around them, the marks' rendering is that of all texts, once these are in the places of
    their marks. Raise `ValueError` for a template that cannot be followed.
    """

    def __init__(self, template: str, tokens: Mapping[str, Any]):
        self._environment = _template_environment()
        if "\x01" in template or not _can_follow(self._environment.parse(template)):
            raise ValueError("the template has parts that cannot be followed")
        self._lock = threading.Lock()
        self._unclear: list[str] = []  # uses of texts that are not followed
        self._absent: set[str] = set()
        self._joined = self._build_type({})
        self._text = self._build_type(
            {
                "__bool__": lambda text: True,
                "__contains__": lambda text, wanted: self._look_for(wanted),
                "__eq__": lambda text, wanted: self._look_for(wanted),
                "__ne__": lambda text, wanted: not self._look_for(wanted),
                "startswith": lambda text, wanted: self._look_for(wanted),
                "endswith": lambda text, wanted: self._look_for(wanted),
                "strip": lambda text, *what: self._notice("strip") if any(what) else self._strip(text),
            }
        )
        self._watch_functions()
        self._render = _build_render(self._environment, template, tokens)

    def trace(self, build: Callable[[Callable[[int], str], Render], _T]) -> tuple[_T, frozenset[str]] | None:
        """Return what `build` returns for a function that makes the mark of a text from its number, and one that
        renders; and the strings that texts must not hold for this to be theirs. Texts are not empty. Return None if the
        template does more with a text than can be followed."""
        with self._lock:
            self._unclear, self._absent = [], set()
            try:
                result = build(lambda number: self._text(f"\x01{number}\x02"), self._render)
            except (ValueError, ModelError):
                return None
            return None if self._unclear else (result, frozenset(self._absent))

    def _build_type(self, methods: Mapping[str, Callable[..., Any]]) -> type[str]:
        """Return a kind of text that notices its methods, but for joining and `methods`."""

        def noticing(name: str) -> Callable[..., Any]:
            return lambda *values, **options: self._notice(name)

        joining: dict[str, Callable[..., Any]] = {
            "__add__": lambda text, other: self._join(text, other),
            "__radd__": lambda text, other: self._join(other, text),
        }
        return type("Text", (str,), {name: noticing(name) for name in _LOOKING} | joining | dict(methods))

    def _notice(self, use: str) -> NoReturn:
        self._unclear.append(use)  # a template may go on after the exception
        raise ValueError(f"the template does something with a text ({use})")

    def _join(self, *texts: object) -> str:
        if not all(isinstance(text, str) for text in texts):
            self._notice("+")
        return self._joined("".join(map(str, texts)))

    def _look_for(self, wanted: object) -> bool:
        """Return False, as for a text that does not hold `wanted`."""
        words = wanted if isinstance(wanted, tuple) else (wanted,)
        if not all(type(word) is str and word for word in words):
            self._notice("comparison")
        self._absent.update(words)
        return False

    def _strip(self, text: str) -> str:
        return self._joined(str(text).replace("\x02", "s\x02"))

    def _watch_functions(self) -> None:
        """Notice calls of functions that could look into a text unseen, as those written in C do."""
        environment = self._environment
        call_function = environment.call

        def call(context: Any, function: Any, *args: Any, **options: Any) -> Any:
            method = isinstance(getattr(function, "__self__", None), str | list | dict)
            given = [*args, *(value for name, value in options.items() if name not in _SCOPES)]
            plain = all(type(part) in (str, int, bool) for v in given for part in (v if type(v) is tuple else (v,)))
            if function is not environment.globals["namespace"] and not (method and plain):
                self._notice("call")
            return call_function(context, function, *args, **options)

        def remainder(context: Any, operator: str, left: Any, right: Any) -> Any:
            return left % right if type(left) is type(right) is int else self._notice(operator)

        def noticing(function: Any, name: str, known: Collection[str]) -> Callable[..., Any]:
            def watched(*args: Any, **options: Any) -> Any:
                if name not in known or (name == "trim" and len(args) + len(options) > 1):
                    self._notice(name)
                return function(*args, **options)

            return wraps(function)(watched)

        vars(environment).update(call=call, call_binop=remainder, intercepted_binops=frozenset("%"))
        for functions, known in ((environment.filters, _FILTERS), (environment.tests, _TESTS)):
            functions.update({name: noticing(function, name, known) for name, function in functions.items()})


def _can_follow(tree: "nodes.Template") -> bool:
    """Whether no text becomes part of a value or is compared without its methods being called."""
    from jinja2 import nodes

    written = {id(child) for output in tree.find_all(nodes.Output) for child in output.nodes}
    for node in tree.find_all(nodes.Node):
        if type(node).__name__ not in _FOLLOWED or (isinstance(node, nodes.Concat) and id(node) not in written):
            return False
        if isinstance(node, nodes.Compare) and any(operand.op in ("in", "notin") for operand in node.ops):
            listed = isinstance(node.ops[0].expr, nodes.List | nodes.Tuple)
            if len(node.ops) > 1 or not (listed or isinstance(node.expr, nodes.Const)):
                return False
    return True
