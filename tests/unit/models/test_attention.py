"""Image encoders attend in one call a layer: the same features and gradients, lengths read once, nothing saved."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor

from ray_vlm.config.schema import Lora, Model
from ray_vlm.models import attention
from ray_vlm.models.attention import NAME, attend_at_once, attend_segments, build_layout, plan_batches
from ray_vlm.models.backbone import base_of, recompute
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.frozen_encoder import StepFeatureCache
from ray_vlm.models.layouts import PackingOptions
from ray_vlm.models.load import load_model, load_trained
from ray_vlm.models.lora import lora_config
from ray_vlm.models.operations import OperationCounter
from ray_vlm.models.prefix_sharing import build_planner
from ray_vlm.models.surgery import ForwardOptions, change_forward
from tests.conftest import QWEN

# Frames, rows and columns of patches of each image. Windows of Qwen2.5-VL are 8 patches wide: the last ones of a row
# and of a column are smaller, and those of one length do not follow one another. The second has two frames.
UNEVEN = torch.tensor([[1, 20, 22], [2, 4, 6], [1, 8, 8], [1, 2, 2]])
EVEN = torch.tensor([[1, 32, 32]])
CPU = torch.device("cpu")
HEADS, SIZE = 2, 8


def _model(folder: str) -> Any:
    """Return the base with an adapter on its image encoder that changes the encoder's output."""
    base = load_model(Model(name=folder, load_in_4bit=False), precision="fp32")
    config = lora_config(Lora(rank=2, target=["vision"]), FAMILIES[base.config.model_type])
    config.init_lora_weights = False
    torch.manual_seed(0)
    return get_peft_model(base, config)


def _encoder(model: Any) -> Any:
    return base_of(model).get_encoder(modality="image")


def _pixels(encoder: Any, grids: Tensor) -> Tensor:
    shape = int(grids.prod(dim=1).sum()), encoder.patch_embed.proj.weight[0].numel()
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(encoder.dtype)


def _step(model: Any, grids: Tensor) -> list[Tensor]:
    """Return the encoder's features and, after a backward, the gradients of the adapter."""
    encoder = _encoder(model)
    output = encoder(_pixels(encoder, grids), grid_thw=grids)
    features = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    model.zero_grad()
    torch.stack([(part * torch.linspace(-1, 1, part.shape[-1]).to(part)).sum() for part in features]).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    return [part.detach() for part in [*features, *gradients]]


def _differences(parts: Sequence[Tensor], stock: Sequence[Tensor]) -> list[float]:
    pairs = zip(parts, stock, strict=True)
    return [float((part - expected).abs().max() / expected.abs().max()) for part, expected in pairs]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """The shapes of the queries of each call of torch's attention."""
    shapes: list[torch.Size] = []
    plain = F.scaled_dot_product_attention

    def attend(query: Tensor, *args: Any, **options: Any) -> Tensor:
        shapes.append(query.shape)
        return plain(query, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    return shapes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", QWEN)
def test_features_and_gradients_are_the_stock_encoders(
    family: str,
    dtype: torch.dtype,
    most: float,
    checkpointing: bool,
    tiny_models: dict[str, str],
    calls: list[torch.Size],
) -> None:
    model = _model(tiny_models[family]).to(dtype).train()
    if checkpointing:
        recompute(model, {"use_reentrant": False})
        assert _encoder(model).blocks[0].gradient_checkpointing
    stock, num_calls = _step(model, UNEVEN), len(calls)
    calls.clear()
    assert attend_at_once(model)
    assert max(_differences(_step(model, UNEVEN), stock)) <= most
    assert len(calls) < num_calls


@pytest.mark.parametrize("family", QWEN)
def test_batches_of_other_devices_are_the_stock_encoders(
    family: str, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(tiny_models[family]).double()
    stock = _step(model, UNEVEN)
    build, layouts = build_layout, []

    def build_other(lengths: Sequence[int], device: torch.device, is_cpu: bool) -> attention.SegmentLayout:
        layouts.append(build(lengths, device, is_cpu=False))
        return layouts[-1]

    monkeypatch.setattr(attention, "build_layout", build_other)
    attend_at_once(model)
    for most in (1.5, 100.0):  # by length, then with padding
        monkeypatch.setattr(attention, "_MOST_PADDED", most)
        assert max(_differences(_step(model, UNEVEN), stock)) <= 1e-12
    assert {len(layout.batches) == 1 for layout in layouts} == {True, False}


@pytest.mark.parametrize("family", QWEN)
def test_a_layer_attends_in_one_call(family: str, tiny_models: dict[str, str], calls: list[torch.Size]) -> None:
    model = load_model(Model(name=tiny_models[family], load_in_4bit=False), precision="fp32")
    encoder = _encoder(model)
    attend_at_once(model)
    with torch.no_grad():
        encoder(_pixels(encoder, EVEN), grid_thw=EVEN)
    assert len(calls) == len(encoder.blocks)
    batches = {(shape[0], shape[2]) for shape in calls}
    assert batches == ({(16, 64), (1, 1024)} if family == "qwen2_5_vl" else {(1, 1024)})
    calls.clear()
    several = EVEN.repeat(3, 1)
    with torch.no_grad():
        encoder(_pixels(encoder, several), grid_thw=several)
    assert len(calls) == len(encoder.blocks)


@pytest.mark.parametrize("family", QWEN)
def test_lengths_are_read_once_a_forward(
    family: str, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(tiny_models[family]).train()
    recompute(model, {"use_reentrant": False})
    attend_at_once(model)
    read = []

    def keep(lengths: list[int]) -> attention.Segments:
        read.append(lengths)
        return plain(lengths)

    plain = attention.Segments
    monkeypatch.setattr(attention, "Segments", keep)
    before = len(attention._known_segments())  # those of plans that are kept
    for step in (1, 2):
        _step(model, UNEVEN)
        assert len(read) == step * (2 if family == "qwen2_5_vl" else 1)  # windows and images
        assert len(attention._known_segments()) == before, "nothing is kept after the step"


@pytest.mark.parametrize(
    ("lengths", "is_cpu", "expected"),
    [
        ([4, 4, 4], True, [[0, 1, 2]]),
        ([4, 4, 2, 4], True, [[0, 1], [2], [3]]),
        ([4, 4, 4], False, [[0, 1, 2]]),
        ([4, 4, 2, 4], False, [[0, 1, 2, 3]]),  # 64 pairs for 52
        ([4, 2, 4, 2], False, [[0, 2], [1, 3]]),  # 64 for 40
    ],
)
def test_segments_are_batched_as_costs_least(lengths: list[int], is_cpu: bool, expected: list[list[int]]) -> None:
    assert plan_batches(lengths, is_cpu) == expected


def _attend(lengths: Sequence[int], parts: Sequence[Tensor], **options: Any) -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    query, key, value = (part.transpose(0, 1)[None] for part in parts)
    return attend_segments(torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=ends, **options)[0]


def _by_segment(lengths: Sequence[int], parts: Sequence[Tensor], scale: float) -> Tensor:
    segments = zip(*(part.split(list(lengths)) for part in parts), strict=True)
    outputs = [F.scaled_dot_product_attention(*(p.transpose(0, 1) for p in s), scale=scale) for s in segments]
    return torch.cat([output.transpose(0, 1) for output in outputs])[None]


@pytest.mark.parametrize("lengths", [[4, 4, 2, 4], [4, 2, 4, 2], [3, 3], [5], [3, 0, 3]])
@pytest.mark.parametrize("is_cpu", [True, False])
def test_a_segment_sees_no_other(lengths: list[int], is_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "build_layout", lambda *args: build_layout(*args[:2], is_cpu))
    parts = torch.randn(3, sum(lengths), HEADS, SIZE, dtype=torch.float64).unbind(0)
    expected = _by_segment(lengths, parts, 0.3)
    assert torch.allclose(_attend(lengths, parts, scaling=0.3), expected, rtol=0, atol=1e-14)
    for part in parts:
        part[: lengths[0]] = torch.nan
    output = _attend(lengths, parts, scaling=0.3)[0]
    assert output[: lengths[0]].isnan().all()
    assert torch.allclose(output[lengths[0] :], expected[0, lengths[0] :], rtol=0, atol=1e-14)


def _torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: object = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32
    lengths = cu_seq_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    assert window_size == (-1, -1)
    assert all(part.is_contiguous() and part.shape == (sum(lengths), HEADS, SIZE) for part in (query, key, value))
    assert scale is not None
    return _by_segment(lengths, (query, key, value), scale)[0]


def _torch_2_15(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    return_aux: object = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False, seqused_k: Tensor | None = None, block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    assert cu_seq_k is not None
    return _torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Tensor]], None]]:
    """A function that puts a stand-in into torch's module, and lets the CPU's tensors go to it."""
    module = pytest.importorskip("torch.nn.attention.varlen")

    def put(stand_in: Callable[..., Tensor]) -> None:
        attention.load_varlen.cache_clear()
        monkeypatch.setattr(module, "varlen_attn", stand_in)
        monkeypatch.setattr(attention, "_varlen_for", lambda query: attention.load_varlen())

    yield put
    attention.load_varlen.cache_clear()


@pytest.mark.parametrize("stand_in", [_torch_2_11, _torch_2_15])
def test_varlen_attention_gets_its_arguments(
    stand_in: Callable[..., Tensor], varlen: Any, calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen(stand_in)
    lengths = [4, 4, 2, 4]
    parts = torch.randn(sum(lengths), 3, HEADS, SIZE).unbind(1)  # views, as of a joint output
    expected = _by_segment(lengths, parts, 0.3)
    calls.clear()
    monkeypatch.setattr(attention, "build_layout", None)  # nothing is laid out
    assert torch.equal(_attend(lengths, parts, scaling=0.3), expected)
    assert len(calls) == len(lengths), "those of the stand-in"


def test_varlen_attention_without_a_scale_or_with_dropout_is_not_used(varlen: Any, calls: list[torch.Size]) -> None:
    def without_scale(query: Tensor, *args: object) -> Tensor:
        raise AssertionError

    parts = torch.randn(3, 8, HEADS, SIZE).unbind(0)
    varlen(without_scale)
    _attend([4, 4], parts)
    varlen(_torch_2_11)
    _attend([4, 4], parts, dropout=0.5)
    assert [shape[0] for shape in calls] == [2, 2]


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"shape": (1, 16, 10, 72)}, True),
        ({"dtype": torch.float32}, False),
        ({"device": CPU}, False),
        ({"shape": (1, 16, 10, 20)}, False),
        ({"shape": (1, 16, 10, 264)}, False),
        ({"capability": (7, 5)}, False),
        ({"flash": False}, False),
        ({"enabled": False}, False),
    ],
)
def test_varlen_attention_is_for_what_flash_attention_takes(
    change: dict[str, Any], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "shape": (1, 16, 10, 80)} | change
    machine = {"flash": True, "enabled": True, "capability": (8, 0)} | change
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: machine["flash"])
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: machine["enabled"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine["capability"])
    monkeypatch.setattr(attention, "load_varlen", lambda: _torch_2_15)
    stand_in: Any = SimpleNamespace(**query)
    assert (attention._varlen_for(stand_in) is _torch_2_15) == taken


@pytest.mark.parametrize("family", QWEN)
def test_no_configuration_names_the_function(family: str, tiny_models: dict[str, str], tmp_path: Path) -> None:
    model = load_model(Model(name=tiny_models[family], load_in_4bit=False), precision="fp32")
    described = model.config.to_json_string(), _encoder(model).config.to_json_string()
    attend_at_once(model)
    assert (model.config.to_json_string(), _encoder(model).config.to_json_string()) == described
    model.save_pretrained(tmp_path)
    assert "flash" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = load_model(Model(name=str(tmp_path), load_in_4bit=False), precision="fp32")
    assert _encoder(again).config._attn_implementation == "sdpa"


def test_training_and_evaluation_attend_at_once(tiny_models: dict[str, str]) -> None:
    spec = Model(name=tiny_models["qwen2_5_vl"], load_in_4bit=False)
    model = load_model(spec, precision="fp32")
    language = model.get_decoder().config._attn_implementation
    change_forward(model, ForwardOptions(True, PackingOptions()), StepFeatureCache(), OperationCounter())
    for changed in (model, load_trained(spec, "fp32", None)):
        assert {block.attn.config._attn_implementation for block in _encoder(changed).blocks} == {NAME}
        assert changed.config._attn_implementation == language


def test_other_encoders_stay_as_they_are(tiny_models: dict[str, str]) -> None:
    other: Any = SimpleNamespace(config=SimpleNamespace(model_type="llama4"))
    assert not attend_at_once(other)
    model = load_model(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), precision="fp32")
    model.set_attn_implementation("eager")
    assert not attend_at_once(model)
    assert _encoder(model).config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "reason"),
    [
        ((9, 0), torch.bfloat16, 128, None),
        ((9, 0), torch.bfloat16, 84, "multiples of 8, and this is 84"),
        ((9, 0), torch.float16, 512, "head sizes up to 256 that are multiples of 8, and this is 512"),
        ((9, 0), torch.float32, 128, "and this is float32"),
        ((7, 5), torch.float16, 128, "compute capability 8.0, and this card has 7.5"),
    ],
)
def test_without_flash_attention_a_line_says_what_is_tried_next(
    capability: tuple[int, int], dtype: Any, size: int, reason: str | None, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "load_varlen", lambda: print)
    monkeypatch.setattr("ray_vlm.models.prefix_sharing.dtype_of", lambda precision: dtype)
    text = SimpleNamespace(head_dim=size)
    base = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text), base_model=SimpleNamespace(get_rope_index=None)
    )
    monkeypatch.setattr("ray_vlm.models.prefix_sharing.base_of", lambda model: model)
    caplog.set_level("INFO", logger="ray_vlm")
    for device, shares in (("cuda:0", True), ("cuda:0", False), ("cpu", True)):
        planner = build_planner(base, PackingOptions(shares, False, 64), 1, device, "bf16")  # type: ignore[arg-type]
        assert planner._segment_keys == (device != "cpu" and reason is None)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (reason is not None)
    assert reason is None or (reason in lines[0] and "Tried next: calls of torch's own attention" in lines[0])
