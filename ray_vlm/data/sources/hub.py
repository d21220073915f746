"""Fetch data sets from the Hugging Face hub, with their own files where ray_vlm reads these
(huggingface.co/docs/hub/datasets-adding).

Which files a split has is what `datasets` makes of a repository; no code of a repository is run. What a name, a
revision and a split mean is kept in `HF_HOME`, so that the hub's cache can be used without a network.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.config.data import Source
from ray_vlm.config.paths import is_hub_data_set
from ray_vlm.data.sources.hub_choice import HubFiles, HubRequest, choose_files
from ray_vlm.data.sources.hub_errors import hub_errors
from ray_vlm.errors import DataError
from ray_vlm.runs.text import plural
from ray_vlm.storage import describe_file, replacing

if TYPE_CHECKING:
    from datasets import DatasetBuilder

_log = logging.getLogger(__name__)
_DOWNLOADS = 8  # at a time
_OF_FOLDER = re.compile(r"(?:^|/)(?:data\.ya?ml|Annotations/[^/]*\.xml)$")  # what tells YOLO and VOC
_WHOLE = ("yolo", "voc", "labelme", "cvat")  # formats of a folder, whatever files it has


def hub_files(source: Source) -> tuple[str, ...]:
    """Return the local paths of the files with the rows of a hub data set in order, or of its folder of images; fetch
    them where the hub's cache does not have them. Raise `DataError` with the reason and the fix."""
    request = _request(source)
    return _fetch(request, _resolve(request))


def hub_version(source: Source) -> list[Any]:
    """Return what identifies the present content of a hub data set: the address of its commit, its number of files, and
    a hash of their names and of the versions of those with rows. Nothing is fetched. Raise `DataError`."""
    request = _request(source)
    files = _resolve(request)
    versions: list[Any] = [files.others]
    for path in _local_rows(request, files):
        try:
            versions.append([path, *describe_file(path)[1:]])
        except OSError:
            versions.append(path)
    digest = int(hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:12], 16)
    address = f"hf://datasets/{request.name}@{files.commit}"
    return [address, len(files.rows) + len(files.others), digest]


def local_source(source: Source) -> Source:
    """Return a source of which a format reads a folder with the folder that the hub's cache has in place of the name of
    the data set; any other as it is. Raise `DataError`."""
    if not is_hub(source) or source.format not in (*_WHOLE, "image_folder"):
        return source
    changes: dict[str, object] = {"path": hub_files(source)[0], "follow_links": True}
    if source.format == "image_folder":
        changes["split"] = None  # the folder is that of the split
    return source.model_copy(update=changes)


def hub_root(source: Source) -> str:
    """Return the folder of the images of a hub data set, which changes with its commit. Raise `DataError`."""
    request = _request(source)
    files = _resolve(request)
    return os.path.join(_snapshot(request.name, files.commit), files.root)


def hub_features(source: Source) -> Mapping[str, Any] | None:
    """Return the features that a hub data set lists, if they have class names. Raise `DataError`."""
    features = _resolve(_request(source)).features
    return json.loads(features) if features else None


def forget() -> None:
    """Drop what this process has asked the hub, so that it asks again."""
    for asked in (_commit_of, _list_files, _load_builder, _resolve, _fetch, _announce):
        asked.cache_clear()


def pin_address(address: str) -> str:
    """Return an `hf://datasets/` address with the commit that its revision means now; any other as it is. Raise
    `DataError`."""
    start = "hf://datasets/"
    owner, _, rest = address.removeprefix(start).partition("/")
    name, _, path = rest.partition("/")
    if not address.startswith(start) or not name:
        return address
    name, _, revision = name.partition("@")
    if revision.startswith("refs"):  # huggingface_hub takes `refs/convert/parquet` with its slashes too
        parts = f"{revision}/{path}".replace("%2F", "/").replace("%2f", "/").split("/")
        revision, path = "/".join(parts[:3]), "/".join(parts[3:])
    return f"{start}{owner}/{name}@{_commit_of(f'{owner}/{name}', revision or 'main')}/{path}".rstrip("/")


@lru_cache(maxsize=256)
def _commit_of(name: str, revision: str) -> str:
    if len(revision) == 40 and set(revision) <= set("0123456789abcdef"):
        return revision
    with hub_errors(name, revision):
        return str(_api().dataset_info(name, revision=revision).sha)


def _request(source: Source) -> HubRequest:
    return HubRequest(
        source.paths[0],
        source.revision or "main",
        source.config,
        source.split or "train",
        source.format,
        source.image_root is None,
    )


def _api() -> Any:
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT, library_name="ray_vlm")


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _snapshot(name: str, commit: str) -> str:
    """Return the folder of the hub's cache with the files of a commit."""
    from huggingface_hub import constants

    return os.path.join(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "snapshots", commit)


@lru_cache(maxsize=64)
def _resolve(request: HubRequest) -> HubFiles:
    """Return the files of a split, as the hub has them now, or without a network as they were when it was last asked.
    This process asks once."""
    if _is_offline():
        return _read_note(request)
    files = _ask(request)
    _write_note(request, files)
    num_files = plural(len(files.rows) + len(files.others), "file")
    size = f"{num_files}, {files.num_bytes / 1e6:.1f} MB"
    _announce(f"{request.title} at commit {files.commit[:12]}: {size}, split {request.split}")
    return files


@lru_cache(maxsize=64)
def _announce(line: str) -> None:
    """Print a line once in this process."""
    _log.info(line)


def _ask(request: HubRequest) -> HubFiles:
    """Return the files of a split as the hub has them."""
    with hub_errors(request.name, request.revision):
        commit = _commit_of(request.name, request.revision)
        return _select(request, commit, _list_files(request.name, commit), request.name)


def _select(request: HubRequest, commit: str, sizes: Mapping[str, int], location: str) -> HubFiles:
    """Return the files of a split among all files of a repository, which `sizes` has with their bytes. `location`: the
    name of the repository, or the folder that holds a copy of it."""
    script = f"{request.name.partition('/')[2]}.py"
    if script in sizes:
        raise DataError(
            f"{request.title}: a data set with a script, {script}, and code of a data set is not run. Give the "
            "copy in Parquet that the hub makes of most of these (revision: refs/convert/parquet), or a folder "
            "with its files."
        )
    if request.format in _WHOLE or (request.format == "auto" and any(map(_OF_FOLDER.search, sizes))):
        return HubFiles((), tuple(sizes), commit=commit, num_bytes=sum(sizes.values()))
    builder = _load_builder(request.title, location, request.config, commit)
    is_copy = location != request.name
    splits = _names_of_splits(request, f"{location if is_copy else f'hf://datasets/{location}@{commit}'}/", builder)
    files = choose_files(request, builder, splits, tuple(sizes)) or HubFiles(_build(request, builder))
    total = sum(sizes.get(name, 0) for name in (*files.rows, *files.others))
    return replace(files, commit=commit, num_bytes=total, features=_class_features(builder))


@lru_cache(maxsize=16)
def _list_files(name: str, commit: str) -> Mapping[str, int]:
    """Return the files of a repository with their bytes, in order of their names."""
    info = _api().dataset_info(name, revision=commit, files_metadata=True)
    return {file.rfilename: file.size or 0 for file in sorted(info.siblings or (), key=lambda file: file.rfilename)}


@lru_cache(maxsize=16)
def _load_builder(title: str, location: str, config: str | None, commit: str) -> "DatasetBuilder":
    """Return what `datasets` makes of a repository. Raise `DataError` for a configuration that is not there."""
    import datasets
    from huggingface_hub import constants

    if constants.ENDPOINT != "https://huggingface.co":
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would call another server
    try:
        revision = None if os.path.isabs(location) else commit
        builder = datasets.load_dataset_builder(location, config, revision=revision)
    except ValueError as error:
        configs = datasets.get_dataset_config_names(location, revision=revision)
        if (len(configs) > 1 and config is None) or config not in (None, *configs):
            wrong = f"no configuration {config!r}" if config else "it has several configurations"
            raise DataError(f"{title}: {wrong}. Set `config` to one of {', '.join(configs)}.") from None
        raise DataError(f"{title}: `datasets` cannot read it ({error}). Give a folder with its files.") from None
    if type(builder).__module__.endswith(".cache"):  # what an earlier version of the data set was built into
        raise DataError(f"{title}: `datasets` could not read it from the hub. Start again, or set HF_HUB_OFFLINE=1.")
    return builder


def _names_of_splits(request: HubRequest, start: str, builder: "DatasetBuilder") -> Mapping[str, Sequence[str]]:
    """Return the names of the files of each split in the repository. `start`: what their addresses or paths begin with.
    Raise `DataError` if the split is not there."""
    listed = builder.config.data_files or {}
    names = {str(split): [str(name).removeprefix(start) for name in files] for split, files in listed.items()}
    if request.split not in names and names:
        raise DataError(
            f"{request.title}: no split {request.split!r}. Set `split` to one of {', '.join(map(str, names))}."
        )
    return names


def _build(request: HubRequest, builder: "DatasetBuilder") -> tuple[str, ...]:
    """Let `datasets` write the split as Parquet into its cache, with images inside, and return the paths. Raise
    `DataError` for images in archives, of which it writes names alone."""
    archives = [name for name in (builder.config.data_files or {}).get(request.split, ()) if name.endswith(".zip")]
    if archives and type(builder).__module__.endswith(".imagefolder"):
        raise DataError(
            f"{request.title}: its images are in archives ({archives[0].rpartition('/')[2]}), which are not read. "
            f"Fetch and unpack them (`hf download --repo-type dataset {request.name}`), and give the folder as `path`."
        )
    builder.download_and_prepare(file_format="parquet")
    if request.split not in (builder.info.splits or {}):
        existing = ", ".join(builder.info.splits or {})
        raise DataError(f"{request.title}: no split {request.split!r}. Set `split` to one of {existing}.")
    start = f"{builder.dataset_name}-{request.split}"
    paths = sorted(Path(builder.cache_dir).glob("*.parquet"))
    return tuple(str(path) for path in paths if path.stem == start or path.stem.startswith(f"{start}-"))


def _class_features(builder: "DatasetBuilder") -> str:
    """Return the features that a data set's card lists, as JSON, if they have class names."""
    features = builder.info.features
    listed = json.dumps(features.to_dict()) if features is not None else ""
    return listed if '"ClassLabel"' in listed else ""


def _local_rows(request: HubRequest, files: HubFiles) -> list[str]:
    return [os.path.join(_snapshot(request.name, files.commit), name) for name in files.rows]


@lru_cache(maxsize=64)
def _fetch(request: HubRequest, files: HubFiles) -> tuple[str, ...]:
    """Fetch what the cache does not have; return the paths of the files with rows, or of the folder of images."""
    snapshot = _snapshot(request.name, files.commit)
    wanted = [name for name in (*files.rows, *files.others) if not os.path.exists(os.path.join(snapshot, name))]
    if wanted and _is_offline():
        raise DataError(
            f"{request.title}: {len(wanted)} of its files, such as {wanted[0]}, are not in {snapshot}, and "
            "HF_HUB_OFFLINE is set. Unset it, or set HF_HOME to a cache that has them."
        )
    if wanted:
        _download(request, files.commit, wanted)
    rows = tuple(_local_rows(request, files))
    return rows or (os.path.join(snapshot, files.root).rstrip("/"),)


def _download(request: HubRequest, commit: str, names: Iterable[str]) -> None:
    api = _api()

    def fetch(name: str) -> None:
        api.hf_hub_download(request.name, name, repo_type="dataset", revision=commit)

    with hub_errors(request.name, request.revision), ThreadPoolExecutor(_DOWNLOADS) as pool:
        try:
            for _ in pool.map(fetch, names):
                pass
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, nothing more is fetched


def _note(request: HubRequest) -> Path:
    """Return the path of what is kept of an answer of the hub."""
    from huggingface_hub import constants

    digest = hashlib.sha256(json.dumps([constants.ENDPOINT, *asdict(request).values()]).encode()).hexdigest()[:16]
    return Path(constants.HF_HOME) / "ray_vlm" / f"{request.name.replace('/', '--')}-{digest}.json"


def _write_note(request: HubRequest, files: HubFiles) -> None:
    path = _note(request)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(files)), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}). Set HF_HOME to a folder with room.") from None


def _read_note(request: HubRequest) -> HubFiles:
    path = _note(request)
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return HubFiles(**note | {"rows": tuple(note["rows"]), "others": tuple(note["others"])})
    except (OSError, ValueError, KeyError, TypeError):
        return _read_copy(request)


def _read_copy(request: HubRequest) -> HubFiles:
    """Return the files of a split in the hub's cache, which another program has filled, as `hf download` does."""
    commit = request.revision
    cache = Path(_snapshot(request.name, "-")).parents[1]
    with suppress(OSError):
        commit = (cache / "refs" / commit).read_text(encoding="ascii").strip()
    folder = cache / "snapshots" / commit
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        raise DataError(
            f"{request.title}: there is no such file or folder here, HF_HUB_OFFLINE is set, and split "
            f"{request.split!r} is not in {cache}. Mend the name; or run `ray-vlm data check` once with a network and "
            "this HF_HOME, or give the folder with its files."
        )
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    with hub_errors(request.name, request.revision):
        files = _select(request, commit, sizes, os.path.realpath(folder))
    for name in files.rows:
        shard = re.fullmatch(r"(.*-)\d{5}-of-(\d{5})(.*)", name)
        alike = [other for other in files.rows if shard and other.startswith(shard[1]) and other.endswith(shard[3])]
        if shard and len(alike) < int(shard[2]):
            raise DataError(f"{request.title}: {folder} has not all shards like {name}. Fetch it once more.")
    return files


def is_hub(source: Source) -> bool:
    """Return whether the path of a source is a data set of the hub, and no file or folder."""
    return isinstance(source.path, str) and source.create is None and is_hub_data_set(source.path)
