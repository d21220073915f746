"""Recognise errors of a GPU that is out of memory, and advise what to change."""

from ray_vlm.config.train import Train

# Texts of CUDA's, ROCm's, cuBLAS' and NCCL's errors, for which torch does not raise its own class.
_MARKS = (
    "CUDA out of memory",
    "HIP out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",
)
NO_ROOM = "ran out of GPU memory"  # is in every message about it
_SENTENCES = 3  # of torch's text: bytes requested, capacity of the GPU, free bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU was out of memory.

    torch's class is recognised by its name, without importing torch; Ray's class of the same name, which is no
    `RuntimeError`, is about the memory of a node."""
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or any(mark in str(error) for mark in _MARKS)


def describe_out_of_memory(error: BaseException) -> str:
    """Return the sentences of the error's text that say how much was requested and how much is free."""
    return ". ".join(" ".join(str(error).split()).split(". ")[:_SENTENCES]).rstrip(".")


def advise_training(train: Train, eval_batch_size: int) -> str:
    """Say which settings to change after a step or a validation ran out of memory."""
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
    """Say which settings to change after an evaluation or a prediction ran out of memory."""
    smaller = f"Lower evaluate.batch_size (now {batch_size}) or" if batch_size > 1 else "Lower"
    return f"{smaller} data.max_pixels, or set model.load_in_4bit."
