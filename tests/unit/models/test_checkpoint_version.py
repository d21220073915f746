"""A base that the installed transformers cannot load: the error says which version or which base would work."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from ray_vlm.config.schema import Model
from ray_vlm.errors import ModelError
from ray_vlm.models.load import load_config, load_model
from ray_vlm.models.processor import load_processor


def _write(folder: Path, **config: Any) -> Model:
    (folder / "config.json").write_text(json.dumps(config))
    return Model(name=str(folder), load_in_4bit=False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "qwen9_vl", "transformers_version": "97.1.0"},
            f"transformers {transformers.__version__} has no model type 'qwen9_vl', and the checkpoint was written by "
            "97.1.0. Install transformers 97.1.0 or newer, or give a base of a family in docs/models.md.",
        ),
        ({"model_type": "qwen9_vl"}, "has no model type 'qwen9_vl'. Install a newer transformers, or give a base"),
        ({"model_type": "qwen9_vl", "transformers_version": "?"}, "no model type 'qwen9_vl'. Install a newer"),
        (
            {
                "model_type": "minicpmv",
                "auto_map": {"AutoModel": "modeling.MiniCPMV"},
                "transformers_version": "4.51.0",
            },
            "model type 'minicpmv' is code in the base's own files, which is not run",
        ),
    ],
)
def test_a_model_type_that_is_not_known(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        load_config(_write(tmp_path, **config))
    assert words in str(error.value)
    assert str(tmp_path) in str(error.value)


def _stamp(base: str, folder: Path, version: str, keep: str) -> Model:
    """Copy the base's files that match `keep`, as if that version of transformers had written them."""
    for file in Path(base).iterdir():
        if file.match(keep) and file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((Path(base) / "config.json").read_text())
    return _write(folder, **config | {"transformers_version": version})


def test_a_newer_checkpoint_that_loads_is_used(tiny_models: dict[str, str], tmp_path: Path) -> None:
    assert load_config(_stamp(tiny_models["qwen3_vl"], tmp_path, "97.1.0", "*")).model_type == "qwen3_vl"


@pytest.mark.parametrize(("version", "advised"), [("97.1.0", True), ("4.57.0", False)])
def test_a_newer_checkpoint_that_does_not_load_names_the_version(
    version: str, advised: bool, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    model = _stamp(tiny_models["qwen3_vl"], tmp_path, version, "*.jinja")
    for load in (load_processor, lambda model: load_model(model, "fp32")):
        with pytest.raises(ModelError) as error:
            load(model)
        assert ("Install transformers 97.1.0 or newer" in str(error.value)) is advised
