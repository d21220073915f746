"""The optimizer options of a job's `train` section."""

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.plan import Plan
from ray_vlm.train.build import build_rewards, shared_options


def test_the_schedule_that_made_detection_stable() -> None:
    """5e-5 in place of 1e-4, cosine down to 1e-6, decay 1e-4 and a norm of 1.0."""
    import torch
    from transformers import get_scheduler

    train = {"learning_rate": 5e-5, "min_lr_ratio": 0.02, "num_epochs": 10.0, "global_batch_size": 2}
    job = JobConfig.model_validate({"model": {"name": "x"}, "data": {"train": {"path": "a"}}, "train": train})
    plan = Plan(20, 2, 1, 1, num_epochs=10.0)
    options = shared_options(job, plan, has_eval=False)
    assert (options["weight_decay"], options["max_grad_norm"]) == (1e-4, 1.0)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=options["learning_rate"])
    schedule = get_scheduler(
        options["lr_scheduler_type"],
        optimizer,
        options["warmup_steps"],
        plan.num_steps,
        scheduler_specific_kwargs=options["lr_scheduler_kwargs"],
    )
    rates = []
    for _ in range(plan.num_steps):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert max(rates) == 5e-5
    assert abs(rates[-1] - 1e-6) < 1e-12
    after = rates[options["warmup_steps"] :]
    assert after == sorted(after, reverse=True)


def test_the_trainer_rewards_attributes_by_name_as_the_check_before_does() -> None:
    """The names of attributes come from the rows: with `object=cup` there is a part `object`."""
    method = {"name": "grpo", "rewards": {"object": 1.0, "condition": 0.5}, "num_generations": 2}
    data = {"train": {"path": "a.csv", "format": "image_csv"}}
    train = {"global_batch_size": 2, "micro_batch_size": 2}
    job = JobConfig.model_validate(
        {"method": method, "task": "classification", "model": {"name": "x"}, "data": data, "train": train}
    )
    rewards = build_rewards(job, ["object=cup", "object=fork", "condition=worn"])
    assert rewards is not None
    assert rewards.weights == {"object": 1.0, "condition": 0.5}
