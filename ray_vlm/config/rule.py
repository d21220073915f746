"""What a rule across sections is; `config/check.py` has them all."""

from collections.abc import Callable

from ray_vlm.config.schema import JobConfig

# (holds for a broken job, the keys that it reads - the first is blamed -, reason and fix)
Rule = tuple[Callable[[JobConfig], bool], tuple[str, ...], str]
