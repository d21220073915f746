"""A base's files and its processor give the same texts and tokens; incomplete files are not used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import Model
from ray_vlm.config.task import DetectionTask
from ray_vlm.data import samples
from ray_vlm.data.images import smart_resize
from ray_vlm.data.measure import measure_row
from ray_vlm.data.parts import build_index
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.sources.formats import read_rows
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import DataError
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.load import resolve_name
from ray_vlm.models.processor import load_processor, read_prompt_text, take_prompt_text
from tests.conftest import QWEN

TURNS = (("system", "Be brief."), ("user", "Look: <image> and <image>?"), ("assistant", "Yes."), ("user", "Why, é?\n"))


@pytest.mark.parametrize("family", [*QWEN, "tiny"])
def test_files_agree_with_the_processor(family: str, tiny_models: dict[str, str], scenes: Path) -> None:
    name = resolve_name("tiny") if family == "tiny" else tiny_models[family]
    model = Model(name=name, load_in_4bit=False)
    result = read_prompt_text(model, name)
    assert result is not None
    text, read_family = result
    taken = take_prompt_text(load_processor(model), read_family)
    assert read_family is FAMILIES["qwen3_vl" if family == "tiny" else family]
    assert (text.sizes, text.image_token, text.special) == (taken.sizes, taken.image_token, taken.special)
    assert text.tokenizer.to_str() == taken.tokenizer.to_str()
    spec = SampleSpec(model, DetectionTask(), ("circle", "square", "star"))
    before = SampleBuilder(spec)
    assert before._processor is None
    counted = [measure_row(row, 50_000_000) for row in read_rows(Source(path=str(scenes / "eval.json")))[0]]
    by_files = [before.token_counts(row) for row in counted], before._layout(TURNS)
    before._load()
    by_processor = [before.token_counts(row) for row in counted], before._layout(TURNS)
    assert before._processor is not None
    assert by_files == by_processor
    assert [len(before.train_row(row).input_ids) for row in counted] == [sum(counts) for counts in by_files[0]]


def test_a_qwen_tokenizer_agrees_with_its_file(tmp_path: Path) -> None:
    """transformers builds it from the vocabulary of the file, by its own rules."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {token: number for number, token in enumerate([*sorted(ByteLevel.alphabet()), "he", "Ġt"])}
    words = Qwen2Tokenizer(vocab=vocabulary, merges=[("h", "e"), ("Ġ", "t")], eos_token="<|im_end|>")
    words.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})
    words.save_pretrained(tmp_path)
    base = Path(resolve_name("tiny"))
    for name in ("config.json", "processor_config.json", "chat_template.jinja"):
        shutil.copy(base / name, tmp_path)
    result = read_prompt_text(Model(name=str(tmp_path)), str(tmp_path))
    assert result is not None
    read, loaded = result[0].tokenizer, Qwen2Tokenizer.from_pretrained(tmp_path).backend_tokenizer
    for text in ("the cat's 12 boxes", "cafe\u0301  \n\n x", "<|image_pad|>\thé <|im_end|>\n", "物体 [1, 2]"):
        assert read.encode(text).ids == loaded.encode(text).ids


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _set(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return change


@pytest.mark.parametrize(
    "change",
    [
        _drop("config.json"),
        _drop("tokenizer.json"),
        _drop("chat_template.jinja"),
        _drop("processor_config.json"),
        lambda folder: (folder / "additional_chat_templates").mkdir(),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (folder / "chat_template.jinja").write_text("{% generation %}x{% endgeneration %}"),
        _set("config.json", model_type="llama4"),
        _set("config.json", model_type="gemma3"),
        _set("tokenizer_config.json", tokenizer_class="GemmaTokenizer"),
        _set("tokenizer_config.json", eos_token="<|nowhere|>"),
        _set("tokenizer_config.json", added_tokens_decoder={"9": {"content": "<|nowhere|>"}}),
        _set("processor_config.json", image_processor={"image_processor_type": "SiglipImageProcessor"}),
        _set("processor_config.json", chat_template="x"),
    ],
)
def test_incomplete_files_are_not_used(change: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(resolve_name("tiny"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = Model(name=str(folder))
    assert read_prompt_text(model, str(folder)) is not None
    change(folder)
    assert read_prompt_text(model, str(folder)) is None


def test_a_base_that_is_not_in_the_cache_is_not_read() -> None:
    assert read_prompt_text(Model(name="nobody/no-such-base"), "nobody/no-such-base") is None


def test_sizes_are_those_of_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as reference_resize

    random = np.random.default_rng(0)
    for _ in range(5000):
        width, height = (int(side) for side in random.integers(1, random.choice([40, 5000]), 2))
        factor, low = int(random.choice([16, 28, 32])), int(random.integers(1, 10**6))
        high = low + int(random.integers(0, 10**7))
        if max(width, height) <= 200 * min(width, height):
            tall, wide = reference_resize(height, width, factor, low, high)
            assert smart_resize((width, height), factor, low, high) == (wide, tall)
    with pytest.raises(ValueError, match="one side is over 200 times"):
        smart_resize((28, 5700), 28, 1, 10**6)


@pytest.mark.parametrize("by_processor", [False, True])
def test_a_template_that_refuses_a_turn_makes_bad_rows(tmp_path: Path, scenes: Path, by_processor: bool) -> None:
    base = tmp_path / "base"
    shutil.copytree(resolve_name("tiny"), base)
    template = (base / "chat_template.jinja").read_text()
    refuse = "{%- if messages[0].role == 'system' %}{{ raise_exception('no system') }}{%- endif %}"
    (base / "chat_template.jinja").write_text(refuse + template)
    labels = ("circle", "square", "triangle", "cross", "ring", "diamond", "star")
    model, source = Model(name=str(base), load_in_4bit=False), Source(path=str(scenes / "eval.json"))
    assert len(build_index(source, Data(), SampleBuilder(SampleSpec(model, DetectionTask(), labels)))) == 12
    spec = SampleSpec(model, DetectionTask(system="Be brief."), labels)
    if by_processor:
        samples.load_sample_builder(spec)._load()
    with pytest.raises(DataError, match=r"row 0 .*chat template refuses its turns \(TemplateError: no system\)"):
        build_index(source, Data(), samples.load_sample_builder(spec))
