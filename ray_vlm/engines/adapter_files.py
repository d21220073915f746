"""Adapters as files for an engine in another process: one folder for each push, in memory where there is room."""

import logging
import os
import re
import shutil
import socket
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

logger = logging.getLogger(__name__)
MEMORY = Path("/dev/shm")  # noqa: S108  (each folder is made by mkdtemp)
_SLACK = 64 * 2**20  # bytes of `MEMORY` that others may need meanwhile
_NAME = "ray-vlm-adapter"


def choose_root(memory: Path, size: float) -> Path:
    """Return the folder for adapters of `size` bytes: `memory` if it exists, can be written and has room for two of
    them (the next is written before the last is removed), else the system's temporary folder."""
    try:
        free = shutil.disk_usage(memory).free
    except OSError:
        free = 0
    fits = free >= 2 * size + _SLACK and os.access(memory, os.W_OK | os.X_OK)
    return memory if fits else Path(tempfile.gettempdir())


def remove_stale(root: Path) -> None:
    """Remove folders of processes of this host that have ended without removing them, as when they are killed."""
    named = re.compile(rf"{_NAME}-{re.escape(socket.gethostname())}-(\d+)-")
    for folder in root.glob(f"{_NAME}-*"):
        match = named.match(folder.name)
        if match and not _runs(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


class AdapterFiles:
    """Writes an adapter to a new folder for each push. All are removed by `close`, or when the process ends.

    `root`: where they lie, for a process of another host or user; None: as `choose_root` says of `memory`."""

    def __init__(self, memory: Path = MEMORY, root: Path | None = None):
        self._memory, self._root = memory, root
        self._parent: Path | None = None
        self._number = 0

    def write(self, model: "PeftModel") -> Path:
        """Write the adapter `default` of `model` as it is now. Return its folder; earlier ones stay."""
        if self._parent is None:
            root = self._root or choose_root(self._memory, adapter_bytes(dict(model.named_parameters())))
            root.mkdir(parents=True, exist_ok=True)
            remove_stale(root)
            prefix = f"{_NAME}-{socket.gethostname()}-{os.getpid()}-"
            self._parent = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
            self._remove = weakref.finalize(self, _remove, self._parent, self._root)
            if self._root is not None:
                self._parent.chmod(0o755)
        self._number += 1
        folder = self._parent / str(self._number)
        # Embeddings are not adapted. PEFT would ask the hub whether their number has changed.
        model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
        return folder

    def keep_only(self, folder: Path) -> None:
        """Remove all folders but this one, which the engine has read."""
        if self._parent is None:
            return
        with suppress(FileNotFoundError):
            for other in self._parent.iterdir():
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        if self._parent is not None:
            self._remove()
            self._parent = None


def _remove(folder: Path, root: Path | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if root is not None:
        with suppress(OSError):  # another worker's adapter is in it
            root.rmdir()


def adapter_bytes(parameters: "Mapping[str, Tensor]") -> int:
    """Return the bytes of the LoRA weights among a model's parameters."""
    return sum(p.numel() * p.element_size() for name, p in parameters.items() if "lora_" in name)
