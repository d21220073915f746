"""Correctness of boxes, matches, scores, sizes and pixels: round trips and comparisons on random cases.

Every codec, stretched and padded, goes from record to text, through the parser and back to original pixels. Matching is
compared with brute force over all permutations, mAP of pycocotools with faster-coco-eval, sizes with published ones,
and pixels with the stock image processors, bit for bit.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.figures import figure, report
from ray_vlm.config.task import DetectionTask
from ray_vlm.data.images import ImageSpec, decode, resize
from ray_vlm.data.records import Box, SftRecord
from ray_vlm.evaluate.average_precision import coco_map
from ray_vlm.evaluate.prediction import Prediction
from ray_vlm.tasks import detection
from ray_vlm.tasks.answers import Parsed, PromptContext
from ray_vlm.tasks.boxes import CODECS, Frame, iou_matrix, match

PATCHES = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}
LABELS = ("dog", "cat", "traffic light")
PADS: dict[str, dict[str, Any]] = {
    "stretch": {},
    "pad_end": {"pad": (127, 127, 127)},
    "pad_center": {"pad": (127, 127, 127), "center": True},
}
GOLDEN_BOX = (146.0, 137.0, 615.0, 415.0)  # of a 640x428 image: qwen-vl-finetune/tools/process_bbox.ipynb
GOLDEN_TEXT = {"qwen2_vl": [228, 320, 961, 970], "qwen2_5_vl": [147, 134, 619, 407]}
# (height, width) -> those after resizing; factor, least and most tokens. From qwen_vl_utils' smart_resize.
GOLDEN_INPUTS = ((1080, 1920), (428, 640), (480, 640), (2400, 1080), (3000, 4000), (20, 20), (30, 5000))
GOLDEN_SIZES = {
    (28, 4, 16384): ((1092, 1932), (420, 644), (476, 644), (2408, 1092), (2996, 4004), (56, 56), (28, 5012)),
    (28, 256, 1280): ((728, 1316), (420, 644), (476, 644), (1484, 672), (840, 1148), (448, 448), (56, 5796)),
    (32, 64, 16384): ((1088, 1920), (416, 640), (480, 640), (2400, 1088), (3008, 4000), (256, 256), (32, 4992)),
    (32, 256, 1280): ((832, 1504), (416, 640), (480, 640), (1696, 768), (960, 1312), (512, 512), (64, 6624)),
}


def spec_of(codec: str, **options: Any) -> ImageSpec:
    """Return the family's image sizes as recommended for training: 256 to 1280 tokens."""
    patch = PATCHES.get(codec, 16)
    token = (2 * patch) ** 2
    return ImageSpec(patch, 2, 256 * token, 1280 * token, **options)


def random_cases(spec: ImageSpec, codec: str, count: int) -> Iterator[tuple[Frame, Box]]:
    """Yield frames of images of random legal sizes, each with a box at least one unit of text wide and tall."""
    rng = np.random.default_rng(0)
    made = 0
    while made < count:
        width, height = (int(v) for v in np.exp(rng.uniform(np.log(28), np.log(4000), 2)).round())
        try:
            placement = spec.place((width, height))
        except ValueError:
            continue
        frame = Frame((width, height), placement.resized, CODECS[codec], placement.content, placement.offset)
        sides = []
        for axis, side in enumerate((width, height)):
            unit = frame.decode_point((1, 1))[axis] - frame.decode_point((0, 0))[axis]
            low = rng.uniform(0, side - unit)
            span = rng.uniform(unit, side - low) if rng.random() < 0.8 else side - low
            sides.append((low, min(low + span, side)))
        made += 1
        (x1, x2), (y1, y2) = sides
        yield frame, (x1, y1, x2, y2)


def round_trip(frame: Frame, box: Box) -> Box | None:
    """Return a box after record -> text -> parse, or None if it is lost or the text lacks the promised form."""
    record = SftRecord("a", 0, ("a.jpg",), (frame.original,), {"boxes": (box,), "labels": (LABELS[0],)})
    text = detection.answer(record, [frame], PromptContext(DetectionTask(), LABELS)).text
    parsed = detection.parse(text, [frame])
    whole = parsed.ok and not parsed.repairs and parsed.values["labels"] == LABELS[:1]
    return parsed.values["boxes"][0] if whole else None


def codec_errors(codec: str, pad: str, count: int) -> tuple[float, float, int]:
    """Return the largest error inside and at the right and bottom edge, in resized pixels or thousandths, and the
    number of lost boxes."""
    pixels = CODECS[codec].coordinates == "resized_pixels"
    inside, edge, lost = 0.0, 0.0, 0
    for frame, box in random_cases(spec_of(codec, **PADS[pad]), codec, count):
        back = round_trip(frame, box)
        if back is None:
            lost += 1
            continue
        shown = frame.content or frame.resized
        for axis in range(4):
            a = axis % 2
            scale = shown[a] / frame.original[a]
            error = abs(back[axis] - box[axis]) * scale
            if not pixels:
                inside = max(inside, error / frame.resized[a] * 1000)
            elif box[axis] * scale + frame.offset[a] > frame.resized[a] - 1.5:  # the last number is side - 1
                edge = max(edge, error)
            else:
                inside = max(inside, error)
    return inside, edge, lost


def codec_figures(count: int) -> list[dict[str, Any]]:
    """Return the figures of all codecs' round trips and of the official golden case."""
    figures = []
    for codec, pad in itertools.product(CODECS, PADS):
        inside, edge, lost = codec_errors(codec, pad, count)
        name, slack = f"codec.{codec}.{pad}", 1e-6
        if CODECS[codec].coordinates == "resized_pixels":
            figures.append(figure(f"{name}.error", inside, "px", 0.5 + slack))
            figures.append(figure(f"{name}.error_at_edge", edge, "px", 1.0 + slack))
        else:
            figures.append(figure(f"{name}.error", inside, "1/1000", 0.5 + slack))
        figures.append(figure(f"{name}.lost", lost, "boxes", 0))
    for codec, expected in GOLDEN_TEXT.items():
        frame = Frame((640, 428), spec_of(codec).place((640, 428)).resized, CODECS[codec])
        figures.append(figure(f"codec.{codec}.golden_wrong", frame.encode(GOLDEN_BOX) != expected, "cases", 0))
    return figures


def random_boxes(rng: np.random.Generator, most: int) -> tuple[tuple[Box, ...], tuple[str, ...]]:
    """Return up to `most` boxes in a small image, so that many overlap, and their labels."""
    count = int(rng.integers(0, most + 1))
    low, side = rng.integers(0, 40, (count, 2)), rng.integers(5, 60, (count, 2))
    boxes = tuple((float(x), float(y), float(x + w), float(y + h)) for (x, y), (w, h) in zip(low, side, strict=True))
    return boxes, tuple(LABELS[i] for i in rng.integers(0, len(LABELS), count))


def answer_like(rng: np.random.Generator, boxes: Sequence[Box], labels: Sequence[str], most: int) -> dict[str, Any]:
    """Return an answer like a model's: most true boxes, slightly moved, some with another label, and some invented
    boxes."""
    moved, names = [], []
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        if rng.random() < 0.8:
            dx, dy, dw, dh = rng.integers(-4, 5, 4)
            x, y = x1 + dx, y1 + dy
            moved.append((x, y, x + max(x2 - x1 + dw, 1.0), y + max(y2 - y1 + dh, 1.0)))
            names.append(label if rng.random() < 0.8 else LABELS[int(rng.integers(0, len(LABELS)))])
    more, more_names = random_boxes(rng, 3)
    order = rng.permutation(min(len(moved) + len(more), most)).tolist()
    boxes_, names_ = [*moved, *more], [*names, *more_names]
    return {"boxes": tuple(boxes_[i] for i in order), "labels": tuple(names_[i] for i in order)}


ORDERS = np.array(list(itertools.permutations(range(6))))


def brute_force(scores: np.ndarray) -> float:
    """Return the largest total of one-to-one pairs by trying all orders; for up to 6 x 6."""
    table = np.zeros((6, 6))
    table[: scores.shape[0], : scores.shape[1]] = scores
    return float(table[np.arange(6), ORDERS].sum(axis=1).max())


def matching_figures(count: int) -> list[dict[str, Any]]:
    """Count the cases in which `match` or the task's score does not reach the best total."""
    rng = np.random.default_rng(1)
    wrong_match = wrong_score = 0
    for _ in range(count):
        rows, columns = rng.integers(0, 7, 2)
        scores = rng.random((rows, columns)) * (rng.random((rows, columns)) < 0.6)
        wrong_match += abs(sum(scores[r, c] for r, c in match(scores)) - brute_force(scores)) > 1e-9
        boxes, labels = random_boxes(rng, 6)
        answer = answer_like(rng, boxes, labels, 6)
        got = detection.score(Parsed(answer), {"boxes": boxes, "labels": labels})
        ious = iou_matrix(boxes, answer["boxes"])
        same = np.array([[t == p for p in answer["labels"]] for t in labels], bool).reshape(ious.shape)
        hits = brute_force((same & (ious >= 0.5)).astype(float))
        counts = sum(got["hits"].values()), sum(got["misses"].values()), sum(got["invented"].values())
        ok = counts == (hits, len(boxes) - hits, len(answer["boxes"]) - hits)
        wrong_score += not (ok and abs(sum(got["ious"]) - brute_force(ious)) < 1e-9)
    return [
        figure("match.differs_from_brute_force", wrong_match, "cases", 0),
        figure("score.differs_from_brute_force", wrong_score, "cases", 0),
    ]


def other_map(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return mAP by faster-coco-eval, from rows that this benchmark builds itself."""
    from faster_coco_eval import COCO, COCOeval_faster

    labels = sorted({label for p in predictions for label in p.truth["labels"]})
    numbers = {label: i for i, label in enumerate(labels, 1)}
    truth: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image, p in enumerate(predictions):
        for rows, values in ((truth, p.truth), (detections, p.parsed)):
            for (x1, y1, x2, y2), label in zip(values["boxes"], values["labels"], strict=True):
                box, area = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
                row = {"image_id": image, "category_id": numbers.get(label), "bbox": box, "area": area, "iscrowd": 0}
                rows.append(row | {"id": len(rows) + 1, "score": 1.0})
    detections = [row for row in detections if row["category_id"] is not None]
    if not truth or not detections:
        return {"map": 0.0, "map_50": 0.0}
    images = [{"id": i} for i in range(len(predictions))]
    categories = [{"id": i, "name": label} for label, i in numbers.items()]
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO({"images": images, "annotations": truth, "categories": categories})
        run = COCOeval_faster(gt, gt.loadRes(detections), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {"map": max(float(run.stats[0]), 0.0), "map_50": max(float(run.stats[1]), 0.0)}


def map_figures(count: int) -> list[dict[str, Any]]:
    """Return the largest difference between the two implementations of mAP."""
    rng = np.random.default_rng(2)
    worst = {"map": 0.0, "map_50": 0.0}
    for _ in range(count):
        predictions = []
        for row in range(int(rng.integers(1, 9))):
            boxes, labels = random_boxes(rng, 5)
            answer = answer_like(rng, boxes, labels, 8)
            truth = {"boxes": boxes, "labels": labels}
            predictions.append(Prediction(row, str(row), "", (None,), ((100, 100),), "", answer, True, (), truth, {}))
        pycoco, faster_coco = coco_map([p.as_dict() for p in predictions]), other_map(predictions)
        worst = {key: max(value, abs(pycoco[key] - faster_coco[key])) for key, value in worst.items()}
    return [figure(f"{key}.pycocotools_vs_faster", value, "absolute", 1e-9) for key, value in worst.items()]


def size_figures() -> list[dict[str, Any]]:
    """Count the published sizes that this package does not reproduce, and those that it refuses because a side is below
    one token."""
    wrong = refused = 0
    for (factor, least, most), outputs in GOLDEN_SIZES.items():
        spec = ImageSpec(factor // 2, 2, least * factor**2, most * factor**2)
        for (height, width), (tall, wide) in zip(GOLDEN_INPUTS, outputs, strict=True):
            if min(height, width) < factor:
                with contextlib.suppress(ValueError):
                    spec.place((width, height))
                    wrong += 1
                refused += 1
                continue
            tokens = tall * wide // factor**2
            size = (width, height)
            wrong += spec.place(size).resized != (wide, tall) or spec.num_tokens(size) != tokens
    return [figure("sizes.golden_wrong", wrong, "sizes", 0), figure("sizes.golden_refused", refused, "sizes")]


def pixel_figures(count: int) -> list[dict[str, Any]]:
    """Count the images for which this package returns other pixels, or another grid, than the stock processor does for
    the file."""
    import torch
    from PIL import Image
    from transformers import Qwen2VLImageProcessor

    rng = np.random.default_rng(3)
    figures = []
    for codec in ("qwen2_5_vl", "qwen3_vl"):  # Qwen2-VL's image processor is Qwen2.5-VL's
        spec = spec_of(codec)
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if codec == "qwen3_vl" else {}
        limits = {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
        processor = Qwen2VLImageProcessor(patch_size=PATCHES[codec], size=limits, **half)
        differ = 0
        for _ in range(count):
            width, height = (int(v) for v in rng.integers(40, 1501, 2))
            coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((width, height))
            noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-20, 21, (height, width, 3))
            file = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
            small = torch.tensor(resize(decode(file.getvalue()), spec, processor)).permute(2, 0, 1)
            own = processor([small], do_resize=False, return_tensors="pt")
            stock = processor(images=[Image.open(file)], return_tensors="pt")
            differ += not all(torch.equal(own[key], stock[key]) for key in ("pixel_values", "image_grid_thw"))
        names = ("qwen2_vl", "qwen2_5_vl") if codec == "qwen2_5_vl" else (codec,)
        figures += [figure(f"pixels.{name}.differ_from_stock", differ, "images", 0) for name in names]
    return figures


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures; `quick` runs a tenth of the cases."""
    share = 10 if quick else 1
    return [
        *codec_figures(10_000 // share),
        *matching_figures(1000 // share),
        *map_figures(1000 // share),
        *size_figures(),
        *pixel_figures(200 // share),
    ]


if __name__ == "__main__":
    report(measure)
