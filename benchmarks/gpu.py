"""QLoRA steps at real size on one NVIDIA card: peak memory against the planner, tokens a second, MFU, where time goes.

Random weights of the presets' shapes, no network: Qwen2.5-VL-7B and Qwen3-VL-8B by SFT, DPO and GRPO (8 answers),
images of 1,024 tokens, in one process under a cap of 40 GiB; attention kernels compared on SFT. Weights are written
once to memory (TMPDIR, or /dev/shm). `--quick`: SFT of Qwen3-VL-2B alone. Bars: the planner is within 7 % of the peak
and never more than 3 % below it.
"""

import json
import os
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import figure, report
from ray_vlm.config.load import dump_job, load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.rows import load_preparer
from ray_vlm.demo.tiny import build_processor
from ray_vlm.models.memory import CUDA_CONTEXT, GIB
from ray_vlm.models.presets import load_preset
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.train.driver import train
from ray_vlm.train.fit import heaviest_rows, predict
from ray_vlm.train.prepare import prepare

MODELS, CAP = ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"), 40.0
METHODS, STEPS, ROWS = ("sft", "dpo", "grpo"), 4, 16
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "A10G": 70e12, "L40S": 362e12, "4090": 165e12}


def write_random(config: Any, folder: Path, device: str) -> str:
    """A checkpoint of this shape with random bfloat16 weights, and a processor with a small vocabulary of its own."""
    import torch
    from transformers import AutoModelForImageTextToText

    processor = build_processor(config.model_type)
    ids = processor.tokenizer.convert_tokens_to_ids
    for kind in ("image", "video"):
        setattr(config, f"{kind}_token_id", ids(f"<|{kind}_pad|>"))
    for side in ("start", "end"):
        setattr(config, f"vision_{side}_token_id", ids(f"<|vision_{side}|>"))
    vision, images = config.vision_config, processor.image_processor
    images.patch_size = vision.patch_size
    images.size = {"shortest_edge": 64**2, "longest_edge": 4096**2}
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = ids("<|im_end|>")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    del model
    return str(folder)


def write_rows(folder: Path, side: int, rows: int) -> None:
    """Chats, pairs and prompts about noise of `side` pixels; answers of about 120 tokens."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    words = ["circle", "square", "triangle", "cross", "ring", "diamond", "star", "object"]

    def answer() -> str:
        return " ".join(rng.choice(words, 110))

    files: dict[str, list[Any]] = {"sft": [], "dpo": [], "grpo": []}
    for number in range(rows):
        name = f"{number}.jpg"
        Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(folder / name)
        turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": answer()}]
        files["sft"].append({"image": name, "conversations": turns})
        asked = {"prompt": "<image>\nWhat is shown?", "images": [name]}
        files["dpo"].append(asked | {"chosen": answer(), "rejected": answer()})
        files["grpo"].append(asked)
    for method, lines in files.items():
        (folder / f"{method}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def build_job(folder: Path, model: str, method: str, gpu: bool) -> JobConfig:
    """A QLoRA job of the method, as the shipped ones are: rank 16, checkpointing on, 2 rows or one group at a time."""
    formats = {"sft": "llava", "dpo": "preference", "grpo": "prompt"}
    options: dict[str, Any] = {"name": method}
    size = {"global_batch_size": 4, "micro_batch_size": 2}
    if method == "grpo":
        options |= {"num_generations": 8, "max_completion_tokens": 128, "rewards": {"benchmarks.gpu:length": 1.0}}
        size = {"global_batch_size": 8, "micro_batch_size": 8}
    data = {"path": str(folder / "rows" / f"{method}.jsonl"), "format": formats[method]}
    return load_resolved(
        {
            "method": options,
            "task": "chat",
            "model": {"name": model, "load_in_4bit": True},
            "lora": {"rank": 16, "alpha": 32},
            "data": {"train": data | {"image_root": str(folder / "rows")}, "max_pixels": 4096**2},
            "train": size | {"max_steps": STEPS, "bf16": gpu, "gradient_checkpointing": True, "probe": True},
            "cluster": {"num_workers": 0, "gpus_per_worker": int(gpu), "gpu_memory_gib": CAP},
            "run": {"name": f"{Path(model).name}-{method}", "output_dir": str(folder / "runs")},
        }
    )


def length(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that random weights earn differently: the share of even tokens."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def run(job: JobConfig, kernel: str | None = None) -> dict[str, float]:
    """Medians over the steps after the first, and the peak. `kernel`: the attention kernel to use, by torch's name."""
    forced: Any = nullcontext()
    if kernel is not None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        forced = sdpa_kernel([getattr(SDPBackend, kernel)])
    with forced:
        paths = train(job, json.dumps(dump_job(job)), overwrite=True)
    lines = [line for line in read_metrics(paths.metrics) if line["kind"] == "train"]
    names = ("step_s", "data_s", "rollout_s", "forward_s", "backward_s", "tokens_per_s")
    found = {name: float(np.median([line[name] for line in lines[1:]])) for name in names}
    return found | {"peak_gib": max(line["peak_memory_gib"] for line in lines)}


def compare(job: JobConfig, name: str, gpu: bool) -> list[dict[str, Any]]:
    """Figures of one job; without a card those that need one are left out."""
    prepared = prepare(job)
    rows = heaviest_rows(prepared.job, prepared.plan, prepared.train)
    planned = predict(job, prepared.train, rows, load_preparer(prepared.spec))
    found = run(job)
    out = [figure(f"{name}: {key[:-2]}", found[key], "s") for key in ("step_s", "data_s", "rollout_s")]
    out += [figure(f"{name}: {key[:-2]}", found[key], "s") for key in ("forward_s", "backward_s")]
    out.append(figure(f"{name}: trained", found["tokens_per_s"], "tokens/s"))
    if not gpu:
        return out
    import torch

    card = torch.cuda.get_device_name()
    flops = next((peak for part, peak in PEAK_FLOPS.items() if part in card), None)
    if flops is not None:  # forward and gradients of activations; weights that stay need no gradients
        weights = planned.parts["base in 4 bit"] * 2 / 1.03
        out.append(figure(f"{name}: MFU", 4 * weights * found["tokens_per_s"] / flops, "of peak"))
    allocated = (planned.peak - CUDA_CONTEXT - planned.parts.get("fragmentation", 0.0)) / GIB
    out.append(figure(f"{name}: peak measured", found["peak_gib"], "GiB", CAP))
    out.append(figure(f"{name}: peak planned", planned.peak / GIB, "GiB", CAP))
    apart = allocated / found["peak_gib"] - 1
    out.append(figure(f"{name}: planned against measured, allocated", abs(apart), "relative", 0.07))
    out.append(figure(f"{name}: planned below measured", max(0.0, -apart), "relative", 0.03))
    return out


def kernels(job: JobConfig, name: str) -> list[dict[str, Any]]:
    """Steps of one job by attention kernel; one that refuses the job's masks is left out."""
    out = []
    for kernel in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        try:
            out.append(figure(f"{name}: step with {kernel}", run(job, kernel)["step_s"], "s"))
        except RuntimeError as error:
            print(f"{kernel}: {str(error).splitlines()[0][:100]}")
    return out


def measure(quick: bool) -> list[dict[str, Any]]:
    """All figures on the card of this machine."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs an NVIDIA card, and torch sees none. Nothing was measured.")
    whole = torch.cuda.get_device_properties(0).total_memory
    print(f"{torch.cuda.get_device_name()}, {whole / GIB:.0f} GiB; torch {torch.__version__}")
    out: list[dict[str, Any]] = []
    place = os.environ.get("TMPDIR") or ("/dev/shm" if Path("/dev/shm").is_dir() else None)
    for model in ("Qwen/Qwen3-VL-2B-Instruct",) if quick else MODELS:
        folder = Path(tempfile.mkdtemp(dir=place))
        try:
            config = load_preset(model)
            write_rows(folder / "rows", 32 * 2 * config.vision_config.patch_size, ROWS)  # 32 x 32 visual tokens
            torch.cuda.set_per_process_memory_fraction(1.0)
            weights = write_random(config, folder / model.rpartition("/")[2], "cuda")
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, CAP * GIB / whole))
            for method in ("sft",) if quick else METHODS:
                job = build_job(folder, weights, method, gpu=True)
                out += compare(job, f"{model.rpartition('/')[2]}, {method}", gpu=True)
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            if not quick:
                out += kernels(build_job(folder, weights, "sft", gpu=True), model.rpartition("/")[2])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return out


if __name__ == "__main__":
    report(measure)
