"""The largest difference between the log-probabilities of an engine and those of the trainer that is no fault."""

from ray_vlm.config.train import Precision

_FP32, _ROUGH = 0.001, 0.1  # two programs in float32 differ by 1e-5 at most; in 16 bit and 4 bit by some hundredths


def largest_gap(max_rollout_gap: float | None, precision: Precision, device: str = "cpu") -> float:
    """Return the bound on the mean absolute difference a token: `method.max_rollout_gap`, or its default for the
    precision where that is None. GPUs multiply float32 in TF32 (`multiply_in_tf32`), which rounds as float16 does."""
    if max_rollout_gap is not None:
        return max_rollout_gap
    return _FP32 if precision == "fp32" and not device.startswith("cuda") else _ROUGH


def describe_gap(step: int, gap: float, bound: float, rollouts: str) -> str:
    """Return the message on a step whose `rollout_gap` is above the bound. `rollouts`: `method.rollouts`."""
    start = (
        f"step {step}: rollout_gap is {gap:.3g}, above {bound:g} (method.max_rollout_gap). It is the mean "
        "difference between the log-probabilities of the answers' tokens at sampling and in training. "
    )
    if rollouts == "transformers":
        return start + (
            "The package's own loop samples by the model that trains, so likely causes are the rounding of "
            "train.precision, lora.dropout, or a part of the model that computes otherwise in training. Use "
            "train.precision=fp32 to see whether it is the rounding; if it is, raise method.max_rollout_gap. Otherwise "
            "please report this."
        )
    return start + (
        f"The answers of rollouts={rollouts} are of another model than the one that trains. Likely causes are an "
        "adapter that did not arrive or is an older one, another base or quantisation, other pixels or another prompt "
        "template, and rounding in 16 or 4 bit. Check that the engine has this job's base, in this precision, or use "
        "method.rollouts=transformers. Raise method.max_rollout_gap only where rounding is the cause."
    )
