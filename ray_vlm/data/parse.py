"""Parse a model's answer to a record, with the classes of the job."""

from ray_vlm.data.records import Record, SftRecord
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.tasks.answers import Parsed
from ray_vlm.tasks.classification import attributes_of, check_attributes
from ray_vlm.tasks.detection import name_classes


def parse_answer(text: str, record: Record, builder: SampleBuilder) -> Parsed:
    """Parse an answer to the record, with the classes of the job.

    A classification has the promised form if its attributes are those of the truth, or those of the labels if the
    record has no truth.
    """
    parsed, labels = builder.task.parse(text, builder.frames(record)), builder.spec.labels
    if builder.spec.task.name == "detection":
        return name_classes(parsed, labels)
    if builder.spec.task.name == "classification" and isinstance(record, SftRecord):
        return check_attributes(parsed, tuple(record.truth["attributes"]) or tuple(attributes_of(labels)))
    return parsed
