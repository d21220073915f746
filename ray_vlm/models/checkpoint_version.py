"""Checkpoints that the installed transformers is too old for, or has no class for, and what would work."""

import json
from pathlib import Path
from typing import Any

_KNOWN = "or give a base of a family in docs/models.md"


def advise_version(name: str, revision: str | None) -> str | None:
    """Return why the installed transformers may not load the base, with what would work; None if it should.

    `name`: a folder, or a hub name, whose files are in the hub's cache."""
    import transformers
    from packaging.version import InvalidVersion, Version
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stored, installed = _read_config(name, revision), transformers.__version__
    kind, written = stored.get("model_type"), stored.get("transformers_version")
    try:
        is_newer = isinstance(written, str) and Version(written) > Version(installed)
    except InvalidVersion:
        is_newer = False
    wanted = f"Install transformers {written} or newer" if is_newer else "Install a newer transformers"
    by = f", and the checkpoint was written by {written}" if is_newer else ""
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        if "auto_map" in stored:
            return (
                f"model type {kind!r} is code in the base's own files, which is not run, and transformers {installed} "
                f"has no class for it. Give a checkpoint in transformers' own format, {_KNOWN}."
            )
        return f"transformers {installed} has no model type {kind!r}{by}. {wanted}, {_KNOWN}."
    return f"transformers {installed} is installed{by}. {wanted}, {_KNOWN}." if is_newer else None


def _read_config(name: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache

    try:
        path: Any = Path(name).expanduser() / "config.json"
        if not path.is_file():
            path = try_to_load_from_cache(name, "config.json", revision=revision)
        stored = json.loads(Path(path).read_text(encoding="utf-8")) if isinstance(path, str | Path) else {}
    except (OSError, ValueError):  # no file, no JSON, or not a name that the hub allows
        return {}
    return stored if isinstance(stored, dict) else {}
