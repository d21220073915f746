"""Box geometry, matching against brute force, and the coordinate codec with its official golden case."""

import itertools

import numpy as np
import pytest

from ray_vlm.tasks.boxes import Frame, iou_matrix, match

GOLDEN = {  # QwenLM/Qwen3-VL, qwen-vl-finetune/tools/process_bbox.ipynb: image 640x428, box [146, 137, 615, 415]
    "relative_1000": [228, 320, 961, 970],
    "resized_pixels": [147, 134, 619, 407],
}


@pytest.mark.parametrize("coordinates", list(GOLDEN))
def test_official_golden_case(coordinates: str) -> None:
    frame = Frame((640, 428), (644, 420), coordinates)
    assert frame.encode([146, 137, 615, 415]) == GOLDEN[coordinates]


@pytest.mark.parametrize("coordinates", list(GOLDEN))
def test_round_trip_stays_within_half_a_unit(coordinates: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        width, height = (int(v) for v in rng.integers(40, 4000, 2))
        resized = (int(rng.integers(2, 60)) * 28, int(rng.integers(2, 60)) * 28)
        x1, y1 = rng.uniform(0, 0.9 * width), rng.uniform(0, 0.9 * height)
        box = [x1, y1, rng.uniform(x1 + 0.05 * width, width), rng.uniform(y1 + 0.05 * height, height)]
        frame = Frame((width, height), resized, coordinates)
        back = frame.decode(frame.encode(box))
        for axis in range(4):
            side = (width, height)[axis % 2]
            unit = side / (1000 if coordinates == "relative_1000" else resized[axis % 2])
            edge = 1.0 if coordinates == "resized_pixels" and box[axis] > side - unit else 0.5
            assert abs(back[axis] - box[axis]) <= edge * unit + 1e-9


def test_iou_of_known_boxes() -> None:
    ious = iou_matrix([(0, 0, 10, 10), (0, 0, 0, 0)], [(0, 0, 10, 10), (5, 0, 15, 10), (20, 20, 30, 30)])
    assert np.allclose(ious, [[1, 1 / 3, 0], [0, 0, 0]])
    assert iou_matrix([], [(0, 0, 1, 1)]).shape == (0, 1)


def test_matching_equals_brute_force() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        rows, columns = rng.integers(1, 6, 2)
        scores = rng.random((rows, columns)) * (rng.random((rows, columns)) < 0.6)
        got = sum(scores[r, c] for r, c in match(scores))
        small, large = sorted((rows, columns))
        table = scores if rows <= columns else scores.T
        orders = itertools.permutations(range(int(large)), int(small))
        best = max(sum(table[i, p[i]] for i in range(small)) for p in orders)
        assert got == pytest.approx(best)
