"""Out of memory on a card: how it is known among other errors, and what is said of it."""

from ray_vlm.config.train import Train

# What CUDA, ROCm, cuBLAS and NCCL say where torch does not raise its own error.
_MARKS = (
    "CUDA out of memory",
    "HIP out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",
)
NO_ROOM = "ran out of GPU memory"  # is in every message about it
_SENTENCES = 3  # of torch's own text: what was asked for, what the card has, what is free


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a card had no room. Torch's error is known by its name, so torch is not imported; Ray's of that name is
    about the computer's memory, which is not meant."""
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or any(mark in str(error) for mark in _MARKS)


def describe_out_of_memory(error: BaseException) -> str:
    """The part of the error's text that says how much was asked for and how much there was."""
    return ". ".join(" ".join(str(error).split()).split(". ")[:_SENTENCES]).rstrip(".")


def advise_training(train: Train, eval_batch_size: int) -> str:
    """What to change where a step or a validation found no room."""
    smaller = []
    if train.tokens_per_micro_batch is not None:
        smaller.append(f"lower train.tokens_per_micro_batch (now {train.tokens_per_micro_batch})")
    elif train.micro_batch_size > 1:
        smaller.append(f"lower train.micro_batch_size (now {train.micro_batch_size})")
    if train.gradient_checkpointing is not True:
        smaller.append("set train.gradient_checkpointing=true")
    smaller.append(f"lower evaluate.batch_size (now {eval_batch_size}) if it was in a validation")
    smaller.append("let train.memory=auto choose")
    return (
        f"The same would happen again, so it is not tried again. To go on with --resume: {'; or '.join(smaller)}. In a "
        "new run also lower data.max_pixels, or set model.load_in_4bit."
    )


def advise_inference(batch_size: int) -> str:
    """What to change where an evaluation or a prediction found no room."""
    smaller = f"Lower evaluate.batch_size (now {batch_size}) or" if batch_size > 1 else "Lower"
    return f"{smaller} data.max_pixels, or set model.load_in_4bit."
