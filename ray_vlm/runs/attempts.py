"""What became of each attempt of a run: from which step to which, why it ended, and how many steps were lost by that.

Ray may start workers anew by itself, when it has room for more or when some are gone: such attempts are known by the
lines of `metrics.jsonl` alone.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ray_vlm.runs.text import plural


def complete(listed: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The attempts of `run.json`, those that Ray began by itself among them, with `from_step`, `to_step`, `workers`
    and `lost_steps`: done and then done again by the next one. `lines`: all of `metrics.jsonl`."""
    known = {entry["attempt"]: dict(entry) for entry in listed}
    starts = {line["attempt"]: line for line in lines if line["kind"] == "start"}
    last = max([*known, *starts], default=0)
    for number, line in starts.items():
        if number not in known:
            before = known.get(max((n for n in known if n < number), default=-1), {})
            status, ended = before.get("status", "running"), before.get("ended")
            known[number] = {"attempt": number, "started": line["time"], "status": status}
            known[number] |= {"ended": ended} if ended else {}
            known[number] |= {"error": before["error"]} if before.get("error") else {}
            before |= {"status": "resized", "ended": line["time"]}
            before.pop("error", None)
    for number, entry in known.items():
        if number < last and entry.get("status", "running") == "running":
            entry["status"] = "died"  # nobody could say why
        if number in starts:
            steps = [line["step"] for line in lines if line["attempt"] == number and line["kind"] == "train"]
            entry["from_step"] = starts[number]["step"]
            entry["to_step"] = max(steps, default=entry["from_step"])
            if workers := starts[number].get("num_workers"):
                entry["workers"] = workers
            if number < last:
                following = min((n for n in starts if n > number), default=None)
                then = entry["to_step"] if following is None else starts[following]["step"]
                entry["lost_steps"] = max(0, entry["to_step"] - then)
    return [known[number] for number in sorted(known)]


def tell_attempts(attempts: Sequence[Mapping[str, Any]]) -> str | None:
    """One sentence on how the run came to its end; None where it went through at once."""
    if len(attempts) < 2:
        return None
    told = []
    for entry, following in pairwise(attempts):
        at = f" at step {entry['to_step']}" if "to_step" in entry else " before its first step"
        again = entry.get("lost_steps", 0)
        told.append(f"{_cause(entry, following)}{at}" + (f" ({plural(again, 'step')} done again)" if again else ""))
    lost = sum(entry.get("lost_steps", 0) for entry in attempts)
    steps = max((entry.get("to_step", 0) for entry in attempts), default=0)
    return f"{len(attempts)} attempts: {'; '.join(told)}. {lost} of {plural(steps, 'step')} done twice."


def _cause(entry: Mapping[str, Any], following: Mapping[str, Any]) -> str:
    status = entry.get("status", "running")
    if status == "resized":
        return f"went on with {plural(following.get('workers', '?'), 'worker')}"
    if status == "interrupted":
        return "stopped by a signal"
    if status in ("running", "died"):
        return "ended without a word"
    return (str(entry.get("error") or "").strip().splitlines() or [status])[0].rstrip(".")[:200]
