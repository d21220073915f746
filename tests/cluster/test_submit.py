"""Jobs on a cluster with token authentication: from a clone, from a folder of one's own, from an installed wheel; both
ways of submitting leave the same run; every verb ends with its own code; nobody sees a token."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4
SECRET = "".join(("hf_", "this_must_be_seen_by_nobody"))  # the file itself is sent, and must not hold it
SMALL = ["train.max_steps=3", "checkpoint.every_steps=2", "evaluate.every_steps=3", "evaluate.num_samples=4"]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def token_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], Path]]:
    """A head node started by `ray start`; yields the environment that reaches it, and its log folder."""
    folder, port, dashboard = tmp_path_factory.mktemp("r"), _free_port(), _free_port()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env = clean | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", "--num-cpus=4", f"--temp-dir={folder}", "--disable-usage-stats"]
    log = open(folder / "head.log", "w")  # noqa: SIM115
    head = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    for _ in range(120):
        if _status(address, TOKEN) == 200:
            break
        time.sleep(0.5)
    else:
        pytest.fail((folder / "head.log").read_text())
    time.sleep(15)  # the agent that starts jobs comes after the server that takes them
    yield env | {"RAY_API_SERVER_ADDRESS": address, "TEST_HEAD": f"127.0.0.1:{port}"}, folder
    for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
        process.kill()
    log.close()


def _status(address: str, token: str | None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{address}/api/jobs/", headers=headers), timeout=5
        ) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The tracked files alone, as in a clone that never ran the demo."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in (f for f in files if (ROOT / f).exists()):
        (tmp_path / "clone" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / "clone" / file)
    return tmp_path / "clone"


def _run(words: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def _ray_vlm(*words: str) -> list[str]:
    return [sys.executable, "-m", "ray_vlm", *words]


def _files(run: Path) -> set[str]:
    files = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    return {"/".join(part.split("-a1-")[0] for part in name.split("/")) for name in files}


def test_two_ways_of_submitting_leave_the_same_run(token_cluster: Any, clone: Path, tmp_path: Path) -> None:
    env, logs = token_cluster
    address = env["RAY_API_SERVER_ADDRESS"]
    assert _status(address, None) in (401, 403)
    assert _status(address, "wrong") in (401, 403)
    small = [*SMALL, f"run.output_dir={tmp_path / 'out'}"]
    command = ["python", "-m", "ray_vlm", "train", "jobs/demo_sft.yaml", *small, "run.name=plain"]
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address, "--working-dir", "."]
    plain = _run([*submit, "--runtime-env", "jobs/runtime_env.yaml", "--", *command], clone, env)
    assert plain.returncode == 0, plain.stdout[-3000:] + plain.stderr[-3000:]
    secret = env | {"HF_TOKEN": SECRET}
    submitted = _run(_ray_vlm("submit", "train", "jobs/demo_sft.yaml", *small, "run.name=ours"), clone, secret)
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-3000:]
    assert "step 3/3" in submitted.stdout
    shutil.rmtree(clone)
    runs = tmp_path / "out" / "plain", tmp_path / "out" / "ours"
    assert _files(runs[0]) == _files(runs[1])
    assert len({(run / "final" / "adapter_model.safetensors").read_bytes() for run in runs}) == 1
    assert SECRET not in submitted.stdout + submitted.stderr
    holding = [p for folder in (logs, tmp_path / "out") for p in folder.rglob("*") if _holds(p, SECRET)]
    assert holding == []


JOB = """\
task: detection
model: {name: tiny}
lora: {rank: 4}
data:
  train: {path: data/train.json}
  eval: {path: OUT/eval.json, image_root: data, create: "mine:draw"}
  test: {path: data/test.json, max_rows: 4}
train: {max_steps: 2, global_batch_size: 4, micro_batch_size: 2, bf16: false}
evaluate: {every_steps: 2, num_samples: 2, max_new_tokens: 32}
pairs: {num_samples: 4, temperature: [1.0, 1.6], min_margin: 0.01}
checkpoint: {every_steps: 2}
tune: {num_trials: 2}
cluster: {num_workers: 1, cpus_per_worker: 1}
run: {name: mine, output_dir: OUT}
"""
MODULE = """\
import pathlib, shutil, ray_vlm
def draw(path):
    pathlib.Path(path + ".package").write_text(ray_vlm.__file__)
    shutil.copy("data/eval.json", path)
"""


@pytest.fixture
def own_folder(tmp_path: Path, scenes: Path) -> tuple[Path, Path]:
    """A user's folder with a job, its rows in `data/` and a module; and where results go."""
    folder, out = tmp_path / "own", tmp_path / "out"
    shutil.copytree(scenes, folder / "data")
    out.mkdir()
    (folder / "job.yaml").write_text(JOB.replace("OUT", str(out)))
    (folder / "space.yaml").write_text("lora.rank: {choice: [2, 4]}\n")
    (folder / "mine.py").write_text(MODULE)
    return folder, out


def _ran_with(out: Path) -> str:
    return (out / "eval.json.package").read_text()


def test_from_a_folder_of_one_s_own(token_cluster: Any, own_folder: tuple[Path, Path]) -> None:
    """Its `data/` travels, and is no reason to take `ray_vlm.data` away."""
    folder, out = own_folder
    env = token_cluster[0] | {"PYTHONPATH": str(ROOT)}
    done = _run(_ray_vlm("submit", "train", "job.yaml"), folder, env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"sends the working folder, {folder.resolve()}" in done.stdout
    assert json.loads((out / "mine" / "run.json").read_text())["status"] == "finished"
    assert "py_modules_files/_ray_pkg_" in _ran_with(out), "the package that was sent ran, whatever the cluster has"


def test_every_verb_from_an_installed_wheel(token_cluster: Any, own_folder: tuple[Path, Path], installed: Path) -> None:
    """Each ends with the verb's own code, its results where they were asked for."""
    folder, out = own_folder
    env = {name: value for name, value in token_cluster[0].items() if name != "PYTHONPATH"}
    run, best, submit = str(out / "mine"), str(out / "mine" / "final"), [str(installed / "ray-vlm"), "submit"]
    for words, result in (
        (["train", "job.yaml"], "mine/run.json"),
        (["train", "job.yaml", "--resume", "train.max_steps=3"], "mine/run.json"),
        (["evaluate", "job.yaml", "--adapter", best, "--base", "--output", f"{out}/e"], "e/report.html"),
        (["pairs", "job.yaml", "--adapter", best, "--output", f"{out}/pairs.jsonl"], "pairs.jsonl"),
        (["predict", run, "data/test", "--output", f"{out}/p.csv", "--draw", f"{out}/drawn"], "p.csv"),
        (["export", run, "--output", f"{out}/x", "--driver-cpus", "1"], "x/README.md"),
        (["tune", "job.yaml", "--space", "space.yaml", "run.name=sweep"], "sweep-space/sweep.json"),
    ):
        done = _run([*submit, *words], folder, env)
        assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        assert (out / result).exists(), f"{words}: {sorted(out.rglob('*'))}"
    assert json.loads((out / "mine" / "run.json").read_text())["result"]["steps"] == 3
    assert len(list((out / "drawn").glob("*.png"))) == 12
    assert "py_modules_files/_ray_pkg_" in _ran_with(out)
    again = _run([*submit, "export", run, "--output", f"{out}/x"], folder, env)
    assert again.returncode == 1
    assert "something is there already" in again.stdout
    wrong = _run(
        [str(installed / "ray-vlm"), "submit", "predict", run, "data/test", "--output", f"{out}/p.x"], folder, env
    )
    assert wrong.returncode == 2, wrong.stdout + wrong.stderr


def test_strangers_are_told_what_is_missing(token_cluster: Any, own_folder: tuple[Path, Path]) -> None:
    """No token and a wrong one, where Ray is told the job server and where it finds it out from the cluster."""
    folder, _ = own_folder
    env = token_cluster[0] | {"PYTHONPATH": str(ROOT)}
    ray_env = {k: v for k, v in env.items() if k != "RAY_API_SERVER_ADDRESS"} | {"RAY_ADDRESS": env["TEST_HEAD"]}
    assert _run(_ray_vlm("jobs", "list"), folder, ray_env).returncode == 0
    for here in (env, ray_env):
        none = {k: v for k, v in here.items() if not k.startswith("RAY_AUTH")} | {"HOME": str(folder)}
        for stranger in (none, none | {"RAY_AUTH_MODE": "token"}, here | {"RAY_AUTH_TOKEN": "0" * 64}):
            for words in (["jobs", "list"], ["submit", "train", "job.yaml"]):
                done = _run(_ray_vlm(*words), folder, stranger)
                assert done.returncode == 1, done.stdout + done.stderr
                assert "Traceback" not in done.stderr
                assert "RAY_AUTH_TOKEN" in done.stderr, done.stderr


def test_a_job_server_takes_no_more_than_is_said(token_cluster: Any, tmp_path: Path) -> None:
    """A little less than the limit of `check_size` is taken, a little more is not."""
    from ray_vlm.cluster.package import MAX_UPLOAD_BYTES

    env = token_cluster[0] | {"PYTHONPATH": str(ROOT)}
    code = "import sys; from ray_vlm.cluster.submit import connect_jobs; client = connect_jobs(None)\n"
    code += "put = client._do_request('PUT', '/api/packages/gcs/_ray_pkg_0.zip', data=bytes(int(sys.argv[1])))\n"
    code += "print(put.status_code)"
    for size, taken in ((MAX_UPLOAD_BYTES - 2**16, True), (MAX_UPLOAD_BYTES + 2**16, False)):
        done = _run([sys.executable, "-c", code, str(size)], tmp_path, env)
        assert (done.stdout.strip() == "200") == taken, done.stdout + done.stderr


def _holds(path: Path, text: str) -> bool:
    try:
        return path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes()
    except OSError:
        return False


def test_codes_refusals_and_stopping(token_cluster: Any, clone: Path, tmp_path: Path) -> None:
    env, _ = token_cluster
    job = ["jobs/demo_sft.yaml", f"run.output_dir={tmp_path / 'out'}"]
    wrong = _run(_ray_vlm("submit", "train", *job, "method={name: sft, trl: {no_such: 1}}"), clone, env)
    assert wrong.returncode == 2, wrong.stdout + wrong.stderr
    relative = _run(_ray_vlm("submit", "train", "jobs/demo_sft.yaml"), clone, env)
    assert relative.returncode == 2
    assert "is relative, and a Ray job runs in a copy" in relative.stderr
    stranger = {k: v for k, v in env.items() if k != "RAY_AUTH_TOKEN"} | {"RAY_AUTH_MODE": "disabled"}
    refused = _run(_ray_vlm("jobs", "list"), clone, stranger)
    assert refused.returncode == 1
    assert "RAY_AUTH_TOKEN" in refused.stderr
    long = ["submit", "train", *job, "run.name=long", "--no-wait", "--submission-id", "long"]
    assert _run(_ray_vlm(*long), clone, env).returncode == 0
    metrics = tmp_path / "out" / "long" / "metrics.jsonl"
    for _ in range(400):
        if metrics.exists() and '"step": 2' in metrics.read_text():
            break
        time.sleep(0.5)
    assert _run(_ray_vlm("jobs", "stop", "long"), clone, env).returncode == 0
    ended = _run(_ray_vlm("jobs", "logs", "long", "--follow"), clone, env)
    assert ended.returncode == 130, ended.stdout + ended.stderr
    assert "stopping: a checkpoint is written" in ended.stdout
    assert json.loads((metrics.parent / "run.json").read_text())["status"] == "interrupted"
    assert list(metrics.parent.glob("checkpoint-*/manifest.json"))
    listed = _run(_ray_vlm("jobs", "list"), clone, env).stdout
    assert "long" in listed
    assert "STOPPED" in listed
