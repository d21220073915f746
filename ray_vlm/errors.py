"""The four errors that this package raises on purpose, and the end of a run that was asked to stop.

Each problem names the value, the reason and the fix.
"""

from collections.abc import Sequence


class RayVlmError(Exception):
    """Base of the four. `problems` holds one sentence for each thing that is wrong; all are shown at once."""

    exit_code = 1

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple:  # keeps the list through pickling between Ray processes
        return type(self), (self.problems,)


class ConfigError(RayVlmError):
    """The job file, an override, or a combination of settings cannot work. Exit code 2; nothing was started."""

    exit_code = 2


class DataError(RayVlmError):
    """Rows, images or boxes are unusable. Names row, id and reason."""


class ModelError(RayVlmError):
    """A model folder, an adapter or its processor cannot be used as asked."""


class RunError(RayVlmError):
    """A run could not start or go on: folder in use, cluster too small, a worker that failed for good."""


class Interrupted(RayVlmError):
    """A signal stopped the run after a checkpoint. The exit code is the shell's for that signal: 130 or 143."""

    def __init__(self, problems: str | Sequence[str], signal: int = 2):
        super().__init__(problems)
        self.signal = int(signal)
        self.exit_code = 128 + self.signal

    def __reduce__(self) -> tuple:
        return type(self), (self.problems, self.signal)
