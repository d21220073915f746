"""The `data` section of a job: the sources of rows, the size of images, and how often each row is shown."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ray_vlm.config.section import Count, Largest, Section

FormatName = Literal[
    "auto",
    "coco",
    "yolo",
    "voc",
    "label_studio",
    "labelme",
    "cvat",
    "hf_objects",
    "objects",
    "image_csv",
    "image_folder",
    "gui_csv",
    "llava",
    "messages",
    "openai",
    "query_response",
    "alpaca",
    "preference",
    "prompt",
    "rec",
]


class Source(Section):
    """A source of rows."""

    path: str | tuple[str, ...] = Field(
        "",
        description="The rows: a file, a list of files, a glob, a folder of shards or of `save_to_disk`, an address "
        "such as s3://bucket/rows.jsonl, or a data set on the hub as `owner/name`.",
    )
    split: str | None = Field(
        None,
        description="The split of what has several: a hub data set, `save_to_disk`, a folder of shards or of classes, "
        "YOLO, Pascal VOC, CVAT. null: `train`, or all rows where there are no splits.",
    )
    config: str | None = Field(None, description="Hub data sets: the configuration, where there are several.")
    revision: str | None = Field(None, description="Hub data sets: a branch, a tag or a commit. null: `main`.")
    ratio: float | None = Field(
        None, gt=0, lt=1, description="Instead of `path`, for eval and test: this share of the training rows."
    )
    format: FormatName = Field(
        "auto",
        description="Format of the rows. `auto`: the one that the files look like; it is printed, with the reason.",
    )
    image_root: str | None = Field(
        None,
        description="Folder of the images, or a tar file with them, as a path or an address; files outside it are "
        "refused. null: the folder of `path`.",
    )
    follow_links: bool = Field(
        False, description="Also read images through symlinks in `image_root` that lead out of it."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Columns with other names, expected name to actual name: `{image: photo}`. `group` names a column "
        "whose groups are never split between training and evaluation.",
    )
    box_units: Literal["pixels", "relative_1", "relative_1000"] = Field(
        "pixels", description="Unit of the boxes in the rows; `pixels` are those of the upright original image."
    )
    box_frame: Literal["image", "listed"] | None = Field(
        None,
        description="Files that list the size of an image: the pixels of the boxes if the upright image has another "
        "size: those of the `image`, or of the `listed` size. null: such rows are bad.",
    )
    crowds: Literal["skip", "objects"] | None = Field(
        None,
        description="`coco` and `hf_objects`: whether crowd annotations (`iscrowd: 1`) are skipped or used as objects. "
        "null: skipped, but of `coco` refused if they are most of a class.",
    )
    weight: float = Field(
        1.0, gt=0, description="How often a training row of this source is shown in an epoch, on average."
    )
    task_start: str | None = Field(None, description="GUI steps: the first Task_id that is used.")
    task_end: str | None = Field(None, description="GUI steps: the last Task_id that is used.")
    max_tasks: Count | None = Field(None, description="GUI steps: use only the first tasks.")
    create: str | None = Field(
        None, description="`module:function` that creates the file at `path` if it is missing; for demos."
    )
    max_rows: Count | None = Field(None, description="Use only the first rows.")

    @field_validator("path", mode="before")
    @classmethod
    def _list_as_tuple(cls, value: object) -> object:
        """Convert a list of files, as YAML has it. Refuse other values in one line, not one a form."""
        names = value if isinstance(value, list | tuple) else [value]
        if not names or not all(isinstance(name, str) and (name or names is not value) for name in names):
            raise ValueError("a path, or a list of at least one path, none of them empty")
        return tuple(value) if isinstance(value, list) else value

    @property
    def paths(self) -> tuple[str, ...]:
        """What `path` names: one file, folder or data set, or those of a list."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def name(self) -> str:
        """The source in messages: its path, or the first one of a list and how many there are more."""
        first, *more = self.paths
        return f"{first} and {len(more)} more" if more else first

    def reads_as(self, other: "Source") -> bool:
        """Whether both read the same files, whatever they select of the rows."""

        def read(source: Source) -> tuple[object, ...]:
            return source.paths, source.split or "train", source.config, source.revision or "main"

        return read(self) == read(other)

    @field_validator("task_start", "task_end", mode="before")
    @classmethod
    def _id_as_text(cls, value: object) -> object:
        """Convert an id that YAML reads as a number, `task_start: 1`, to text."""
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Window(Section):
    """A shuffle in which rows that are read together stay near: within about `window` rows."""

    window: int = Field(ge=2, le=Largest)


Shuffle = Literal["full", "none"] | Window


class Data(Section):
    """The rows for training, validation and testing."""

    @field_validator("shuffle", mode="before")
    @classmethod
    def _read_shuffle(cls, value: object) -> object:
        """Return one of the forms of the setting, of which pydantic's union would tell an error for each. `true` and
        `false` are what earlier versions had."""
        if isinstance(value, bool):
            return "full" if value else "none"
        if value is None or value in ("full", "none") or isinstance(value, Window):
            return value
        rows = value["window"] if isinstance(value, dict) and value.keys() == {"window"} else None
        if isinstance(rows, int) and not isinstance(rows, bool) and 2 <= rows <= Largest:
            return Window(window=rows)
        raise ValueError("full, none, or {window: N} with a whole number N from 2 on")

    @model_validator(mode="before")
    @classmethod
    def _expand_ratios(cls, value: object) -> object:
        """Expand `eval: 0.1` to `eval: {ratio: 0.1}`."""
        if not isinstance(value, dict):
            return value
        numbers = {k: v for k, v in value.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        return value | {part: {"ratio": numbers[part]} for part in ("eval", "test") if part in numbers}

    @property
    def tested(self) -> Source | None:
        """The source of the rows that `ray-vlm evaluate` uses."""
        return self.eval if self.test_on_eval else self.test

    train: Source | None = Field(None, description="Training rows.")
    mix: tuple[Source, ...] = Field((), strict=False, description="More training rows, mixed in by their `weight`.")
    eval: Source | None = Field(
        None,
        description="Validation rows, which choose `best/`; a number is a share of the training rows. null: no "
        "validation.",
    )
    test: Source | None = Field(None, description="Test rows, for headline numbers only; a number is a share of train.")
    test_on_eval: bool = Field(
        False,
        description="Test on the rows of `eval`, which also choose `best/`, instead of separate rows; reports and "
        "model cards say so.",
    )
    stratify: bool = Field(True, description="Split shares of the training rows stratified by class.")
    min_pixels: Count | None = Field(
        None, description="Smallest image area after resizing, in pixels. null: the processor's own."
    )
    max_pixels: Count | None = Field(
        None, description="Largest image area after resizing, in pixels. null: the processor's own."
    )
    resize: Literal["stretch", "pad"] = Field(
        "stretch",
        description="How sides become multiples of a patch: `stretch`, as the processor does, or `pad`, which keeps "
        "shapes.",
    )
    pad_color: tuple[int, int, int] | None = Field(
        None, strict=False, description="Colour of the padding, [red, green, blue]. null: the processor's mean."
    )
    pad_place: Literal["end", "center"] = Field(
        "end",
        description="Padding at the right and bottom (`end`), or on all sides (`center`); boxes are moved with the "
        "image.",
    )
    max_image_pixels: Count = Field(
        50_000_000,
        description="An image of more pixels than this makes its row bad; the size is read from the file's header.",
    )
    max_tokens: Count | None = Field(
        None, description="A row of more tokens than this, including image tokens, is bad. Rows are never truncated."
    )
    shuffle: Shuffle | None = Field(
        None,
        description="`full`: all rows in a new order in every epoch, from `seed`. `{window: N}`: the same, but rows "
        "that are read together, as those of one Parquet row group, stay within about N rows. `none`: the order of "
        "the files. null: `full`, unless images lie in row groups that a process cannot keep, then a window. A run "
        "keeps what was chosen.",
    )
    balance_lengths: bool = Field(
        True,
        description="Distribute a step's rows so that workers get equal work and micro-batches rows of similar length.",
    )
    oversample: dict[str, float] | Literal["auto"] | None = Field(
        None,
        description="How often rows with a class or condition are shown in an epoch, `{name: factor}`, also "
        "fractional. `auto`: max(1, sqrt(threshold / share of rows)).",
    )
    oversample_threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Threshold of `oversample: auto`. null: the share of each class if all were equally frequent.",
    )
    class_weights: dict[str, float] | Literal["inverse", "inverse_sqrt"] | None = Field(
        None, description="Weight of a class's answer tokens in the loss: `{name: weight}`, or from its frequency."
    )
    condition_weights: dict[str, float] | Literal["inverse", "inverse_sqrt"] | None = Field(
        None, description="Classification: the same for the values of all attributes but the first."
    )
    on_bad_row: Literal["raise", "quarantine"] = Field(
        "raise",
        description="`raise`: the run does not start. `quarantine`: bad rows are written to `bad_rows.jsonl`, counted "
        "and left out; a row that becomes unreadable during training is replaced by another.",
    )
    on_bad_box: Literal["raise", "clip", "drop"] = Field(
        "raise",
        description="Detection: a box that is empty or reaches outside its image makes its row bad (`raise`), is "
        "clipped to the image (`clip`), or is dropped alone (`drop`); `clip` drops empty boxes too. All are counted.",
    )
    index_dir: str | None = Field(
        None,
        description="Folder of the index of the rows, which runs with the same rows share; also an address such as "
        "s3://bucket/index. null: `.index` in `run.output_dir`.",
    )
    num_loaders: Count | None = Field(
        None, description="Ray Data processes or threads that read images for each worker. null: from the free CPUs."
    )
    loaders: Literal["ray_data", "threads"] | None = Field(
        None,
        description="What reads images under Ray: `ray_data`, processes on any node, or `threads` of the worker. null: "
        "threads for images below 0.5 megapixels if the CPUs are on the nodes of the workers, else Ray Data.",
    )
