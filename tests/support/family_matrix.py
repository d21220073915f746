"""Every family by every method, in float32 and in 4 bit: what passes, and what is refused by which rule.

`run_family` trains a tiny checkpoint. `tests/families/matrix.json` holds the results, `tests/families/test_matrix.py`
compares them, and `python -m tests.support.family_matrix` writes them as the table of `docs/models.md`.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.jobs import write_job

RESULTS = Path(__file__).parents[1] / "families" / "matrix.json"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PRECISIONS = ("fp32", "nf4")
COLUMNS = ("sft", "dpo", "grpo", "evaluate", "export")
PASSES = "yes"
FAST = "fast"  # key of what the forward of a family leaves out
# The rules by which a cell may be refused: the words of the error, and the reason as the table gives it.
RULES = {
    "processor": r"its processor cannot be asked what it makes of images",
    "experts": r"bitsandbytes puts only \d+% of the weights",
}
WHY = {
    "processor": "its processor writes text of its own behind the images, and no chat template makes such a prompt",
    "experts": "most of its weights are fused experts, which bitsandbytes leaves as they are",
}
MARKS = ("<!-- families: python -m tests.support.family_matrix -->", "<!-- end of families -->")
NAMES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL, mixtures",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5, mixtures",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "internvl": "InternVL",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics3",
    "llava_onevision": "LLaVA-OneVision",
    "paligemma": "PaliGemma",
    "mistral3": "Mistral 3",
    "pixtral": "Pixtral",
    "glm4v": "GLM-4V",
    "molmo2": "Molmo2",
    "minicpmv4_6": "MiniCPM-V 4.6",
    "minicpmv4_7": "MiniCPM-V 4.7",
    "llama4": "Llama-4",
    "aya_vision": "Aya Vision",
    "cohere2_vision": "Command A Vision",
}


def mean_token(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that differs between answers: the mean of their token ids, in thousands."""
    return [sum(ids) / max(1, len(ids)) / 1000 for ids in completion_ids]


def write_rows(folder: Path, scenes: Path, preference: bool) -> Path:
    """Write eight chat rows with one or two images of different sizes, as pairs or as conversations."""
    names = sorted(path for path in scenes.rglob("*") if path.suffix in (".jpg", ".png"))[:16]
    path = folder / ("pairs.jsonl" if preference else "chat.jsonl")
    with path.open("w") as file:
        for number in range(8):
            images = [str(name) for name in names[2 * number : 2 * number + 1 + number % 2]]
            question = "<image>" * len(images) + "What is shown?"
            row: dict[str, Any] = {"id": str(number), "images": images}
            turns = [{"role": "user", "content": question}]
            if preference:
                row |= {"prompt": turns, "chosen": "A ring.", "rejected": "A circle and none."}
            else:
                row["messages"] = [*turns, {"role": "assistant", "content": f"A star {number}."}]
            file.write(json.dumps(row) + "\n")
    return path


def run_family(base: str, nf4: bool, folder: Path, scenes: Path, columns: tuple[str, ...] = COLUMNS) -> dict[str, str]:
    """Train a checkpoint for two steps by each method, evaluate and export it. Return the result of each column:
    `PASSES`, or the key of the rule that refuses it. Other errors pass through."""
    from ray_vlm.errors import ModelError

    runs: dict[str, Path] = {}

    def train_by(method: str) -> None:
        runs[method] = train_family(base, nf4, method, folder, scenes)

    actions: dict[str, Callable[[], None]] = {method: lambda method=method: train_by(method) for method in COLUMNS[:3]}
    actions["evaluate"] = lambda: evaluate_run(folder, runs["sft"])
    actions["export"] = lambda: export_run(runs["sft"])
    results: dict[str, str] = {}
    for column in columns:
        if column in ("evaluate", "export") and "sft" not in runs:
            results[column] = results["sft"]
            continue
        try:
            actions[column]()
            results[column] = PASSES
        except ModelError as error:
            results[column] = next((rule for rule, words in RULES.items() if re.search(words, str(error))), "")
            if not results[column]:
                raise
    return results


def train_family(base: str, nf4: bool, method: str, folder: Path, scenes: Path) -> Path:
    """Train for two steps and return the run's folder. SFT is of drawn scenes, the others of rows with two images."""
    from ray_vlm.config.load import load_job
    from ray_vlm.runs.monitor import read_metrics
    from ray_vlm.train.driver import train

    (folder / method).mkdir()
    sections: dict[str, Any] = {"model": {"name": base, "load_in_4bit": nf4}, "method": {"name": method}}
    sections["lora"] = {"target": ["language", "vision"]}
    sections["train"] = {"max_steps": 2, "global_batch_size": 4, "micro_batch_size": 2}
    if method != "sft":
        rows = write_rows(folder / method, scenes, method == "dpo")
        sections["task"] = "chat"
        source = {"path": str(rows), "image_root": str(scenes)}
        sections["data"] = {"train": source | {"format": "preference" if method == "dpo" else "messages"}}
    if method == "grpo":
        sections["method"] |= {"num_generations": 2, "max_completion_tokens": 6}
        sections["method"] |= {"rewards": {f"{__name__}:mean_token": 1.0}}
    else:
        test = {"path": str(scenes / "test.json"), "max_rows": 2}
        sections.setdefault("data", {}).update({"test": test} if method == "sft" else {})
    sections["evaluate"] = {"max_new_tokens": 6, "batch_size": 2}
    path = write_job(folder / method, scenes, base, **sections)
    paths = train(load_job(path), path.read_text())
    lines = [line for line in read_metrics(paths.metrics) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines), lines
    if method == "grpo":  # sampled with a cache, scored without one
        assert all(line["rollout_gap"] < 2e-5 for line in lines), [line["rollout_gap"] for line in lines]
    return Path(paths.root)


def evaluate_run(folder: Path, run: Path) -> None:
    """Evaluate the trained adapter on drawn scenes."""
    from ray_vlm.config.load import load_job
    from ray_vlm.evaluate.run import evaluate

    metrics = evaluate(load_job(folder / "sft" / "job.yaml"), str(run / "final"), folder / "scores")
    assert metrics["overall"]


def export_run(run: Path) -> None:
    """Export base and adapter merged, and load the result."""
    from transformers import AutoModelForImageTextToText

    from ray_vlm.cli import main

    assert main(["export", str(run), "--merged", "--weights", "final"]) == 0
    merged = next(path.parent for path in run.rglob("config.json"))
    _, info = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info


def read_results() -> dict[str, Any]:
    """Return `{family: {precision: {column: result}}}`."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def write_result(family: str, key: str, result: Mapping[str, Any]) -> None:
    """Keep the result of a family under `key`: a precision, or `FAST`."""
    results = read_results()
    results.setdefault(family, {})[key] = dict(result)
    ordered = {name: results[name] for name in NAMES if name in results}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def render(results: Mapping[str, Any]) -> str:
    """Return the table of the results, and the reasons under it."""
    lines = ["| family | model type | float32 | 4 bit | computed once or left out |", "|---|---|---|---|---|"]
    reasons: dict[str, str] = {}
    for family, of_family in results.items():
        cells = [_cell(of_family[precision], reasons) for precision in PRECISIONS]
        left_out = ", ".join(name for name, is_on in of_family.get(FAST, {}).items() if is_on) or "-"
        lines.append("| " + " | ".join((NAMES[family], f"`{family}`", *cells, left_out)) + " |")
    return "\n".join([*lines, "", *(f"({number}) {reason}.\\" for reason, number in reasons.items())]).rstrip("\\")


def _cell(results: Mapping[str, str], reasons: dict[str, str]) -> str:
    """Return what passes, and the number of the reason under the table for what does not."""
    passes = [column for column in COLUMNS if results[column] == PASSES]
    if len(passes) == len(COLUMNS):
        return "yes"
    rules = dict.fromkeys(results[column] for column in COLUMNS if results[column] != PASSES)
    numbers = ", ".join(f"({reasons.setdefault(WHY[rule], str(len(reasons) + 1))})" for rule in rules)
    return f"only {', '.join(passes)} {numbers}" if passes else f"no {numbers}"


def replace_table(page: str, table: str) -> str:
    """Return the page with this table between its marks."""
    before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(replace_table(PAGE.read_text(encoding="utf-8"), render(read_results())), encoding="utf-8")
