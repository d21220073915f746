"""Pairs: which answers make one, what is refused, and that a pair comes back from its file as it went in."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ray_vlm.config.check_method import known_formats
from ray_vlm.config.data import Data, Source
from ray_vlm.config.method import SftMethod
from ray_vlm.config.schema import JobConfig, Model, Pairs
from ray_vlm.config.task import DetectionTask
from ray_vlm.data.parts import build_index
from ray_vlm.data.preprocessing import changed_since, describe_preprocessing
from ray_vlm.data.records import SftRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import ConfigError, DataError, RunError
from ray_vlm.evaluate.pairs import (
    ScoredAnswer,
    build_rows,
    check_output,
    check_rows,
    choose_pair,
    describe_pairs,
    load_scoring,
    name_images,
    pair_of,
    plan_prompts,
    write_about,
    write_rows,
)

FENCED = '```json\n[\n\t{"bbox_2d": [1, 2, 30, 40], "label": "circle"}\n]\n```'
TOKENS = "<|object_ref_start|>circle<|object_ref_end|><|box_start|>(1,2),(30,40)<|box_end|>"


@pytest.mark.parametrize(
    ("texts", "scores", "positions"),
    [
        ("abc", [0.5, 0.9, 0.1], (1, 2)),
        ("abcd", [0.9, 0.1, 0.9, 0.1], (0, 1)),  # the first among equals
        ("ab", [0.5, 0.45], None),
        ("ab", [0.3, 0.2], (0, 1)),  # 0.09999999999999998 in floating point
        (["a", " a\n"], [1.0, 0.0], None),
        (["a", "a ", "b"], [1.0, 0.0, 0.5], (0, 2)),  # a reward may be random; a pair never holds one text twice
        ("a", [1.0], None),
        ("", [], None),
        ("ab", [-2.0, -3.0], (0, 1)),
    ],
)
def test_best_against_worst(texts: Any, scores: list[float], positions: tuple[int, int] | None) -> None:
    assert choose_pair(list(texts), scores, 0.1) == positions


def test_an_answer_that_was_cut_off_is_never_the_best() -> None:
    assert choose_pair("abc", [0.9, 0.5, 0.1], 0.1, [False, True, True]) == (1, 2)
    assert choose_pair("abc", [0.9, 0.5, 0.1], 0.1, [True, True, False]) == (0, 2)
    assert choose_pair("abc", [0.9, 0.5, 0.1], 0.1, [False] * 3) is None


def test_why_a_row_gives_no_pair() -> None:
    assert pair_of([ScoredAnswer("a", 1.0)], 0.1) == "unusable"
    assert pair_of([ScoredAnswer("a", 1.0), ScoredAnswer("a ", 1.0)], 0.1) == "all_alike"
    assert pair_of([ScoredAnswer("a", 1.0), ScoredAnswer("b", 0.95)], 0.1) == "small_margin"
    assert pair_of([ScoredAnswer("a", 1.0, whole=False), ScoredAnswer("b", 0.0, whole=False)], 0.1) == "cut_off"
    kept = {"chosen": "a", "rejected": "b", "chosen_reward": 1.0, "rejected_reward": 0.5}
    assert pair_of([ScoredAnswer("b", 0.5), ScoredAnswer("a", 1.0)], 0.5) == kept


def _check(part: str, **data: Any) -> None:
    job = JobConfig(model={"name": "tiny"}, data={"train": {"path": "rows.json"}} | data)
    check_rows(job.data, part, job.task.name, known_formats(job.method.name, job.task.name, "test"))


def test_rows_without_a_truth_are_refused() -> None:
    _check("train")
    _check("eval", train={"path": "a", "format": "preference"}, eval={"path": "b"})
    for name in ("preference", "prompt", "rec"):
        with pytest.raises(ConfigError, match=rf"data.train.format={name}: .*rows of detection.*: coco, objects"):
            _check("train", train={"path": "a", "format": name})
        with pytest.raises(ConfigError, match=r"data.eval.format"):
            _check("eval", eval={"path": "b", "format": name})
        with pytest.raises(ConfigError, match=r"data.mix\[0\].format"):
            _check("eval", mix=[{"path": "b", "format": name}], eval=0.1)


def test_a_wrong_reward_is_named_by_its_own_key() -> None:
    with pytest.raises(ConfigError, match=r"pairs.rewards.luck: no such part of detection"):
        load_scoring("detection", Pairs(rewards={"luck": 1.0}), SftMethod(), [])


@pytest.mark.parametrize(("size", "num_samples", "num_prompts"), [(8, 8, 1), (8, 3, 2), (2, 8, 1), (32, 4, 8)])
def test_prompts_at_a_time(size: int, num_samples: int, num_prompts: int) -> None:
    batches = plan_prompts(17, size, num_samples)
    assert [len(batch) for batch in batches] == [num_prompts] * (17 // num_prompts) + [17 % num_prompts] * (
        17 % num_prompts > 0
    )
    assert [i for batch in batches for i in batch] == list(range(17))


def test_where_pairs_are_written(tmp_path: Path) -> None:
    assert check_output(str(tmp_path / "new" / "pairs.jsonl"), False) == tmp_path / "new" / "pairs.jsonl"
    (tmp_path / "pairs.jsonl").write_text("x")
    (tmp_path / "folder.jsonl").mkdir()
    assert check_output(str(tmp_path / "pairs.jsonl"), True)
    with pytest.raises(RunError, match=r"is there already.*--overwrite"):
        check_output(str(tmp_path / "pairs.jsonl"), False)
    for name, why in (("pairs.json", r"ends in \.jsonl"), ("folder.jsonl", "is a folder")):
        with pytest.raises(ConfigError, match=why):
            check_output(str(tmp_path / name), True)
    with pytest.raises(ConfigError, match="copy the file"):
        check_output("s3://bucket/pairs.jsonl", False)


def _record(*images: Any, number: int = 0, **more: Any) -> SftRecord:
    truth = {"boxes": ((10.0, 10.0, 50.0, 50.0),), "labels": ("circle",)}
    return SftRecord(str(number), number, images, ((128, 96),) * len(images), truth, **more)


def test_images_are_named_inside_the_folder_around_them() -> None:
    assert name_images([_record()]) == ({}, None)
    assert name_images([_record("/a/b/x.jpg")]) == ({"/a/b/x.jpg": "x.jpg"}, "/a/b")
    near = name_images([_record("/a/b/x.jpg", "/a/bc/y.jpg"), _record("/a/z.jpg")])
    assert near == ({"/a/b/x.jpg": "b/x.jpg", "/a/bc/y.jpg": "bc/y.jpg", "/a/z.jpg": "z.jpg"}, "/a")
    assert name_images([_record("/a/x.jpg", "/b/y.jpg")])[1] == "/"
    stored = "s3://bucket/a/{}?endpoint_override=h".format
    assert name_images([_record(stored("x.jpg"), stored("b/y.jpg"))]) == (
        {stored("x.jpg"): "x.jpg", stored("b/y.jpg"): "b/y.jpg"},
        "s3://bucket/a?endpoint_override=h",
    )
    for images in (("s3://bucket/x.jpg", "s3://butter/x.jpg"), ("/a/x.jpg", "s3://bucket/x.jpg")):
        with pytest.raises(ConfigError, match=r"x\.jpg and .*x\.jpg have no folder in common"):
            name_images([_record(*images)])
    with pytest.raises(ConfigError, match=r"row 3 \(id 3\): its image has no file of its own"):
        name_images([_record(b"...", number=3)])


def _builder(**options: Any) -> SampleBuilder:
    task = DetectionTask(codec=options.pop("codec", None))
    return load_sample_builder(SampleSpec(Model(name="tiny", load_in_4bit=False), task, ("circle",), **options))


def _pictures(folder: Path, count: int) -> list[str]:
    names = [folder / "rows" / f"{i}.png" for i in range(count)]
    for path in names:
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (128, 96), "green").save(path)
    return [str(path) for path in names]


@pytest.mark.parametrize(("codec", "good"), [("qwen2_vl", TOKENS), ("qwen2_5_vl", FENCED), ("qwen3_vl", FENCED)])
def test_pairs_come_back_as_they_went_in(codec: str, good: str, tmp_path: Path, lines: list[str]) -> None:
    builder = _builder(codec=codec)
    bad = ' \t"None",\r\n\\ \u2028 \N{GREEK SMALL LETTER BETA} \N{ROLLING ON THE FLOOR LAUGHING} </s> \x01 '
    pictures = _pictures(tmp_path, 3)
    records = [_record(image, number=i, group="site 1") for i, image in enumerate(pictures)]
    unusable = [ScoredAnswer(text, 3.0) for text in ("", " \n", "<image>", "a\0b", "<|im_start|>user", "\ud800")]
    sampled = [
        [
            *unusable,
            ScoredAnswer(good, 2.0),
            ScoredAnswer(bad, 0.5),
            *(replace(text, reward=-1.0) for text in unusable),
        ],
        [ScoredAnswer(good, 2.0), ScoredAnswer(good, 2.0)],
        [*unusable, ScoredAnswer(good, 2.0)],
    ]
    names, root = name_images(records)
    path = tmp_path / "else" / "where" / "pairs.jsonl"
    summary = write_rows(path, build_rows(records, [sampled[:2], sampled[2:]], builder, names, 0.1), 3)
    assert summary["without_pair"] == {"all_alike": 1, "small_margin": 0, "cut_off": 0, "unusable": 1}
    assert (summary["num_pairs"], summary["mean_chosen_reward"], summary["mean_rejected_reward"]) == (1, 2.0, 0.5)
    assert lines[-1].startswith("sampled 3/3 rows")
    source = Source(path=str(path), format="preference", image_root=root)
    (back,) = build_index(source, Data(), builder).records
    assert (back.chosen, back.rejected) == (good, bad)
    assert (back.id, back.group, back.images) == ("0", "site 1", (pictures[0],))
    assert back.prompt == builder.turns(records[0])
    assert builder.prompt_row(back).input_ids.tolist() == builder.prompt_row(records[0]).input_ids.tolist()
    assert builder.text(builder.pair_row(back).completions[0].tolist()) == good


def test_ids_of_mixed_sources_stay_apart(tmp_path: Path) -> None:
    builder, pictures = _builder(), _pictures(tmp_path, 2)
    records = [_record(image, source=i) for i, image in enumerate(pictures)]
    names, _ = name_images(records)
    sampled = [[ScoredAnswer("a", 1.0), ScoredAnswer("b", 0.0)]] * 2
    rows = list(build_rows(records, [sampled], builder, names, 0.1))
    assert [row["id"] for row in rows if isinstance(row, dict)] == ["0:0", "1:0"]


def test_without_any_pair_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(RunError, match=r"no pair: of 3 rows 2 with all answers alike, 1 with every answer cut off"):
        write_rows(path, ["all_alike", "cut_off", "all_alike"], 3)
    with pytest.raises(RunError, match="was not written"):
        write_rows(Path("/proc/pairs/pairs.jsonl"), [], 0)
    assert list(tmp_path.iterdir()) == []


def test_what_a_job_needs_is_said(lines: list[str]) -> None:
    about = {"num_pairs": 1, "num_records": 2, "mean_chosen_reward": 1.0, "mean_rejected_reward": 0.5}
    about |= {"without_pair": {"all_alike": 1, "small_margin": 0}, "image_root": "/a, b: c"}
    describe_pairs(Path("/x/pairs.jsonl"), about)
    assert lines[:2] == ["1 pairs of 2 rows: chosen 1.000, rejected 0.500", "no pair: 1 with all answers alike"]
    import yaml

    source = {"path": "/x/pairs.jsonl", "format": "preference", "image_root": "/a, b: c"}
    assert yaml.safe_load(lines[2]) == {"data": {"train": source}}
    assert len(lines[2].splitlines()) == 2


def test_other_image_sizes_and_codecs_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    builder = _builder(codec="qwen2_5_vl", max_pixels=9216, resize="pad", pad_color=(1, 2, 3))
    assert changed_since(str(path), builder) == []
    write_about(path, {"preprocessing": describe_preprocessing(builder)})
    assert changed_since(str(path), builder) == []
    changes = changed_since(str(path), _builder(codec="qwen3_vl", max_pixels=18432))
    assert changes == [
        "form of boxes (qwen2_5_vl, now qwen3_vl)",
        "image sizes (max_pixels 9216, now 18432; pad [1, 2, 3], now None)",
    ]
    for broken in ("{", "[]", json.dumps({"preprocessing": {"task": {"codec": "x"}}})):
        Path(f"{path}.about.json").write_text(broken)
        with pytest.raises(DataError, match=r"pairs.jsonl.about.json: not readable"):
            changed_since(str(path), builder)
