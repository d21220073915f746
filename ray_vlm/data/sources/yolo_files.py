"""Find the images and label files of a YOLO data set, as `data.yaml`, `obj.data` or `classes.txt` describes it.

The label file of `.../images/.../x.jpg` is `.../labels/.../x.txt` (the last `images` is replaced), or else `x.txt`
beside the image. Nothing outside `image_root`, by default the folder of the description, is listed.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ray_vlm.config.data import Source
from ray_vlm.data.sources.folders import IMAGES, FolderFile, check_link, list_files, local_folder, suffix_of
from ray_vlm.data.sources.member_files import Member
from ray_vlm.data.sources.tar import tar_of
from ray_vlm.data.sources.yolo_config import YoloConfig, read_config
from ray_vlm.errors import DataError

_TEXT, _TEXT_LENGTH = (".txt",), len(".txt")
_NOT_LABELS = (
    "classes",
    "predefined_classes",
    "train",
    "val",
    "valid",
    "test",
    "trainval",
    "notes",
    "license",
    "names",
)
_COMMON = ("images", "labels", "obj_train_data")  # folders whose name alone does not say which split they hold
_SHOWN = 5
_Texts = dict[str, FolderFile]  # label files by their path without suffix


@dataclass(frozen=True)
class YoloFiles:
    """A split of a data set. `address`: the file that describes it; `root`: the folder of the images; `names`: class
    names by number; `pose_numbers`: how many numbers follow the box of a pose; `members`: the rows in order."""

    address: str
    root: str
    names: Mapping[int, str]
    pose_numbers: int
    members: list[Member]


@dataclass
class _Tree:
    """Where files are looked for. `bases`: the folders that names may be relative to; the last parts of a name that
    led to a file are tried first for the next one (`hint`)."""

    config: YoloConfig
    root: str
    follow_links: bool
    bases: list[str] = field(default_factory=list)
    hint: tuple[str, int] | None = None
    label_folders: dict[str, str] = field(default_factory=dict)

    def locate(self, name: str, bases: Iterable[str] = ()) -> str | None:
        """Return the file or folder that a name of the description means, None if there is none.

        A name of another machine, or one that leaves the folder as Roboflow's `../train/images`, means what exists
        here under its last parts.
        """
        plain = name.strip().replace("\\", "/")
        parts = [part for part in plain.split("/") if part not in ("", ".", "..")]
        if self.hint is not None and len(parts) > self.hint[1]:
            path = os.path.join(self.hint[0], *parts[self.hint[1] :])
            if os.path.exists(path):
                return path
        bases = [*bases, *self.bases]
        for base in bases:
            path = os.path.normpath(os.path.join(base, plain))
            if _is_inside(path, self.root) and os.path.exists(path):
                return path
        for first in range(len(parts)):
            if first and first == len(parts) - 1 and parts[first].lower() in _COMMON:
                break
            for base in bases:
                path = os.path.join(base, *parts[first:])
                if _is_inside(path, self.root) and os.path.exists(path):
                    self.hint = (base, first)
                    return path
        return None

    def label_folder(self, folder: str) -> str:
        """Return the folder `labels` with the label files of a folder of images, empty if its path has no `images`."""
        if folder not in self.label_folders:
            parts = folder.split("/")
            last = len(parts) - 1 - parts[::-1].index("images") if "images" in parts else -1
            path = "/".join([*parts[:last], "labels", *parts[last + 1 :]])
            allowed = _is_inside(path, self.root) or _is_inside(path, self.config.folder)
            self.label_folders[folder] = path if last >= 0 and allowed else ""
        return self.label_folders[folder]


def find_yolo_files(source: Source) -> YoloFiles:
    """Return the images of the source's split with their label files. Raise `DataError`."""
    if tar_of(source.image_root):
        raise DataError(
            f"{source.name}: the images of YOLO are listed in a folder, and image_root is a tar. Unpack it."
        )
    if len(source.paths) > 1:
        raise DataError(f"{source.name}: YOLO is read from one data.yaml. Give each an entry of data.mix.")
    config = read_config(source.paths[0])
    root = config.folder if source.image_root is None else local_folder(source.image_root, "YOLO")
    tree = _Tree(config, root, source.follow_links)
    tree.bases = list(_bases(config, root))
    images: dict[str, None] = {}
    texts: _Texts = {}
    orphans: dict[str, None] = {}
    by_entry: dict[str, list[str]] = {}
    for entry in config.entries(source.split):
        path = _entry_path(tree, entry, source.split)
        if os.path.isdir(path):
            listed, its_texts = _list_folder(tree, path)
            orphans |= dict.fromkeys(its_texts)
        elif path.lower().endswith(".txt"):
            tree.hint = None
            listed = list(_read_list(tree, path))
            its_texts = _list_parents(tree, listed)
        else:
            raise DataError(
                f"{config.address}: {entry!r} is {path}, neither a folder nor a .txt list of images. Mend it."
            )
        by_entry[entry] = listed
        images |= dict.fromkeys(listed)
        texts |= its_texts
    members = list(_pair(tree, images, texts, orphans))
    _check_members(tree, members, by_entry, source)
    return YoloFiles(config.address, root, config.names, config.pose_numbers, members)


def _bases(config: YoloConfig, root: str) -> Iterator[str]:
    named = [os.path.normpath(os.path.join(config.folder, config.path))] if config.path else []
    if config.path:
        last = os.path.basename(config.path.replace("\\", "/").rstrip("/"))
        named.append(os.path.join(root, last))
    for base in dict.fromkeys([*named, root, config.folder]):
        if _is_inside(base, root) and os.path.isdir(base):
            yield base


def _is_inside(path: str, root: str) -> bool:
    return f"{path}/".startswith(f"{root.rstrip('/')}/")


def _entry_path(tree: _Tree, entry: str, split: str | None) -> str:
    """Return the folder or list that an entry of the split names. Raise `DataError`."""
    config = tree.config
    tree.hint = None
    path = tree.locate(entry)
    if path is None:
        meant = os.path.normpath(os.path.join(config.folder, config.path, entry))
        fix = f"Put the folder beside {os.path.basename(config.address)}, or mend its value"
        if os.path.exists(meant):
            base = os.path.normpath(os.path.join(config.folder, config.path))
            base = base if _is_inside(meant, base) else os.path.dirname(meant)
            fix = f"{meant} lies outside that; set image_root={base}"
        value = f"path {config.path!r} and {entry!r}" if config.path else repr(entry)
        raise DataError(f"{config.address}: {value} of {split or 'train'} is not in {tree.root}. {fix}.")
    if not tree.follow_links and not _is_inside(os.path.realpath(path), os.path.realpath(tree.root)):
        raise DataError(
            f"{path}: a link to {os.path.realpath(path)}, outside {tree.root}. Move that here, or set "
            "follow_links=true of the job's source."
        )
    return path


def _list_folder(tree: _Tree, folder: str) -> tuple[list[str], _Texts]:
    """Return the images below a folder, and the label files below it and its folder of labels."""
    files = list_files(folder, _TEXT, IMAGES, tree.follow_links, tree.root, f"{folder}/")
    images = [file.name for file in files if suffix_of(file.name) not in _TEXT]
    texts = [file for file in files if suffix_of(file.name) in _TEXT]
    labels = tree.label_folder(folder)
    if labels and os.path.isdir(labels):
        texts += list_files(labels, _TEXT, (), tree.follow_links, tree.config.folder, f"{labels}/")
    return images, {file.name[:-_TEXT_LENGTH]: file for file in texts}


def _read_list(tree: _Tree, path: str) -> Iterator[str]:
    """Yield the images that a list names, one a line; a name that leads nowhere is a row without its image."""
    folder = os.path.dirname(path)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for line in file:
                if (name := line.strip()) and "\0" not in name:
                    parts = (part for part in name.replace("\\", "/").split("/") if part not in ("", ".", ".."))
                    yield tree.locate(name, (folder,)) or os.path.join(tree.root, *parts)
    except OSError as error:
        raise DataError(f"{path}: not readable ({error}). Mend its permissions.") from None


def _list_parents(tree: _Tree, images: Iterable[str]) -> _Texts:
    """Return the label files in the folders where those of some images may lie."""
    parents = dict.fromkeys(os.path.dirname(image) for image in images)
    folders = [folder for parent in parents for folder in (parent, tree.label_folder(parent)) if folder]
    texts: _Texts = {}
    for folder in dict.fromkeys(folders):
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.lower().endswith(".txt"):
                        if entry.is_symlink() and not tree.follow_links:
                            check_link(entry, os.path.realpath(tree.config.folder))
                        about = entry.stat()
                        texts[entry.path[:-_TEXT_LENGTH]] = FolderFile(entry.path, about.st_size, about.st_mtime_ns)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{folder}: not readable ({error}). Mend its permissions.") from None
    return texts


def _pair(tree: _Tree, images: Iterable[str], texts: _Texts, orphans: dict[str, None]) -> Iterator[Member]:
    """Yield the images with their label files, and behind them the label files below the split's folders that belong
    to no image."""
    start = len(tree.root.rstrip("/")) + 1
    for image in images:
        folder, _, name = image.rpartition("/")
        stem = name[: name.rfind(".")] if "." in name else name
        file = None
        for path in (f"{tree.label_folder(folder)}/{stem}", f"{folder}/{stem}"):
            if path in texts:
                file = file or texts[path]
                orphans.pop(path, None)
        yield Member(image[start:], *(file or ("",)))
    for stem in orphans:
        name = os.path.basename(stem).lower()
        if name not in _NOT_LABELS and not name.startswith("readme") and texts[stem].name != tree.config.address:
            yield Member("", *texts[stem])


def _check_members(tree: _Tree, members: list[Member], by_entry: Mapping[str, list[str]], source: Source) -> None:
    """Raise `DataError` if there are no images, or no label file for any of them or for any of a folder or list.

    `by_entry`: the images of each folder and list of the split.
    """
    images = [member for member in members if member.image]
    split = source.split or "train"
    if not images:
        raise DataError(f"{tree.config.address}: no images in the folders of {split}. Mend its value of {split}.")
    if not any(member.annotation for member in images):
        folder, name = os.path.split(os.path.join(tree.root, os.path.splitext(images[0].image)[0]))
        looked = [f"{labels}/{name}.txt" for labels in (tree.label_folder(folder), folder) if labels]
        raise DataError(
            f"{tree.config.address}: none of {len(images)} images of {split} has a label file, such as "
            f"{' or '.join(looked)}. Put the labels there: without any, the model would learn that nothing is there."
        )
    labelled = {member.image for member in images if member.annotation}
    start = len(tree.root.rstrip("/")) + 1
    for entry, listed in by_entry.items():
        if listed and labelled.isdisjoint(image[start:] for image in listed):
            raise DataError(
                f"{tree.config.address}: none of the {len(listed)} images of {entry!r} has a label file, and those of "
                f"other entries of {split} have. Put the labels there, or an empty .txt for one of them if nothing is "
                "in these images."
            )
