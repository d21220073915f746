"""A corpus of broken adapters: each is refused with its file and the reason, and none is loaded in part."""

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_vlm.config.schema import Lora, Model
from ray_vlm.errors import ModelError
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.load import load_adapter, load_model
from ray_vlm.models.lora import CONFIG, WEIGHTS, lora_config


class Payload:
    """What a pickle may do when it is read."""

    def __reduce__(self) -> tuple:
        return os.abort, ()


@pytest.fixture(scope="module")
def base(tiny_models: dict[str, str]) -> Any:
    """The base, to be copied: even a refused adapter changes its modules."""
    return load_model(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), precision="fp32")


@pytest.fixture(scope="module")
def complete(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of ranks 4 and 2 with B matrices that do something."""
    from peft import get_peft_model

    lora = Lora(rank=4, target=["language", "vision"], ranks={"vision": 2})
    model = get_peft_model(copy.deepcopy(base), lora_config(lora, FAMILIES["qwen3_vl"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("adapter") / "complete"
    model.save_pretrained(folder)
    return folder


def _config(**change: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | change))

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor], str], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        change(tensors, next(name for name in sorted(tensors) if "lora_B" in name))
        save_file(tensors, folder / WEIGHTS)

    return damage


def _content(name: str, content: bytes | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)

    return damage


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def _pickle_beside(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: (folder / CONFIG).unlink(), r"adapter_config\.json is missing"),
    (_content(CONFIG, None), r"adapter_config\.json is missing"),
    (_content(CONFIG, b""), r"adapter_config\.json: not readable as JSON"),
    (_content(CONFIG, b"\xff"), "not readable as JSON"),
    (_content(CONFIG, b"[" * 100_000), "not readable as JSON"),
    (_content(CONFIG, b"null"), "peft_type is 'NoneType', and only LORA"),
    (_config(peft_type="XLORA"), "peft_type is 'XLORA', and only LORA"),
    (_config(base_model_name_or_path=["x"]), r"trained on \['x'\], but model.name is"),
    (_config(base_model_name_or_path="other/base"), "trained on 'other/base'"),
    (_config(megatron_config={"a": 1}, megatron_core="os"), "megatron_config is not null"),
    (_config(alora_invocation_tokens=[1]), "alora_invocation_tokens is not null"),
    (_config(r=2**31), "its rank is 2147483648, and that of the weights beside it 2, 4"),
    (_config(r=0), "the rank 0 is not a whole number above 0"),
    (_config(r="4"), "the rank '4' is not"),
    (_config(r=8), "does not go on this base .*size mismatch"),
    (_config(rank_pattern={}), "does not go on this base .*size mismatch"),
    (_config(rank_pattern={"(": 2}), "does not go on this base"),
    (_config(rank_pattern=[2]), r"the rank \[2\] is not"),
    (_config(lora_alpha=float("nan")), "lora_alpha nan is not a number"),
    (_config(lora_alpha="32"), "lora_alpha '32' is not a number"),
    (_config(target_modules="("), "does not go on this base"),
    (_config(target_modules=["nothing"]), "does not go on this base"),
    (_config(target_modules=".*language_model.*q_proj"), "the base has no place for .* and .* more"),
    (_config(eva_config=3), "does not go on this base .*EvaConfig"),
    (lambda folder: (folder / WEIGHTS).unlink(), r"adapter_model\.safetensors is missing"),
    (_pickle_beside, r"adapter_model\.safetensors is missing"),
    (_content(WEIGHTS, None), r"adapter_model\.safetensors is missing"),
    (_content(WEIGHTS, b""), "not readable as safetensors"),
    (_content(WEIGHTS, pickle.dumps(Payload())), "not readable as safetensors"),
    (_cut, "not readable as safetensors"),
    (_tensors(lambda tensors, name: tensors.clear()), "holds no weights"),
    (_tensors(lambda tensors, name: tensors.pop(name)), "its weights lack .*lora_B"),
    (_tensors(lambda tensors, name: tensors.update(x=tensors[name].clone())), "the base has no place for x"),
    (_tensors(lambda tensors, name: tensors.update(x=tensors.pop(name))), "has no place for x"),
    (_tensors(lambda tensors, name: tensors.update({name: tensors[name][:, :1].clone()})), "size mismatch"),
    (_tensors(lambda tensors, name: tensors[name].view(-1)[:1].fill_(float("nan"))), "not finite"),
    (_tensors(lambda tensors, name: tensors[name].view(-1)[:1].fill_(1e38)), "above 1e6"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_adapter_is_refused(
    tmp_path: Path, complete: Path, base: Any, tiny_models: dict[str, str], damage: Callable[[Path], None], words: str
) -> None:
    spec = Model(name=tiny_models["qwen3_vl"], load_in_4bit=False)
    folder = tmp_path / "best"
    shutil.copytree(complete, folder)
    damage(folder)
    with pytest.raises(ModelError, match=words) as error:
        load_adapter(copy.deepcopy(base), str(folder), spec)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_card_without_room_is_no_fault_of_the_adapter(
    complete: Path, base: Any, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("peft.PeftModel.from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_adapter(base, str(complete), Model(name=tiny_models["qwen3_vl"], load_in_4bit=False))


def test_a_complete_adapter_is_loaded_unchanged(complete: Path, tiny_models: dict[str, str]) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    spec = Model(name=tiny_models["qwen3_vl"], load_in_4bit=False)
    loaded = get_peft_model_state_dict(load_adapter(load_model(spec, precision="fp32"), str(complete), spec))
    for name, tensor in load_file(complete / WEIGHTS).items():
        assert torch.equal(tensor, loaded[name])
