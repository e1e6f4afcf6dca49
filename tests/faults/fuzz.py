"""Arbitrary and nearly valid input for the two readers of strangers' files: safetensors headers and recipes.

Whatever comes, they raise nothing but llmprune's own errors; and a weight file that is taken is one that safetensors takes too.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from llmprune.checkpoint.source import open_folder
from llmprune.errors import LlmpruneError
from llmprune.recipe.reading import read_recipe
from llmprune.recipe.recipe import Recipe

NUMBERS = st.one_of(st.integers(-2, 20), st.integers(), st.floats(), st.booleans(), st.none())
ANYTHING = st.recursive(
    NUMBERS | st.text(max_size=8), lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part, max_size=3)
)
DTYPE = st.sampled_from(("F32", "F16", "BF16", "I64", "U8", "F8_E4M3", "BOOL", "F4", "f32", "")) | ANYTHING


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A file whose header is right, or wrong in some of its entries, lengths or bytes."""
    header: dict[str, Any] = {}
    at = 0
    for name in draw(st.lists(st.text(max_size=6), max_size=4, unique=True)):
        rows, columns = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [at, at + 4 * rows * columns]}
        at += 4 * rows * columns
        if draw(st.integers(0, 3)) == 0:
            header[name][draw(st.sampled_from(("shape", "data_offsets", "extra")))] = draw(ANYTHING)
        if draw(st.integers(0, 3)) == 0:
            header[name]["dtype"] = draw(DTYPE)
        if draw(st.integers(0, 9)) == 0:
            header[name] = draw(ANYTHING)
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.just({"format": "pt"}) | ANYTHING)
    raw = bytearray(json.dumps(header).encode() + b" " * draw(st.integers(0, 3)))
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 3)))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    length = len(raw) + draw(st.sampled_from((0, 0, 0, 0, 1, -1, 2**40)))
    return struct.pack("<Q", max(0, length)) + bytes(raw) + bytes(at + draw(st.sampled_from((0, 0, 0, 1, -1))) if at else 0)


VALUES = ANYTHING | st.sampled_from(
    ("2:4", "0:0", "block:4x4", "channels", "50%", "-1", "1e9", "nan", "llama", "wanda", "balanced", "fisher", "kd", "(", "float32", "900M", "1.2GB")
)
RIGHT = (
    *(("pattern", "2:4"), ("pattern", "channels"), ("quality", "max"), ("method", "wanda"), ("criterion", "magnitude"), ("allocation", "fisher")),
    *(("samples", 4), ("seed", 7), ("skip", "q_proj"), ("eval", ["c4"]), ("dtype", "float32"), ("target_params", "900M"), ("group", "row")),
)


def toml(value: Any) -> str:
    """TOML as near as it can say a value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return str(value).lower() if isinstance(value, bool | float) or value is None else json.dumps(value, ensure_ascii=False)


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    """Keys of a recipe, or nearly so, with values of all kinds."""
    keys = draw(st.lists(st.sampled_from(sorted(Recipe.model_fields)) | st.text(max_size=6), max_size=draw(st.sampled_from((0, 1, 6))), unique=True))
    named = dict(draw(st.lists(st.sampled_from(RIGHT), max_size=3))) | {key: draw(VALUES) for key in keys}
    if draw(st.booleans()):
        named |= {"model": "llama", "sparsity": 0.5}
    text = "\n".join(f"{key if key.isidentifier() and key.isascii() else json.dumps(key)} = {toml(value)}" for key, value in named.items())
    return text.encode(errors="replace")


def read_header(folder: Path, data: bytes) -> str:
    (folder / "model.safetensors").write_bytes(data)
    try:
        source = open_folder(folder, "m")
    except LlmpruneError as error:
        assert_one_line(error)
        return "refused"
    try:
        theirs = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in deserialize(data)}
    except SafetensorError as error:
        raise AssertionError(f"taken, but safetensors says {error}") from None
    assert {name: (entry.dtype, entry.shape) for name, entry in source.tensors.items()} == theirs
    return "taken"


def read_toml(folder: Path, data: bytes) -> str:
    path = folder / "recipe.toml"
    path.write_bytes(data)
    try:
        read_recipe(path, {})
    except LlmpruneError as error:
        assert_one_line(error)
        return "refused"
    return "taken"


def assert_one_line(error: LlmpruneError) -> None:
    assert error.message.isprintable(), error.message
    assert error.hint.isprintable(), error.hint


READERS: dict[str, tuple[Callable[[Path, bytes], str], st.SearchStrategy[bytes]]] = {
    "headers": (read_header, headers() | st.binary(max_size=200)),
    "recipes": (read_toml, recipes() | st.binary(max_size=200)),
}


def fuzz(count: int, which: str, derandomize: bool = True) -> Counter[str]:
    """How many of ``count`` inputs of one kind were taken and refused; whatever else happens is raised, with the smallest input that does it."""
    read, inputs = READERS[which]
    ends: Counter[str] = Counter()
    checks = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text("{}")

        @settings(
            max_examples=count,
            derandomize=derandomize,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=checks,
        )
        @given(inputs)
        def one(data: bytes) -> None:
            ends[read(Path(place), data)] += 1

        one()
    return ends


def fuzzed(count: int) -> tuple[str, str]:
    """(the figure: so many inputs, none with an exception but llmprune's own; how many of each kind were taken). Raises what one has raised."""
    found = {which: fuzz(count // len(READERS), which, derandomize=False) for which in READERS}
    return f"{sum(map(Counter.total, found.values())):,}", ", ".join(f"{which}: {dict(ends)}" for which, ends in found.items())


if __name__ == "__main__":
    import sys

    print("\n".join(fuzzed(int(sys.argv[1]) if len(sys.argv) > 1 else 4000)))
