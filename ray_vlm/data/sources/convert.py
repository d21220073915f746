"""Write the rows of a job in another format: `ray-vlm data convert`.

Nothing is written if the format would lose something, unless that is allowed. A data set is whole or not there: its
files are written into a folder beside the one that is named, which is renamed at the end.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ray_vlm.cluster.preflight import build_demand
from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.index import describe_bad
from ray_vlm.data.parts import ReadSource, build_indexer
from ray_vlm.data.records import BadRow, Record, SftRecord
from ray_vlm.data.shards import read_bad, read_record
from ray_vlm.data.sources.formats import change_id
from ray_vlm.data.sources.losses import LossSurvey
from ray_vlm.data.sources.output import ImageFiles, ImageMode, Output, Part, RowsProfile, as_json
from ray_vlm.data.sources.write_boxes import (
    write_coco,
    write_cvat,
    write_hf_objects,
    write_label_studio,
    write_labelme,
    write_objects,
    write_voc,
    write_yolo,
)
from ray_vlm.data.sources.write_parquet import write_hf_parquet
from ray_vlm.data.sources.write_tables import write_gui_csv, write_image_csv, write_image_folder
from ray_vlm.data.sources.write_texts import (
    write_alpaca,
    write_llava,
    write_messages,
    write_openai,
    write_preference,
    write_prompt,
    write_query_response,
    write_rec,
)
from ray_vlm.data.suspicions import add_up, find_suspicions
from ray_vlm.errors import ConfigError, DataError, RunError
from ray_vlm.runs.console import track
from ray_vlm.runs.text import plural
from ray_vlm.storage import is_remote, local_path, whole_or_gone
from ray_vlm.tasks.boxes import box_problem

Writer = Callable[[Iterable[Record], Output], str]
_NAMED_BY_IDS = ("yolo", "cvat", "voc", "labelme", "label_studio", "image_folder")
WRITERS: dict[str, Writer] = {
    "coco": write_coco,
    "yolo": write_yolo,
    "voc": write_voc,
    "label_studio": write_label_studio,
    "labelme": write_labelme,
    "cvat": write_cvat,
    "hf_objects": write_hf_objects,
    "objects": write_objects,
    "image_csv": write_image_csv,
    "image_folder": write_image_folder,
    "gui_csv": write_gui_csv,
    "llava": write_llava,
    "messages": write_messages,
    "openai": write_openai,
    "query_response": write_query_response,
    "alpaca": write_alpaca,
    "preference": write_preference,
    "prompt": write_prompt,
    "rec": write_rec,
}


@dataclass(frozen=True)
class Converted:
    """A data set that was written into `folder`: its rows, images, files with rows, and `source`, which reads it again.

    `bad`: rows of the source that were left out. `losses`: what was allowed to be lost. `notes`: for the user.
    `labels`: the class names of the task in their order, where the format does not have it.
    """

    folder: Path
    images: int
    files: int
    source: Source
    rows: int = 0
    bad: int = 0
    losses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return lines on what was written, and the section of a job that reads it."""
        left_out = f"; left out as bad: {self.bad:,}" if self.bad else ""
        files = "1 file" if self.files == 1 else f"{self.files:,} files"
        counts = f"{self.rows:,} rows, {self.images:,} images, {files} with rows"
        lines = [*(f"lost: {line}" for line in self.losses), *(f"note: {line}" for line in self.notes)]
        settings = ", ".join(f"{name}: {as_json(value)}" for name, value in _settings(self.source))
        lines += [f"{self.folder}: {counts}{left_out}", "", "data:", f"  train: {{{settings}}}"]
        if self.labels:
            lines.append(f"task: {{name: detection, labels: {as_json(list(self.labels))}}}  # keeps their order")
        return "\n".join(lines)


def _settings(source: Source) -> Iterator[tuple[str, object]]:
    """Yield the settings that read a data set, the path and the format first."""
    yield "path", source.path
    yield "format", source.format
    yield from source.model_dump(exclude_defaults=True, exclude={"path", "format"}).items()


class CheckedRows:
    """The usable rows of a source of the index, as often as they are asked for. `bad`: the others, once they were
    gone through."""

    def __init__(self, read: ReadSource):
        self._read = read
        self.bad: list[BadRow] = []

    def __iter__(self) -> Iterator[Record]:
        self.bad, start = [], 0
        for shard in self._read.open():
            reasons = shard.column("reason")
            for position in range(len(shard)):
                row: Record | BadRow
                row = read_record(shard, position) if reasons[position].as_py() is None else read_bad(shard, position)
                if (change := self._read.renamed.get(start + position)) is not None:
                    row = change_id(row, change)
                row = _check_boxes(row)
                if isinstance(row, BadRow):
                    self.bad.append(row)
                else:
                    yield row
            start += len(shard)


def _check_boxes(row: Record | BadRow) -> Record | BadRow:
    """Return a `BadRow` for a row with a box that cannot belong to its image, which training refuses too."""
    if not isinstance(row, SftRecord):
        return row
    numbers = row.context.get("image_of", ())
    regions = [(box, row.sizes[0]) for box in row.truth.get("boxes", ())]
    regions += [(box, row.sizes[number]) for box, number in zip(row.context.get("boxes", ()), numbers, strict=True)]
    single = (row.truth.get("box"), row.truth.get("point"), row.context.get("box"))
    regions += [(region, row.sizes[0]) for region in single if region is not None]
    problem = next((reason for box, size in regions if (reason := box_problem(box, size))), None)
    return row if problem is None else BadRow(row.row, row.id, f"{problem}; mend it, or set data.on_bad_box")


def convert(
    job: JobConfig,
    format: str,
    folder: str,
    part: Part = "train",
    images: ImageMode = "copy",
    allow_loss: bool = False,
) -> Converted:
    """Write the rows of a part of a job into `folder`, which must not exist or be empty.

    Raise `ConfigError` for a part without files and a folder in use, `DataError` for rows that cannot be used and for
    losses that are not allowed, `RunError` if the disk cannot be written.
    """
    if images == "inside" and format != "hf_objects":
        raise ConfigError(f"--images inside is for hf_objects, which is then a Parquet file, not for {format}.")
    source = _source_of(job.data, part)
    target = _check_folder(folder, source)
    indexer = build_indexer(job.data, job.run.output_dir, job.task.name, build_demand(job))
    read = indexer.read(source)
    rows = CheckedRows(read)
    survey = LossSurvey(format, read.shards.labels, images == "inside")
    for record in track(rows, f"what {format} holds of {source.name}", len(read)):
        survey.add(record)
    if rows.bad and job.data.on_bad_row == "raise":
        fix = "Mend or remove them, or set data.on_bad_row=quarantine to leave them out"
        count = f"{len(rows.bad):,} of {len(read):,} rows are bad, so nothing was written"
        raise DataError([*describe_bad(rows.bad, len(read), source.name)[:-1], f"{source.name}: {count}. {fix}."])
    if not survey.num_rows:
        raise DataError(f"{source.name}: no usable row among {len(read)}. " + "; ".join(b.reason for b in rows.bad[:3]))
    losses = survey.lines()
    if losses and not allow_loss:
        fix = "Nothing was written. Use another format, or --allow-loss to write the rows without that."
        raise DataError([f"{format} does not hold {line}." for line in losses] + [fix])
    num_bad = len(rows.bad)
    written = write_data_set(
        track(rows, f"writing {target}", survey.num_rows), format, target, survey.profile(), part, images
    )
    labels = survey.labels if survey.reorders_labels else ()
    summary = add_up(shard.summary() for shard in read.open())
    notes = find_suspicions(source, summary, read.shards.labels, job.data.on_bad_box)
    notes += _tell_format(format, survey.profile(), part, source.format)
    return replace(written, rows=survey.num_rows, bad=num_bad, losses=tuple(losses), notes=tuple(notes), labels=labels)


def _tell_format(format: str, profile: RowsProfile, part: Part, read: str) -> Iterator[str]:
    """Yield what users of a format should know of what was written. `read`: the format of the source."""
    if format in _NAMED_BY_IDS and read not in _NAMED_BY_IDS:
        yield "images are named by the ids of their rows, for which this format has no other field"
    if format == "coco" and not profile.numeric_ids:
        yield "the ids of images are texts, as in the source; some trainers take only numbers in COCO files"
    if format == "yolo":
        others = "`train`" if part == "eval" else "`val`" if part == "train" else "`train` and `val`"
        yield f"trainers of YOLO ask for {others} in data.yaml too: write another part, and name its folder there"


def check_format(format: str) -> None:
    """Raise `ConfigError` if there is no writer of the format."""
    if format not in WRITERS:
        raise ConfigError(f"--to {format!r} is no format. Use one of: {', '.join(WRITERS)}.")


def _source_of(data: Data, part: Part) -> Source:
    """Return the source of a part. Raise `ConfigError` if the part is no file of its own."""
    source = data.tested if part == "test" else getattr(data, part)
    if source is None:
        raise ConfigError(f"`data.{part}` is missing. Give it a path and a format, or another --part.")
    if source.ratio is not None:
        raise ConfigError(
            f"data.{part} is a share of the rows of data.train, and is written with these: use --part train. A job "
            "with the same seed and shares draws the same rows from the written data set."
        )
    if part == "train" and data.mix:
        raise ConfigError(
            f"data.mix has {plural(len(data.mix), 'more source')}, which may share ids. Convert each by itself: "
            "remove data.mix, and set data.train.path and data.train.format."
        )
    return source


def _check_folder(folder: str, source: Source) -> Path:
    """Return the absolute path of the folder to write. Raise `ConfigError` if it is in use, an address, or inside a
    folder that the source reads."""
    if is_remote(folder):
        raise ConfigError(f"{folder}: a data set is written into a folder of this machine. Copy it from there.")
    path = Path(local_path(folder))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not an empty folder. Give another one, or remove it.")
    for address in source.paths:
        read = None if is_remote(address) else Path(local_path(address))
        if read is not None and read.is_dir() and path.resolve().is_relative_to(read.resolve()):
            raise ConfigError(f"{path} is inside {read}, whose files are the rows. Give a folder beside it.")
    return path


def write_data_set(
    records: Iterable[Record],
    format: str,
    folder: Path,
    profile: RowsProfile,
    part: Part = "train",
    images: ImageMode = "copy",
) -> Converted:
    """Write records, which have sizes, into a new or empty folder. Raise `DataError` if an image cannot be read, and
    `RunError` if the folder cannot be written; then nothing is left.

    `profile`: of all of these records, as `LossSurvey` has it.
    """
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        with whole_or_gone(staging):
            out = Output(staging, ImageFiles(staging, images), profile, part)
            write = write_hf_parquet if images == "inside" else WRITERS[format]
            rows = write(out.images.fetch_ahead(records), out)
            os.rename(staging, folder)  # over an empty folder too
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error}). Give another folder.") from None
    return Converted(folder, len(out.images), out.files, _source_of_written(folder / rows, format, out))


def _source_of_written(path: Path, format: str, out: Output) -> Source:
    """Return the source that reads a data set that was written."""
    options: dict[str, object] = {"path": str(path), "format": format}
    if format == "coco" and out.profile.grouped:
        options["columns"] = {"group": "group"}
    if format in ("yolo", "voc") and out.part != "train":
        options["split"] = out.split
    return Source.model_validate(options)
