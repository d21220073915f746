"""`data preview`: what is drawn and marked is what is trained."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_vlm.cli import main
from ray_vlm.config.load import load_job
from ray_vlm.data.balance import code_tags
from ray_vlm.data.draw import place_labels, wrap
from ray_vlm.data.inspect.preview import (
    Chosen,
    build_panels,
    choose_rows,
    count_tokens,
    describe_prepared,
    describe_rows,
    draw_sheet,
    on_picture,
)
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import IGNORED, Sample
from ray_vlm.demo.drains import draw as draw_drains
from ray_vlm.demo.screens import draw as draw_screens
from ray_vlm.train.prepare import prepare


def test_rows_are_spread_and_a_third_has_the_rarest_class() -> None:
    tags = [("a",)] * 90 + [("a", "b")] * 10
    chosen = choose_rows(*code_tags(tags), 12)
    assert len(set(chosen.positions)) == 12
    assert list(chosen.positions) == sorted(chosen.positions)
    assert (chosen.rarest, chosen.share) == ("b", 0.1)
    assert chosen.having == sum(position >= 90 for position in chosen.positions) >= 4
    assert np.diff([p for p in chosen.positions if p < 90]).max() <= 25


def test_rows_that_repeat_with_a_period_are_not_all_of_one_kind() -> None:
    tags = [("click",), ("type",), ("done",)] * 700
    chosen = choose_rows(*code_tags(tags), 12)
    shown = [tags[position][0] for position in chosen.positions]
    assert all(shown.count(name) >= 3 for name in ("click", "type", "done"))


@pytest.mark.parametrize(
    ("tags", "count", "expected"),
    [([()] * 4, 12, 4), ([("a",)] * 5, 3, 3), ([("a",), ("b",)], 12, 2), ([("a",)] * 8 + [("b",)], 6, 6), ([()], 1, 1)],
)
def test_few_rows_are_all_shown_once(tags: list, count: int, expected: int) -> None:
    chosen = choose_rows(*code_tags(tags), count)
    assert len(set(chosen.positions)) == len(chosen.positions) == expected


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("resize", ["stretch", "pad"])
def test_boxes_come_back_from_the_text(job_file: Any, family: str, resize: str) -> None:
    padding = {"pad_place": "center"} if resize == "pad" else {}
    job = load_job(job_file(family, data={"resize": resize} | padding))
    prepared = prepare(job)
    for position, panel in enumerate(build_panels(prepared.train.records[:8], load_sample_builder(prepared.spec))):
        truth = prepared.train.records[position].truth
        assert sorted(mark.label for mark in panel.marks) == sorted(truth["labels"])
        assert not panel.problem
        for mark in panel.marks:
            assert min(np.abs(np.subtract(box, mark.region)).max() for box in truth["boxes"]) < 2
        width, height = panel.frames[0].resized
        assert panel.images[0].shape == (height, width, 3)


def test_a_box_that_moves_in_the_text_is_reported(job_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_vlm.tasks import boxes

    prepared = prepare(load_job(job_file()))
    right = boxes.Frame.encode
    monkeypatch.setattr(boxes.Frame, "encode", lambda frame, box: [v + 60 for v in right(frame, box)])
    position = next(i for i, record in enumerate(prepared.train.records) if record.truth["boxes"])
    (panel,) = build_panels([prepared.train.records[position]], load_sample_builder(prepared.spec))
    assert "not read back where the data has them" in panel.problem


def test_marks_lie_on_the_pixels_that_the_model_sees(job_file: Any) -> None:
    prepared = prepare(load_job(job_file(data={"resize": "pad", "pad_place": "center"})))
    (panel,) = build_panels([prepared.train.records[0]], load_sample_builder(prepared.spec))
    frame = panel.frames[0]
    left, top, right, bottom = on_picture((0.0, 0.0, *map(float, frame.original)), frame, 2.0)
    assert (left, top) == (2 * frame.offset[0], 2 * frame.offset[1])
    assert (right - left, bottom - top) == (2 * frame.content[0], 2 * frame.content[1])


def test_classification_is_marked_at_the_place_that_its_question_tells(job_file: Any, tmp_path: Path) -> None:
    draw_drains(tmp_path, "train", 120)
    data = {"path": str(tmp_path / "train.csv"), "format": "image_csv"}
    job = job_file(task={"name": "classification", "position": True}, data={"train": data})
    prepared = prepare(load_job(job, ["data.condition_weights={blocked: 2.5}"]))
    for position, panel in enumerate(build_panels(prepared.train.records[:6], load_sample_builder(prepared.spec))):
        record = prepared.train.records[position]
        box = record.context["box"]
        (mark,) = panel.marks
        assert mark.region == pytest.approx(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), abs=1.0)
        assert mark.label == ", ".join(record.truth["attributes"].values())
    blocked = next(i for i, r in enumerate(prepared.train.records) if r.truth["attributes"]["condition"] == "blocked")
    text = describe_rows(prepared.train, load_sample_builder(prepared.spec), Chosen((blocked,)))
    assert re.search(r"\[\[x2\.50:[^]]*blocked[^]]*\]\]", text)  # a token may hold a quote or a bracket too


def test_gui_steps_point_where_the_answer_says(job_file: Any, tmp_path: Path) -> None:
    draw_screens(tmp_path, "train", 4)
    data = {"path": str(tmp_path / "train.csv"), "format": "gui_csv", "max_rows": 12}
    prepared = prepare(load_job(job_file(task={"name": "gui_steps"}, data={"train": data})))
    panels = build_panels(prepared.train.records, load_sample_builder(prepared.spec))
    assert [len(panel.marks) for panel in panels] == [int(r.truth["box"] is not None) for r in prepared.train.records]
    assert draw_sheet(panels, "steps", ["note"]).startswith(b"\x89PNG")


def test_tokens_are_counted_by_what_is_done_with_them() -> None:
    ids = np.array([9, 9, 1, 2, 3], np.int32)
    labels = np.array([IGNORED, IGNORED, IGNORED, 2, 3], np.int32)
    plain = Sample(ids, labels, ())
    weighted = Sample(ids, labels, (), np.array([1, 1, 1, 3, 1], np.float32))
    counts = count_tokens([plain, weighted], image_token_id=9)
    assert (counts.trained, counts.prompt, counts.image, counts.total) == (4, 2, 4, 10)
    assert counts.weight == 1.5


def test_the_token_view_marks_what_is_trained(job_file: Any) -> None:
    prepared = prepare(load_job(job_file()))
    text = describe_prepared(prepared.train, prepared.plan, load_sample_builder(prepared.spec), prepared.balance)
    view = text[text.index("--- row 0") :].split("--- row 1")[0]
    answer = load_sample_builder(prepared.spec).answer(prepared.train.records[0]).text
    assert f"[[{answer}<|im_end|>" in view
    assert f"<image: {prepared.train.image_tokens[0]} tokens>" in view
    assert view.count("[[") == view.count("]]") == 1


def test_texts_are_wrapped_into_the_panel_and_shortened() -> None:
    lines = wrap("word " * 200, 14, 300, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert wrap("x" * 500, 14, 300, 9)[0]
    assert wrap("", 14, 300, 3) == [""]


def test_labels_cover_no_other_label() -> None:
    regions = [(10.0 * i, 20.0 + i, 10.0 * i + 40, 60.0) for i in range(12)]
    areas = place_labels([*regions, (150.0, 100.0)], [(60.0, 18.0)] * 13, (300, 200))
    drawn = [area for area in areas if area is not None]
    assert areas[0] is not None
    assert areas[-1] is not None, "a point has room"
    for i, a in enumerate(drawn):
        assert min(a) >= 0
        assert a[2] < 300
        assert a[3] < 200
        assert all(a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1] for b in drawn[i + 1 :])
    assert place_labels(regions[:1], [(400.0, 18.0)], (300, 200)) == [None]


def test_the_verb_writes_a_sheet_and_prints_tokens(
    job_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["data", "preview", str(job_file()), "--rows", "5", "data.train.max_rows=20"]) == 0
    out = capsys.readouterr().out
    assert out.count("--- row") == 3
    assert "tokens of 5 rows" in out
    assert Image.open(tmp_path / "runs" / "data" / f"{job_file().stem}-preview.png").size[0] > 1000
    with pytest.raises(SystemExit):
        main(["data", "preview", str(job_file()), "--rows", "0"])


def test_a_text_from_the_data_cannot_steer_the_terminal(job_file: Any, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "<image>What\u202e?"}, {"role": "assistant", "content": "A\u2028\u200bdog"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a\u202eb", "images": ["a.png"], "messages": turns}))
    data = {"path": str(tmp_path / "rows.jsonl"), "format": "messages"}
    prepared = prepare(load_job(job_file(task="chat", data={"train": data})))
    text = describe_rows(prepared.train, load_sample_builder(prepared.spec), choose_rows(*code_tags([()]), 1))
    assert "A\\u2028\\u200bdog" in text
    assert text.replace("\n", "").isprintable()
    (panel,) = build_panels([prepared.train.records[0]], load_sample_builder(prepared.spec))
    assert (panel.question, panel.head[0]) == ("What\\u202e?", "row 0 (id a\\u202eb)")
