"""Loading: which layers are quantised and trained, damaged bases, and gradients after an evaluation in 4 bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from ray_vlm.config.schema import Lora, Model
from ray_vlm.config.train import Precision
from ray_vlm.errors import ModelError
from ray_vlm.models.families import FAMILIES, part_of
from ray_vlm.models.load import describe_download, load_adapter, load_config, load_model, resolve_name
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
    """Adapters, the reference's copy of one, and layers that PEFT copies to train them do not count."""
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
    ("name", "reason"),
    [
        ("/no/such", "there is no such folder"),
        ("./models/none", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("pyproject.toml", "is a file"),
        ("docs", "holds no config.json"),
        ("docs/none", "there is no folder 'none' in the folder 'docs'"),
    ],
)
def test_a_path_without_a_base_is_not_looked_up_on_the_hub(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    def ask_hub(*args: object, **options: object) -> None:
        raise AssertionError("the hub is not to be asked")

    monkeypatch.setattr(AutoConfig, "from_pretrained", ask_hub)
    monkeypatch.chdir(Path(__file__).parents[3])
    with pytest.raises(ModelError, match=reason) as raised:
        load_config(Model(name=name))
    assert "repo" not in str(raised.value)


def test_a_cached_base_is_loaded_beside_a_folder_of_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--base" / "snapshots" / "0123"
    (tmp_path / "models--some--base" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--base" / "refs" / "main").write_text("0123")
    snapshot.mkdir(parents=True)
    shutil.copy(Path(resolve_name("tiny")) / "config.json", snapshot)
    (tmp_path / "some").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda name, **options: name)
    assert load_config(Model(name="some/base")) == "some/base"


Damage = Callable[[Path], object]
_INDEX = "model.safetensors.index.json"


def _keep_bytes(count: int) -> Damage:
    """Keep the first `count` bytes of the weights; with a negative number, all but so many at the end."""
    return lambda weights: weights.write_bytes(weights.read_bytes()[:count])


def _narrow(part: str) -> Damage:
    """Give one matrix, the first whose name contains `part`, a shape that the configuration does not say."""

    def change(weights: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        name = next(name for name, tensor in tensors.items() if tensor.dim() == 2 and part in name)
        save_file(tensors | {name: tensors[name][:1].clone()}, weights, {"format": "pt"})

    return change


def _index_instead(content: str) -> Damage:
    def change(weights: Path) -> None:
        weights.unlink()
        (weights.parent / _INDEX).write_text(content)

    return change


@pytest.mark.parametrize("in_4bit", [False, True])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_keep_bytes(0), r"SafetensorError: .*header.*A file of the base may be cut off: fetch it again"),
        (_keep_bytes(5), r"SafetensorError: .*header.*A file of the base may be cut off: fetch it again"),
        (_keep_bytes(-100), r"SafetensorError: .*header.*A file of the base may be cut off: fetch it again"),
        (_narrow("embed_tokens"), r"the shapes of its tensors are not those of its config\.json"),
        (_narrow("language_model.layers.0.self_attn"), r"the shapes of its tensors are not those of its config\.json"),
        (_narrow("visual.blocks.0"), r"the shapes of its tensors are not those of its config\.json"),
        (_index_instead("{}"), r"KeyError: 'weight_map'.*fetch it again"),
        (_index_instead('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}'), r"No such file .*fetch it again"),
        (lambda weights: (weights.parent / "generation_config.json").write_text("[]"), "TypeError: .*fetch it again"),
    ],
)
def test_damaged_weights_are_an_error_of_the_base(tmp_path: Path, damage: Damage, reason: str, in_4bit: bool) -> None:
    folder = tmp_path / "base"
    shutil.copytree(resolve_name("tiny"), folder)
    damage(folder / "model.safetensors")
    with pytest.raises(ModelError, match=rf"base': its weights cannot be loaded \({reason}") as raised:
        load_model(Model(name=str(folder), load_in_4bit=in_4bit), "fp32")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("in_4bit", [False, True])
def test_weights_that_the_files_do_not_hold_are_not_made_up(tmp_path: Path, in_4bit: bool) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "base"
    shutil.copytree(resolve_name("tiny"), folder)
    tensors = load_file(folder / "model.safetensors")
    load_model(Model(name=str(folder), load_in_4bit=in_4bit), "fp32")
    removed = [name for name in sorted(tensors) if "layers.0" in name][:3]
    save_file({name: tensors[name] for name in tensors if name not in removed}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"do not hold the weights model\..* and 2 more, which would be random"):
        load_model(Model(name=str(folder), load_in_4bit=in_4bit), "fp32")


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1234"),
        MemoryError(),
        KeyboardInterrupt(),
    ],
)
def test_a_failure_of_the_machine_is_no_error_of_the_base(
    tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", fail)
    with pytest.raises(type(failure)) as raised:
        load_model(Model(name=tiny_models["qwen3_vl"]), "fp32")
    assert raised.value is failure


def test_the_progress_of_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_errors_of_the_hub_come_with_the_fix(monkeypatch: pytest.MonkeyPatch, name: str, advice: str) -> None:
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


def test_only_the_target_parts_of_a_loaded_adapter_are_trained(tiny_models: dict[str, str], tmp_path: Path) -> None:
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
