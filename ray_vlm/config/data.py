"""The job's `data` section: where rows come from, how images are sized, what is shown how often."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ray_vlm.config.section import Largest, Section


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Source(Section):
    """Where rows come from."""

    path: str = Field("", description="The file with the rows: a path, or an address such as s3://bucket/rows.jsonl.")
    ratio: float | None = Field(
        None, gt=0, lt=1, description="In place of `path`, for eval and test: this share of the training rows."
    )
    format: Literal["coco", "llava", "messages", "objects", "image_csv", "gui_csv", "preference", "prompt"] = Field(
        "coco", description="Shape of a source row."
    )
    image_root: str | None = Field(
        None, description="Folder of the images; nothing outside it is read. null: the folder of `path`."
    )
    follow_links: bool = Field(
        False, description="Read images by symlinks that lie in `image_root` and lead out of it."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Names that differ, ours to theirs: `{image: photo}`. `group` names a column that no split cuts.",
    )
    box_units: Literal["pixels", "relative_1", "relative_1000"] = Field(
        "pixels", description="What box numbers in the rows mean; `pixels` are of the upright original image."
    )
    box_frame: Literal["image", "listed"] | None = Field(
        None,
        description="COCO: whose pixels boxes are in where the file lists another size than the upright image has: the "
        "`image`'s, or those of the `listed` size. null: such rows are bad.",
    )
    crowds: Literal["skip", "objects"] | None = Field(
        None,
        description="COCO: whether crowd annotations (`iscrowd: 1`) are left out or are objects. null: left out, and "
        "refused where they are most of a class.",
    )
    weight: float = Field(
        1.0, gt=0, description="How often a training row of this source is shown in an epoch, on average."
    )
    task_start: str | None = Field(None, description="GUI steps: the first Task_id that is used.")
    task_end: str | None = Field(None, description="GUI steps: the last Task_id that is used.")
    max_tasks: int | None = Field(None, ge=1, le=Largest, description="GUI steps: use only the first tasks.")
    create: str | None = Field(
        None, description="`module:function`, called with `path` once when that file is missing. Made for demos."
    )
    max_rows: int | None = Field(None, ge=1, le=Largest, description="Use only the first rows.")

    @field_validator("task_start", "task_end", mode="before")
    @classmethod
    def _id_as_text(cls, value: Any) -> Any:
        """An id that YAML reads as a number, `task_start: 1`, is a text as all ids are."""
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Data(Section):
    """What to learn from, what to choose by, what to be judged on."""

    @model_validator(mode="before")
    @classmethod
    def _expand_ratios(cls, value: Any) -> Any:
        """`eval: 0.1` is short for `eval: {ratio: 0.1}`."""
        if isinstance(value, dict):
            value = {k: {"ratio": v} if k in ("eval", "test") and _is_number(v) else v for k, v in value.items()}
        return value

    @property
    def tested(self) -> Source | None:
        """The rows that `ray-vlm evaluate` measures."""
        return self.eval if self.test_on_eval else self.test

    train: Source | None = Field(None, description="Rows to learn from.")
    mix: tuple[Source, ...] = Field((), strict=False, description="More training rows, mixed in by their `weight`.")
    eval: Source | None = Field(
        None, description="Rows that choose `best/`; a number is a share of the training rows. null: no validation."
    )
    test: Source | None = Field(None, description="Rows for headline numbers only; a number is a share of train.")
    test_on_eval: bool = Field(
        False,
        description="Test on the rows of `eval`, which also choose `best/`, in place of rows of their own; reports and "
        "cards say so.",
    )
    stratify: bool = Field(True, description="Shares of the training rows keep the mix of classes.")
    min_pixels: int | None = Field(
        None, ge=1, le=Largest, description="Smallest image area after resizing, in pixels. null: the processor's own."
    )
    max_pixels: int | None = Field(
        None, ge=1, le=Largest, description="Largest image area after resizing, in pixels. null: the processor's own."
    )
    resize: Literal["stretch", "pad"] = Field(
        "stretch",
        description="How sides become multiples of a patch: `stretch` as the processor does, or `pad` and keep shapes.",
    )
    pad_color: tuple[int, int, int] | None = Field(
        None, strict=False, description="Colour of the padding, [red, green, blue]. null: the processor's mean."
    )
    pad_place: Literal["end", "center"] = Field(
        "end", description="Padding at the right and bottom, or on all sides; boxes move with their image."
    )
    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        le=Largest,
        description="An image file of more pixels than this is a bad row; read from its header.",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        le=Largest,
        description="A row of more tokens than this, image tokens counted, is a bad row. Nothing is cut.",
    )
    shuffle: bool = Field(True, description="A new order in every epoch, from `seed`.")
    balance_lengths: bool = Field(
        True, description="Share a step's rows out so that workers get equal work and micro-batches equal lengths."
    )
    oversample: dict[str, float] | Literal["auto"] | None = Field(
        None,
        description="How often rows with a class or condition are shown in an epoch, `{name: factor}`; fractions too. "
        "`auto`: max(1, sqrt(threshold / share of rows)).",
    )
    oversample_threshold: float | None = Field(
        None, gt=0, le=1, description="Of `oversample: auto`. null: the share of each class if all were equal."
    )
    class_weights: dict[str, float] | Literal["inverse", "inverse_sqrt"] | None = Field(
        None, description="Weight of a class's answer tokens in the loss: `{name: weight}`, or from its frequency."
    )
    condition_weights: dict[str, float] | Literal["inverse", "inverse_sqrt"] | None = Field(
        None, description="Classification: the same for the values of all attributes but the first."
    )
    on_bad_row: Literal["raise", "quarantine"] = Field(
        "raise",
        description="`raise`: nothing starts. `quarantine`: written to `bad_rows.jsonl`, counted, left out; "
        "of a row that cannot be read any more while training, another takes the place.",
    )
    on_bad_box: Literal["raise", "clip", "drop"] = Field(
        "raise",
        description="Detection: a box that is empty or leaves its image makes its row bad (`raise`), is cut to the "
        "image (`clip`), or is left out alone (`drop`); `clip` leaves empty ones out too, and both are counted.",
    )
    num_loaders: int | None = Field(
        None,
        ge=1,
        le=Largest,
        description="Ray Data processes that read images for each worker. null: from the free CPUs.",
    )
