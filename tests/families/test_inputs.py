"""The inputs of each family's forward against those of its own processor, to the bit."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_vlm.config.schema import Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.collate import collate, join_pixels, read_pixels
from ray_vlm.data.records import SftRecord
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import SampleSpec
from tests.support.tiny_families import ALL, REFUSED

WORDS = ("circle", "none", "What", "is", "42", "[3, 7]", "a photo", "é", "\n", "class?", "{x}")
TRAINED = [family for family in ALL if family not in REFUSED]
QUICK = ("llava_onevision", "idefics3", "molmo2")


def random_record(number: int, folder: Path) -> SftRecord:
    """A question with one or two images of random sizes among random words."""
    rng = np.random.default_rng([number, 36])
    sizes, paths = [], []
    for n in range(int(rng.integers(1, 3))):
        width, height = (int(side) for side in rng.integers(30, 230, 2))
        paths.append(str(folder / f"{number}_{n}.png"))
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(paths[-1])
        sizes.append((width, height))
    words = [str(word) for word in rng.choice(WORDS, int(rng.integers(1, 12)))]
    for place in sorted(rng.integers(0, len(words) + 1, len(sizes)), reverse=True):
        words.insert(int(place), "<image>")
    turns = (("user", " ".join(words)),)
    return SftRecord(str(number), number, tuple(paths), tuple(sizes), {"answer": "A ring."}, {"turns": turns})


def stock_inputs(records: Sequence[SftRecord], builder: SampleBuilder) -> dict[str, Any]:
    """What the family's own processor makes of these questions and their images."""
    texts, images = [], []
    for record in records:
        content: list[dict[str, str]] = []
        for n, piece in enumerate(record.context["turns"][0][1].split("<image>")):
            content += [{"type": "image"}] if n else []
            content += [{"type": "text", "text": piece}] if piece else []
        turns = [{"role": "user", "content": content}]
        texts.append(builder.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        images.append([Image.open(path).convert("RGB") for path in record.images])
    options = {"return_tensors": "pt", "add_special_tokens": False, "padding": True, "padding_side": "right"}
    return dict(builder.processor(text=texts, images=images, **options))


def check_rows(builder: SampleBuilder, records: Sequence[SftRecord]) -> None:
    rows = [builder.prompt_row(record) for record in records]
    own, expected = collate(rows, builder), stock_inputs(records, builder)
    assert own.keys() - {"labels"} == expected.keys() - {"video_metadata"}
    for name, value in expected.items():
        assert own[name].shape == value.shape, name
        assert torch.equal(own[name].to(value.dtype), value), name
    for record, row in zip(records, rows, strict=True):
        assert builder.token_counts(record)[0] == int((row.input_ids == builder.image_token_id).sum())
    joined = join_pixels([read_pixels(row.images, builder, "cpu") for row in rows], builder, "cpu")
    for name, value in joined.items():
        assert torch.equal(value, own[name]), name


def builder_of(folder: str) -> SampleBuilder:
    return SampleBuilder(SampleSpec(Model(name=folder, load_in_4bit=False), ChatTask(), (), kind="answer"))


@pytest.mark.parametrize("family", QUICK)
def test_inputs_equal_those_of_the_family_s_processor(
    family: str, family_folder: Callable[[str], str], tmp_path: Path
) -> None:
    check_rows(builder_of(family_folder(family)), [random_record(number, tmp_path) for number in range(4)])


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINED)
def test_inputs_of_50_random_rows_equal_those_of_the_family_s_processor(
    family: str, family_folder: Callable[[str], str], tmp_path: Path
) -> None:
    builder = builder_of(family_folder(family))
    records = [random_record(number, tmp_path) for number in range(50)]
    for record in records:
        check_rows(builder, [record])
    for first in range(0, 50, 5):
        check_rows(builder, records[first : first + 5])
