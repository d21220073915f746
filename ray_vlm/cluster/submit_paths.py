"""Check the paths in a submitted command: can the cluster read the inputs, and will the results be kept?

On the cluster the command runs in a copy of the working folder that is deleted afterwards. A relative path is resolved
in that copy, so it must be sent; any other path must be on storage that all nodes see.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_vlm.cluster.package import IGNORE_GITIGNORE, Archive
from ray_vlm.config.data import Source
from ray_vlm.config.load import dump_job
from ray_vlm.config.paths import check_output_dir, is_hub_name
from ray_vlm.config.schema import JobConfig

# Arguments of the verbs by what they name; all others name no file. A test checks that none is missing.
SENT = ("job", "space")  # a file that is sent
READ = ("run", "inputs", "adapter", "against", "base", "image_root")  # is sent, or on storage that all nodes
# see; a run, an adapter or a base may also be a name on the hub, or of a base that ships with the package
WRITTEN = ("output", "draw")

_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):[A-Za-z_]\w*")
_SHARED = "a path that all nodes see: an absolute path on a shared file system, or an address such as s3://"


@dataclass
class PathReport:
    """The problems and notes on a command's paths."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)  # paths outside the folder, which all nodes must see
    written: list[str] = field(default_factory=list)  # paths of the results

    def __add__(self, other: "PathReport") -> "PathReport":
        return PathReport(
            self.problems + other.problems,
            self.notes + other.notes,
            self.expected + other.expected,
            self.written + other.written,
        )


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
    if _is_absolute(value):
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
    for key, value, optional in _job_inputs(job):
        if _is_absolute(value):
            if "://" not in value:
                report.expected.append(f"{value} ({key})")
            continue
        candidates = [os.path.normpath(os.path.join(base, value)) for base in ("", beside)]
        if sent := next(filter(archive.holds, candidates), None):
            _note_left_out(key, sent, archive, report)
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


def check_results(verb: str, words: Mapping[str, Any], job: JobConfig | None) -> PathReport:
    """Report the paths that a verb with these arguments writes to, and those whose contents would be lost."""
    outputs = {f"--{name}": words[name] for name in WRITTEN if words.get(name) is not None}
    adapters = words.get("adapter") or []
    if verb == "evaluate" and not outputs and len(adapters) == 1:
        outputs = {"without --output, results go beside the adapter: its folder": os.path.dirname(adapters[0])}
    elif job is not None and not (verb == "evaluate" and outputs):
        outputs["run.output_dir"] = job.run.output_dir
    elif verb == "export" and not outputs:
        outputs = {"without --output, an export goes into the run: it": words["run"]}
    problems = [problem for name, value in outputs.items() for problem in check_output_dir(value, name)]
    return PathReport(
        problems, written=[value for name, value in outputs.items() if verb != "pairs" or name == "--output"]
    )


def _note_left_out(key: str, path: str, archive: Archive, report: PathReport) -> None:
    """Add a note if only part of a folder of images is sent."""
    below = archive.left_out_below(path)
    if key.endswith("image_root") and below:
        name, reason = next(iter(below.items()))
        report.notes.append(f"{key}: {len(below)} of what is in {path} is left out, such as {name} by {reason}")


def _job_inputs(job: JobConfig) -> Iterator[tuple[str, str, bool]]:
    """Yield the key and value of each path that a job reads, and whether it may be something else than a file there."""
    sources: list[tuple[str, Source | None]] = [(f"data.{name}", getattr(job.data, name)) for name in ("train", "eval")]
    sources += [("data.test", job.data.test), *((f"data.mix[{i}]", source) for i, source in enumerate(job.data.mix))]
    for key, source in sources:
        if source is None or not source.path or source.create:  # generated rows are generated on the cluster too
            continue
        yield f"{key}.path", source.path, False
        if source.image_root or (os.path.dirname(source.path) and not _is_absolute(source.path)):
            yield f"{key}.image_root", source.image_root or os.path.dirname(source.path), not source.image_root
    yield "model.name", job.model.name, True
    if job.model.adapter:
        yield "model.adapter", job.model.adapter, True


def _modules(value: Any) -> Iterator[str]:
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


def _is_absolute(value: str) -> bool:
    return "://" in value or value.startswith(("/", "~"))
