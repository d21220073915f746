"""Choose the files of a split among those of a repository on the hub."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from os.path import commonpath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import BuilderConfig, DatasetBuilder

_PACKED = ("", ".gz", ".zst")
_HOLD_IMAGES = (".parquet", ".arrow", ".feather", ".tar")
_TEXTS = tuple(f"{name}{packed}" for name in (".json", ".jsonl", ".ndjson", ".csv", ".tsv") for packed in _PACKED)
_TABLES = (*_HOLD_IMAGES, *_TEXTS)
_IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of `imagefolder`
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json", "state.json")
_KEYWORDS = {  # names that stand for a split, as `datasets` takes them
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_NOT_READING = ("name", "version", "data_dir", "data_files", "description", "features")  # of a builder's settings


@dataclass(frozen=True)
class HubRequest:
    """What a source asks of the hub. `needs_images`: whether it names no folder of images."""

    name: str
    revision: str
    config: str | None
    split: str
    format: str
    needs_images: bool

    @property
    def title(self) -> str:
        """The data set in messages."""
        return f"{self.name} (revision {self.revision})" if self.revision != "main" else self.name


@dataclass(frozen=True)
class HubFiles:
    """The files of a split. `rows`: names in the repository of the files with rows, or paths of files that `datasets`
    has made; empty for a folder. `others`: files that rows name, or those of the folder. `root`: the folder of the
    images in the repository. `features`: of `datasets`, as JSON, if they have class names."""

    rows: tuple[str, ...]
    others: tuple[str, ...] = ()
    root: str = ""
    commit: str = ""
    num_bytes: int = 0
    features: str = ""


def choose_files(
    request: HubRequest, builder: "DatasetBuilder", splits: Mapping[str, Sequence[str]], names: Sequence[str]
) -> HubFiles | None:
    """Return the files of a split if ray_vlm reads them, else None. `splits`: the names of the files of each split;
    `names`: those of all files of the repository."""
    files = splits.get(request.split, ())
    module = type(builder).__module__.rpartition(".")[2]
    if any("://" in name for name in files):  # elsewhere than in the repository
        return None
    images = tuple(name for name in names if _has_suffix(name, _IMAGES))
    if module == "imagefolder":
        return _choose_images(request, splits, names, images)
    if not files or not all(_has_suffix(name, _TABLES) for name in files) or not _is_plain(builder.config, files):
        return None
    if _has_suffix(files[0], _HOLD_IMAGES) or not request.needs_images:
        return HubFiles(tuple(files))
    return _with_images(tuple(files), images)


def _choose_images(
    request: HubRequest, splits: Mapping[str, Sequence[str]], names: Sequence[str], images: tuple[str, ...]
) -> HubFiles | None:
    """Return the files of a repository of images: rows if it has files of rows, else the folder of the split; None if
    images are in archives, or those of several splits in one folder."""
    files = splits[request.split]
    if request.format != "image_folder":
        if rows := [name for name in files if name.rpartition("/")[2] in _METADATA]:
            return _with_images(tuple(rows), tuple(name for name in files if _has_suffix(name, _IMAGES)))
        if rows := _rows_of_split(names, request.split):
            return _with_images(tuple(rows), images if request.needs_images else ())
    pictures = tuple(name for name in files if _has_suffix(name, _IMAGES))
    root = _class_root(pictures)
    start = f"{root}/" if root else ""
    others = (name for split, some in splits.items() if split != request.split for name in some)
    if len(pictures) < len([name for name in files if name.rpartition("/")[2] not in _METADATA]):
        return None
    return None if any(name.startswith(start) for name in others) else HubFiles((), pictures, root)


def _with_images(rows: tuple[str, ...], images: tuple[str, ...]) -> HubFiles:
    """Return rows with the files that they name: below their folder, if any images are, or below the repository."""
    folder = rows[0].rpartition("/")[0]
    is_beside = not images or any(name.startswith(f"{folder}/") for name in images)
    return HubFiles(rows, images, folder if is_beside else "")


def _has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes)


def _is_plain(config: "BuilderConfig", files: Sequence[str]) -> bool:
    """Return whether a data set's card asks for no other reading of its files than their suffixes do."""
    tabs = all(".tsv" in name.lower() for name in files)
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(config, field.name)
        if field.name == "sep" and value == ("\t" if tabs else ","):
            continue
        if field.name not in _NOT_READING and value != default:
            return False
    return True


def _rows_of_split(names: Sequence[str], split: str) -> list[str]:
    """Return the files of rows among files that are mostly images: those named after the split, or for `train` all if
    none is named after a split."""
    rows = [name for name in names if _has_suffix(name, _TEXTS) and name.rpartition("/")[2] not in _NO_ROWS]
    by_split = {key: [name for name in rows if _is_named(name, words)] for key, words in _KEYWORDS.items()}
    chosen = by_split.get(split) or [name for name in rows if _is_named(name, (split,))]
    return chosen or (rows if split == "train" and not any(by_split.values()) else [])


def _is_named(name: str, words: Sequence[str]) -> bool:
    any_word = "|".join(map(re.escape, words))
    return re.search(rf"(?:^|[-._ 0-9/])(?:{any_word})(?:[-._ 0-9/]|$)", name.lower()) is not None


def _class_root(names: Sequence[str]) -> str:
    """Return the folder that holds the folders of images, which classes are named after."""
    folders = {name.rpartition("/")[0].rpartition("/")[0] for name in names}
    return commonpath(folders) if folders and "" not in folders else ""
