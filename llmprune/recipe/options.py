"""Options of methods: the fields of their dataclasses, which a recipe's table ``[options]`` sets.

A field of a plain type is an option; ``Annotated[float, Field(ge=0, description="...")]`` says its range and its meaning.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from llmprune.errors import RequestError, first_line
from llmprune.methods import check_name

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


@dataclass(frozen=True)
class Part:
    """A method that a recipe is made of. role: how [options] calls it, as in ``solver.damping``. said: fields that the recipe sets elsewhere."""

    role: str
    name: str
    cls: type[Any]
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Option]:
        return {name: option for name, option in options_of(self.cls).items() if name not in self.said}

    def make(self, given: dict[str, Any], seed: int) -> Any:
        """The method. given: its options; one named ``seed`` is the recipe's unless it is given. Raises RequestError for values that it refuses."""
        seeded = {"seed": seed} if "seed" in self.options else {}
        try:
            return self.cls(**self.said | seeded | given)
        except ValueError as error:
            raise RequestError(f"{self.role} {self.name}: {first_line(error)}", f"see llmprune methods {self.name}") from None


def options_of(cls: type[Any]) -> dict[str, Option]:
    """The options of a method's class, in its order."""
    hints = get_type_hints(cls, include_extras=True)
    found = [f for f in fields(cls) if f.init and (_plain(hints[f.name]) in PLAIN or get_origin(_plain(hints[f.name])) is Literal)]
    return {f.name: Option(f.name, hints[f.name], f.default, _meaning(hints[f.name])) for f in found}


def assigned(options: dict[str, Any], parts: list[Part]) -> dict[str, dict[str, Any]]:
    """Role -> its options, read. An option is named alone where one part has it, as ``role.name`` anywhere.

    Raises RequestError for one that no part has, or more than one, for a value that is none, and for one that is named twice.
    """
    found: dict[str, dict[str, Any]] = {part.role: {} for part in parts}
    for key, value in options.items():
        role, _, name = key.rpartition(".")
        takers = [part for part in parts if name in part.options and role in ("", part.role)]
        if not takers:
            check_name("option", key, _known(parts))
        if len(takers) > 1:
            raise RequestError(f"option {key!r} is one of {' and '.join(p.role for p in takers)}", f"write {takers[0].role}.{name}")
        if name in found[takers[0].role]:
            raise RequestError(f"option {key!r} is given twice", "name it once")
        found[takers[0].role][name] = takers[0].options[name].read(value)
    return found


def _known(parts: list[Part]) -> list[str]:
    """What may be named: an option alone where one part has it, with its role otherwise."""
    every = [name for part in parts for name in part.options]
    return [name if every.count(name) == 1 else f"{part.role}.{name}" for part in parts for name in part.options]


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _meaning(hint: Any) -> str:
    said = [m.description for m in get_args(hint)[1:] if isinstance(m, FieldInfo)] if get_origin(hint) is Annotated else []
    return next((text for text in said if text), "")
