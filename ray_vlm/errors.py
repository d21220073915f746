"""The exceptions of this package: four kinds of error, and the interruption of a run by a signal.

Each problem names the value, the reason and the fix.
"""

from collections.abc import Sequence


class RayVlmError(Exception):
    """Base of all. `problems` has one message for each thing that is wrong; all are shown at once."""

    exit_code = 1

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple:  # keeps the list through pickling between Ray processes
        return type(self), (self.problems,)


class ConfigError(RayVlmError):
    """The job file, an override or a combination of settings is invalid. Exit code 2; nothing was started."""

    exit_code = 2


class DataError(RayVlmError):
    """Rows, images or boxes are unusable. The message names the row, its id and the reason."""


class ModelError(RayVlmError):
    """A model, an adapter or a processor cannot be used as requested."""


class RunError(RayVlmError):
    """A run could not start or continue: its folder is in use, the cluster is too small, a worker failed for good."""


class Interrupted(RayVlmError):
    """A signal stopped the run after a checkpoint. The exit code is 128 plus the signal: 130 or 143."""

    def __init__(self, problems: str | Sequence[str], signal: int = 2):
        super().__init__(problems)
        self.signal = int(signal)
        self.exit_code = 128 + self.signal

    def __reduce__(self) -> tuple:
        return type(self), (self.problems, self.signal)
