"""The attempts of a run: the steps of each, why it ended, and how many steps had to be repeated.

Ray may restart workers by itself, if it has resources for more of them or has lost some. Such attempts are not in
`run.json`, only in the start lines of `metrics.jsonl`.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ray_vlm.runs.text import plural


def complete(listed: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the attempts of `run.json` (`listed`) and those that Ray started by itself, with `from_step`, `to_step`,
    `workers` and `lost_steps` (steps that the next attempt repeated). `lines`: all of `metrics.jsonl`."""
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
            entry["status"] = "died"  # it was killed before it could write a status
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
    """Return a sentence on why each attempt ended, or None for a run with one attempt."""
    if len(attempts) < 2:
        return None
    clauses = []
    for i, (entry, following) in enumerate(pairwise(attempts)):
        at = f" at step {entry['to_step']}" if "to_step" in entry else " before its first step"
        again = entry.get("lost_steps", 0)
        clause = f"{_cause(entry, following)}{at}"
        clause += _extension(attempts[i + 1 :]) if entry.get("status") == "finished" else ""
        clauses.append(clause + (f" ({plural(again, 'step')} done again)" if again else ""))
    lost = sum(entry.get("lost_steps", 0) for entry in attempts)
    steps = max((entry.get("to_step", 0) for entry in attempts), default=0)
    repeated = f" {lost} of {plural(steps, 'step')} done twice." if lost else ""
    return f"{len(attempts)} attempts: {'; '.join(clauses)}.{repeated}"


def _extension(later: Sequence[Mapping[str, Any]]) -> str:
    """Return how far a finished run was extended, without the step if no later attempt has finished."""
    end = next((entry for entry in later if entry.get("status") == "finished" and "to_step" in entry), None)
    return " and was extended" + (f" to step {end['to_step']}" if end else "")


def _cause(entry: Mapping[str, Any], following: Mapping[str, Any]) -> str:
    status = entry.get("status", "running")
    if status == "resized":
        return f"went on with {plural(following.get('workers', '?'), 'worker')}"
    if status == "interrupted":
        return "stopped by a signal"
    if status in ("running", "died"):
        return "ended without a message"
    return (str(entry.get("error") or "").strip().splitlines() or [status])[0].rstrip(".")[:200]
