"""Does a shuffle in windows teach as much as a full one? The demo's detection job on rows in a Parquet file.

Run: python -m benchmarks.shuffle [--quick] [--json PATH]. The training rows of the demo lie in a Parquet file with
groups of 50 rows. Each of three seeds is trained with a full shuffle and with windows of 1,024 rows, about half of the
data, and measured on the same test rows. Bar: for each seed, the F1 with windows is
not below the 95 % interval of the one with a full shuffle.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, report
from ray_vlm.config.data import Source
from ray_vlm.demo.story import demo_job, draw_scenes

GROUP_ROWS, WINDOW = 50, 1024
SHUFFLES = {"full": "full", "windows": f"{{window: {WINDOW}}}"}


def write_rows(train: Source, path: Path) -> None:
    """Write the rows of a COCO file as Parquet, with their images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    coco = json.loads(Path(train.path).read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in coco["categories"]}
    objects: dict[int, dict[str, list]] = {image["id"]: {"ref": [], "bbox": []} for image in coco["images"]}
    for annotation in coco["annotations"]:
        x, y, width, height = annotation["bbox"]
        objects[annotation["image_id"]]["ref"].append(names[annotation["category_id"]])
        objects[annotation["image_id"]]["bbox"].append([x, y, x + width, y + height])
    folder = Path(train.path).parent
    rows = [
        {
            "images": [{"bytes": (folder / image["file_name"]).read_bytes(), "path": None}],
            "objects": objects[image["id"]],
        }
        for image in coco["images"]
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=GROUP_ROWS)


def train_and_measure(folder: Path, rows: Path, seed: int, shuffle: str, steps: int | None) -> dict[str, Any]:
    """Train one job, and return its metrics on the test rows."""
    from ray_vlm.evaluate.run import evaluate
    from ray_vlm.train.driver import train

    name = f"{shuffle}-{seed}"
    overrides = [
        *(f"data.train.path={rows}", "data.train.format=objects", "data.train.create=null"),
        *(f"data.shuffle={SHUFFLES[shuffle]}", f"seed={seed}", f"run.name={name}"),
        *([f"train.max_steps={steps}"] if steps else []),
    ]
    job = demo_job(folder, overrides)
    run = train(job, "", overwrite=True).root
    return evaluate(job, str(run / "best"), folder / "scores" / name)


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = demo_job(folder).data
        draw_scenes(data, lambda: None)
        rows = folder / "rows.parquet"
        assert data.train is not None
        write_rows(data.train, rows)
        figures = []
        for seed in range(1 if quick else 3):
            scores = {name: train_and_measure(folder, rows, seed, name, 10 if quick else None) for name in SHUFFLES}
            low, high = scores["full"]["intervals"]["f1_50"]
            full, windows = (scores[name]["overall"]["f1_50"] for name in SHUFFLES)
            print(f"seed {seed}: full {full:.3f} [{low:.3f}, {high:.3f}], windows {windows:.3f}", flush=True)
            figures += [
                figure(f"F1, seed {seed}, full shuffle", full, ""),
                figure("  lower end of its interval", low, ""),
                figure(f"  windows of {WINDOW:,} rows", windows, "", low, most=False),
            ]
    return figures


if __name__ == "__main__":
    report(measure)
