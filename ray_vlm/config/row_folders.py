"""The files with rows in a folder: shards, shards of a split, or what `datasets` wrote by `save_to_disk`."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ray_vlm.config.row_files import natural_key, row_suffix
from ray_vlm.errors import DataError
from ray_vlm.storage import join, list_folder, read_bytes

_ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json")  # of `datasets`, without rows
# As the hub names the files of a split, with a hash at the end in early ones, and before it the name of the data set.
_SHARD = re.compile(r"(?:.*-)?(\w+(?:\.\w+)*)-([0-9]{4,})-of-([0-9]{4,})(?:-[0-9a-f]{8,})?")
_NUMBERED = re.compile(r"([A-Za-z]+)(?:[-_.]?[0-9]+)?")
_SAME = {  # names of splits that mean the same
    "training": "train",
    **dict.fromkeys(("val", "valid", "dev"), "validation"),
    **dict.fromkeys(("testing", "eval", "evaluation"), "test"),
}
_SPLITS = {"train", "validation", "test", *_SAME}
_DATA = "data"  # the folder of the files in a repository of the hub
_SHOWN = 6


def files_of_folder(folder: str, split: str | None) -> tuple[str, ...]:
    """Return the files with the rows of a folder, in natural order, or in that of `save_to_disk`.

    `split`: the one of several to read, by default `train`. Names that begin with a dot or an underscore do not count.
    Raise `DataError` if the folder does not say which files are meant, with what is there; `OSError` if it cannot be
    listed.
    """
    entries = list_folder(folder)
    files = {entry.name for entry in entries if entry.is_file}
    folders = sorted(entry.name for entry in entries if not entry.is_file and not entry.name.startswith((".", "_")))
    if "dataset_dict.json" in files:
        return _saved_splits(folder, split)
    if "state.json" in files and (state := _read_object(join(folder, "state.json"))).get("_data_files") is not None:
        return _saved_files(folder, state, split)
    rows = sorted((name for name in files if _holds_rows(name)), key=natural_key)
    rows = [name for name in rows if row_suffix(name) != ".tar"] or rows  # beside rows, a tar has their images
    wanted = split_name(split or "train") or split or "train"
    splits: dict[str, list[str]] = {}
    for name in folders:
        splits.setdefault(split_name(name), []).append(name)
    unnamed = splits.pop("", [])
    if rows:
        chosen = _choose(folder, rows, split)
        if not any(split_name(name) for name in rows):
            _check_only_rows(folder, rows, splits.get(wanted, []))
        return tuple(join(folder, name) for name in chosen)
    if split is not None and split in folders:
        return files_of_folder(join(folder, split), None)
    if wanted in splits:
        if len(splits[wanted]) > 1:
            raise DataError(
                f"{folder}: {_listed(splits[wanted])} are all folders of the split {wanted}. Say which are meant, as "
                f"in path: {join(folder, splits[wanted][0] + '/*')}, or a list of several."
            )
        return files_of_folder(join(folder, splits[wanted][0]), None)
    if _DATA in unnamed and not splits:
        return files_of_folder(join(folder, _DATA), split)
    if splits:
        raise DataError(
            f"{folder}: no folder of the split {split or 'train'}; there are "
            f"{_listed([name for names in splits.values() for name in names])}. Set `split` to one."
        )
    held = _listed([*sorted(files, key=natural_key), *(f"{name}/" for name in folders)]) or "nothing"
    raise DataError(
        f"{folder}: no file with rows is in this folder; it holds {held}. Give a folder with files such as .jsonl, "
        ".csv, .parquet or .arrow, or `path` a pattern for deeper ones, as in "
        f"{join(folder, '**/*.parquet')}."
    )


def _check_only_rows(folder: str, rows: Sequence[str], inner: Sequence[str]) -> None:
    """Raise `DataError` if a folder has rows itself and in the folders `inner`, which are named by the split."""
    for name in inner:
        if any(entry.is_file and _holds_rows(entry.name) for entry in list_folder(join(folder, name))):
            raise DataError(
                f"{folder}: rows may be {_listed(rows)} in it, or those in its folder {name}. Give `path` that folder, "
                f"or files, as in {join(folder, '*' + row_suffix(rows[0]))}."
            )


def _holds_rows(name: str) -> bool:
    return bool(row_suffix(name)) and not name.startswith((".", "_")) and name not in _ABOUT


def split_name(name: str) -> str:
    """Return the split that a file or a folder is named by, as the hub's files are; '' if none is.

    `train-00000-of-00004.parquet` is of `train`, and so are `train.jsonl`, `train_3.csv` and a folder `train`; `val`,
    `valid` and `dev` are `validation`.
    """
    stem = _stem(name)
    if shard := _SHARD.fullmatch(stem):
        return _SAME.get(shard[1], shard[1])
    plain = _NUMBERED.fullmatch(stem)
    word = plain[1].lower() if plain else ""
    return _SAME.get(word, word) if word in _SPLITS else ""


def _stem(name: str) -> str:
    return name[: len(name) - len(row_suffix(name))]


def _choose(folder: str, rows: Sequence[str], split: str | None) -> list[str]:
    """Return the files of a split, or all if no file is named by one. Raise `DataError` if they do not fit together."""
    splits: dict[str, list[str]] = {}
    for name in rows:
        splits.setdefault(split_name(name), []).append(name)
    wanted = split or "train"
    others = splits.pop("", [])
    if splits and others:
        raise DataError(
            f"{folder}: {_listed(others)} and files of the splits {_listed(list(splits))} are in one folder. Say which "
            f"are meant, as in path: {join(folder, '*' + row_suffix(rows[0]))}."
        )
    if not splits and split is not None:
        raise DataError(
            f"{folder}: split={split} is set, but the names of its files, such as {rows[0]}, are not those of splits. "
            "Remove `split`, or name the files."
        )
    if split is None and len(splits) == 1 and not _SPLITS & splits.keys():
        others = next(iter(splits.values()))  # `part-00000-of-00002.csv` is of no split, or of the only one
    chosen = others or splits.get(wanted) or splits.get(_SAME.get(wanted, wanted))
    if not chosen:
        raise DataError(
            f"{folder}: no file of the split {wanted}; there are {_listed(list(splits))}. Set `split` to one."
        )
    _check_complete(folder, chosen)
    kinds = Counter(map(row_suffix, chosen))
    if len(kinds) > 1:
        counts = " and ".join(f"{count} {suffix}" for suffix, count in kinds.items())
        raise DataError(
            f"{folder}: files of several kinds, {counts}. Say which are meant, as in path: "
            f"{join(folder, '*' + next(iter(kinds)))}."
        )
    return chosen


def _check_complete(folder: str, names: Sequence[str]) -> None:
    """Raise `DataError` if a file is missing by the names of the others, as of `train-00000-of-00004.parquet`, or if
    they are counted in two ways, as where a data set was written anew beside its old files."""
    sets: dict[str, dict[str, set[int]]] = {}  # of each name before the number, and each total, the numbers
    for name in names:
        if shard := _SHARD.fullmatch(_stem(name)):
            numbers = sets.setdefault(name[: shard.start(2)], {}).setdefault(shard[3], set())
            numbers.add(int(shard[2]))
    for start, by_total in sets.items():
        if len(by_total) > 1:
            totals = _listed([f"{start}*-of-{total}" for total in sorted(by_total)])
            raise DataError(
                f"{folder}: {totals} are files of several writings of one data set. Remove the old ones, or give a "
                "pattern of those that are meant."
            )
        ((total, there),) = by_total.items()
        count = int(total)
        if len(there) < count:
            missing = next(n for n in range(1 if count in there else 0, count + 1) if n not in there)
            raise DataError(
                f"{folder}: {count - len(there)} of the {count} files of {start.rstrip('-')} are missing, the first "
                f"{start}{missing:0{len(total)}d}-of-{total}. Fetch the rest, or give a pattern of those that are "
                f"there, as {join(folder, '*' + row_suffix(names[0]))}."
            )


def _saved_splits(folder: str, split: str | None) -> tuple[str, ...]:
    """Return the files of a split of a `DatasetDict`."""
    splits = _read_object(join(folder, "dataset_dict.json")).get("splits")
    names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
    wanted = split or "train"
    if wanted not in names or PurePosixPath(wanted).name != wanted:
        raise DataError(
            f"{folder}: no split {wanted}; save_to_disk wrote {_listed(names) or 'none'}. Set `split` to one."
        )
    inner = join(folder, wanted)
    return _saved_files(inner, _read_object(join(inner, "state.json")), None)


def _saved_files(folder: str, state: Mapping[str, Any], split: str | None) -> tuple[str, ...]:
    """Return the Arrow files that `state.json` lists (huggingface.co/docs/datasets, `Dataset.save_to_disk`)."""
    if split is not None and state.get("_split") not in (None, split):
        raise DataError(f"{folder}: save_to_disk wrote the split {state['_split']} here, and split={split} is set.")
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder}: save_to_disk of an old version of datasets wrote the order of the rows apart from them. Load "
            "and save it with a present version."
        )
    listed = state.get("_data_files")
    names = [item.get("filename") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    texts = [name for name in names if isinstance(name, str)]
    inside = [name for name in texts if name not in ("", "..") and PurePosixPath(name).name == name]
    if not inside or len(inside) < len(names):
        raise DataError(f"{folder}: its state.json lists no files of rows. Save the data set again.")
    return tuple(join(folder, name) for name in inside)


def _read_object(address: str) -> dict[str, Any]:
    try:
        value = json.loads(read_bytes(address))
    except FileNotFoundError:
        raise DataError(f"{address}: no such file, which save_to_disk writes. Save the data set again.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{address}: not readable as JSON ({error}). Save the data set again.") from None
    return value if isinstance(value, dict) else {}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
