"""What the driver says of a run, and which rows it calls the same."""

from dataclasses import replace
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.records import SftRecord
from ray_vlm.train.driver import describe_job, rows_fingerprint


def _record(**changes: Any) -> SftRecord:
    record = SftRecord(row=0, id="a", images=("/data/a.png",), sizes=((8, 8),), context={}, truth={"label": "dog"})
    return replace(record, **changes)


def test_a_job_is_described_with_every_file_once() -> None:
    job = JobConfig.model_validate(
        {
            "model": {"name": "some/base"},
            "data": {"train": {"path": "a.json"}, "mix": [{"path": "b.json"}], "eval": {"path": "a.json"}},
        }
    )
    assert describe_job(job) == "sft of some/base for detection: reading a.json, b.json"


def test_rows_are_the_same_wherever_their_images_lie_and_others_with_another_answer() -> None:
    fingerprint = rows_fingerprint([_record()])
    assert rows_fingerprint([_record(images=("/elsewhere/a.png",))]) == fingerprint
    others = [{"truth": {"label": "cat"}}, {"id": "b"}, {"sizes": ((8, 9),)}, {"images": ("/data/b.png",)}]
    assert fingerprint not in {rows_fingerprint([_record(**change)]) for change in others}
    assert rows_fingerprint([_record(), _record(id="b")]) != rows_fingerprint([_record(id="b"), _record()])
