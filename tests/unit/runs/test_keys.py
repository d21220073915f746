"""Keys of settings: class names are keys too, quoted if they contain a dot."""

import pytest

from ray_vlm.runs.keys import describe_no_section, split_key, split_setting
from ray_vlm.runs.read import setting


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("train.learning_rate", ("train", "learning_rate")),
        ("data.oversample.toe-drain", ("data", "oversample", "toe-drain")),
        ("data.oversample.toe drain", ("data", "oversample", "toe drain")),
        ("data.oversample.driver's", ("data", "oversample", "driver's")),
        ('data.oversample."5.5 in"', ("data", "oversample", "5.5 in")),
        ("data.oversample.'a \"b\"'", ("data", "oversample", 'a "b"')),
        ("data.oversample.condition=blocked", None),
        ('data.oversample."condition=blocked"', ("data", "oversample", "condition=blocked")),
        ("data..x", None),
        ("to-e.x", None),
        ("", None),
    ],
)
def test_keys_and_names(key: str, parts: tuple[str, ...] | None) -> None:
    assert split_key(key) == parts
    if parts is not None:
        assert split_setting(f"{key}=a=b") == (parts, "a=b")
        assert setting({parts[0]: {parts[1]: {parts[-1]: 7, "learning_rate": 1}}}, key) is not None or len(parts) == 2


def test_the_way_out_where_a_single_value_stands() -> None:
    message = describe_no_section(("data", "oversample", "toe-drain"), 2, "auto")
    assert message.endswith("so it has no `toe-drain`. Give all of it: data.oversample={toe-drain: ...}")
