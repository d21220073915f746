"""Derived values of a space, such as `2 * lora.rank`: arithmetic on settings. No text is ever evaluated as Python.

Allowed: numbers, `+ - * / // % **`, brackets, settings by their dotted keys, and `min`, `max`, `round`, `int`, `sqrt`.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CALLS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "round": round, "int": int, "sqrt": math.sqrt}
_LARGEST = 1e12  # result of a power: 9**9**9 would take for ever
_MOST_DIGITS = 15  # second argument of `round`: round(5, -999999999) would take for ever
_LONGEST = 200  # characters of a formula


def read_formula(text: str) -> tuple[str, ...]:
    """Return the settings that a formula names, in order. Raise `ValueError` with what cannot be read."""
    names: list[str] = []
    _walk(_parse(text), lambda name: names.append(name) or 1.0)  # type: ignore[func-returns-value]
    return tuple(dict.fromkeys(names))


def compute(text: str, values: Mapping[str, Any]) -> int | float:
    """Compute a formula; `values` has the settings that it names. Raise `ValueError` with the reason."""

    def look_up(name: str) -> float:
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {value!r}, and a formula needs a number")
        return value

    value = _walk(_parse(text), look_up)
    if not is_finite(value):
        raise ValueError(f"{text!r} is {'too large' if isinstance(value, int) else value}")
    return value


def is_finite(value: int | float) -> bool:
    """Return whether a number is finite; an integer that no float can hold is not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _parse(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise ValueError(f"a formula of {len(text)} characters; the longest has {_LONGEST}")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is no formula; write arithmetic on settings, such as 2 * lora.rank") from None


def _walk(node: ast.expr, look_up: Callable[[str], float]) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name | ast.Attribute):
        return look_up(_dotted(node))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _walk(node.operand, look_up)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _walk(node.left, look_up), _walk(node.right, look_up)
        return _apply(node, left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS and not node.keywords:
        arguments = [_walk(argument, look_up) for argument in node.args]
        try:
            if node.func.id == "round" and any(abs(digits) > _MOST_DIGITS for digits in arguments[1:]):
                raise OverflowError(f"digits are -{_MOST_DIGITS} to {_MOST_DIGITS}")
            return _CALLS[node.func.id](*arguments)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{ast.unparse(node)}: {error}") from None
    raise ValueError(f"{ast.unparse(node)!r} is not arithmetic; use + - * / // % **, {', '.join(_CALLS)}")


def _apply(node: ast.BinOp, left: Any, right: Any) -> Any:
    try:
        if isinstance(node.op, ast.Pow) and abs(left) > 1 and right * math.log10(abs(left)) > math.log10(_LARGEST):
            raise OverflowError("too large")
        result = _BINARY[type(node.op)](left, right)
    except (ZeroDivisionError, OverflowError, TypeError) as error:
        raise ValueError(f"{ast.unparse(node)}: {error}") from None
    if isinstance(result, complex):
        raise ValueError(f"{ast.unparse(node)}: the root of a negative number")
    return result


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError(f"{ast.unparse(node)!r} is not a setting")
