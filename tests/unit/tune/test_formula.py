"""Formulas are arithmetic on settings: they compute, they name what they need, and nothing else gets through."""

import pytest

from ray_vlm.tune.formula import compute, read_formula


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 * lora.rank", 32),
        ("lora.rank / 4 + 1", 5.0),
        ("-lora.rank // 3", -6),
        ("min(lora.rank, 8) ** 2", 64),
        ("round(train.learning_rate * 1e4)", 2),
        ("int(sqrt(lora.rank))", 4),
        ("3", 3),
    ],
)
def test_arithmetic(text: str, value: float) -> None:
    assert compute(text, {"lora.rank": 16, "train.learning_rate": 2e-4}) == value


def test_the_settings_that_are_named() -> None:
    assert read_formula("lora.rank * (lora.rank + data.oversample.drain) / seed") == (
        "lora.rank",
        "data.oversample.drain",
        "seed",
    )


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "lora.rank.__class__()",
        "'a' * 3",
        "[1, 2]",
        "x if y else z",
        "lambda: 1",
        "True + 1",
        "open(1)",
        "max(1, key=2)",
        "(1).real",
        "2 *",
        "",
        "1" * 300,
        "9 ** 9 ** 9",
        "1 / 0",
        "1e308 * 10 - 1e308 * 10",
        "(-8) ** 0.5",
        "min()",
        "int(1e400)",
        "*".join(["9**12"] * 30),  # a whole number that no float holds
        "round(5, -999999999)",  # would take for ever
        "round(5, 1e999)",
    ],
)
def test_what_is_not_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        compute(text, dict.fromkeys(read_formula(text), 1))


def test_what_is_not_a_number_is_named() -> None:
    with pytest.raises(ValueError, match=r"lora\.rank is None"):
        compute("2 * lora.rank", {})
    with pytest.raises(ValueError, match=r"train\.bf16 is True"):
        compute("train.bf16 + 1", {"train.bf16": True})
