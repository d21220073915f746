"""DeepSpeed ZeRO: the configuration of each `cluster.deepspeed`, and gathering weights for saving.

ZeRO-1 partitions the optimizer's state among the workers, ZeRO-2 the gradients as well, ZeRO-3 also the weights
(Rajbhandari et al., 2020, arXiv:1910.02054). `_offload` keeps optimizer state, and of ZeRO-3 the weights, in the
computer's memory.
"""

from typing import Any

from ray_vlm.config.cluster import BUCKET, GATHERED, Cluster
from ray_vlm.config.train import Precision


def deepspeed_config(cluster: Cluster, precision: Precision) -> dict[str, Any] | None:
    """Return the configuration for `TrainingArguments(deepspeed=...)`, or None without DeepSpeed.

    Values that the Trainer fills in are "auto".
    """
    if not cluster.deepspeed:
        return None
    zero: dict[str, Any] = {"stage": cluster.zero_stage, "reduce_bucket_size": BUCKET}
    if cluster.zero_stage < 3:
        zero["allgather_bucket_size"] = BUCKET
    else:
        zero |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_param_persistence_threshold": "auto"}
        zero |= {"stage3_max_live_parameters": GATHERED, "stage3_max_reuse_distance": GATHERED}
    if cluster.deepspeed.endswith("_offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
        if cluster.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "communication_data_type": "fp32",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also where its state is offloaded
        "steps_per_print": 10**9,
    }


def gather_weights(model: Any, adapter: bool, rank: int) -> dict[str, Any]:
    """Return the complete weights to save, in the computer's memory, on rank 0. All ranks must call this together.

    Needed under ZeRO-3, where every rank has a slice of each weight. `adapter`: only the trained weights.
    """
    import deepspeed

    names = set() if adapter else model.state_dict().keys()
    weights: dict[str, Any] = {name: buffer for name, buffer in model.named_buffers() if name in names}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not adapter:
            with deepspeed.zero.GatheredParameters([parameter]):
                if rank == 0:
                    weights[name] = parameter.data.detach().cpu().clone()
    return weights
