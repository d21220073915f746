"""Metrics of predictions, by task; `measure` is the entry point. All are shares (0 to 1), and higher is better.

Every task: `parse_rate`, the share of answers in the requested form. Detection: `precision_50`, `recall_50` and `f1_50`
count pairs of equal label and IoU >= 0.5, as the task's own `score` pairs boxes, over all images (micro); `mean_iou` is
the mean over true objects of the IoU of the box paired with it, whatever its label, and 0 without one; `map` and
`map_50` are COCO's, with every box scored 1.0 and ties in the order of the answer; `unknown_labels` are the most
frequent answered labels that no true object has, with their counts. Classification: `accuracy` is the share of rows
with every attribute right, `attribute_accuracy` that of single attributes; `balanced_accuracy` is the mean recall of
the values of an attribute, averaged over attributes; `macro_f1` likewise. GUI steps: `step_success`, `task_success`
(every step of a task), `action_accuracy`, `argument_accuracy`, `grounding` (pointing inside the true box, of the steps
that point), `mean_iou`. Chat: `exact`, `normalised`, `anls`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ray_vlm.evaluate.average_precision import coco_map
from ray_vlm.evaluate.prediction import Prediction
from ray_vlm.tasks.answers import same_words

_KINDS = ("hits", "misses", "invented")  # counts of which precision and recall are made
_NUM_UNKNOWN = 10  # unknown labels in the metrics


def measure(task: str, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return `{"overall": {metric: value}, "per_class": {label: {...}}, "num_rows", ...}` of a task's predictions."""
    metrics = _MEASURES[task](predictions)
    metrics["overall"]["parse_rate"] = _mean(p.ok for p in predictions)
    return metrics | {"task": task, "num_rows": len(predictions)}


def _mean(values: Iterable[Any]) -> float:
    """Return the mean of the values that are not None; 0.0 without any."""
    numbers = [float(value) for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else 0.0


def _rates(hits: int, misses: int, invented: int, suffix: str = "") -> dict[str, float]:
    """Return precision, recall and F1 from counts, 0.0 for a division by zero; `suffix` is appended to their names."""
    precision = hits / (hits + invented) if hits + invented else 0.0
    recall = hits / (hits + misses) if hits + misses else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {f"precision{suffix}": precision, f"recall{suffix}": recall, f"f1{suffix}": f1}


def _class_rates(counts: Mapping[str, int], suffix: str = "") -> dict[str, float]:
    """Return the rates of a class, and the number of its true objects or rows."""
    hits, misses, invented = (counts[kind] for kind in _KINDS)
    return _rates(hits, misses, invented, suffix) | {"num": hits + misses}


def measure_detection(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return the metrics overall and by class, the number of true objects, and the unknown labels."""
    totals: dict[str, Counter] = {kind: Counter() for kind in _KINDS}
    for prediction in predictions:
        for kind, counter in totals.items():
            counter.update(prediction.score[kind])
    labels = sorted(set().union(*totals.values()))
    ious = [iou for p in predictions for iou in p.score["ious"]]
    hits, misses, invented = (sum(totals[kind].values()) for kind in _KINDS)
    overall = _rates(hits, misses, invented, "_50")
    overall |= coco_map([{"truth": p.truth, "found": p.parsed} for p in predictions])
    overall["mean_iou"] = sum(ious) / max(len(ious), 1)
    known = totals["hits"] + totals["misses"]
    others = Counter({label: count for label, count in totals["invented"].items() if label not in known})
    return {
        "overall": overall,
        "per_class": {label: _class_rates({kind: totals[kind][label] for kind in _KINDS}, "_50") for label in labels},
        "num_objects": len(ious),
        "unknown_labels": dict(others.most_common(_NUM_UNKNOWN)),
    }


def measure_classification(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return the overall metrics, and precision, recall and F1 of every `attribute=value`."""
    counts: dict[str, Counter] = defaultdict(Counter)
    values: dict[str, set[str]] = defaultdict(set)
    for p in predictions:
        for name, value in p.truth["attributes"].items():
            values[name].add(value)
    for p in predictions:
        for name, value in p.truth["attributes"].items():
            answered = known_value(p.parsed.get("attributes", {}).get(name), values[name])
            right = p.score["correct"][name]
            counts[f"{name}={value}"]["hits" if right else "misses"] += 1
            if answered is not None and not right:
                counts[f"{name}={answered}"]["invented"] += 1
    known = {tag for tag, c in counts.items() if c["hits"] + c["misses"]}
    per_class = {tag: _class_rates(counts[tag]) for tag in sorted(known)}
    by_attribute: dict[str, list[dict[str, float]]] = defaultdict(list)
    for tag, class_rates in per_class.items():
        by_attribute[tag.partition("=")[0]].append(class_rates)
    overall = {
        "accuracy": _mean(p.score["all"] for p in predictions),
        "attribute_accuracy": _mean(right for p in predictions for right in p.score["correct"].values()),
        "balanced_accuracy": _mean(_mean(r["recall"] for r in value_rates) for value_rates in by_attribute.values()),
        "macro_f1": _mean(_mean(r["f1"] for r in value_rates) for value_rates in by_attribute.values()),
    }
    return {"overall": overall, "per_class": per_class}


def known_value(answered: str | None, values: Iterable[str]) -> str | None:
    """Return the value of the data that equals the answered one up to case and spaces; None without such a value."""
    return next((value for value in values if answered is not None and same_words(answered, value)), None)


def measure_gui_steps(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return the overall metrics, and those of each true action."""
    tasks: dict[str, list[bool]] = defaultdict(list)
    actions: dict[str, list[Prediction]] = defaultdict(list)
    for p in predictions:
        tasks[p.group].append(p.score["success"])
        actions[f"action={p.truth['output']['action']}"].append(p)
    counts: dict[str, Counter] = defaultdict(Counter)
    for tag, steps in actions.items():
        counts[tag]["hits"] = sum(p.score["action"] for p in steps)
        counts[tag]["misses"] = len(steps) - counts[tag]["hits"]
        name = tag.partition("=")[2]
        others = (p for other, group in actions.items() if other != tag for p in group)
        counts[tag]["invented"] = sum(same_words(str(p.parsed["output"].get("action")), name) for p in others)
    overall = {
        "step_success": _mean(p.score["success"] for p in predictions),
        "task_success": _mean(all(steps) for steps in tasks.values()),
        "action_accuracy": _mean(p.score["action"] for p in predictions),
        "argument_accuracy": _mean(p.score["arguments"] for p in predictions),
        "grounding": _mean(p.score["inside"] for p in predictions),
        "mean_iou": _mean(p.score["iou"] for p in predictions),
    }
    success = {tag: {"success": _mean(p.score["success"] for p in steps)} for tag, steps in actions.items()}
    per_class = {tag: _class_rates(counts[tag]) | success[tag] for tag in sorted(actions)}
    return {"overall": overall, "per_class": per_class, "num_tasks": len(tasks)}


def measure_chat(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return the overall metrics; free text has no classes."""
    names = ("exact", "normalised", "anls")
    return {"overall": {name: _mean(p.score[name] for p in predictions) for name in names}, "per_class": {}}


_MEASURES: dict[str, Callable[[Sequence[Prediction]], dict[str, Any]]] = {
    "detection": measure_detection,
    "classification": measure_classification,
    "gui_steps": measure_gui_steps,
    "chat": measure_chat,
}
