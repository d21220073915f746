"""The base class of all sections of a job, and sections whose settings depend on their `name`."""

from types import UnionType
from typing import Annotated, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A section of the job: frozen, without unknown keys, and without silent casts from text to number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


Largest = 2**31 - 1  # upper limit of counts and areas; anything larger is a typing error
Count = Annotated[int, Field(ge=1, le=Largest)]
CountOrZero = Annotated[int, Field(ge=0, le=Largest)]


def read_variant(*variants: type[Section]) -> BeforeValidator:
    """Return the validator that prepares a section for a union of `variants`, which pydantic tells apart by `name`.

    The name alone is a section, and a section without a name is the first variant. Settings of other variants are
    dropped if they have their default: earlier versions wrote every setting into `resolved.json`.
    """
    by_name = {variant.model_fields["name"].default: variant.model_fields for variant in variants}
    defaults = {key: field.default for fields in by_name.values() for key, field in fields.items()}

    def read(value: object) -> object:
        value = {"name": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            return value
        value = {"name": next(iter(by_name)), **value}
        own = by_name.get(str(value["name"]), defaults)  # of an unknown variant all, since pydantic will refuse it
        return {k: v for k, v in value.items() if k in own or k not in defaults or v != defaults[k]}

    return BeforeValidator(read)


def sections_of(annotation: object) -> list[type[BaseModel]]:
    """Return the sections that a field may hold: one, all variants of a union, or none where it holds a value."""
    options = (annotation, *get_args(annotation))
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def has_alternatives(annotation: object) -> bool:
    """Return whether a field may hold values of several types, None aside, and not only sections."""
    options = [option for option in get_args(annotation) if option is not type(None)]
    union = get_origin(annotation) in (Union, UnionType)
    return union and len(options) > 1 and len(sections_of(annotation)) < len(options)


def without_variant(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return a location of a pydantic error as the keys of the file: a union puts the variant's name behind them."""
    return location[:1] + location[2:] if location[:1] in (("method",), ("task",)) else location
