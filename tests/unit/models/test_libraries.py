"""The libraries' start-up messages, as a process of its own prints them."""

import subprocess
import sys

CODE = """
import logging
from ray_vlm.models.libraries import quiet_libraries
quiet_libraries()
import bitsandbytes.backends.cpu.ops
for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.cextension"):
    logging.getLogger(name).warning("a banner of %s", name)
    logging.getLogger(name).error("an error of %s", name)
"""


def test_bitsandbytes_prints_errors_only() -> None:
    """Some processors make its CPU kernels warn while they are imported."""
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    output = result.stdout + result.stderr
    assert "banner" not in output
    assert "Failed to load" not in output
    assert output.count("an error of") == 2
