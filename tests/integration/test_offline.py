"""Nothing calls home: a whole run with a network that notes every attempt to leave the machine."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import socket, sys
tried = []
real = socket.getaddrinfo
def note(host, *args, **kwargs):
    if host not in (None, "localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname()):
        tried.append(host)
        raise OSError(f"{host} is outside")
    return real(host, *args, **kwargs)
socket.getaddrinfo = note
from ray_vlm.cli import main
code = main(["train", sys.argv[1]])
print("tried", tried, "code", code)
"""


def test_training_asks_for_no_host_outside(job_file, scenes: Path) -> None:
    rows = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "eval")}
    path = job_file(data=rows, evaluate={"metric": "f1_50", "max_new_tokens": 4, "num_samples": 2})
    quiet = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CI", "TRANSFORMERS_OFFLINE")
    env = {k: v for k, v in os.environ.items() if k not in quiet}
    out = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, env=env, check=True)
    assert out.stdout.strip().splitlines()[-1] == "tried [] code 0"
