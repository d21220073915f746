"""Compute each token of a batch once, and only those that are needed: shared prefixes, packed rows, labelled logits.

DPO's two answers, and all answers of a GRPO group, follow the same images and the same question. TRL lays them out as
rows of a padded batch, so images and question are computed once for each row. `share_prefixes` wraps the forward of the
*backbone*, which TRL's log-probability head calls for hidden states: a batch with a `layout` (`models/layouts.py`) is
computed as one row, in which rows with the same images and the same beginning have that beginning once, and the hidden
states are copied back to where TRL expects them. Losses, metrics and options stay TRL's; nothing is approximated
(prefix sharing: Wang & Hegde 2024, arXiv:2410.20305; packing: Krell et al. 2021, arXiv:2107.02027; here with M-RoPE
positions and images).

A batch with a layout has an image that several rows show once among its inputs.
"""

import functools
import logging
from typing import TYPE_CHECKING, Any

from ray_vlm.config.method import AlignmentMethod, Method
from ray_vlm.config.schema import Lora
from ray_vlm.models.attention import why_no_segments
from ray_vlm.models.backbone import base_of
from ray_vlm.models.families import Family
from ray_vlm.models.layouts import LayoutPlanner, PackedLayout, PackingOptions, PaddedLayout
from ray_vlm.models.operations import OperationCounter
from ray_vlm.models.precision import dtype_of
from ray_vlm.models.vision_inputs import select_plan

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedConfig

    from ray_vlm.config.train import Precision

logger = logging.getLogger(__name__)
# Outputs of TRL's head that have a value for each scored position (`FusedCausalLMOutput` in trl/trainer/utils.py).
_HEAD_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def plan_packing(
    method: Method, lora: Lora | None, pack: bool, family: Family, config: "PreTrainedConfig"
) -> PackingOptions:
    """Return whether the rows of a job's batches may share prefixes and be packed.

    `pack`: whether the job wants packing; `config`: the model's."""
    exact = why_not_packed(lora, family) is None and not _has_windows(config) and not _has_dropout(config)
    share = isinstance(method, AlignmentMethod) and method.share_prefixes
    return PackingOptions(exact and share, exact and pack, config.get_text_config().hidden_size)


def why_not_packed(lora: Lora | None, family: Family) -> str | None:
    """Return why rows that are packed or share a prefix would give other results than separate rows, or None."""
    if lora is not None and lora.dropout > 0:
        return "lora.dropout would fall otherwise"
    return family.cannot.get("train.packing")


def _has_windows(config: "PreTrainedConfig") -> bool:
    """Return whether layers of the language model attend within a window of the row."""
    return "sliding_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def _has_dropout(config: "PreTrainedConfig") -> bool:
    """Return whether attention leaves out some of its weights at random, which attention over packed rows does not."""
    return bool(getattr(config.get_text_config(), "attention_dropout", 0.0))


def build_planner(
    model: "Module", packing: PackingOptions, image_token: int, device: str, precision: "Precision"
) -> LayoutPlanner:
    """Return what plans the layouts of batches of a model, with or without an adapter, whose positions are M-RoPE's."""
    import torch

    base = base_of(model)
    where, text = torch.device(device), base.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    is_cpu = where.type == "cpu"
    reason = None if is_cpu else why_no_segments(where, dtype_of(precision), size)
    if reason is not None and (packing.share or packing.pack):
        logger.info(
            f"attention over packed rows: no flash attention over segments of any lengths, since {reason}. Tried next: "
            "calls of torch's own attention for blocks of an answer, with the same result"
        )
    return LayoutPlanner(base.base_model.get_rope_index, packing, image_token, is_cpu, not is_cpu and reason is None)


def share_prefixes(model: "Module", counter: OperationCounter | None = None) -> None:
    """Let the model's backbone compute batches with a `layout` as the layout says. Exact without dropout. `counter`
    leaves out tokens that the layout computes and the batch does not need."""
    backbone = base_of(model).base_model
    plain = backbone.forward

    def forward(
        *args: object,
        keep: "Tensor | None" = None,
        layout: PackedLayout | PaddedLayout | None = None,
        **inputs: Any,
    ) -> Any:
        if layout is not None and counter is not None:
            counter.leave_out(layout.tokens, layout.pairs)
        if layout is not None:
            inputs |= _images(layout, inputs)
        if isinstance(layout, PackedLayout):
            inputs |= _packed(layout, inputs)
        elif layout is not None:
            mask = inputs["attention_mask"] if layout.masked else None
            inputs |= {"attention_mask": mask, "position_ids": layout.position_ids}
        output = plain(*args, **inputs)
        if isinstance(layout, PackedLayout):
            hidden = output.last_hidden_state[0]  # [tokens, hidden]
            output.last_hidden_state = hidden[layout.targets]  # [rows, columns, hidden]
        return output if keep is None else _keep(output, keep)

    backbone.forward = forward


def keep_scored(model: "Module") -> None:
    """Let the backbone of a family whose rows are left as they are return hidden states of `keep` alone, as
    `share_prefixes` does."""
    backbone = base_of(model).base_model
    plain = backbone.forward

    @functools.wraps(plain)
    def forward(*args: object, keep: "Tensor | None" = None, **inputs: Any) -> Any:
        output = plain(*args, **inputs)
        return output if keep is None else _keep(output, keep)

    backbone.forward = forward


def _keep(output: Any, keep: "Tensor") -> Any:
    """Leave the hidden states that the head scores in a backbone's output. `keep`: bool `[rows, tokens - 1]`."""
    # The hidden state of a position predicts the next token, so the last column is never scored. The head gets one row
    # of all kept positions, [1, kept, hidden].
    output.last_hidden_state = output.last_hidden_state[:, :-1][keep][None]
    return output


def _images(layout: PackedLayout | PaddedLayout, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the image inputs of the layout's rows, one row behind another; nothing if those of the batch are these."""
    import torch

    if layout.images is None:
        return {}
    assert layout.image_numbers is not None
    pixels = torch.cat([inputs["pixel_values"][first:end] for first, end in layout.images])
    # Not indexed by the list, which would be copied to a GPU, and the host would wait for that.
    grids = torch.cat([inputs["image_grid_thw"][number : number + 1] for number in layout.image_numbers])
    select_plan(inputs["image_grid_thw"], layout.image_numbers, grids)
    return {"pixel_values": pixels, "image_grid_thw": grids}


def _packed(layout: PackedLayout, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the text inputs of the packed row, without a mask."""
    tokens = {name: inputs[name].reshape(-1)[layout.source] for name in ("input_ids", "mm_token_type_ids")}
    if layout.is_token is not None:  # padding becomes token 0 of kind text
        tokens = {name: ids * layout.is_token for name, ids in tokens.items()}
    positions = {"attention_mask": None, "position_ids": layout.position_ids, "use_cache": False}
    return tokens | positions | {"packed_row": layout.row}


def score_labelled(model: "Module") -> None:
    """Let the fused head of `model`, with or without an adapter, score labelled positions alone. The results are exact.

    With Triton, TRL's fused head skips other tokens itself (`trl/trainer/utils.py`, `add_fused_lm_head`); without, it
    scores every position, and its tile of logits takes hundreds of megabytes. So on CPUs the backbone, which must
    accept `keep` (`share_prefixes`, `keep_scored`), passes only labelled positions to the head, and the outputs are
    copied back to the positions where TRL's trainers read them.
    """
    base = base_of(model)
    fused = base.forward

    @functools.wraps(fused)  # `generate` inspects the signature
    def forward(*args: object, labels: "Tensor | None" = None, **inputs: Any) -> Any:
        if labels is None or labels.device.type == "cuda" or inputs.get("shift_labels") is not None:
            return fused(*args, labels=labels, **inputs)
        targets = labels[:, 1:]
        mask = targets != -100  # bool [rows, tokens - 1]
        if not inputs.get("fused_lm_head") or not mask.any():
            return fused(*args, labels=labels, **inputs)
        # `shift_labels` are already shifted, and must have the shape of the kept hidden states: [1, kept].
        output = fused(*args, shift_labels=targets[mask][None], keep=mask, **inputs)
        for name in _HEAD_FIELDS:
            if (values := getattr(output, name)) is not None:
                setattr(output, name, values.new_zeros(mask.shape).masked_scatter(mask, values))
        output.label_mask = mask
        return output

    base.forward = forward
