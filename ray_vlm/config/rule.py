"""The type of a rule across sections; `config/check.py` has the list of rules."""

from collections.abc import Callable

from ray_vlm.config.schema import JobConfig

# (whether a job breaks the rule, the keys that it reads, of which the first is reported, reason and fix)
Rule = tuple[Callable[[JobConfig], bool], tuple[str, ...], str]
