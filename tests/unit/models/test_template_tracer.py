"""Conversations that are laid out from an outline are what the chat template renders, whatever their texts hold."""

import random

import pytest

from ray_vlm.data.samples import _Layouts, _mark_answers, _messages, _split_layout
from ray_vlm.demo.tiny import CHAT_TEMPLATE
from ray_vlm.errors import ModelError
from ray_vlm.models.processor import PromptText, TemplateTracer, _build_render, _template_environment
from ray_vlm.tasks.answers import Turns
from tests.support.tiny_families import TEMPLATE

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_BODY = "{%- for part in m.content %}{% if part.type == 'image' %}<i>{% else %}TEXT{% endif %}{% endfor %}<end>\n"
_LOOP = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>" + _BODY + "{% endfor %}"
PLAIN = _LOOP + "{% if add_generation_prompt %}<assistant>{% endif %}"
TOOLS = "{% if tools %}{{ messages | tojson }}{{ strftime_now('%Y') }}{% endif %}" + PLAIN
LISTED = "{% if m.role not in ['user', 'assistant', 'system'] %}{{ raise_exception('role') }}{% endif %}" + _BODY
# What a template does with a text, and whether it can be followed.
USES = {
    "{{ part.text }}": True,
    "{{ part['text'] | trim }}": True,
    "{{ part.text.strip() }}": True,
    "{{ '<t>' + part.text + '</t>' }}": True,
    "{{ 'a' ~ part.text ~ loop.index0 }}": True,
    "{% if m.role == 'user' %}{{ part.text }}{% endif %}{{ part.text }}": True,
    "{% set ns = namespace(t='') %}{% set ns.t = ns.t + part.text %}{{ ns.t }}": True,
    "{% if '</think>' in part.text %}{{ part.text.split('</think>')[-1] }}{% else %}{{ part.text }}{% endif %}": True,
    "{% if part.text.startswith('<tool') %}!{% endif %}{{ part.text }}": True,
    "{% if part.text.endswith(('a', 'b')) %}!{% endif %}{{ part.text }}": True,
    "{% if part.text == 'yes' %}!{% endif %}{{ part.text }}": True,
    "{% if 'no' != part.text %}!{% endif %}{{ part.text }}": True,
    "{% if part.text in ['yes', 'no'] %}!{% endif %}{{ part.text }}": True,
    "{% if part.text %}{{ part.text }}{% endif %}": True,
    "{% if loop.index0 % 2 == 0 %}-{% endif %}{{ part.text }}": True,
    "{% if part.text in 'yes or no' %}!{% endif %}{{ part.text }}": False,
    "{% if 'yes or no'.startswith(part.text) %}!{% endif %}{{ part.text }}": False,
    "{% if part.text | trim %}{{ part.text }}{% endif %}": False,
    "{% if '' in part.text %}{{ part.text }}{% endif %}": False,
    "{% if (part.text + '!') == 'yes!' %}!{% endif %}{{ part.text }}": False,
    "{% if part.text < 'm' %}!{% endif %}{{ part.text }}": False,
    "{% if part.text | length > 9 %}!{% endif %}{{ part.text }}": False,
    "{% if part.text | int %}!{% endif %}{{ part.text }}": False,
    "{% if {'yes': 1}[part.text] is defined %}!{% endif %}{{ part.text }}": False,
    "{% if [1, 2][part.text] is defined %}!{% endif %}{{ part.text }}": False,
    "{% if part.text is iterable %}!{% endif %}{{ part.text }}": False,
    "{% if part.text is sequence %}!{% endif %}{{ part.text }}": False,
    "{{ part.text | upper }}": False,
    "{{ part.text.lower() }}": False,
    "{{ part.text.lstrip('\n') }}": False,
    "{{ part.text | trim('x') }}": False,
    "{{ part.text[:5] }}": False,
    "{{ part.text.foo }}{{ part.text }}": False,
    "{{ part.text * 2 }}": False,
    "{{ '%s' % part.text }}": False,
    "{{ '{}'.format(part.text) }}": False,
    "{{ '%.3s' | format(part.text) }}": False,
    "{{ ' '.join([part.text]) }}": False,
    "{{ [part.text] | join }}": False,
    "{{ [part.text] }}": False,
    "{{ part | tojson }}": False,
    "{{ part.text | wordcount }}": False,
    "{{ part.text | replace('a', 'b') }}": False,
    "{{ 'abc' | replace('a', part.text) }}": False,
    "{% for letter in part.text %}{{ letter }}.{% endfor %}": False,
    "{% set x %}{{ part.text }}{% endset %}{{ x | upper }}": False,
    "{% set x = 'a' ~ part.text %}{{ x | upper }}": False,
    "{% macro f(t) %}{{ t }}{% endmacro %}{% if f(part.text) == 'yes' %}!{% endif %}{{ part.text }}": False,
    "{% filter upper %}{{ part.text }}{% endfilter %}": False,
    "{{ strftime_now('%Y') }}{{ part.text }}": False,
    "{{ dict(a=part.text).a }}": False,
    "{{ range(2) | list }}{{ part.text }}": False,
}
WORDS = [
    "yes",
    "no",
    "a",
    "b",
    " ",
    "\n",
    "</think>",
    "<tool_response>",
    "<end>",
    "\x01",
    "\x010\x02",
    "\x02",
    "é",
    "%s",
    "{}",
]
WORDS += ["<assistant>", "x" * 200, "{{ x }}", "'", '"', "\\", "0", "<i", "物体", "</s>", "<|im_end|>\n"]


def _layouts(template: str) -> _Layouts:
    render = _build_render(_template_environment(), template, TOKENS)
    try:
        tracer = TemplateTracer(template, TOKENS)
    except ValueError:
        tracer = None
    return _Layouts(PromptText(None, render, tracer, (), "<i>", None))  # type: ignore[arg-type]


def _text(draw: random.Random) -> str:
    return "".join(draw.choice(WORDS) for _ in range(draw.randint(1, 4)))


def _turns(draw: random.Random) -> Turns:
    """A conversation of one of a few shapes, with a text of any kind in each place."""
    shapes = [
        "u{}",
        "u<image>{}",
        "s{}|u<image>\n{}<image>{}",
        "u{}|a{}|u<image>{}",
        "u<image>|a|u{}",
        "u<image><image>{}",
    ]
    roles = {"u": "user", "a": "assistant", "s": "system"}
    turns = draw.choice(shapes).split("|")
    return tuple(
        (roles[turn[0]], "".join(p + _text(draw) for p in turn[1:].split("{}")[:-1]) or turn[1:]) for turn in turns
    )


def _reference(layouts: _Layouts, turns: Turns) -> object:
    try:
        heads, close = _split_layout(_messages(_mark_answers(turns)), layouts._render)
    except (ValueError, ModelError) as error:
        return str(error)
    return list(heads), close


def _result(layouts: _Layouts, turns: Turns) -> object:
    try:
        heads, close = layouts.split(turns)
    except (ValueError, ModelError) as error:
        return str(error)
    return list(heads), close


@pytest.mark.parametrize(
    ("template", "followed"),
    [
        (CHAT_TEMPLATE, True),
        (TEMPLATE.replace("IMAGE", "<|image|>"), True),
        (PLAIN.replace("TEXT", "{{ part.text }}"), True),
        (TOOLS.replace("TEXT", "{{ part.text }}"), True),
        (PLAIN.replace(_BODY, LISTED).replace("TEXT", "{{ part.text }}"), True),
        (PLAIN.replace("TEXT", "{{ part.text }}").replace("<end>", "{{ messages[0].content[0].text }}<end>"), True),
        (PLAIN.replace("TEXT", "{{ part.text }}") + "\x01", False),
        *[(PLAIN.replace("TEXT", use), followed) for use, followed in USES.items()],
    ],
)
def test_outlines_are_renderings(template: str, followed: bool) -> None:
    draw = random.Random(0)
    layouts = _layouts(template)
    for _ in range(150):
        turns = _turns(draw)
        assert _result(layouts, turns) == _reference(layouts, turns)
    assert any(layouts._outlines.values()) == followed
