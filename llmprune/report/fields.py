"""A JSON file as typed values: a missing field, or one of another type, is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmprune.checkpoint.files import check_format
from llmprune.errors import RequestError

REQUIRED: Any = object()


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def typed(kind: Any, value: Any) -> Any:
    """A JSON value converted to a type, such as a frozen dataclass. Raises ValidationError: 3 is a float, but "3" is not."""
    return _adapter(kind).validate_json(json.dumps(value), strict=True)


@dataclass(frozen=True)
class Fields:
    """The content of a file of a known format. name: of the file; what: the kind of file expected, for hints."""

    content: Mapping[str, Any]
    name: str
    what: str

    def __post_init__(self) -> None:
        if not isinstance(self.content, Mapping):
            raise self.refusal("is not a JSON object")
        check_format(self.content, self.name)

    def get(self, path: str, kind: Any, default: Any = REQUIRED) -> Any:
        """The value at a path such as ``sparsity.asked``. Raises RequestError where it is missing without a default, or not of that type."""
        value: Any = self.content
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                if default is REQUIRED:
                    raise self.refusal(f"has no {path!r}")
                return default
            value = value[key]
        try:
            return typed(kind, value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join([path, *(str(part) for part in first["loc"])])
            raise self.refusal(f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None

    def refusal(self, said: str) -> RequestError:
        return RequestError(f"{self.name}: {said}", f"give {self.what}, made by this version of llmprune")
