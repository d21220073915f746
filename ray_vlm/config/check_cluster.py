"""Rules of the `cluster` section: what works with DeepSpeed, and what a worker can run on."""

from ray_vlm.config.rule import Rule

CLUSTER_RULES: list[Rule] = [
    (
        lambda j: j.train.memory is not None and j.cluster.gpu_memory_gib is None,
        ("train.memory", "cluster.gpu_memory_gib"),
        "it fits the job to a GPU, whose memory is not given. Set cluster.gpu_memory_gib.",
    ),
    (
        lambda j: bool(j.train.probe) and j.cluster.zero_stage == 3,
        ("train.probe", "cluster.deepspeed"),
        "under ZeRO-3 no worker has all weights to run a batch before training begins. Leave it out.",
    ),
    (
        lambda j: j.train.nonfinite != "stop" and j.cluster.deepspeed is not None,
        ("train.nonfinite", "cluster.deepspeed"),
        "DeepSpeed takes its step before the gradient can be checked. Leave train.nonfinite out.",
    ),
    (
        lambda j: j.train.precision == "fp16" and j.cluster.deepspeed is not None,
        ("train.precision", "cluster.deepspeed"),
        "DeepSpeed scales the loss by itself, and a step that it skips cannot be distinguished from a fault. Use bf16 "
        "or fp32, or leave cluster.deepspeed out.",
    ),
    (
        lambda j: j.train.vision_cache is not None and j.cluster.zero_stage == 3,
        ("train.vision_cache", "cluster.deepspeed"),
        "under ZeRO-3 no worker has all weights of the image encoder, whose hash is part of each file's name. Use "
        "zero2, or leave it out.",
    ),
    (
        lambda j: j.cluster.most_workers > j.train.global_batch_size,
        ("cluster.num_workers", "train.global_batch_size"),
        "there are more workers than rows in a step, so some would only run padding. Raise train.global_batch_size, or "
        "use fewer.",
    ),
    (
        lambda j: isinstance(j.cluster.num_workers, list) and j.cluster.least_workers >= j.cluster.most_workers,
        ("cluster.num_workers",),
        "the first number is the fewest workers, the second, larger one the most. Give [fewest, most], or one number.",
    ),
    (
        lambda j: isinstance(j.cluster.num_workers, list) and j.cluster.deepspeed is not None,
        ("cluster.num_workers", "cluster.deepspeed"),
        "a DeepSpeed checkpoint can only be read by the same number of workers. Give one number, or leave DeepSpeed "
        "out.",
    ),
    (
        lambda j: isinstance(j.cluster.num_workers, list) and j.evaluate.asynchronous,
        ("cluster.num_workers", "evaluate.asynchronous"),
        "elastic workers would take the resources of the validation process. Give one number, or leave "
        "evaluate.asynchronous out.",
    ),
    (
        lambda j: j.cluster.gpus_per_worker not in (0, 1),
        ("cluster.gpus_per_worker",),
        "a worker trains on one GPU or on CPUs. Use 0 or 1, and more workers for more GPUs.",
    ),
    (
        lambda j: j.cluster.deepspeed is not None and j.cluster.num_workers == 0,
        ("cluster.deepspeed", "cluster.num_workers"),
        "it partitions among workers, which Ray starts. Set cluster.num_workers to 1 or more, or leave it out.",
    ),
    (
        lambda j: j.cluster.deepspeed is not None and j.tune.resident,
        ("cluster.deepspeed", "tune.resident"),
        "a base that is kept for all trials cannot be partitioned by each of them. Leave one of them out.",
    ),
    (
        lambda j: j.cluster.zero_stage == 3 and j.method.name == "grpo",
        ("cluster.deepspeed", "method"),
        "under ZeRO-3 every token that is sampled would gather the whole model. Use zero2, with model.load_in_4bit if "
        "the base is too large for a GPU.",
    ),
    (
        lambda j: (
            j.cluster.zero_stage == 3
            and j.method.name == "dpo"
            and j.lora is not None
            and bool(j.train.gradient_checkpointing)
            and "vision" in j.lora.target
        ),
        ("cluster.deepspeed", "method", "lora.target", "train.gradient_checkpointing"),
        "with gradient checkpointing under ZeRO-3 the image encoder's adapter gets no gradient from pairs. Use "
        "lora.target without vision, train.gradient_checkpointing=false, or zero2.",
    ),
    (
        lambda j: j.cluster.zero_stage == 3 and j.method.precompute_ref_log_probs,
        ("cluster.deepspeed", "method.precompute_ref_log_probs"),
        "the reference runs before the weights are partitioned. Use zero2, or leave precompute_ref_log_probs out.",
    ),
    (
        lambda j: (
            j.cluster.zero_stage == 3
            and j.data.eval is not None
            and j.method.name == "sft"
            and j.evaluate.metric != "loss"
            and not j.evaluate.asynchronous
        ),
        ("cluster.deepspeed", "evaluate.metric", "evaluate.asynchronous", "data", "method"),
        "under ZeRO-3 every token of an answer would gather the whole model. Set evaluate.metric=loss, or "
        "evaluate.asynchronous=true if one GPU can hold the base.",
    ),
]
