"""Loading: what is quantised, what is trained, and gradients that survive an evaluation in 4 bit."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch

from ray_vlm.config.schema import Lora, Model
from ray_vlm.config.train import Precision
from ray_vlm.errors import ModelError
from ray_vlm.models.families import FAMILIES, part_of
from ray_vlm.models.load import describe_download, load_adapter, load_config, load_model
from ray_vlm.models.lora import count_trainable, lora_config, train_parts
from tests.conftest import QWEN


def _adapted(folder: str, target: list[str], precision: Precision = "fp32"):
    from peft import get_peft_model

    model = load_model(Model(name=folder), precision=precision)
    torch.manual_seed(0)
    return get_peft_model(model, lora_config(Lora(rank=4, target=target), FAMILIES[model.config.model_type]))


def _gradients(model, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.train()
    ids = torch.randint(20, 400, (2, 24))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", QWEN)
def test_4bit_layers_are_those_of_the_language_model(family: str, tiny_models: dict[str, str]) -> None:
    model = load_model(Model(name=tiny_models[family]), precision="fp32")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    quantised = [name for name, kind in kinds.items() if kind == "Linear4bit"]
    assert len(quantised) == 4 * 7
    assert all("language_model.layers" in name for name in quantised)
    layer = model.get_submodule(quantised[0])
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.nested, "double quantisation"


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("precision", get_args(Precision))
def test_gradients_are_the_same_before_and_after_an_evaluation(family: str, precision: Precision, tiny_models) -> None:
    model = _adapted(tiny_models[family], ["language"], precision)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = _gradients(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(20, 60)[None])
        model.generate(input_ids=torch.arange(20, 40)[None], max_new_tokens=3, do_sample=False)
    after = _gradients(model)
    assert before.keys() == after.keys()
    assert len(before) == 2 * 4 * 7
    for name, gradient in before.items():
        assert float(gradient.abs().sum()) > 0
        assert torch.equal(gradient, after[name]), name


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("part", ["language", "connector", "vision"])
def test_lora_lands_on_the_part_that_was_named(family: str, part: str, tiny_models: dict[str, str]) -> None:
    model = _adapted(tiny_models[family], [part])
    counts = count_trainable(model, FAMILIES[family])
    assert [name for name, count in counts.items() if count["trainable"]] == [part]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(part_of(FAMILIES[family], name) == part for name in trained)


def test_counts_include_every_4bit_weight(tiny_models: dict[str, str]) -> None:
    counts = [
        count_trainable(
            load_model(Model(name=tiny_models["qwen3_vl"], load_in_4bit=bits), "fp32"), FAMILIES["qwen3_vl"]
        )
        for bits in (True, False)
    ]
    assert [c["total"] for c in counts[0].values()] == [c["total"] for c in counts[1].values()]


def test_shares_are_those_of_the_base(tiny_models: dict[str, str]) -> None:
    """Adapters, the reference's copy of one and layers copied to be trained whole are no part of what is adapted."""
    folder, family = tiny_models["qwen3_vl"], FAMILIES["qwen3_vl"]
    plain = count_trainable(load_model(Model(name=folder), "fp32"), family)
    adapted = _adapted(folder, ["language"])
    adapted.add_adapter("ref", adapted.peft_config["default"])
    counts = count_trainable(adapted, family)
    for part, count in counts.items():
        assert (count["total"], count["in_4bit"]) == (plain[part]["total"], plain[part]["in_4bit"])
    assert counts["language"]["trainable"] > 0


def test_copied_layers_are_trained_and_not_counted_twice() -> None:
    class Peft:
        def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
            sizes = {"original_module": 7, "modules_to_save.default": 7, "modules_to_save.ref": 7}
            return [
                (f"base_model.model.lm_head.{name}.weight", torch.nn.Parameter(torch.zeros(n), "default" in name))
                for name, n in sizes.items()
            ]

    assert count_trainable(Peft(), FAMILIES["qwen3_vl"])["language"] == {"trainable": 7, "total": 7, "in_4bit": 0}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/no/such", "there is no such folder"),
        ("./models/none", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("pyproject.toml", "is a file"),
        ("docs", "holds no config.json"),
    ],
)
def test_a_path_without_a_base_is_not_called_a_name_on_the_hub(
    name: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    with pytest.raises(ModelError, match=told) as raised:
        load_config(Model(name=name))
    assert "repo" not in str(raised.value)


def test_a_download_says_how_much_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = tmp_path / "models--some--base" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a.incomplete").write_bytes(bytes(2**20))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert describe_download("some/base") == "0.0 GiB in the cache"
    assert describe_download(str(tmp_path)) == ""


def test_unusable_models_and_adapters_are_named(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        load_config(Model(name=str(tmp_path / "nowhere")))
    model = load_model(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), "fp32")
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        load_adapter(model, str(tmp_path), Model(name="x"))
    adapted = _adapted(tiny_models["qwen2_5_vl"], ["language"])
    adapted.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"qwen2_5_vl.*qwen3_vl"):
        load_adapter(model, str(tmp_path / "other"), Model(name=tiny_models["qwen3_vl"]))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("GatedRepoError", "accept its licence on its hub page, and set HF_TOKEN"),
        ("RevisionNotFoundError", "no such model.revision"),
        ("LocalEntryNotFoundError", "set HF_HOME to a cache that has it"),
    ],
)
def test_what_the_hub_refuses_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch, name: str, advice: str) -> None:
    import huggingface_hub.errors
    from transformers import AutoConfig

    def refuse(*args: object, **options: object) -> None:
        kind = getattr(huggingface_hub.errors, name)
        raise OSError("cannot load it") from kind.__new__(kind)

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=advice):
        load_config(Model(name="some/base"))


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8"])
def test_a_base_that_is_quantised_already_is_refused(tmp_path: Path, tiny_models: dict[str, str], method: str) -> None:
    shutil.copytree(tiny_models["qwen3_vl"], tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    about = {"quant_method": method, "bits": 4, "group_size": 128, "activation_scheme": "dynamic"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    with pytest.raises(ModelError, match=rf"published quantised \({method}\).*Give the unquantised base"):
        load_model(Model(name=str(tmp_path / "base")), "fp32")


def test_of_a_given_adapter_only_the_named_parts_go_on(tiny_models: dict[str, str], tmp_path: Path) -> None:
    folder, family = tiny_models["qwen3_vl"], FAMILIES["qwen3_vl"]
    _adapted(folder, ["language", "connector"]).save_pretrained(tmp_path)
    spec = Model(name=folder)

    def trained(*target: str) -> set[str]:
        model = load_adapter(load_model(spec, precision="fp32"), str(tmp_path), spec, trainable=True)
        train_parts(model, Lora(target=list(target)), family)
        return {part_of(family, name) for name, p in model.named_parameters() if p.requires_grad}

    assert trained("language", "vision") == {"language"}
    assert trained("connector", "language") == {"connector", "language"}
    with pytest.raises(ModelError, match=r"adapts connector, language and lora.target=\['vision'\]"):
        trained("vision")
