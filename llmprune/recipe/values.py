"""Values of a recipe from text and back: shares, counts, and TOML files."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmprune.errors import RequestError

MAX_RECIPE = 1 << 20
NUMBER = r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def read_share(value: Any) -> Any:
    """A number, or a text such as 0.5, 5e-1 or 50%, as a float; anything else as it is."""
    if isinstance(value, str):
        match = re.fullmatch(rf"\s*([-+]?){NUMBER}(%?)\s*", value)
        if not match:
            raise ValueError("is not a number")
        return float(match[1] + match[2]) / (100 if match[3] else 1)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def read_count(value: Any) -> Any:
    """A number, or a text such as 900M, 0.9B (billion) or 9e8, as a whole number; anything else as it is."""
    return _scaled(value, COUNTS, "is not a count (write 900000000, 9e8, 900M or 0.9B)")


def read_bytes(value: Any) -> Any:
    """A number of bytes, or a text such as 500B, 900MB, 1.2G or 1.2e9, as a whole number; anything else as it is."""
    return _scaled(value, BYTES, "is not a number of bytes (write 1200000000, 1.2e9 or 1.2GB)")


def _scaled(value: Any, units: dict[str, float], wrong: str) -> Any:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(rf"{NUMBER}([a-zA-Z]*)\s*", value)
    scaled = float(match[1]) * units.get(match[2].lower(), math.inf) if match else math.inf
    if not scaled < math.inf:
        raise ValueError(wrong)
    return round(scaled)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_RECIPE:
            raise RequestError(f"{path.name}: larger than {MAX_RECIPE} bytes", "this is not a recipe")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"recipe {path.name}: {error.strerror}", "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"recipe {path.name}: not valid TOML ({error})", 'write sparsity = 0.5 and pattern = "2:4"') from None


def as_toml(values: dict[str, Any]) -> Iterator[str]:
    """Lines of TOML. Its strings, numbers and lists are spelt as JSON's are; tables come last."""
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    for key, value in values.items():
        if key not in tables:
            yield f"{key} = {spelt(value)}"
    for key, table in tables.items():
        if table:
            yield f"\n[{key}]"
            yield from (f"{spelt(name)} = {spelt(value)}" for name, value in table.items())


def spelt(value: Any) -> str:
    """One value; of a table, an inline one."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{spelt(name)} = {spelt(said)}" for name, said in value.items()) + "}"
    """A value as TOML has it in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{spelt(name)} = {spelt(one)}" for name, one in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)  # TOML does not have JSON's escapes of characters beyond 16 bits


def listed(text: str) -> list[str]:
    """The parts of "a,b,c"."""
    return [part.strip() for part in text.split(",") if part.strip()]
