"""The files that are sent with a submitted job, and whether its command finds there what it names.

The working folder and this package are first planned, then zipped. Ray zips the folders that a runtime environment
names, and applies `excludes` to those of `py_modules` too: a pattern for the data would remove modules of the package.
It sends archives unchanged. So this module writes both archives, and what `describe_archive` prints is exactly what
they contain.

On the cluster the command runs in a copy of the working folder that is deleted afterwards. A relative path is resolved
in that copy, so it must be sent; any other path must be on storage that all nodes see. So must be the paths of results.
"""

import os
import posixpath
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile, ZipInfo

from ray_vlm import __version__
from ray_vlm.config.load import dump_job
from ray_vlm.config.paths import check_output_dir, is_hub_data_set, is_hub_name
from ray_vlm.config.row_files import is_pattern, match_files, split_pattern
from ray_vlm.config.row_folders import files_of_folder
from ray_vlm.config.schema import Data, JobConfig, Model
from ray_vlm.errors import ConfigError, DataError
from ray_vlm.storage import is_absolute

if TYPE_CHECKING:
    from ray._private.thirdparty.pathspec import PathSpec

    from ray_vlm.config.data import Source

PACKAGE_FOLDER = Path(__file__).parents[1]
IGNORE_GITIGNORE = "RAY_RUNTIME_ENV_IGNORE_GITIGNORE"  # Ray's own switch: "1" sends what git ignores
MAX_UPLOAD_BYTES = 100 * 2**20  # Ray's job server takes no larger request (`DASHBOARD_CLIENT_MAX_SIZE`)

_NEVER_SENT = (".git/", ".venv*/", "venv/", "__pycache__/", "*.pyc")
_NEVER = "this command, which never sends it"
_NAMES_SHOWN = 5
_ENTRY_BYTES = 120  # overhead of a zip archive for each file, beside its name (twice) and its bytes
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # the date of every file: the same files give the same archive, which is sent once

# Arguments of the verbs by what they name; all others name no file. A test checks that none is missing.
SENT = ("job", "space")  # a file that is sent
READ = ("run", "inputs", "adapter", "against", "base", "image_root")  # is sent, or on storage that all nodes
# see; a run, an adapter or a base may also be a name on the hub, or of a base that ships with the package
WRITTEN = ("output", "draw")

_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):[A-Za-z_]\w*")
_SHARED = "a path that all nodes see: an absolute path on a shared file system, or an address such as s3://"


@dataclass(frozen=True)
class Archive:
    """The files of a folder that are sent and those that are left out; only names and sizes have been read."""

    folder: Path
    files: Mapping[str, int]  # path in the folder -> bytes
    left_out: Mapping[str, str] = field(default_factory=dict)  # path (of a folder with a slash) -> what leaves it out
    prefix: str = ""  # folder of the files in the archive

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(self.files.values())

    @property
    def archive_bytes(self) -> int:
        """Upper bound of the archive's size; its files are not compressed."""
        return self.num_bytes + sum(_ENTRY_BYTES + 2 * len(os.fsencode(self.prefix + name)) for name in self.files)

    def holds(self, path: str) -> bool:
        """Whether a file, or any file of a folder, is sent."""
        path = posixpath.normpath(path)
        return path in self.files or path == "." or any(name.startswith(f"{path}/") for name in self.files)

    def why_left_out(self, path: str) -> str | None:
        """Return what leaves a file or a folder out; None if it is sent or does not exist."""
        path = posixpath.normpath(path)
        for name, reason in self.left_out.items():
            if path == name.rstrip("/") or (name.endswith("/") and path.startswith(name)):
                return reason
        return None

    def left_out_below(self, path: str) -> dict[str, str]:
        """Return what is left out of a folder that is sent: path -> what leaves it out."""
        start = "" if posixpath.normpath(path) == "." else f"{posixpath.normpath(path)}/"
        return {name: reason for name, reason in self.left_out.items() if name.startswith(start)}


@dataclass(frozen=True)
class _Rule:
    """Patterns as in .gitignore, relative to the folder `base`."""

    base: str
    spec: "PathSpec"
    origin: str
    has_exceptions: bool  # it has lines with `!`, so folders are matched file by file

    def matches(self, name: str) -> bool:
        """Whether the patterns match `name`, a path in the working folder; a folder's path ends with a slash."""
        if not name.startswith(self.base):
            return False
        name = name[len(self.base) :]
        if name.endswith("/") and self.spec.match_file(name.rstrip("/")):  # to Ray `x/*` matches x/y, not x/y/z
            return True
        return not (name.endswith("/") and self.has_exceptions) and self.spec.match_file(name)


def _rule(base: str, lines: Sequence[str], origin: str) -> _Rule:
    from ray._private.thirdparty.pathspec import PathSpec

    exceptions = any(line.strip().startswith("!") for line in lines)
    return _Rule(base, PathSpec.from_lines("gitwildmatch", lines), origin, exceptions)


def plan_working_folder(folder: Path, excludes: Sequence[str], excludes_of: str) -> Archive:
    """Plan the archive of a working folder: all but what `.gitignore`, `.rayignore` and `excludes` leave out.

    `excludes_of`: the name of the file with `excludes`. If the folder contains this package, it is left out, since it
    has an archive of its own. Raises `ConfigError` if the folder cannot be read.
    """
    ignore_files = [".rayignore"] if os.environ.get(IGNORE_GITIGNORE) == "1" else [".gitignore", ".rayignore"]
    rules = [_rule("", _NEVER_SENT, _NEVER), _rule("", excludes, excludes_of)]
    if (folder / "ray_vlm" / "__init__.py").is_file():
        rules.append(_rule("", ["/ray_vlm/"], "this command, which sends the package by itself"))
    return _plan(folder, rules, ignore_files)


def plan_package() -> Archive:
    """Plan the archive of this package; the user's patterns do not apply to it."""
    files = _plan(PACKAGE_FOLDER, [_rule("", _NEVER_SENT, _NEVER)], []).files
    return Archive(PACKAGE_FOLDER, files, prefix="ray_vlm/")


def _plan(folder: Path, rules: Sequence[_Rule], ignore_files: Sequence[str]) -> Archive:
    files: dict[str, int] = {}
    left_out: dict[str, str] = {}
    pending = [("", tuple(rules), frozenset({os.path.realpath(folder)}))]
    while pending:
        base, known, parents = pending.pop()
        try:
            entries = sorted(os.scandir(folder / base), key=lambda entry: entry.name)
            known += tuple(_read_ignore_files(folder, base, ignore_files))
            for entry in entries:
                name, reason = _judge(entry, base, known, parents)
                if reason is not None:
                    left_out[name] = reason
                elif name.endswith("/"):
                    pending.append((name, known, parents | {os.path.realpath(entry.path)}))
                else:
                    files[name] = entry.stat().st_size
        except OSError as error:
            raise ConfigError(
                f"--working-dir {folder}: {error.filename or base} cannot be read ({error.strerror}). Change its "
                "permissions, or add it to .rayignore."
            ) from None
    return Archive(folder, dict(sorted(files.items())), dict(sorted(left_out.items())))


def _judge(entry: os.DirEntry, base: str, rules: Sequence[_Rule], parents: frozenset[str]) -> tuple[str, str | None]:
    """Return the path of an entry (of a folder with a slash) and what leaves it out. Links are followed, as by Ray."""
    is_folder = entry.is_dir()
    name = f"{base}{entry.name}{'/' if is_folder else ''}"
    for rule in rules:
        if rule.matches(name):
            return name, rule.origin
    if is_folder and entry.is_symlink() and os.path.realpath(entry.path) in parents:
        return name, "its being a link to a folder that contains it"
    if not is_folder and not entry.is_file():
        return name, "its being neither a file nor a folder"
    if "\\" in name or name.encode(errors="surrogateescape").decode(errors="replace") != name:
        return name, "its name, which Ray does not unpack"
    return name, None


def _read_ignore_files(folder: Path, base: str, names: Sequence[str]) -> Iterator[_Rule]:
    for name in names:
        path = folder / base / name
        if path.is_file():
            yield _rule(base, path.read_text(encoding="utf-8", errors="replace").splitlines(), base + name)


def check_size(archive: Archive) -> None:
    """Raise `ConfigError`, with the largest entries, for a working folder that the job server would refuse."""
    if archive.archive_bytes < MAX_UPLOAD_BYTES:
        return
    sizes: dict[str, int] = {}
    for name, size in archive.files.items():
        top, slash, _ = name.partition("/")
        sizes[top + slash] = sizes.get(top + slash, 0) + size
    largest = sorted(sizes, key=lambda name: -sizes[name])[:_NAMES_SHOWN]
    raise ConfigError(
        f"--working-dir {archive.folder}: {len(archive.files):,} files of {format_bytes(archive.num_bytes)} would be "
        f"sent, and Ray's job server takes less than {format_bytes(MAX_UPLOAD_BYTES)}. The largest: "
        f"{', '.join(f'{name} {format_bytes(sizes[name])}' for name in largest)}. Put data and models where every node "
        "can read them, name them in the job by an absolute path or an address such as s3://, and add them to "
        ".rayignore, which is written like .gitignore."
    )


def describe_archive(archive: Archive) -> str:
    """Describe what is sent, and what is left out and why, in lines for a terminal."""
    what = f"ray_vlm {__version__}" if archive.prefix else "the working folder"
    count = f"{len(archive.files):,} file{'' if len(archive.files) == 1 else 's'}"
    lines = [f"sends {what}, {archive.folder}: {count}, {format_bytes(archive.num_bytes)}"]
    for reason in dict.fromkeys(archive.left_out.values()):
        names = [name for name, cause in archive.left_out.items() if cause == reason]
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        lines.append(f"  left out by {reason}: {', '.join(names[:_NAMES_SHOWN])}{more}")
    return "\n".join(lines)


def format_bytes(size: float) -> str:
    """Format a size in decimal units, as file managers do."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def write_archive(archive: Archive, path: Path) -> None:
    """Write the files as a zip archive that depends only on their names, contents and executable bits."""
    with ZipFile(path, "w") as target:
        for name in archive.files:
            source = archive.folder / name
            info = ZipInfo(archive.prefix + name, _EARLIEST)
            mode = 0o755 if source.stat().st_mode & stat.S_IXUSR else 0o644
            info.external_attr = (stat.S_IFREG | mode) << 16
            with open(source, "rb") as data, target.open(info, "w") as out:
                shutil.copyfileobj(data, out)


@dataclass
class PathReport:
    """The problems and notes on a command's paths."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)  # paths outside the folder, which all nodes must see
    written: list[str] = field(default_factory=list)  # paths of the results

    def __add__(self, other: "PathReport") -> "PathReport":
        return PathReport(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


def name_in_folder(path: str, folder: Path) -> str | None:
    """Return a path of this machine relative to `folder`; None if it is outside."""
    for full in (Path(os.path.abspath(os.path.expanduser(path))), Path(path).resolve()):
        for root in (Path(os.path.abspath(folder)), folder.resolve()):
            if full.is_relative_to(root):
                return full.relative_to(root).as_posix()
    return None


def check_words(words: Mapping[str, Any], archive: Archive) -> tuple[dict[str, Any], PathReport]:
    """Return the arguments of a command as the cluster gets them, and a report on the paths among them."""
    report = PathReport()
    arguments = dict(words)
    for name in SENT:
        if arguments.get(name) is not None:
            arguments[name] = _check_sent(name, arguments[name], archive, report)
    for name in READ:
        value = arguments.get(name)
        if isinstance(value, list):
            arguments[name] = [_check_read(name, one, archive, report) for one in value]
        elif isinstance(value, str):
            arguments[name] = _check_read(name, value, archive, report)
    return arguments, report


def _check_sent(name: str, path: str, archive: Archive, report: PathReport) -> str:
    inside = name_in_folder(path, archive.folder)
    if inside is None:
        report.problems.append(
            f"{path} lies outside {archive.folder}, which is what the cluster gets. Give --working-dir with a folder "
            f"that contains the {name} and the files that it names."
        )
        return path
    if reason := archive.why_left_out(inside):
        report.problems.append(f"{path}: the {name} is left out by {reason}. {_take_out(reason)}")
    elif not archive.holds(inside):
        report.problems.append(f"{path}: no such file in {archive.folder}, which is what the cluster gets.")
    return inside


def _check_read(name: str, value: str, archive: Archive, report: PathReport) -> str:
    label = f"{name}={value}" if name in ("run", "inputs") else f"--{name} {value}"
    if is_absolute(value):
        if "://" not in value:
            report.expected.append(value)
        return value
    inside = name_in_folder(value, archive.folder)
    if name == "run" and not Path(value).exists() and (archive.folder / "outputs" / value).exists():
        inside = f"outputs/{value}"
    if inside is None:
        report.problems.append(
            f"{label} lies outside {archive.folder}, which is what the cluster gets. Give {_SHARED}."
        )
    elif reason := archive.why_left_out(inside):
        report.problems.append(f"{label} is left out by {reason}. {_take_out(reason)}")
    elif archive.holds(inside):
        return inside
    elif name in ("inputs", "against", "image_root") or (name == "adapter" and not is_hub_name(value)):
        report.problems.append(
            f"{label}: no such file or folder in {archive.folder}, which is what the cluster gets. Give {_SHARED}."
        )
    return value


def check_job(job: JobConfig, job_file: str, archive: Archive) -> PathReport:
    """Check the paths in a job: rows, images, base, adapter and modules. `job_file`: its path in the folder."""
    report = PathReport()
    beside = os.path.dirname(job_file)
    for key, value, optional, split in _job_inputs(job.data, job.model):
        if is_absolute(value):
            if "://" not in value:
                report.expected.append(f"{value} ({key})")
            continue
        candidates = [os.path.normpath(os.path.join(base, value)) for base in ("", beside)]
        is_rows = key.endswith(".path")
        files = next(filter(None, (_rows_of(archive, name, split) for name in candidates if is_rows)), None)
        if files:
            _check_rows(key, value, files, archive, report)
        elif sent := next(filter(archive.holds, candidates), None):
            if not key.startswith("model.") and (below := archive.left_out_below(sent)):
                part, cause = next(iter(below.items()))
                report.notes.append(f"{key}: {len(below)} of what is in {sent} is left out, such as {part} by {cause}")
        elif reason := next(filter(None, map(archive.why_left_out, candidates)), None):
            report.problems.append(f"{key}={value!r} is left out by {reason}. {_take_out(reason)}")
        elif not optional:
            report.problems.append(
                f"{key}={value!r} is not in {archive.folder}, which is what the cluster gets. Put it there, or give "
                f"{_SHARED}."
            )
    for module in sorted(set(_modules(dump_job(job)))):
        files = [module.replace(".", "/") + end for end in (".py", "/__init__.py")]
        for name in dict.fromkeys(os.path.join(base, file) for base in ("", beside) for file in files):
            if (archive.folder / name).is_file() and (reason := archive.why_left_out(name)):
                report.problems.append(f"{name}, the module of a function in the job, is left out by {reason}.")
    return report


def _rows_of(archive: Archive, path: str, split: str | None) -> list[str]:
    """Return the files of rows that a pattern or a folder stands for, relative to the archive's folder, if any of them
    is in it; those outside have their full path."""
    full = archive.folder / path
    try:
        if full.is_dir():
            files = files_of_folder(str(full), split)
        else:
            files = match_files(str(full)).files if is_pattern(path) and not full.exists() else ()
    except (DataError, OSError, ValueError):  # a folder of another kind; the command names what is wrong with it
        return []
    inside = {file: name for file in files if (name := name_in_folder(file, archive.folder)) is not None}
    return [inside.get(file, file) for file in files] if inside else []


def _check_rows(key: str, value: str, files: Sequence[str], archive: Archive, report: PathReport) -> None:
    """Report files of rows that are left out of a pattern or a folder: the cluster would read fewer rows."""
    if outside := next(filter(is_absolute, files), None):
        report.problems.append(
            f"{key}={value!r}: {outside} is not in {archive.folder}, which is what the cluster gets. Put it there, or "
            f"give {_SHARED}."
        )
    lost = {name: reason for name in files if (reason := archive.why_left_out(name))}
    if lost:
        name, reason = next(iter(lost.items()))
        report.problems.append(
            f"{key}={value!r}: {len(lost)} of its {len(files)} files are left out, such as {name} by {reason}. "
            f"{_take_out(reason)}"
        )


def check_results(verb: str, words: Mapping[str, Any], output_dir: str | None) -> PathReport:
    """Report the paths that a verb with these arguments writes to, and those whose contents would be lost.

    `output_dir`: that of the job that the verb runs, if it runs one.
    """
    outputs = {f"--{name}": words[name] for name in WRITTEN if words.get(name) is not None}
    adapters = words.get("adapter") or []
    if verb == "evaluate" and not outputs and len(adapters) == 1:
        outputs = {"without --output, results go beside the adapter: its folder": os.path.dirname(adapters[0])}
    elif output_dir is not None and not (verb == "evaluate" and outputs):
        outputs["run.output_dir"] = output_dir
    elif verb == "export" and not outputs:
        outputs = {"without --output, an export goes into the run: it": words["run"]}
    problems = [problem for name, value in outputs.items() for problem in check_output_dir(value, name)]
    return PathReport(
        problems, written=[value for name, value in outputs.items() if verb != "pairs" or name == "--output"]
    )


def _job_inputs(data: Data, model: Model) -> Iterator[tuple[str, str, bool, str | None]]:
    """Yield the key and value of each path that a job reads, whether it may be something else than a file there, and of
    rows their split."""
    sources: list[tuple[str, Source | None]] = [("data.train", data.train), ("data.eval", data.eval)]
    sources += [("data.test", data.test), *((f"data.mix[{i}]", source) for i, source in enumerate(data.mix))]
    for key, source in sources:
        if source is None or not source.path or source.create:  # generated rows are generated on the cluster too
            continue
        for path in source.paths:
            yield f"{key}.path", path, is_hub_data_set(path), source.split
        paths = [path for path in source.paths if not is_hub_data_set(path)]
        first = paths[0] if paths else ""
        beside = split_pattern(first)[0] if is_pattern(first) else os.path.dirname(first)
        if source.image_root or (beside and not is_absolute(first)):
            yield f"{key}.image_root", source.image_root or beside, not source.image_root, None
    yield "model.name", model.name, True, None
    if model.adapter:
        yield "model.adapter", model.adapter, True, None


def _modules(value: object) -> Iterator[str]:
    """Yield the module of each `module:function` in plain data, except for this package's, which is always sent."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _modules(key)
            yield from _modules(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            yield from _modules(inner)
    elif isinstance(value, str) and (match := _FUNCTION.fullmatch(value)) and not value.startswith("ray_vlm."):
        yield match[1]


def _take_out(reason: str) -> str:
    """Return how to fix a path that `reason` leaves out."""
    git = f" {IGNORE_GITIGNORE}=1 sends what git ignores." if reason.endswith(".gitignore") else ""
    return f"Change that, or give {_SHARED}.{git}"
