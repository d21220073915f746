"""Read and write `preprocessing.json`: how inputs were made, kept beside the weights, so that prediction does the same.

Pairs sampled from a model keep the same data in `<file>.about.json` (`ray-vlm pairs`). `rules_since` says how files
were read differently when a checkpoint was written.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ray_vlm.config.schema import JobConfig
from ray_vlm.config.section import Count, Section, without_variant
from ray_vlm.config.task import Task
from ray_vlm.config.train import Precision
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import DataError, ModelError
from ray_vlm.storage import read_bytes, split_options

Colour = Annotated[int, Field(ge=0, le=255)]
_LARGEST_AREA = 2**40  # pixels; for families without a limit of their own
PREPROCESSING = "preprocessing.json"
_TABLES = ("llava", "messages", "objects", "image_csv", "gui_csv", "preference", "prompt")  # formats
ABOUT = ".about.json"  # suffix of the file that describes how a file of pairs was made


class _Images(Section):
    """The sizes of an `ImageSpec`."""

    model_config = ConfigDict(extra="ignore")

    min_pixels: int = Field(ge=1, le=_LARGEST_AREA)
    max_pixels: int = Field(ge=1, le=_LARGEST_AREA)
    pad: tuple[Colour, Colour, Colour] | None = Field(None, strict=False)
    center: bool = False
    stock: bool = False


class Asking(Section):
    """Other settings that prediction needs to repeat what the run did; files of earlier versions have none."""

    model_config = ConfigDict(extra="ignore")

    revision: str | None = None
    load_in_4bit: bool = False
    precision: Precision | None = None
    max_new_tokens: Count | None = None
    max_image_pixels: Count | None = None


class Saved(Section):
    """The content of the file; unknown keys of later versions are ignored."""

    model_config = ConfigDict(extra="ignore")

    task: Task
    labels: tuple[str, ...] = Field(strict=False)
    hints: str
    split: str
    images: _Images
    asking: Asking = Field(default_factory=Asking)


def asking_of(job: JobConfig) -> Asking:
    """Return the settings of this job, other than its inputs, that prediction needs."""
    return Asking(
        revision=job.model.revision,
        load_in_4bit=job.model.load_in_4bit,
        precision=job.train.precision,
        max_new_tokens=job.evaluate.max_new_tokens,
        max_image_pixels=job.data.max_image_pixels,
    )


def describe_preprocessing(builder: SampleBuilder, asking: Asking | None = None) -> dict[str, Any]:
    """Return how inputs are made, for `preprocessing.json` beside the weights; `read_saved` reads it back.

    `asking`: the other settings that prediction needs, for weights that are used without their run.
    """
    spec = builder.spec
    return {
        "task": spec.task.model_dump() | {"codec": builder.codec_name},
        "labels": list(spec.labels),
        "hints": spec.hints,
        "split": spec.split,
        "images": asdict(builder.image_spec),
    } | ({"asking": asking.model_dump()} if asking is not None else {})


def own_settings(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part of `describe_preprocessing` without settings of other tasks, which earlier versions wrote."""
    try:
        task: Task = TypeAdapter(Task).validate_python(described["task"])
    except (KeyError, ValidationError):
        return dict(described)
    return {**described, "task": task.model_dump(mode="json")}


def read_saved(folder: str) -> Saved | None:
    """Read the file beside the weights in `folder`, if any. Raise `ModelError` if it cannot be read."""
    path = Path(folder) / PREPROCESSING
    if not path.exists():
        return None
    try:
        return Saved.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable ({_reason(error)}). Use an adapter folder that a run wrote.") from None


def read_preprocessing(folder: str, spec: SampleSpec) -> SampleSpec | None:
    """Return `spec` with the wording, class names, codec and image sizes that the weights in `folder` were trained
    with.

    Return None without a file; raise `ModelError` if the file cannot be read.
    """
    saved = read_saved(folder)
    if saved is None:
        return None
    if saved.task.name != spec.task.name:
        raise ModelError(f"{folder}: trained for {saved.task.name}, and the job's task is {spec.task.name}.")
    images = saved.images
    return replace(
        spec,
        task=saved.task,
        labels=saved.labels,
        hints=saved.hints,
        split=saved.split,
        min_pixels=None if images.stock else images.min_pixels,
        max_pixels=images.max_pixels,
        resize="pad" if images.pad else "stretch",
        pad_color=images.pad,
        pad_place="center" if images.center else "end",
    )


def _reason(error: Exception) -> str:
    """Return the first problem in one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, without_variant(first['loc']))) or 'all of it'}: {first['msg']}"


def changed_since(path: str, builder: SampleBuilder) -> list[str]:
    """Return what `builder` does differently from the sampling of the pairs in the file `path`, with both values.

    Coordinates in pixels of the resized image are valid only at the same image sizes. Empty if nothing differs, or if
    there is no `<path>.about.json`. Raise `DataError` if that cannot be read.
    """
    uri, options = split_options(path)
    about = f"{uri}{ABOUT}{options}"
    try:
        saved = json.loads(read_bytes(about))["preprocessing"]
        codec, images = saved["task"]["codec"], dict(saved["images"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{about}: not readable ({type(error).__name__}: {error}). Make the pairs again, or delete it if it "
            "does not belong to them."
        ) from None
    now = json.loads(json.dumps(asdict(builder.image_spec)))
    changed = [f"form of boxes ({codec}, now {builder.codec_name})"] if codec != builder.codec_name else []
    sizes = [f"{name} {images.get(name)}, now {value}" for name, value in now.items() if images.get(name) != value]
    return changed + ([f"image sizes ({'; '.join(sizes)})"] if sizes else [])


@dataclass(frozen=True)
class Rule:
    """A change to how files become rows. It does not apply to checkpoints with `RULES` below `number`; `formats`: those
    of the sources that it concerns."""

    number: int
    formats: tuple[str, ...]
    text: str


CHANGED = (
    Rule(1, ("coco",), "a group that no box uses, and labelme's _background_, are no class"),
    Rule(1, ("coco",), "an annotation without bbox has the box around its segmentation"),
    Rule(1, ("coco",), "a crowd may be written as text, and crowds=objects counts crowds as objects"),
    Rule(1, ("coco",), "an id 1.0 is 1, and annotations of images that are not listed are one bad row"),
    Rule(1, ("coco",), "sizes that contradict the image are refused until box_frame says whose the boxes are"),
    Rule(1, ("llava", "messages"), "rows that share an id are kept, with their number behind it"),
    Rule(1, _TABLES[:3], "rows with video or audio, or with an image in a column that is not read, are bad rows"),
    Rule(1, _TABLES, "numbers of a ClassLabel column in Parquet are its names"),
    Rule(1, ("coco", *_TABLES), "boxes within one pixel are refused until box_units says what their numbers are"),
    Rule(1, ("coco", *_TABLES), "images below one visual token, AVIF, and names with backslashes or %20 are read"),
)
RULES = max(rule.number for rule in CHANGED)  # what checkpoints keep


def rules_since(number: int, formats: Iterable[str]) -> list[str]:
    """Return the changes after `number` for sources of these formats, for a resumed run to report."""
    known = set(formats)
    return [rule.text for rule in CHANGED if rule.number > number and not known.isdisjoint(rule.formats)]
