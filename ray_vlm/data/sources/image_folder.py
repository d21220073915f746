"""Read a folder with a folder of images for each class, as torchvision's `ImageFolder` does
(docs.pytorch.org/vision), or with such folders inside those of splits: `train/dog/1.jpg`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.data.sources.member_files import Member, MemberFiles
from ray_vlm.data.sources.pieces import row_digest, unreadable_file
from ray_vlm.errors import DataError
from ray_vlm.storage import Store, is_remote, join, local_path

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
SPLITS = {  # names of folders of splits, by the name that a job gives
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "eval", "dev"),
    "test": ("test", "testing"),
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLIT_NAMES = frozenset(name for names in SPLITS.values() for name in names)
_JUNK = ("thumbs.db", "desktop.ini", "__macosx")


def find_members(source: Source) -> tuple[str, list[Member]]:
    """Return the folder that has a folder for each class, and the files inside those in order. Raise `DataError`."""
    if source.image_root is not None:
        raise DataError(f"{source.name}: image_root is not used, since `path` is the folder of the images. Remove it.")
    if len(source.paths) > 1:
        raise DataError(f"{source.name}: format=image_folder reads one folder. Give each an entry of data.mix.")
    address = source.paths[0]
    try:
        names = _remote_names(address) if is_remote(address) else _local_names(local_path(address), source.follow_links)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, NotADirectoryError):
            raise DataError(
                f"{address}: a file, and format=image_folder reads a folder with a folder for each class. Give that "
                "folder, or another format."
            ) from None
        raise unreadable_file(address, error) from None
    address = address if is_remote(address) else local_path(address)
    split = _choose_split(source, names)
    if split:
        address, names = join(address, split), [name.removeprefix(f"{split}/") for name in _inside(names, split)]
    _check_names(source, address, names)
    members = [name for name in names if not name.endswith("/") and ("/" in name or _is_image(name))]
    return address, [Member(name, "") for name in sorted(members)]


def open_members(source: Source, root: str, members: Sequence[Member]) -> MemberFiles:
    """Return the rows of the files below `root`, whose cells are `id`, `image` and `label`, the class."""
    if not any("/" in member.image for member in members):
        raise DataError(
            f"{root}: no folder of images for each class in it. Put the images of a class into a folder with its name, "
            "or give a table with the classes (format=image_csv)."
        )
    return MemberFiles(root, members, _read_member)


def folder_version(source: Source) -> list[Any]:
    """Return the folder of the classes, the number of files in it, and a digest of their names."""
    root, members = find_members(source)
    digest = row_digest(root)
    for member in members:
        digest.update(f"{member.image}\0".encode("utf-8", "surrogateescape"))
    return [root, len(members), digest.hexdigest()]


def _read_member(member: Member, _: bytes | None) -> Mapping[str, Any]:
    label, slash, _rest = member.image.partition("/")
    if not slash:
        raise ValueError("an image beside the folders of the classes, so it has no class; move it into one of them")
    if not _is_image(member.image):
        raise ValueError("no image by its suffix; move it out of the folder of the class")
    return {"id": member.image.removesuffix(PurePosixPath(member.image).suffix), "image": member.image, "label": label}


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def is_hidden(name: str) -> bool:
    """Return whether a file or a folder is none of a data set, by its name."""
    return name.startswith(".") or name.lower() in _JUNK


def _local_names(folder: str, follow_links: bool) -> list[str]:
    """Return the files below a folder relative to it, and the folders in it and in these, which end with a slash."""
    return list(_scan(folder, "", follow_links, ()))


def _scan(folder: str, inside: str, follow_links: bool, above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(f"{folder}: a link to a folder that it lies in. Remove it.")
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            name = inside + entry.name
            if not entry.is_dir():
                yield name
                continue
            if entry.is_symlink() and not follow_links:
                raise DataError(
                    f"{entry.path}: a link to a folder. Set follow_links=true of the job's source to read it."
                )
            if inside.count("/") < 2:
                yield f"{name}/"
            yield from _scan(entry.path, f"{name}/", follow_links, (*above, real))


def _remote_names(address: str) -> list[str]:
    """Return what `_local_names` does, of an object store, which has no empty folders."""
    files = [name for name in Store(address).files() if not any(map(is_hidden, name.split("/")))]
    if not files:
        raise FileNotFoundError(address)
    parts = (name.split("/") for name in files)
    folders = {"/".join(some[:depth]) + "/" for some in parts for depth in (1, 2) if len(some) > depth}
    return [*files, *folders]


def _inside(names: Sequence[str], folder: str) -> list[str]:
    return [name for name in names if name.startswith(f"{folder}/") and name != f"{folder}/"]


def _folders(names: Sequence[str]) -> list[str]:
    """Return the names of the folders at the top."""
    return sorted(name[:-1] for name in names if name.endswith("/") and name.count("/") == 1)


def _choose_split(source: Source, names: Sequence[str]) -> str:
    """Return the folder of the split that a source names, or that of the training rows; empty without folders of
    splits: those have the name of a split, and folders in them. Raise `DataError`."""
    folders = _folders(names)
    holding = {name.split("/")[0] for name in names if name.endswith("/") and name.count("/") == 2}
    splits = [name for name in folders if name.lower() in _SPLIT_NAMES and name in holding]
    wanted = source.split
    if not splits and wanted is None:
        return ""
    if wanted is None and len(splits) < len(folders):
        others = ", ".join(name for name in folders if name not in splits)
        raise DataError(
            f"{source.name}: it has folders of splits ({', '.join(splits)}) and others ({others}), so the classes are "
            "not clear. Set `split`, or give the folder with the classes alone as `path`."
        )
    names_of_split = next((n for n in SPLITS.values() if wanted and wanted.lower() in n), (wanted,))
    if wanted is None:
        names_of_split = SPLITS["train"]
    chosen = [wanted] if wanted in folders else [name for name in folders if name.lower() in names_of_split]
    if len(chosen) != 1 or chosen[0] is None:
        if not splits:
            raise DataError(
                f"{source.name}: split={wanted} is set, and the folder has classes ({', '.join(folders) or 'none'}) in "
                "place of splits. Remove `split`, or give the folder above."
            )
        raise DataError(
            f"{source.name}: {f'{len(chosen)} folders' if chosen else 'no folder'} of the split "
            f"{wanted or 'train'}; there is {', '.join(folders)}. Set `split` to one of them."
        )
    return chosen[0]


def _check_names(source: Source, root: str, names: Sequence[str]) -> None:
    """Raise `DataError` for a table that lists the images, for folders without images, and for classes that cannot be
    told apart."""
    tables = [name for name in names if name.rpartition("/")[2].lower() in METADATA]
    if tables:
        raise DataError(
            f"{source.name}: {tables[0]} lists what the images are. Give it as `path`, with format=image_csv for "
            f"classes: path={join(root, tables[0])}."
        )
    classes = _folders(names)
    filled = {name.split("/")[0] for name in names if not name.endswith("/") and _is_image(name)}
    problems = [
        f"{join(root, name)}: a folder without images, among those of the classes. Remove it, or fill it."
        for name in classes
        if name not in filled
    ]
    spelled = {name.strip() for name in classes}
    if len(spelled) < len(classes):
        problems.append(f"{root}: names of folders that differ only by spaces at their ends. Rename them.")
    if problems:
        raise DataError(problems)
