"""`preprocessing.json`: how inputs were made, kept beside the weights, so that prediction makes them so again.

Pairs that a model's own answers gave have the same in `<file>.about.json` (`ray-vlm pairs`).
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from ray_vlm.config.schema import JobConfig, Task
from ray_vlm.config.section import Largest, Section
from ray_vlm.config.train import Precision
from ray_vlm.data.files import read_bytes
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import DataError, ModelError
from ray_vlm.runs.store import is_remote

Colour = Annotated[int, Field(ge=0, le=255)]
_LARGEST_AREA = 2**40  # pixels; what families without a limit of their own have
PREPROCESSING = "preprocessing.json"
ABOUT = ".about.json"  # ends the name of what tells how a file of pairs was made


class _Images(Section):
    """What `ImageSpec` says of sizes."""

    model_config = ConfigDict(extra="ignore")

    min_pixels: int = Field(ge=1, le=_LARGEST_AREA)
    max_pixels: int = Field(ge=1, le=_LARGEST_AREA)
    pad: tuple[Colour, Colour, Colour] | None = Field(None, strict=False)
    center: bool = False
    stock: bool = False


class Asking(Section):
    """What else it takes to ask weights as their run did; files of earlier versions have none of it."""

    model_config = ConfigDict(extra="ignore")

    revision: str | None = None
    load_in_4bit: bool = False
    precision: Precision | None = None
    max_new_tokens: int | None = Field(None, ge=1, le=Largest)
    max_image_pixels: int | None = Field(None, ge=1, le=Largest)


class Saved(Section):
    """The file; what a later version adds is left alone."""

    model_config = ConfigDict(extra="ignore")

    task: Task
    labels: tuple[str, ...] = Field(strict=False)
    hints: str
    split: str
    images: _Images
    asking: Asking = Field(default_factory=Asking)


def asking_of(job: JobConfig) -> Asking:
    """What a run of this job asks by, beside its inputs."""
    return Asking(
        revision=job.model.revision,
        load_in_4bit=job.model.load_in_4bit,
        precision=job.train.precision,
        max_new_tokens=job.evaluate.max_new_tokens,
        max_image_pixels=job.data.max_image_pixels,
    )


def describe_preprocessing(builder: SampleBuilder, asking: Asking | None = None) -> dict[str, Any]:
    """How inputs are made, for `preprocessing.json` beside the weights; `read_saved` reads it back.

    `asking`: what else it takes to ask them, for weights that go where their run is not.
    """
    spec = builder.spec
    return {
        "task": spec.task.model_dump() | {"codec": builder.codec_name},
        "labels": list(spec.labels),
        "hints": spec.hints,
        "split": spec.split,
        "images": asdict(builder.image_spec),
    } | ({"asking": asking.model_dump()} if asking is not None else {})


def read_saved(folder: str) -> Saved | None:
    """What lies beside the weights in `folder`, if anything. Raises `ModelError` where it cannot be read."""
    path = Path(folder) / PREPROCESSING
    if not path.exists():
        return None
    try:
        return Saved.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable ({_reason(error)}). Use an adapter folder that a run wrote.") from None


def read_preprocessing(folder: str, spec: SampleSpec) -> SampleSpec | None:
    """`spec` with the wording, class names, codec and image sizes of the training of the weights in `folder`.

    None where they do not say; raises `ModelError` where what they say cannot be read.
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
    """The first thing that is wrong, in one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"


def changed_since(path: str, builder: SampleBuilder) -> list[str]:
    """What `builder` does otherwise than the sampling of the pairs in the file `path`, each with both values.

    Places that answers give in pixels of the resized image hold only at the same image sizes. Empty where nothing
    differs, or where no `<path>.about.json` tells. Raises `DataError` where that cannot be read.
    """
    place, mark, options = path.partition("?") if is_remote(path) else (path, "", "")
    about = f"{place}{ABOUT}{mark}{options}"
    try:
        saved = json.loads(read_bytes(about))["preprocessing"]
        codec, images = saved["task"]["codec"], dict(saved["images"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{about}: not readable ({type(error).__name__}: {error}). Make the pairs again, or delete it if it tells "
            "nothing of them."
        ) from None
    now = json.loads(json.dumps(asdict(builder.image_spec)))
    changed = [f"form of boxes ({codec}, now {builder.codec_name})"] if codec != builder.codec_name else []
    sizes = [f"{name} {images.get(name)}, now {value}" for name, value in now.items() if images.get(name) != value]
    return changed + ([f"image sizes ({'; '.join(sizes)})"] if sizes else [])
