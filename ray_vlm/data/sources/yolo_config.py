"""Read what describes a YOLO data set: `data.yaml` (docs.ultralytics.com/datasets/detect), darknet's `obj.data`, or a
list of class names such as `classes.txt`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_vlm.config.paths import describe_search
from ray_vlm.data.sources.fields import control_character, shown
from ray_vlm.data.sources.folders import SPLITS
from ray_vlm.errors import DataError
from ray_vlm.storage import is_remote, local_path, open_file

_MAX_BYTES = 4 * 2**20
_YAML = (".yaml", ".yml")
_USUAL_YAML = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAME_FILES = ("classes.txt", "obj.names", "classes.names", "predefined_classes.txt", "_darknet.labels")


@dataclass(frozen=True)
class YoloConfig:
    """The description of a data set. `folder`: where its file lies; `path`: the value of that name, or empty; `names`:
    class names by number; `pose_numbers`: how many numbers follow the box of a pose; `splits`: folders and lists."""

    address: str
    folder: str
    path: str
    names: Mapping[int, str]
    pose_numbers: int
    splits: Mapping[str, Sequence[str]]

    def entries(self, split: str | None) -> Sequence[str]:
        """Return the folders and lists of a split, `train` by default. Raise `DataError` if it is not described."""
        wanted = split or "train"
        for name in next((names for names in SPLITS if wanted in names), (wanted,)):
            if self.splits.get(name):
                return self.splits[name]
        usual = [name for names in SPLITS for name in names if self.splits.get(name)]
        existing = ", ".join(usual) or "none"
        raise DataError(f"{self.address}: no split {wanted!r}; there is {existing}. Set `split` of the job's source.")


def read_config(address: str) -> YoloConfig:
    """Return the description at a path: a file, or the folder that has one. Raise `DataError`."""
    if is_remote(address):
        raise DataError(
            f"{address}: YOLO has a file for each image, which is read from a folder of this machine alone."
        )
    path = _description(local_path(address))
    folder, name = os.path.split(path)
    if name.lower().endswith(_YAML):
        return _read_yaml(path, folder)
    if name.lower().endswith(".data"):
        return _read_darknet(path, folder)
    names = _read_names(path)
    top = os.path.dirname(folder) if os.path.basename(folder) == "labels" else folder
    return YoloConfig(path, top, "", names, 0, _usual_splits(top))


def _description(path: str) -> str:
    """Return the file that describes the data set at a path."""
    if os.path.isfile(path):
        if path.lower().endswith((*_YAML, ".data", ".names", ".txt", ".labels")):
            return path
        raise DataError(f"{path}: not a data.yaml. Give `path` the data.yaml of a YOLO data set, or its folder.")
    if not os.path.isdir(path):
        raise DataError(f"{path}: no such file or folder. Give `path` the data.yaml.{describe_search(path)}")
    files = sorted(os.listdir(path))
    yamls = [name for name in _USUAL_YAML if name in files] or [name for name in files if name.endswith(_YAML)]
    if len(yamls) > 1 and yamls[0] not in _USUAL_YAML:
        raise DataError(f"{path}: has {', '.join(yamls[:5])}. Give `path` the one that describes the data set.")
    darknet = [name for name in files if name.endswith(".data")]
    lists = [name for name in NAME_FILES if name in files]
    in_labels = [f"labels/{name}" for name in NAME_FILES if os.path.isfile(os.path.join(path, "labels", name))]
    if names := [*yamls[:1], *darknet[:1], *lists, *in_labels]:
        return os.path.join(path, names[0])
    for above in list(Path(path).parents)[:2]:  # of `train` or `images/train`
        if any((above / name).is_file() for name in _USUAL_YAML):
            raise DataError(f"{path}: has no data.yaml, and {above} has. Give that folder as `path`, and `split`.")
    raise DataError(f"{path}: has no data.yaml, obj.data or classes.txt. Add the one with the names of the classes.")


def _read_text(path: str) -> str:
    try:
        with open_file(path) as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: not readable ({error}). Mend its permissions.") from None
    if len(data) > _MAX_BYTES:
        raise DataError(f"{path}: above {_MAX_BYTES} bytes, which no list of classes has. Give `path` the data.yaml.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from None


def _read_yaml(path: str, folder: str) -> YoloConfig:
    import yaml

    text = _read_text(path)
    try:
        _check_nodes(text, path)
        data = yaml.safe_load(text)
        written = yaml.load(text, yaml.BaseLoader)  # noqa: S506  of scalars their texts alone
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as YAML ({str(error)[:300]}). Mend it.") from None
    if not isinstance(data, dict) or "names" not in data:
        raise DataError(f"{path}: not the description of a YOLO data set, which has `names` and `train`. Add them.")
    names = _names(data["names"], written.get("names"), path)
    count = data.get("nc")
    if isinstance(count, int) and count not in (len(names), max(names) + 1):
        raise DataError(f"{path}: nc is {count}, and there are {len(names)} names. Mend one of them.")
    base = data.get("path")
    if base is not None and not isinstance(base, str):
        raise DataError(f"{path}: `path` is no text. Write the folder of the data set, or remove it.")
    others = {"names", "nc", "path", "download", "kpt_shape", "flip_idx", "roboflow", "yaml_file", "channels"}
    usual = {name for names in SPLITS for name in names}
    splits = {
        key: _entries(value, key, path)
        for key, value in data.items()
        if isinstance(key, str) and key not in others and (key in usual or isinstance(value, str | list))
    }
    return YoloConfig(path, folder, base or "", names, _pose_numbers(data.get("kpt_shape"), path), splits)


def _check_nodes(text: str, path: str) -> None:
    """Raise `DataError` for what YAML's readers take without a word: names that are written twice, and aliases, which a
    small file can repeat without end."""
    import yaml

    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise DataError(f"{path}: has aliases (*name), which are not read. Write the values out.")
    top = yaml.compose(text, yaml.SafeLoader)
    pairs = top.value if isinstance(top, yaml.MappingNode) else []
    for node in (top, *(value for _, value in pairs)):
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise DataError(f"{path}: line {node.start_mark.line + 1}: {shown(twice)} is there twice. Keep one.")


def _entries(value: object, key: str, path: str) -> list[str]:
    listed = value if isinstance(value, list) else [] if value is None else [value]
    entries = [entry for entry in listed if isinstance(entry, str)]
    if len(entries) < len(listed):
        raise DataError(f"{path}: `{key}` is no folder, list of folders or .txt file. Mend it.")
    return entries


def _pose_numbers(shape: object, path: str) -> int:
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) and 0 < n < 10_000 for n in shape):
        raise DataError(f"{path}: kpt_shape is not [number of points, 2 or 3]. Mend it.")
    return shape[0] * shape[1]


def _names(value: object, written: Any, path: str) -> dict[int, str]:
    """Return the class names by number, from a list or a mapping, which may have gaps. `written`: the same with all
    scalars as texts, such as 007 and 1.10."""
    pairs: list[tuple[Any, Any]] = (
        list(enumerate(value)) if isinstance(value, list) else list(value.items()) if isinstance(value, dict) else []
    )
    texts = list(written.values()) if isinstance(written, dict) else written
    if not isinstance(texts, list) or len(texts) != len(pairs):  # as with a merge key
        texts = [None] * len(pairs)
    if not pairs:
        raise DataError(f"{path}: `names` is no list of names, nor a mapping of numbers to names. Mend it.")
    names: dict[int, str] = {}
    for (key, name), text in zip(pairs, texts, strict=True):
        number = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key
        if not isinstance(number, int) or isinstance(number, bool) or number < 0 or number in names:
            raise DataError(f"{path}: `names` has a key that is no number of its own. Number the classes from 0.")
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            kind = "yes or no, as YAML reads it" if isinstance(name, bool) else type(name).__name__
            raise DataError(f"{path}: the name of class {number} is no text ({kind}). Write it in quotes.")
        names[number] = _checked(text if isinstance(text, str) else str(name), f"class {number}", path)
    return names


def _checked(name: str, what: str, path: str) -> str:
    name = name.strip()
    if not name:
        raise DataError(f"{path}: the name of {what} is empty. Fill it.")
    if character := control_character(name):
        raise DataError(f"{path}: {shown(name)} holds the control character {character}. Remove it.")
    return name


def _read_names(path: str) -> dict[int, str]:
    """Return the class names of a text file with one a line."""
    lines = _read_text(path).replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")
    if lines == [""]:
        raise DataError(f"{path}: holds no names of classes. Write one a line.")
    return {number: _checked(line, f"class {number}", path) for number, line in enumerate(lines)}


def _read_darknet(path: str, folder: str) -> YoloConfig:
    """Read darknet's `obj.data`, of lines `key = value`; its paths are relative to where darknet was started."""
    pairs = [line.partition("=") for line in _read_text(path).splitlines() if "=" in line and line.strip()[0] != "#"]
    values = {key.strip(): value.strip() for key, _, value in pairs}
    name_file = os.path.basename(values.get("names", "obj.names").replace("\\", "/"))
    names = _read_names(os.path.join(folder, name_file))
    splits = {key: [values[key]] for key in ("train", "valid", "val", "test") if values.get(key)}
    if not splits:
        splits = {key: list(value) for key, value in _usual_splits(folder).items()}
    return YoloConfig(path, folder, "", names, 0, splits)


def _usual_splits(folder: str) -> dict[str, list[str]]:
    """Return the splits of a folder without a description: by the usual names, or else all images as `train`."""
    splits: dict[str, list[str]] = {}
    for name in (name for names in SPLITS for name in names):
        usual = (f"{name}.txt", f"images/{name}", f"{name}/images", name)
        if existing := [entry for entry in usual if os.path.exists(os.path.join(folder, entry))]:
            splits[name] = existing[:1]
    if not splits:
        splits["train"] = ["images" if os.path.isdir(os.path.join(folder, "images")) else "."]
    return splits
