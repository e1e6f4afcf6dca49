"""Config fields that may count the units of a pattern, where an architecture has no table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from llmprune.model.matrices import block_matrices
from llmprune.structured.fields import fields_of

FFN = ("intermediate", "ffn", "inner", "dff", "ff_", "_ff", "feed_forward", "mlp")  # words in the fields that count channels


@dataclass(frozen=True)
class Count:
    """Config fields that count units: (field, its value per unit), all changed together."""

    fields: tuple[tuple[str, int], ...]
    units: int
    fixed: tuple[tuple[str, Any], ...] = ()


def channel_counts(model: PreTrainedModel, path: str) -> Iterator[Count]:
    """Fields that are as large as the input of some matrix, or twice that, and fields that are unset."""
    widths = {m.columns for block in model.get_submodule(path).children() for m in block_matrices(block)}
    for name, value in fields_of(model.config.to_dict()):
        if not any(word in name.rpartition(".")[2] for word in FFN):
            continue
        several = isinstance(value, list | tuple) and value and len({*map(str, value)}) == 1
        number = value[0] if several else value
        if type(number) is int and number > 2:
            yield from (Count(((name, each),), number // each) for each in (1, 2) if number % each == 0 and number // each in widths)
        elif value is None:
            yield from (Count(((name, 1),), width) for width in sorted(widths))


COUNTS = {"channels": channel_counts}
