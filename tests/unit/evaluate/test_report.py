"""The report: self-contained, escaped, and it shows the rare class."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_vlm.data.draw import colour_of, draw_values
from ray_vlm.evaluate.report import NUM_IMAGES, EvalResult, choose_images, draw_pictures, write_report
from ray_vlm.runs.plot import COLOURS, learning_curve

EVIL = "<script>alert(1)</script>"


def _prediction(i: int, label: str, image: Path) -> dict:
    boxes = [[1.0, 2.0, 30.0, 40.0]]
    truth = {"boxes": boxes, "labels": [label]}
    score = {"hits": {label: 1}, "misses": {}, "invented": {}, "ious": [1.0]}
    return {"id": str(i), "images": [str(image)], "sizes": [[60, 50]], "found": truth, "answer": ""} | {
        "truth": truth,
        "score": score,
        "group": "",
        "ok": True,
    }


def test_report_is_one_escaped_file(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(image)
    predictions = [_prediction(0, EVIL, image), _prediction(1, "dog", image)]
    names = ("f1_50", "map", "map_50", "mean_iou", "precision_50", "recall_50", "parse_rate")
    per_class = {EVIL: {"f1_50": 0.5, "num": 1}, "zebra": {"f1_50": 0.0, "num": 0}}
    metrics = {
        "overall": dict.fromkeys(names, 0.5),
        "per_class": per_class,
        "num_rows": 2,
        "num_objects": 2,
        "task": "detection",
        "unknown_labels": {"zebra": 2, "": 18, EVIL: 1},
    }
    lines = tmp_path / "metrics.jsonl"
    complete = [json.dumps({"kind": "train", "attempt": 1, "step": step, "loss": 3.0 - step}) for step in (1, 2)]
    lines.write_text("\n".join([*complete, '{"kin']))
    results = [EvalResult("before", metrics, predictions), EvalResult("after", metrics, predictions)]
    write_report(tmp_path / "report.html", EVIL, results, {EVIL: lines}, [EVIL])
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert html.count("data:image/jpeg;base64,") == 4
    assert "http://" not in html
    assert "https://" not in html
    assert "<svg" in html
    assert "Labels that after answered and that no object has: zebra (2), &#34;&#34; (18), " in html
    assert "<td>zebra" not in html, "the table has the classes of the truth"


@pytest.mark.parametrize(
    ("truth", "parsed", "score", "words"),
    [
        ({"attributes": {"object": EVIL}}, {"attributes": {"object": "b"}}, {"all": False}, "wrong: object: b"),
        (
            {"output": {"action": "click"}, "box": [1, 2, 9, 9], "point": None},
            {"output": {"action": "click"}, "box": None, "point": [5, 5]},
            {"success": True},
            "right: action: click",
        ),
        ({"answer": EVIL}, {"answer": "no"}, {"normalised": False}, "wrong: no"),
    ],
)
def test_every_task_has_a_report(tmp_path: Path, truth: dict, parsed: dict, score: dict, words: str) -> None:
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(tmp_path / "a.png")
    one = {"id": "1", "images": [str(tmp_path / "a.png")], "sizes": [[60, 50]], "answer": "?"}
    prediction = one | {"truth": truth, "found": parsed, "score": score}
    metrics = {"overall": {"accuracy": 0.5}, "per_class": {}, "num_rows": 2}
    no_image = prediction | {"images": [], "sizes": []}
    write_report(tmp_path / "r.html", "x", [EvalResult("base", metrics, [prediction, no_image])], {})
    html = (tmp_path / "r.html").read_text()
    assert words in html
    assert "<script" not in html


def test_half_of_the_images_show_the_rarest_class() -> None:
    labels = ["common"] * 40 + ["rare"] * 8
    predictions = [{"truth": {"labels": [label]}} for label in labels]
    chosen = choose_images(predictions)
    assert len(chosen) == len(set(chosen)) == NUM_IMAGES
    assert sum(labels[i] == "rare" for i in chosen) >= NUM_IMAGES // 2
    assert choose_images(predictions[:3]) == [0, 1, 2]


def test_steps_that_point_somewhere_are_shown_even_if_others_are_rarer() -> None:
    done, click = {"output": {"action": "done"}}, {"output": {"action": "click"}, "box": [1, 2, 3, 4]}
    steps = [{"truth": done if i % 4 == 3 else click} for i in range(40)]
    assert sum("box" in steps[i]["truth"] for i in choose_images(steps)) >= NUM_IMAGES // 2 + 3


def test_no_curve_without_training() -> None:
    assert learning_curve([{"kind": "eval", "step": 1, "loss": 1.0}]) is None


def test_a_curve_shows_the_main_number_of_its_method() -> None:
    lines = [
        {"kind": "train", "step": 1, "loss": 0.1, "reward": -1.0},
        {"kind": "train", "step": 2, "loss": -0.1, "reward": 3.0},
        {"kind": "eval", "step": 2, "loss": None, "reward": 1.0},
    ]
    chart = learning_curve(lines, "GRPO")
    assert chart is not None
    assert chart.title == "Reward, GRPO"
    assert [name for _, _, name in chart.lines] == ["training, each step and smoothed; dots: validation"]
    assert f"stroke: {COLOURS[0]}" in chart.svg
    assert "var(--ink)" in chart.svg, "the colours of the page, light or dark"
    without = [{k: v for k, v in line.items() if k != "reward"} for line in lines[:2]]
    negative = learning_curve(without)
    assert negative is not None
    assert negative.title == "Loss"


def test_a_class_has_one_colour_on_all_images() -> None:
    classes = ("circle", "square")
    colours = [colour_of(label, classes) for label in ("square", "circle", "zebra", "\ud800")]
    assert colours[:2] == [COLOURS[1], COLOURS[0]]
    assert set(colours) <= set(COLOURS)
    image, values = Image.new("RGB", (60, 60)), {"boxes": [(5, 30, 50, 50)], "labels": ["square"]}
    drawn = draw_values(image, values, classes)
    assert drawn.getpixel((5, 45)) == tuple(bytes.fromhex(COLOURS[1][1:])), "not the colour of a first label"


def test_pictures_show_the_truth_and_every_result(tmp_path: Path) -> None:
    """A missing image is replaced by a grey one of its size; small images are enlarged, large ones reduced."""
    Image.new("RGB", (1280, 40)).save(tmp_path / "a.png")
    lines = [_prediction(i, "dog", tmp_path / name) | {"sizes": [[1280, 40]]} for i, name in enumerate(["a.png", "b"])]
    metrics = {"overall": {}, "per_class": {}}
    first, second = draw_pictures([EvalResult(title, metrics, lines) for title in ("before", "after")])
    assert [view["title"] for view in first["views"]] == ["before", "after"]
    sizes = []
    for picture in (first, second):
        data = base64.b64decode(picture["views"][0]["uri"].partition(",")[2])
        sizes.append(Image.open(io.BytesIO(data)).size)
    assert sizes == [(640, 20), (640, 20)]
    assert draw_values(Image.new("RGB", (60, 30)), {}, min_side=360).size == (360, 180)
    drawn = draw_values(Image.new("RGB", (60, 60)), {"point": (30, 30)}, truth={"box": (5, 5, 50, 50)})
    assert drawn.getpixel((5, 30)) == (255, 255, 255), "the truth is white"
