"""The types of a recipe's values: how each is read from text, and what it refuses."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from llmprune.recipe.user_methods import UserClass, UserCriterion
from llmprune.recipe.values import read_bytes, read_count, read_share

MOST_INCREASE = 10.0


def _sparsity(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError('is outside 0 <= sparsity < 1 (half is 0.5 or "50%")')
    return value


def _increase(value: float) -> float:
    if not 0 < value <= MOST_INCREASE:
        raise ValueError(f'is outside 0 < increase <= {MOST_INCREASE:g} (five per cent is 0.05 or "5%")')
    return value


def _regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is not a regular expression ({error})") from None
    return value


def _method(value: Any) -> Any:
    if isinstance(value, str | UserCriterion | UserClass | None):
        return value
    raise ValueError("is not a name")


def _windows(value: Any) -> Any:
    """A number of windows, or "all"."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if value == "all" or (isinstance(number, int) and not isinstance(number, bool) and number > 0):
        return number
    raise ValueError("is neither a whole number above 0 nor all")


SHARE = BeforeValidator(read_share, json_schema_input_type=float | str)
Sparsity = Annotated[float, SHARE, AfterValidator(_sparsity)]  # in this order: a refusal shows the value as it was given
Increase = Annotated[float, SHARE, AfterValidator(_increase)]
Between = Annotated[float, Field(gt=0, lt=1), SHARE]
Count = Annotated[int, Field(gt=0), BeforeValidator(read_count, json_schema_input_type=int | str)]
Bytes = Annotated[int, Field(gt=0), BeforeValidator(read_bytes, json_schema_input_type=int | str)]
Windows = Annotated[int | str, PlainValidator(_windows, int | Literal["all"])]
Regex = Annotated[str, AfterValidator(_regex)]
MethodName = PlainValidator(_method, str | None)
