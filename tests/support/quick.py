"""What makes the tests quick without changing what they see: work that every run repeats is done once a process."""

import gc
import sys
from typing import Any

_GROWTH = 100  # modules that were imported since the last freeze and make another one worth its time
_frozen_at = 0


def freeze_imports() -> None:
    """Take what was imported so far out of the garbage collector's sight.

    `accelerate` collects at the end of every training, and a process with torch, transformers and TRL in it has more
    than a million objects that live as long as it does: a third of a second each time.
    """
    global _frozen_at
    if len(sys.modules) >= _frozen_at + _GROWTH:
        gc.collect()
        gc.freeze()
        _frozen_at = len(sys.modules)


def compile_templates_once() -> None:
    """Keep the code of each Jinja template for each environment.

    PEFT writes a model card with every adapter, and compiles its template each time: a tenth of a second.
    """
    from jinja2 import Environment

    compile_template = Environment.compile
    compiled: dict[tuple[Any, ...], tuple[Environment, Any]] = {}  # with the environment, or its id could be another's

    def compile_once(self: Environment, source: Any, *options: Any, **named: Any) -> Any:
        if not isinstance(source, str):
            return compile_template(self, source, *options, **named)
        key = (id(self), source, options, tuple(sorted(named.items())))
        if key not in compiled:
            compiled[key] = (self, compile_template(self, source, *options, **named))
        return compiled[key][1]

    Environment.compile = compile_once  # type: ignore[method-assign, assignment]
