"""What the driver says of a run, and which rows it calls the same."""

from dataclasses import replace
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.index import fingerprint_records
from ray_vlm.data.records import SftRecord
from ray_vlm.data.shards import row_digest
from ray_vlm.train.driver import describe_job


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
    fingerprint = fingerprint_records([_record()])
    assert fingerprint_records([_record(images=("/elsewhere/a.png",))]) == fingerprint
    assert row_digest(_record(images=("/elsewhere/a.png",))) == row_digest(_record())
    others = [{"truth": {"label": "cat"}}, {"id": "b"}, {"sizes": ((8, 9),)}, {"images": ("/data/b.png",)}]
    assert fingerprint not in {fingerprint_records([_record(**change)]) for change in others}
    assert row_digest(_record()) not in {row_digest(_record(**change)) for change in others}
    assert fingerprint_records([_record(), _record(id="b")]) != fingerprint_records([_record(id="b"), _record()])
