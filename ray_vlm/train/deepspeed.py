"""DeepSpeed ZeRO: what `cluster.deepspeed` stands for, and what a trainer needs done otherwise under it.

ZeRO-1 shares the optimizer's state among the workers, ZeRO-2 the gradients as well, ZeRO-3 also the weights
(Rajbhandari et al., 2020, arXiv:1910.02054). `_offload` keeps optimizer state, and of ZeRO-3 the weights, in the
computer's memory.
"""

from typing import Any

from ray_vlm.config.cluster import BUCKET, GATHERED
from ray_vlm.config.schema import JobConfig


def deepspeed_config(job: JobConfig) -> dict[str, Any] | None:
    """DeepSpeed's configuration, as `TrainingArguments(deepspeed=...)` takes it; None without DeepSpeed.

    Values that the Trainer knows better are "auto".
    """
    if not job.cluster.deepspeed:
        return None
    zero: dict[str, Any] = {"stage": job.cluster.zero_stage, "reduce_bucket_size": BUCKET}
    if job.cluster.zero_stage < 3:
        zero["allgather_bucket_size"] = BUCKET
    else:
        zero |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_param_persistence_threshold": "auto"}
        zero |= {"stage3_max_live_parameters": GATHERED, "stage3_max_reuse_distance": GATHERED}
    if job.cluster.deepspeed.endswith("_offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
        if job.cluster.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": job.train.precision == "bf16"},
        "communication_data_type": "fp32",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,  # AdamW stays torch's, wherever its state lies
        "steps_per_print": 10**9,
    }


def gather_weights(model: Any, adapter: bool, rank: int) -> dict[str, Any]:
    """What a saved folder holds, whole and in the computer's memory, on rank 0; all ranks call this together.

    `adapter`: only what is trained. Needed under ZeRO-3, where every rank has a slice of each weight.
    """
    import deepspeed

    kept = set() if adapter else model.state_dict().keys()
    whole: dict[str, Any] = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not adapter:
            with deepspeed.zero.GatheredParameters([parameter]):
                if rank == 0:
                    whole[name] = parameter.data.detach().cpu().clone()
    return whole
