"""Whether an engine of other processes answers with the trainer's adapter as it is now: the decision, from numbers.

An engine that has lost the adapter, or holds an older one, answers well-formed text with no error. What shows it is the
log-probability of each token: of the engine, and of the trainer with the adapter, without it, and at an earlier push.
Differences are root mean squares over the tokens of one answer, in natural units; the gap is a mean, as `rollout_gap`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_vlm.config.train import Precision


@dataclass(frozen=True)
class Resolution:
    """What numbers of a precision can show, as differences a token.

    `visible`: a change of the trainer's numbers from which on the engine's must change too. `still`: an engine does not
    change if its numbers do by at most this share of what the trainer's do. In 16 bit every change of the weights
    changes the rounding of all numbers, so there only equal numbers are still; in float32 two calls may differ in the
    last bits, because vLLM reads a prompt from its cache the second time. `shown`, `apart`: differences between two
    models from which on it is clear which of them an answer is nearer to, as a proof and as a fault, unless the engine
    is less exact than that. `tokens`: that a fault takes: the rounding of fewer may look like one."""

    visible: float
    still: float
    shown: float
    apart: float
    tokens: int


def resolution_of(precision: Precision, device: str) -> Resolution:
    """Return the resolution of the trainer's arithmetic. GPUs multiply float32 in TF32, which has the mantissa of
    float16. In 16 bit two programs differ by some hundredths a token."""
    if precision == "bf16":
        return Resolution(visible=5e-3, still=0.0, shown=0.05, apart=0.25, tokens=4)
    if precision == "fp16" or device.startswith("cuda"):
        return Resolution(visible=1e-3, still=0.0, shown=0.01, apart=0.05, tokens=4)
    return Resolution(visible=1e-5, still=0.1, shown=1e-5, apart=5e-5, tokens=1)


@dataclass(frozen=True)
class Answers:
    """Tokens of one or more answers that an engine sampled to one prompt, and its log-probabilities of all of them, one
    answer behind another, `float64 [tokens]`."""

    ids: tuple[tuple[int, ...], ...]
    logprobs: np.ndarray


@dataclass(frozen=True)
class Evidence:
    """The numbers of one check.

    `push`: how often the adapter was sent. `engine`: the engine's answers with the adapter. `trainer`, `trainer_base`:
    the trainer's log-probabilities of their tokens with the adapter and without, `float64 [tokens]`. `base`: the
    engine's answers without the adapter; None if it was not asked. `previous_push`, `previous_engine`,
    `previous_trainer`: of the check before; None if there was none. The last has the trainer's log-probabilities of
    that time of the tokens of `engine`, `float64 [tokens]`, NaN where the tokens before were others.
    """

    push: int
    engine: Answers
    trainer: np.ndarray
    trainer_base: np.ndarray
    resolution: Resolution
    base: Answers | None = None
    previous_push: int | None = None
    previous_engine: Answers | None = None
    previous_trainer: np.ndarray | None = None

    @property
    def gap(self) -> float:
        """Mean difference between the engine's log-probabilities and the trainer's."""
        return float(np.abs(self.engine.logprobs - self.trainer).mean())

    @property
    def error(self) -> float:
        """Standard error of the gap: few tokens in 16 bit can be above a bound that holds for the mean of many."""
        differences = np.abs(self.engine.logprobs - self.trainer)
        return float(differences.std() / np.sqrt(len(differences)))

    @property
    def effect(self) -> float:
        """How much the adapter changes the trainer's log-probabilities."""
        return _rms(self.trainer, self.trainer_base)


def judge(evidence: Evidence, max_gap: float) -> list[str]:
    """Return what the numbers show to be wrong, a sentence each; empty if nothing is. `max_gap`: the bound of the gap.

    Where an adapter changes less than the resolution, as before its first step, nothing can be wrong but the gap."""
    if not len(evidence.engine.logprobs):
        return ["the engine answered a prompt with no token at all"]
    stale, base = _why_stale(evidence), _why_base(evidence)
    if stale and base:  # the nearer of the two
        kept = _nearer_to_previous(evidence)
        stale, base = (stale, None) if kept else (None, base)
    if stale:
        return [f"the engine answers with the adapter of an earlier push: {stale}"]
    if base:
        return [f"the engine answers with the base alone: {base}"]
    gap, tokens = evidence.gap, len(evidence.engine.logprobs)
    if not gap - evidence.error <= max_gap:  # NaN is no proof either
        return [
            f"the log-probabilities of the engine and of the trainer are {gap:.2g} apart (mean of {tokens} tokens; "
            f"bound {max_gap:.2g}), and not because of the adapter alone. Likely causes: the engine sees other pixels, "
            "another chat template or other prompt tokens, holds another base or another quantisation of it, or "
            "returns log-probabilities at another temperature"
        ]
    return []


def proves(evidence: Evidence) -> bool:
    """Return whether the numbers of a check without problems prove that the engine has the adapter: it is clear that
    the engine's numbers are nearer to the trainer's with the adapter than to those without."""
    numbers, limit = evidence.engine.logprobs, evidence.resolution.shown
    return _nearer(numbers, evidence.trainer, evidence.trainer_base, limit) == "first"


def _why_base(evidence: Evidence) -> str | None:
    """Return what shows that the engine answers without the adapter, or None."""
    engine, base, effect, resolution = evidence.engine, evidence.base, evidence.effect, evidence.resolution
    if len(engine.logprobs) < resolution.tokens:
        return None
    if base is not None and base.ids == engine.ids and effect > resolution.visible:
        moved = _rms(engine.logprobs, base.logprobs)
        if moved <= resolution.still * effect:
            return (
                f"the adapter changes the trainer's log-probabilities by {effect:.2g} a token, and the engine's by "
                f"{moved:.2g}, asked with the adapter and without it"
            )
    if _nearer(engine.logprobs, evidence.trainer, evidence.trainer_base, resolution.apart) == "second":
        return (
            f"its log-probabilities are {_rms(engine.logprobs, evidence.trainer_base):.2g} a token from the trainer's "
            f"without the adapter, and {_rms(engine.logprobs, evidence.trainer):.2g} from those with it"
        )
    return None


def _why_stale(evidence: Evidence) -> str | None:
    """Return what shows that the engine answers with the adapter as it was before, or None."""
    engine, before, resolution = evidence.engine, evidence.previous_engine, evidence.resolution
    if before is None or evidence.previous_trainer is None:
        return None
    seen = ~np.isnan(evidence.previous_trainer)
    if seen.sum() < resolution.tokens:
        return None
    numbers, now, previous = engine.logprobs[seen], evidence.trainer[seen], evidence.previous_trainer[seen]
    trainer_moved = _rms(now, previous)
    if before.ids == engine.ids and trainer_moved > resolution.visible:
        moved = _rms(engine.logprobs, before.logprobs)
        if moved <= resolution.still * trainer_moved:
            return (
                f"from push {evidence.previous_push} to push {evidence.push} the trainer's log-probabilities of the "
                f"same tokens changed by {trainer_moved:.2g} a token, and the engine's by {moved:.2g}"
            )
    if _nearer(numbers, now, previous, resolution.apart) == "second":
        return (
            f"its log-probabilities are {_rms(numbers, previous):.2g} a token from the trainer's of push "
            f"{evidence.previous_push}, and {_rms(numbers, now):.2g} from those of push {evidence.push}"
        )
    return None


def _nearer_to_previous(evidence: Evidence) -> bool:
    """Return whether the engine is nearer to the trainer at the check before than to the trainer without an adapter.

    An adapter that changed nothing then is no earlier adapter, but the base."""
    assert evidence.previous_trainer is not None
    seen = ~np.isnan(evidence.previous_trainer)
    numbers, previous = evidence.engine.logprobs[seen], evidence.previous_trainer[seen]
    without = evidence.trainer_base[seen]
    if _rms(previous, without) <= evidence.resolution.visible:
        return False
    return _rms(numbers, previous) < _rms(numbers, without)


def _nearer(numbers: np.ndarray, first: np.ndarray, second: np.ndarray, limit: float) -> str | None:
    """Return which of two models `numbers` are nearer to, `first` or `second`; None if they do not show it.

    The distance to the nearer one is taken for the engine's own rounding: the two must be twice as far apart, and more
    than `limit`."""
    distances = {"first": _rms(numbers, first), "second": _rms(numbers, second)}
    name = min(distances, key=lambda key: distances[key])
    return name if _rms(first, second) > max(limit, 2 * distances[name]) else None


def _rms(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(first - second))))


def shared_context(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many of the first positions of two answers have the same tokens before them: one more than the tokens
    that are equal, at most the shorter answer."""
    shorter = min(len(first), len(second))
    equal = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    return min(equal + 1, shorter)
