"""Options of methods: the fields of their dataclasses, which a recipe's table ``[options]`` sets.

A field of a plain type is an option; ``Annotated[float, Field(ge=0, description="...")]`` says its range and its meaning.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from llmprune.errors import RequestError

PLAIN = (float, int, str, bool)


@dataclass(frozen=True)
class Option:
    """One option of a method. hint: its type, with its range. meaning: empty where the method does not say it."""

    name: str
    hint: Any
    default: Any
    meaning: str

    @property
    def kind(self) -> str:
        plain = _plain(self.hint)
        return " | ".join(map(repr, get_args(plain))) if get_origin(plain) is Literal else str(plain.__name__)

    def __str__(self) -> str:
        default = "" if self.default is MISSING else f" = {self.default!r}"
        return f"{self.name}: {self.kind}{default}" + (f"  {self.meaning}" if self.meaning else "")

    def read(self, value: Any) -> Any:
        """The value in the option's type. Raises RequestError for another type, or one that is out of range."""
        try:
            return TypeAdapter(self.hint).validate_python(value, strict=True)
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            raise RequestError(f"option {self.name} {value!r}: {said[0].lower()}{said[1:]}", str(self)) from None


def options_of(cls: type[Any]) -> dict[str, Option]:
    """The options of a method's class, in its order."""
    hints = get_type_hints(cls, include_extras=True)
    found = [f for f in fields(cls) if f.init and (_plain(hints[f.name]) in PLAIN or get_origin(_plain(hints[f.name])) is Literal)]
    return {f.name: Option(f.name, hints[f.name], f.default, _meaning(hints[f.name])) for f in found}


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _meaning(hint: Any) -> str:
    said = [m.description for m in get_args(hint)[1:] if isinstance(m, FieldInfo)] if get_origin(hint) is Annotated else []
    return next((text for text in said if text), "")
