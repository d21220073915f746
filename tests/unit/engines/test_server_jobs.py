"""A job that names a server asks it: the rollouts of GRPO, and an evaluation."""

import json
from pathlib import Path
from typing import Any

from ray_vlm.config.load import load_job
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.evaluate.actors import InferenceJob, InferenceWorker
from ray_vlm.evaluate.generate import answer_records
from ray_vlm.train.driver import train
from ray_vlm.train.prepare import prepare
from tests.support.sampling_server import SamplingServer, serve


def test_an_evaluation_asks_the_server_that_the_job_names(job_file: Any) -> None:
    prepared = prepare(load_job(job_file()))
    base, builder = prepared.job.model.name, load_sample_builder(prepared.spec)
    with serve(SamplingServer(base, base, builder.image_token_id)) as server:
        options = {"engine": "server", "sampler_url": server.url, "max_new_tokens": 5}
        job = prepared.job.model_copy(update={"evaluate": prepared.job.evaluate.model_copy(update=options)})
        worker = InferenceWorker(InferenceJob(job, prepared.spec, prepared.train.records, None, ()))
        assert len(answer_records(worker, prepared.train.records[:3])) == 3
        worker.close()
    assert [request["sampling_params"]["max_tokens"] for request in server.requests] == [5, 5, 5]
    assert "model" not in worker.__dict__, "no base is loaded here"


def test_grpo_trains_on_the_answers_of_its_server(job_file: Any) -> None:

    plain = load_job(job_file())
    base, builder = plain.model.name, load_sample_builder(prepare(plain).spec)
    with serve(SamplingServer(base, base, builder.image_token_id)) as server:
        method = {"name": "grpo", "num_generations": 2, "rollouts": "server", "sampler_url": server.url}
        job = load_job(
            job_file(
                method=method | {"max_completion_tokens": 4, "max_rollout_gap": 100.0},
                train={"max_steps": 2, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
                lora={"rank": 4, "target": ["language"]},
            )
        )
        folder = train(job, "").address
    assert len(server.loaded) >= 2, "an adapter a step"
    assert len({entry["name"] for entry in server.loaded}) == len(server.loaded)
    assert not server.adapters, "the last one is removed at the end"
    steps = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert any("rollout_gap" in step for step in steps)
