"""Values of a recipe out of text: shares, counts of parameters, bytes."""

from __future__ import annotations

from typing import Any

import pytest

from llmprune.errors import RequestError
from llmprune.recipe.reading import read_recipe


def read(**values: Any) -> Any:
    """The one field that is given, as a recipe of a structured pattern has it."""
    (name,) = values
    return getattr(read_recipe(None, {"model": "llama", "pattern": "channels"} | values), name)


@pytest.mark.parametrize(
    ("said", "share"),
    [("0.5", 0.5), (".5", 0.5), ("50%", 0.5), ("1e-1", 0.1), ("2.5E-1", 0.25), (" 5e1 % ", 0.5), ("0", 0.0), (0, 0.0), (0.25, 0.25)],
)
def test_shares(said: Any, share: float) -> None:
    assert read(sparsity=said) == share


@pytest.mark.parametrize("said", ["nan", "inf", "e-1", "1e", "5 0", "half", "", "0x1", True, float("nan")])
def test_what_is_not_a_share(said: Any) -> None:
    with pytest.raises(RequestError, match="sparsity"):
        read(sparsity=said)


@pytest.mark.parametrize(
    ("said", "count"),
    [("900M", 9 * 10**8), ("500B", 5 * 10**11), ("9e8", 9 * 10**8), ("12k", 12_000), ("1.5G", 15 * 10**8), (7, 7)],
)
def test_parameters_are_counted_in_thousands_millions_and_billions(said: Any, count: int) -> None:
    assert read(target_params=said) == count


@pytest.mark.parametrize(
    ("said", "count"),
    [("500B", 500), ("500 b", 500), ("1.2GB", 12 * 10**8), ("1.2G", 12 * 10**8), ("800kB", 800_000), ("3e5", 300_000), ("2TB", 2 * 10**12), (7, 7)],
)
def test_a_size_is_in_bytes(said: Any, count: int) -> None:
    assert read(target_size=said) == count


@pytest.mark.parametrize("budget", ["target_params", "target_size"])
@pytest.mark.parametrize("said", ["", "M", "1.2GiB", "50%", "-5", "0", "nan", "inf", "1e400", "1.5e308G", "9" * 400, 2.5])
def test_what_is_not_a_count(budget: str, said: Any) -> None:
    with pytest.raises(RequestError, match=budget):
        read(**{budget: said})


def test_parameters_are_not_bytes() -> None:
    with pytest.raises(RequestError, match="'3GB': is not a count"):
        read(target_params="3GB")
