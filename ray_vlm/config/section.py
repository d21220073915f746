"""The base class of all sections of a job."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the job: frozen, without unknown keys, and without silent casts from text to number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


Largest = 2**31 - 1  # upper limit of counts and areas; anything larger is a typing error
