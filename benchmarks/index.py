"""The index of 300,000 LLaVA rows: what does it cost to build it, to use it again, and to share it among processes?

Run: python -m benchmarks.index [--quick] [--folder PATH] [--json PATH]. The rows are questions and answers of varied
words about 500 small JPEGs, 95 MB of JSON lines, and the base is the tiny one. `--folder`: keeps the data set for the
next run. Arms alternate, and figures are medians; every command is one of `ray-vlm` in a process of its own.

1. The first index on one core, against a bare loop that parses the lines, reads the header of each row's image and
   calls the fast tokenizer in batches of 1,000, all in one thread. Starting up, which is what an index of 300 rows
   takes, does not count. Bar: 0.6x of the loop's speed. Two processes on two cores against one on one, with the
   tokenizer's threads off: 1.7x.
2. The second start of `train` and `evaluate` until their plan is ready, and of `data check` and `data stats` to their
   end: 8 s. The driver's largest PSS, which is its own pages and its share of those that it shares: 700 MB.
3. Training with two Ray workers: the largest PSS of a worker and of a loader, and the most memory of its own, against
   the same job on 300 rows: 60 MB more.
4. Ten million rows, by 611 links to the files of one piece: a record by its number, 100 us; what a process holds that
   has read of every shard, 20 MB.
5. Ray tasks on two nodes of one core each, with addresses of their own, against one node: 1.7x. Nodes need root and
   network namespaces; without them these figures are left out, and a line says so.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from benchmarks.figures import figure, report
from tests.support.hosts import start_hosts, why_not
from tests.support.lost_nodes import HEAD, cluster_env, head, node, wait_nodes
from tests.support.photos import write_images

ROOT = Path(__file__).parents[1]
ROWS, QUICK_ROWS, FEW = 300_000, 20_000, 300
IMAGES, IMAGE_SIZE = 500, (336, 252)
STEPS = 60  # of training: a loader has several tasks of 64 rows
BATCH = 1000  # rows of the bare loop at a time
THREADS_OFF = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
LARGE_ROWS = 10_000_000
SPEED, SCALING, START_S, DRIVER_MB, MORE_MB, RECORD_US, HELD_MB = 0.6, 1.7, 8.0, 700.0, 60.0, 100.0, 20.0
_KIB = re.compile(r"^(Pss|Anonymous):\s+(\d+) kB$", re.MULTILINE)
_TITLE = re.compile(r"ray::(\w+)")  # of a process of Ray: the class of its actor
_QUESTIONS = (
    "What is the {} {} beside the {}? Describe the {} and say why it looks {}.",
    "How many {} can you count near the {} {}?",
    "Is there a {} {} in front of the {}, and does the {} seem {} to you?",
    "Which part of the {} would a {} {} notice first, and what happens to the {} {} behind it?",
)
_WORDS = """
    time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work government number night point home water room mother
    area money story fact month lot right study book eye job word business issue side kind head house service friend
    father power hour game line end member law car city community name president team minute idea body information
    back parent face others level office door health person art war history party result change morning reason
    research girl guy moment air teacher force education foot boy age policy music market sense nation plan college
    interest death experience effect use class control care field development role effort rate heart drug show leader
    light voice wife police mind price report decision son view relationship town road arm difference value building
    action season society tax director position player record paper space ground form event matter center couple site
    project activity star table need court oil situation cost industry figure street image phone data picture practice
    piece land product doctor wall patient worker news test movie north love south west east umbrella bicycle traffic
    pavement window reflection shadow mountain river bridge crowd kitchen counter plate spoon bottle sandwich broccoli
    giraffe elephant zebra surfboard skateboard tennis racket baseball glove frisbee kite large small bright dark
    wooden metallic colourful crowded empty narrow broad ancient modern quiet sudden gentle careful stand walk carry
    hold sit run jump ride lean reach watch follow cross climb gather wait point smile cook repair
"""
_ENDINGS = ("", "", "", "s", "ed", "ing", "er", "ly")


def write_data(folder: Path, num_rows: int) -> Path:
    """Write the images, and the LLaVA rows as JSON lines, unless they are there; return the file of the rows."""
    if not (folder / "images").exists():
        write_images(folder / "images", IMAGE_SIZE, IMAGES)
    path = folder / f"rows-{num_rows}.jsonl"
    if path.exists():
        return path
    rng = np.random.default_rng(num_rows)
    words = np.array([word + ending for ending in _ENDINGS for word in _WORDS.split()])
    frequency = 1 / np.arange(10, 10 + len(words))  # as Zipf has it, with a flat beginning
    order, share = rng.permutation(len(words)), frequency / frequency.sum()
    with open(path.with_suffix(".part"), "w", encoding="utf-8") as file:
        for start in range(0, num_rows, 10_000):
            count = min(10_000, num_rows - start)
            drawn = words[order[rng.choice(len(words), (count, 22), p=share)]].tolist()
            kinds, lengths = rng.integers(0, len(_QUESTIONS), count).tolist(), rng.integers(4, 17, count).tolist()
            images = rng.integers(0, IMAGES, count).tolist()
            for number, text, kind, length, image in zip(
                range(start, start + count), drawn, kinds, lengths, images, strict=True
            ):
                row = _row(number, image, _QUESTIONS[kind].format(*text[:5]), text[5 : 5 + length])
                file.write(json.dumps(row) + "\n")
    path.with_suffix(".part").rename(path)
    return path


def _row(number: int, image: int, question: str, answer: Sequence[str]) -> dict[str, Any]:
    half = len(answer) // 2
    text = f"The {' '.join(answer[:half])}, {number % 97} in all, {' '.join(answer[half:])}."
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": text}]
    return {"id": f"{number:09d}", "image": f"images/{image}.jpg", "conversations": turns}


def write_job(folder: Path, rows: Path) -> Path:
    """Write the job over these rows: a few steps with two Ray workers and a loader each."""
    job = {
        "task": "chat",
        "model": {"name": "tiny", "load_in_4bit": False},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": {"path": str(rows), "format": "llava"}, "num_loaders": 1},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": STEPS, "precision": "fp32"},
        "cluster": {"num_workers": 2},
        "run": {"output_dir": str(folder / "runs")},
    }
    path = folder / f"job-{rows.stem}.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def run_bare(path: Path) -> None:
    """Print as JSON the seconds of each part of the bare loop, in this process and in one thread."""
    from PIL import Image
    from tokenizers import Tokenizer

    from ray_vlm.models.load import resolve_name

    tokenizer = Tokenizer.from_file(str(Path(resolve_name("tiny")) / "tokenizer.json"))
    seconds, num_rows, num_tokens = dict.fromkeys(("json", "header", "tokenizer"), 0.0), 0, 0
    before, picture = "<|im_start|>user\n", "<|vision_start|><|image_pad|><|vision_end|>"
    between, after = "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"
    started = time.perf_counter()
    with open(path, "rb") as file:
        while lines := [line for _, line in zip(range(BATCH), file, strict=False)]:
            begun = time.perf_counter()
            rows = [json.loads(line) for line in lines]
            parsed = time.perf_counter()
            for row in rows:
                with Image.open(path.parent / row["image"]) as image:
                    assert image.size == IMAGE_SIZE
            measured = time.perf_counter()
            pairs = [[turn["value"] for turn in row["conversations"]] for row in rows]
            texts = [before + ask.replace("<image>", picture) + between + answer + after for ask, answer in pairs]
            ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
            num_rows, num_tokens = num_rows + len(ids), num_tokens + sum(map(len, ids))
            took = (parsed - begun, measured - parsed, time.perf_counter() - measured)
            seconds = {name: total + part for (name, total), part in zip(seconds.items(), took, strict=True)}
    total = time.perf_counter() - started
    print(json.dumps({"rows": num_rows, "tokens": num_tokens, "total": total, **seconds}))


@contextmanager
def held_to(cores: set[int]) -> Iterator[None]:
    """Hold this thread, and all processes that it starts meanwhile, to these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def two_cores() -> tuple[int, int]:
    """Return the first two cores that this process may use."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this benchmark compares one core with two, and this process may use only one")
    return cores[0], cores[1]


def verb(*words: str) -> list[str]:
    """Return the command line of a verb of `ray-vlm`."""
    return [sys.executable, "-m", "ray_vlm", *words]


def environment() -> dict[str, str]:
    """Return the environment of a command: this checkout, and libraries that start no threads."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return own | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | THREADS_OFF


def index_s(
    job: Path, folder: Path, env: Mapping[str, str], wrap: Callable[[Sequence[str]], list[str]] = list
) -> float:
    """Return the seconds of the command that builds the job's index where there is none. `wrap`: makes it the command
    line of a host."""
    shutil.rmtree(folder, ignore_errors=True)
    command = wrap(verb("data", "index", str(job), f"run.output_dir={folder}"))
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    took = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    shutil.rmtree(folder)
    return took


def row_s(full: float, few: float, num_rows: int) -> float:
    """Return the seconds of a row, from those of an index of all rows and of one of a few."""
    return (full - few) / (num_rows - FEW)


def build_figures(folder: Path, num_rows: int, rounds: int) -> list[dict[str, Any]]:
    """Build the first index on one core and on two, and run the bare loop on one, by turns."""
    job, few = write_job(folder, write_data(folder, num_rows)), write_job(folder, write_data(folder, FEW))
    first, second = two_cores()
    bare: list[dict[str, float]] = []
    rows: dict[str, list[float]] = {"one": [], "two": []}
    starts: list[float] = []
    command = [sys.executable, "-m", "benchmarks.index", "--bare", str(folder / f"rows-{num_rows}.jsonl")]
    for _ in range(rounds):
        with held_to({first}):
            out = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
        bare.append(json.loads(out.stdout))
        for name, cores in (("one", {first}), ("two", {first, second})):
            with held_to(cores):
                starts.append(index_s(few, folder / "built", environment()))
                taken = index_s(job, folder / "built", environment())
            rows[name].append(row_s(taken, starts[-1], num_rows))
            print(f"{name}: {taken:.1f} s, {starts[-1]:.1f} s of them to start", flush=True)
    parts = {name: statistics.median(run[name] / num_rows for run in bare) for name in ("json", "header", "tokenizer")}
    loop = statistics.median(run["total"] / num_rows for run in bare)
    one, two = statistics.median(rows["one"]), statistics.median(rows["two"])
    return [
        figure("rows", num_rows, "rows"),
        figure("the file", (folder / f"rows-{num_rows}.jsonl").stat().st_size / 1e6, "MB"),
        figure("tokens of a row, its image's placeholder as one", bare[0]["tokens"] / num_rows, "tokens"),
        figure("bare loop, a row", 1e6 * loop, "us"),
        *(figure(f"  {name}", 1e6 * seconds, "us") for name, seconds in parts.items()),
        figure("first index, one core, a row", 1e6 * one, "us"),
        figure("  of 300 rows, the whole command", statistics.median(starts), "s"),
        figure("  speed against the bare loop", loop / one, "x", SPEED, most=False),
        figure("first index, two processes on two cores, a row", 1e6 * two, "us"),
        figure("  speed against one on one core", one / two, "x", SCALING, most=False),
    ]


@dataclass
class Watched:
    """What was seen of a command: its wall time, and by pid the title of each process in Ray ("driver" for the
    command itself), its largest PSS and the most memory of its own that no file backs, in MB."""

    wall_s: float = 0.0
    titles: dict[int, str] = field(default_factory=dict)
    pss: dict[int, float] = field(default_factory=dict)
    anonymous: dict[int, float] = field(default_factory=dict)

    def look(self, pid: int, with_pss: bool) -> None:
        """Note the memory of the command's processes now, their PSS only if asked for."""
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(psutil.Error, OSError):
                named = _TITLE.match(" ".join(process.cmdline()))
                if process.pid == pid:
                    self.titles[pid] = "driver"
                elif named and named[1] != "IDLE":
                    self.titles[process.pid] = named[1]
                kib = _KIB.findall(Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8"))
                for name, size in kib:
                    sizes = self.pss if name == "Pss" else self.anonymous
                    if with_pss or name != "Pss":
                        sizes[process.pid] = max(int(size) * 1024 / 1e6, sizes.get(process.pid, 0.0))

    def largest(self, title: str, sizes: Mapping[int, float]) -> float:
        """Return the largest of the sizes of processes with this title. Raise `LookupError` if none was seen."""
        own = [sizes[pid] for pid, name in self.titles.items() if name == title and pid in sizes]
        if not own:
            raise LookupError(f"no process {title} among {sorted(set(self.titles.values()))}")
        return max(own)


def watch(
    words: Sequence[str],
    log: Path,
    ready: Callable[[str], bool] | None = None,
    during: Callable[[str], bool] = lambda output: True,
    poll_s: float = 0.1,
) -> Watched:
    """Run a verb to its end, or end it as soon as `ready`, which gets its output so far, returns true. PSS counts as
    long as `during` does. `poll_s`: pause between two looks, which take the system's time at each process."""
    watched, output, is_ready = Watched(), "", False
    with open(log, "w", encoding="utf-8") as file:
        started = time.perf_counter()
        process = subprocess.Popen(verb(*words), cwd=ROOT, env=environment(), stdout=file, stderr=file)
        while process.poll() is None and not is_ready:
            with suppress(psutil.Error):
                watched.look(process.pid, during(output))
            time.sleep(poll_s)
            output = log.read_text(encoding="utf-8")
            is_ready = ready is not None and ready(output)
        watched.wall_s = time.perf_counter() - started
    if is_ready:
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
    if process.wait() and not is_ready:
        raise RuntimeError(f"ray-vlm {' '.join(words)}: {log.read_text(encoding='utf-8')[-3000:]}")
    if ready is not None and not is_ready:
        raise RuntimeError(f"ray-vlm {' '.join(words)} ended before its plan was ready")
    return watched


def second_figures(folder: Path, job: Path) -> list[dict[str, Any]]:
    """Start each verb once so that its index is there, and once more with a watch."""
    source = yaml.safe_load(job.read_text(encoding="utf-8"))["data"]["train"]
    answers = folder / "evaluated" / "answers.jsonl"  # written when the batches are planned, before the model is loaded
    test = ["data.train=null", *(f"data.test.{name}={value}" for name, value in source.items())]
    verbs: dict[str, tuple[list[str], Callable[[str], bool] | None]] = {
        "train": (
            ["train", str(job), "--overwrite", "run.name=second", "cluster.num_workers=0"],
            lambda output: " training rows; " in output,
        ),
        "data check": (["data", "check", str(job)], None),
        "data stats": (["data", "stats", str(job)], None),
        "evaluate": (
            ["evaluate", str(job), "--output", str(answers.parent), *test],
            lambda output: answers.exists(),
        ),
    }
    figures = []
    for turn in ("first", "second"):
        for name, (words, ready) in verbs.items():
            shutil.rmtree(answers.parent, ignore_errors=True)
            watched = watch(words, folder / f"{name.replace(' ', '-')}.log", ready)
            most = watched.largest("driver", watched.pss)
            print(f"{turn} {name}: {watched.wall_s:.1f} s, {most:.0f} MB", flush=True)
            if turn == "second":
                until = "plan ready" if ready else "whole command"
                figures.append(figure(f"second start of {name}, {until}", watched.wall_s, "s", START_S))
                figures.append(figure("  largest PSS of the driver", most, "MB", DRIVER_MB))
    return figures


def _is_training(output: str) -> bool:
    """Whether the first step is done and the last one is not, by the lines of the console."""
    return "\nstep " in output and f"\nstep {STEPS}/" not in output


def worker_figures(folder: Path, job: Path, few: Path) -> list[dict[str, Any]]:
    """Train with two Ray workers on all rows and on a few; compare the memory of the processes that are alike.

    PSS counts from the first step to the last, when all processes run and share their libraries. What they need
    before, such as a copy of the rows, is in the memory that no file backs.
    """
    runs = []
    for name, path in (("few", few), ("all", job)):
        words = ["train", str(path), "--overwrite", f"run.name={name}", "train.log_every_steps=1"]
        log = folder / f"workers-{name}.log"
        runs.append(watch(words, log, during=_is_training, poll_s=0.5))
    small, large = runs
    figures = []
    for label, title in (("worker", "RayTrainWorker"), ("loader", "MapWorker")):
        for kind, own, other in (
            ("PSS", large.pss, small.pss),
            ("memory of its own, over its life", large.anonymous, small.anonymous),
        ):
            most, least = large.largest(title, own), small.largest(title, other)
            figures.append(figure(f"largest {kind} of a {label}, all rows", most, "MB"))
            figures.append(figure(f"  more than with {FEW} rows", most - least, "MB", MORE_MB))
    for title in sorted({*large.titles.values()} & {*small.titles.values()} - {"RayTrainWorker", "MapWorker"}):
        more = large.largest(title, large.anonymous) - small.largest(title, small.anonymous)
        figures.append(figure(f"  memory of its own, more than with {FEW} rows: {title}", more, "MB"))
    return figures


def nodes_s(folder: Path, jobs: Sequence[Path], count: int) -> list[float]:
    """Return the seconds to index each job on a cluster of `count` nodes of one core each; the first runs the command
    too."""
    cores, env = two_cores(), environment() | cluster_env()
    logs = folder / "hosts"
    logs.mkdir(exist_ok=True)
    with start_hosts([], env, logs) as hosts:
        for number, core in enumerate(cores[:count]):
            with held_to({core}):
                hosts.start(node(number, cpus=1) if number else head(cpus=1))
        wait_nodes(hosts, env, count, logs)
        with held_to({cores[0]}):
            joined = env | {"RAY_ADDRESS": f"{HEAD}:6379"}
            return [index_s(job, folder / "built", joined, hosts[0].words) for job in jobs]


def node_figures(folder: Path, num_rows: int, rounds: int, jobs: Sequence[Path]) -> list[dict[str, Any]]:
    """Build the index as Ray tasks on one node and on two, by turns. `jobs`: that of a few rows, and that of all."""
    if reason := why_not():
        print(f"two nodes are left out: several hosts on one machine: {reason}", flush=True)
        return []
    rows: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count, taken in rows.items():
            start, full = nodes_s(folder, jobs, count)
            print(f"{count} nodes: {full:.1f} s, {start:.1f} s of them to start", flush=True)
            taken.append(row_s(full, start, num_rows))
    one, two = statistics.median(rows[1]), statistics.median(rows[2])
    return [
        figure("first index, Ray tasks on one node of one core, a row", 1e6 * one, "us"),
        figure("  two nodes of one core each, a row", 1e6 * two, "us"),
        figure("  speed of two against one", one / two, "x", SCALING, most=False),
    ]


def write_large_part(job: Path) -> str:
    """Write a part of ten million rows, links to the files of a job's first piece, and return the index's folder."""
    from ray_vlm.config.load import load_job
    from ray_vlm.config.paths import absolute_paths
    from ray_vlm.data.parts import load_parts

    index = load_parts(absolute_paths(load_job(str(job), [])), ["train"]).train
    assert index is not None
    about, folder = index.records.about, Path(index.records.folder.address)
    rows, tokens, count, _ = about["shards"][0]
    shards = []
    for number in range(-(-LARGE_ROWS // count)):
        names = [name.replace(".arrow", f"-{number}.arrow") for name in (rows, tokens)]
        for name, link in zip((rows, tokens), names, strict=True):
            (folder / link).unlink(missing_ok=True)
            os.link(folder / name, folder / link)
        shards.append([*names, count, 0])
    part = folder / "parts" / "large"
    part.mkdir(exist_ok=True)
    np.save(part / "positions.npy", np.arange(len(shards) * count))
    (part / "about.json").write_text(json.dumps({**about, "num_rows": len(shards) * count, "shards": shards}))
    return str(folder)


def touch_records(folder: str) -> None:
    """Print as JSON the seconds for a record by its number, and the PSS of a process that has read of every shard."""
    from ray_vlm.data.index import IndexedRows
    from ray_vlm.data.shards import IndexFolder, load_shard, read_encoded

    rows = IndexedRows(IndexFolder(folder), "parts/large")
    shards, count = len(rows.about["shards"]), rows.about["shards"][0][2]

    def touch(first: int, last: int) -> float:
        started = time.perf_counter()
        for number in (shard * count + turn * 1999 % count for shard in range(first, last) for turn in range(8)):
            assert rows[number].id
        took = time.perf_counter() - started
        for shard in range(first, last):
            encoded = load_shard(rows.folder, rows.where(shard * count)[1])
            assert len(read_encoded(encoded, 0).ids)
            encoded.drop_pages()
        return took / (last - first) / 8

    touch(0, 30)  # with what the libraries load at their first use
    before = _pss_bytes()
    seconds = touch(30, shards)
    print(json.dumps([seconds, (_pss_bytes() - before) * shards / (shards - 30)]))


def _pss_bytes() -> int:
    return 1024 * int(dict(_KIB.findall(Path("/proc/self/smaps_rollup").read_text()))["Pss"])


def record_figures(job: Path) -> list[dict[str, Any]]:
    """Read records of ten million rows by their numbers, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.index", "--touch", write_large_part(job)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    seconds, held = json.loads(out.stdout.strip().splitlines()[-1])
    return [
        figure("10 million rows, a record by its number", 1e6 * seconds, "us", RECORD_US),
        figure("  held of them by a process that has read of every shard", held / 1e6, "MB", HELD_MB),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--folder", type=Path, help="a folder for the data set, which stays there")
    own, rest = parser.parse_known_args()

    def measure(quick: bool) -> list[dict[str, Any]]:
        num_rows, rounds = (QUICK_ROWS, 1) if quick else (ROWS, 2)
        with tempfile.TemporaryDirectory(prefix="index") as temporary:
            folder = Path(own.folder or temporary).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            figures = build_figures(folder, num_rows, rounds)
            job, few = (folder / f"job-rows-{count}.yaml" for count in (num_rows, FEW))
            figures += second_figures(folder, job)
            figures += worker_figures(folder, job, few)
            figures += record_figures(job)
            return figures + node_figures(folder, num_rows, rounds, (few, job))

    report(measure, rest)


if __name__ == "__main__":
    if "--bare" in sys.argv:
        run_bare(Path(sys.argv[2]))
    elif "--touch" in sys.argv:
        touch_records(sys.argv[2])
    else:
        main()
