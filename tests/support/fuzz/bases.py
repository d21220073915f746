"""Mutations of a base's files for `fuzz`: its chat template, its tokenizer and its processor. `inputs` defines an
attempt.

Rows under an accepted base must have the tokens that were counted before training, image by image.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ray_vlm.config.schema import Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.collate import collate
from ray_vlm.data.measure import measure_row
from ray_vlm.data.records import PreferenceRecord, SftRecord
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import DataError
from tests.support.fuzz.inputs import Attempt, write_base
from tests.support.fuzz.mutations import TEXTS, break_bytes, break_text, break_tree, pick

_TEMPLATE = "chat_template.jinja"
_TOKENS = ("tokenizer_config.json", "tokenizer.json")
# Pieces that templates in use have: refusals, calls, other roles, what the messages do not hold.
_JINJA = [
    "{{ raise_exception('no system turn') }}",
    "{% if loop.first and message.role == 'system' %}{{ none.x }}{% endif %}",
    *("{{ message['tool_calls'][0]['function'] }}", "{{ strftime_now('%d %b %Y') }}", "{% generation %}"),
    *("{{ messages | tojson(indent=2) }}", "{{ bos_token }}", "{{ eos_token }}", "{% endfor %}", "{{", "{#", "%}"),
    *("{{ message.content.strip() }}", "{{ message.content + 1 }}", "{{ 1 // 0 }}", "{{ [] | first }}", "{{ x.y.z }}"),
    *("<|image_pad|>", "{{ namespace(a=1) }}", "{% set x = 3 %}", "{{ range(10**9) }}", "{%- break -%}", "}}"),
    *("{% macro m() %}x{% endmacro %}{{ m() }}", "{{ messages.__class__.__mro__ }}", "{{ 'a' * 100000 }}"),
    *("{{ message | length }}", "{% include 'x' %}", "<think>\n\n</think>\n\n", "{{ add_generation_prompt }}"),
    *("{% if enable_thinking %}<think>{% endif %}", "{{ [1][5] }}", "{{ 'x' | no_such_filter }}"),
]
_CLASSES = ["Qwen2VLProcessor", "Qwen2_5_VLProcessor", "LlavaProcessor", "SmolVLMProcessor", "NoProcessor", "AutoModel"]
_CLASSES += ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "CLIPImageProcessor", "Qwen2TokenizerFast", "", "x"]
_CLASSES += ["LlamaTokenizer", "qwen2_vl", "llama4", "llava", "bert"]


def of_templates(folder: Path) -> Attempt:
    """Return an attempt on chat templates that are cut, changed or mixed with another's, in each file that may hold
    one."""
    whole, records = _write_whole(folder)
    template = (whole / _TEMPLATE).read_text()

    def attempt(rng: np.random.Generator) -> int:
        broken = _copy(whole, folder)
        text = template
        for _ in range(int(rng.integers(1, 3))):
            text = _break_template(text, rng)
        draw = rng.random()
        if draw < 0.7:
            (broken / _TEMPLATE).write_bytes(text.encode("utf-8", "surrogatepass"))
        else:
            (broken / _TEMPLATE).unlink()
            name, value = ("chat_template.json", {}) if draw < 0.85 else (_TOKENS[0], _read_json(broken / _TOKENS[0]))
            (broken / name).write_text(json.dumps(value | {"chat_template": text}))
        system = "Be brief." if rng.random() < 0.5 else None
        return _read_rows(broken, records, system)

    return attempt


def _break_template(text: str, rng: np.random.Generator) -> str:
    kind, at = rng.random(), int(rng.integers(len(text) + 1))
    if kind < 0.6:  # mostly between two blocks, where it leaves the rest whole
        at = pick(rng, [0, *(block.end() for block in re.finditer(r"[%}]}", text))]) if rng.random() < 0.8 else at
        return text[:at] + pick(rng, _JINJA) + text[at:]
    if kind < 0.7:
        return break_text(text, rng)
    if kind < 0.85:
        return break_bytes(text.encode(errors="replace"), rng).decode(errors="replace")
    words = text.split("'")
    words[int(rng.integers(len(words)))] = pick(rng, ["role", "content", "image", "text", "video", *TEXTS])
    return "'".join(words)


def of_processors(folder: Path) -> Attempt:
    """Return an attempt on a base's tokenizer, processor and configuration files with values changed, exchanged,
    damaged or missing."""
    whole, records = _write_whole(folder)

    def attempt(rng: np.random.Generator) -> int:
        broken = _copy(whole, folder)
        name = pick(rng, ["processor_config.json", "processor_config.json", *_TOKENS, "config.json"])
        if rng.random() < 0.2 and name == "processor_config.json":  # as older versions saved it
            images = _read_json(broken / name)["image_processor"]
            (broken / name).unlink()
            name = "preprocessor_config.json"
            (broken / name).write_text(json.dumps(images | {"min_pixels": 4096, "max_pixels": 36864}))
        _break_file(broken / name, rng)
        return _read_rows(broken, records, None)

    return attempt


def _break_file(path: Path, rng: np.random.Generator) -> None:
    kind = rng.random()
    if kind < 0.05:
        path.unlink()
    elif kind < 0.25:
        path.write_bytes(break_bytes(path.read_bytes(), rng))
    elif kind < 0.4:
        value = _read_json(path)
        inner = pick(rng, [value, *(v for v in value.values() if isinstance(v, dict))])
        names = [key for key in inner if "class" in key or "type" in key] or list(inner)
        inner[pick(rng, names)] = pick(rng, _CLASSES)
        path.write_text(json.dumps(value))
    else:
        path.write_text(json.dumps(break_tree(_read_json(path), rng, above=1)))


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _write_whole(folder: Path) -> tuple[Path, list[Any]]:
    """A whole base, and rows of several turns, two images and a pair."""
    base, image = Path(write_base(folder)), str(folder / "a.jpg")
    turns = (("user", "<image>What?"), ("assistant", "A dog."), ("user", "<image>And here?"))
    records = [
        SftRecord("a", 0, (image,), (), {"answer": "A dog."}, {"turns": (("user", "<image>What?"),)}),
        SftRecord("b", 1, (image, image), (), {"answer": "A cat."}, {"turns": turns}),
        SftRecord("c", 2, (), (), {"answer": "Yes."}, {"turns": (("system", "Be kind."), ("user", "Is it?"))}),
        PreferenceRecord("d", 3, (image,), (), (("user", "<image>What?"),), "A dog.", "A cat."),
    ]
    return base, [measure_row(record, 50_000_000) for record in records]


def _copy(whole: Path, folder: Path) -> Path:
    broken = folder / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(whole, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    return broken


def _read_rows(base: Path, records: list[Any], system: str | None) -> int:
    """Rows that training would see with other tokens than were counted. Raises `DataError` where none is accepted."""
    model, task = Model(name=str(base), load_in_4bit=False), ChatTask(system=system)
    lost, reasons = 0, []
    for record in records:
        builder = SampleBuilder(
            SampleSpec(model, task, (), kind="pair" if isinstance(record, PreferenceRecord) else "answer")
        )
        (encoded,) = builder.encode([record])
        if isinstance(encoded, str):
            reasons.append(encoded)
            continue
        counts = encoded.counts
        row = builder.row(record)
        made = len(row.input_ids) + sum(map(len, row.completions))
        images = int((row.input_ids == builder.image_token_id).sum())
        lost += made != sum(counts) or images != counts[0] or len(row.images) != len(record.images)
        if not row.completions:
            collate([row], builder)  # the processor's own look at the images
    if len(reasons) == len(records):
        raise DataError(reasons)
    return lost
