"""What all sections of a job have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the job: frozen, strict about unknown keys, no silent casts from text to number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


Largest = 2**31 - 1  # of counts and areas; more is a slip of the pen
