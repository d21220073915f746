"""The file of pairs that `pairs.py` writes: its path, its names of images, its rows and its description."""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ray_vlm.data.preprocessing import ABOUT
from ray_vlm.data.records import SftRecord
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.runs.paths import write_json
from ray_vlm.runs.store import full_address, is_remote

REASONS = {  # why a row gives no pair, with the text of messages
    "all_alike": "with all answers alike",
    "small_margin": "with too small a margin",
    "cut_off": "with every answer cut off",
    "unusable": "with fewer than two answers that text can hold",
}
_PROGRESS_S = 5.0  # seconds between progress lines


def check_output(output: str, overwrite: bool) -> Path:
    """Check and return the file to write, before anything is read or sampled. Raise `ConfigError` or `RunError`."""
    if is_remote(output):
        raise ConfigError(f"--output {output}: pairs are written to a local folder. Give a path, then copy the file.")
    path = Path(full_address(output))
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise ConfigError(f"--output {output}: pairs are JSON lines. Give a name that ends in .jsonl.")
    if path.is_dir():
        raise ConfigError(f"--output {output} is a folder. Give the name of a file in it.")
    if path.exists() and not overwrite:
        raise RunError(f"--output {output} is there already. Give another name, or --overwrite.")
    return path


def name_images(records: Sequence[SftRecord]) -> tuple[dict[str, str], str | None]:
    """Return the name of each image relative to `image_root`, and `image_root`, the folder around all of them, None
    without images.

    Raise `ConfigError` for images that are bytes, and for images without a common folder.
    """
    rest: dict[str, str] = {}  # image -> its address without scheme and options
    kinds: dict[tuple[str, str], str] = {}  # (scheme, options) -> an image of that kind
    for record in records:
        for image in record.images:
            if isinstance(image, bytes):
                raise ConfigError(
                    f"row {record.row} (id {record.id}): its image is given as bytes, and a pair names its images. "
                    "Write the images to files, and give their paths in the rows."
                )
            uri, mark, options = image.partition("?") if is_remote(image) else (image, "", "")
            scheme, colon, rest[image] = uri.rpartition("://")
            kinds.setdefault((scheme + colon, mark + options), image)
    if not rest:
        return {}, None
    common = os.path.commonprefix(list(rest.values()))  # noqa: RUF071  (cut at a slash in the next line)
    folder = common[: common.rfind("/") + 1]
    if len(kinds) > 1 or not folder:
        apart = list(kinds.values()) if len(kinds) > 1 else sorted(rest)
        raise ConfigError(
            f"{apart[0]} and {apart[-1]} have no folder in common, and the pairs of a file have one image_root. Make "
            "pairs of one source at a time."
        )
    ((scheme, options),) = kinds
    root = f"{scheme}{folder.rstrip('/') or '/'}{options}"
    return {image: inside[len(folder) :] for image, inside in rest.items()}, root


def write_rows(
    path: Path, rows: Iterable[dict[str, Any] | str], num_records: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write the rows to a temporary file, rename it to `path`, and return the counts and mean rewards.

    Texts among `rows` are the reasons (keys of `REASONS`) of records without a pair.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            summary = _write(file, rows, num_records, say)
        _about(path).unlink(missing_ok=True)  # a description of other pairs must never lie beside these
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path} was not written ({error}). Fix the cause, or give another --output.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return summary


def _write(
    file: TextIO, rows: Iterable[dict[str, Any] | str], num_records: int, say: Callable[[str], None]
) -> dict[str, Any]:
    without: Counter[str] = Counter()
    chosen, rejected, pairs = 0.0, 0.0, 0
    started, last_line = time.monotonic(), -math.inf
    for done, row in enumerate(rows, 1):
        if isinstance(row, str):
            without[row] += 1
        else:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            chosen, rejected = chosen + row["chosen_reward"], rejected + row["rejected_reward"]
            pairs += 1
        now = time.monotonic()
        if now - last_line >= _PROGRESS_S or done == num_records:
            rate = done / max(now - started, 1e-9)
            left = (num_records - done) / rate
            say(f"sampled {done}/{num_records} rows, {rate:.1f}/s, {left:.0f} s left, {pairs} pairs")
            last_line = now
    reasons = {name: without[name] for name in REASONS}
    if not pairs:
        raise RunError(
            f"no pair: of {num_records} rows {_describe_reasons(reasons)}. Lower pairs.min_margin, or raise "
            "pairs.temperature, pairs.num_samples or evaluate.max_new_tokens."
        )
    means = {"mean_chosen_reward": chosen / pairs, "mean_rejected_reward": rejected / pairs}
    return {"num_pairs": pairs, "without_pair": reasons, **means}


def _describe_reasons(without: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {REASONS[name]}" for name, count in without.items() if count)


def _about(path: Path) -> Path:
    return path.with_name(path.name + ABOUT)


def write_about(path: Path, about: Mapping[str, Any]) -> None:
    """Write the description of the pairs in `path` beside them."""
    write_json(_about(path), dict(about))


def describe_pairs(path: Path, about: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Print a summary of the pairs, and the YAML with which a job reads them."""
    import yaml

    chosen, rejected = about["mean_chosen_reward"], about["mean_rejected_reward"]
    say(f"{about['num_pairs']} pairs of {about['num_records']} rows: chosen {chosen:.3f}, rejected {rejected:.3f}")
    if without := _describe_reasons(about["without_pair"]):
        say(f"no pair: {without}")
    source = {"path": str(path), "format": "preference"}
    source |= {"image_root": about["image_root"]} if about["image_root"] is not None else {}
    inline = yaml.safe_dump(source, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    say(f"data:\n  train: {inline.strip()}")
