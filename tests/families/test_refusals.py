"""Families that are refused when they are loaded, in words."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoProcessor

from ray_vlm.config.schema import Model
from ray_vlm.data.processor_images import load_processor_images
from ray_vlm.errors import ModelError
from ray_vlm.models.load import load_config
from tests.families.test_inputs import builder_of


def test_a_processor_that_writes_behind_images_is_refused(family_folder: Callable[[str], str]) -> None:
    with pytest.raises(ModelError, match=r"'paligemma': its processor .* writes text of its own behind images"):
        builder_of(family_folder("paligemma"))


@pytest.fixture
def idefics(family_folder: Callable[[str], str]) -> tuple[Any, Any]:
    folder = family_folder("idefics3")
    return AutoProcessor.from_pretrained(folder), load_config(Model(name=folder))


def test_a_processor_without_a_placeholder_is_refused(idefics: tuple[Any, Any]) -> None:
    processor, config = idefics
    processor.image_token = None
    with pytest.raises(ModelError, match=r"'idefics3': its processor has no image token .* docs/models\.md"):
        load_processor_images(processor, config)


def test_a_processor_that_does_not_report_what_it_writes_is_refused(idefics: tuple[Any, Any]) -> None:
    processor, config = idefics
    processor.get_text_with_replacements = lambda text, images=(), *others: (text, [])
    with pytest.raises(ModelError, match="'idefics3': its processor cannot be asked what it makes of images"):
        load_processor_images(processor, config)
