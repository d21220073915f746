"""Processors: problems of a base's files are reported when it is loaded, not at the first image of a run."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.schema import Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.measure import measure_row
from ray_vlm.data.records import SftRecord
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import ModelError
from ray_vlm.models.load import resolve_name
from ray_vlm.models.processor import load_processor

Change = Callable[[Path], None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the tiny base's files, without its weights."""
    shutil.copytree(resolve_name("tiny"), tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "base"


def _set_image(**values: Any) -> Change:
    def change(base: Path) -> None:
        settings = json.loads((base / "processor_config.json").read_text())
        settings["image_processor"] |= values
        (base / "processor_config.json").write_text(json.dumps(settings))

    return change


def _set_token(**values: Any) -> Change:
    def change(base: Path) -> None:
        path = base / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def test_a_processor_that_needs_a_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoProcessor

    def refuse(*args: object, **options: object) -> None:
        raise ImportError("Package `num2words` is required to run SmolVLM processor.")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=r"`num2words` is required.*Install it with pip"):
        load_processor(Model(name="tiny"))


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", b'{"model_type": 3}'])
def test_a_damaged_configuration_is_named(base: Path, content: bytes) -> None:
    """And not the tokenizer's files, which transformers reads with it."""
    (base / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"its config\.json cannot be loaded .*Fetch config\.json of the base again"):
        SampleBuilder(SampleSpec(Model(name=str(base)), ChatTask(), ()))


def test_a_missing_base_is_not_a_missing_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bases").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="there is no folder 'nope' in the folder 'bases'"):
        SampleBuilder(SampleSpec(Model(name="bases/nope"), ChatTask(), ()))


@pytest.mark.parametrize(
    ("cause", "advice"),
    [
        ("GatedRepoError", "accept its licence on its hub page, and set HF_TOKEN"),
        ("LocalEntryNotFoundError", "set HF_HOME to a cache that has it"),
        (None, "Fetch them again, or give a folder"),
    ],
)
def test_a_processor_that_the_hub_refuses_comes_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, cause: str | None, advice: str
) -> None:
    import huggingface_hub.errors

    def refuse(*args: object, **options: object) -> None:
        kind = getattr(huggingface_hub.errors, cause) if cause else None
        raise OSError("cannot load it") from (kind.__new__(kind) if kind else None)

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda name, **options: None)
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", refuse)
    with pytest.raises(ModelError, match=rf"its processor cannot be loaded \(cannot load it\)\. .*{advice}"):
        load_processor(Model(name="some/base"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda base: (base / "tokenizer.json").write_text('{"model": 3}'), "processor cannot be loaded"),
        (lambda base: (base / "tokenizer.json").write_text("{"), "processor cannot be loaded"),
        (_set_image(image_std=[0.5, 0.5, 0.5, 0.5]), r"cannot be used \(RuntimeError: .* tensor a \(3\)"),
        (_set_image(image_std=[0, 0, 0]), "numbers that are not finite"),
        (_set_image(patch_size=0), "cannot be used"),
        (_set_image(image_mean=["a", "b", "c"]), "cannot be used"),
        (_set_token(eos_token=None), "has no eos_token"),
    ],
)
def test_files_that_would_end_a_run_are_refused_at_its_start(base: Path, change: Change, reason: str) -> None:
    change(base)
    with pytest.raises(ModelError, match=reason):
        load_processor(Model(name=str(base)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set_image(image_mean=[3, 0.5, 0.5]), r"image_mean=.3, 0.5, 0.5."),
        (
            _set_image(image_processor_type="CLIPImageProcessor"),
            "CLIPImageProcessor.* is not an image processor",
        ),
    ],
)
def test_an_image_processor_of_another_kind_is_refused(base: Path, change: Change, reason: str) -> None:
    change(base)
    with pytest.raises(ModelError, match=reason):
        _ = SampleBuilder(SampleSpec(Model(name=str(base)), ChatTask(), ())).processor


def test_a_tokenizer_without_padding_pads_with_its_end(base: Path) -> None:
    _set_token(pad_token=None)(base)
    tokenizer = load_processor(Model(name=str(base))).tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        ("{% for x in %}", r"chat template is damaged \(line 1: .*\). Fetch it again"),
        ("{{ 1 | no_such_filter }}", r"chat template is damaged \(line 1: No filter named 'no_such_filter'"),
        ("{% if add_generation_prompt %}x{% endif %}", "an answer that does not continue its own prompt"),
    ],
)
def test_a_damaged_template_is_a_fault_of_the_base(base: Path, scenes: Path, piece: str, reason: str) -> None:
    template = base / "chat_template.jinja"
    template.write_text(piece + template.read_text())
    with pytest.raises(ModelError, match=reason):
        _count(base, scenes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: "<|image_pad|>" + text, r"writes 2 images \(<\|image_pad\|>\) for 1; use the template"),
        (lambda text: text.replace("<|image_pad|>", ""), "writes 0 images"),
        (lambda text: "{{ 1 // 0 }}" + text, "refuses its turns .ZeroDivisionError"),
    ],
)
def test_a_template_that_miscounts_images_makes_bad_rows(
    base: Path, scenes: Path, change: Callable[[str], str], reason: str
) -> None:
    template = base / "chat_template.jinja"
    template.write_text(change(template.read_text()))
    result = _count(base, scenes)
    assert isinstance(result, str)
    assert re.search(reason, result)


def _count(base: Path, scenes: Path) -> object:
    """Count the tokens of a row with one image, or return why it is bad."""
    builder = SampleBuilder(SampleSpec(Model(name=str(base)), ChatTask(), ()))
    image = str(next(scenes.rglob("*.png"), None) or next(scenes.rglob("*.jpg")))
    row = SftRecord("a", 0, (image,), (), {"answer": "A dog."}, {"turns": (("user", "<image>What?"),)})
    measured = measure_row(row, 50_000_000)
    assert isinstance(measured, SftRecord)
    (encoded,) = builder.encode([measured])
    return encoded
