"""A budget of time: the search for the sparsity, and what it counts as the same kind of block."""

from __future__ import annotations

from time import sleep
from types import SimpleNamespace

import pytest
import torch
from families import tiny_model

from llmprune.errors import RequestError
from llmprune.ratios import latency
from llmprune.ratios.latency import first_units, kind_of, seconds, sparsity_for
from llmprune.structured.structure import structure_of


class Linear:
    """Stands in for the clock: 40 % of the time is outside of what can be cut."""

    def __init__(self, stream: object, ids_1L: torch.Tensor) -> None:
        assert ids_1L.shape == (1, 16)

    def ratio(self, sparsity: float) -> float:
        return 0.4 + 0.6 * (1 - sparsity)


def stream_of(pattern: str, blocks: int) -> SimpleNamespace:
    return SimpleNamespace(names=[str(i) for i in range(blocks)], structure=SimpleNamespace(name=pattern))


@pytest.mark.parametrize(("ratio", "expected"), [(0.7, 0.5), (0.95, 1 / 12), (0.56, 11 / 15)])
def test_the_least_sparsity_within_the_time(monkeypatch: pytest.MonkeyPatch, ratio: float, expected: float) -> None:
    monkeypatch.setattr(latency, "Timer", Linear)
    found = sparsity_for(stream_of("channels", 4), torch.zeros(3, 16), ratio)
    assert expected <= found <= expected + 0.95 / 2**8
    layers = sparsity_for(stream_of("layers", 4), torch.zeros(3, 16), ratio)
    assert layers * 4 == round(layers * 4)
    assert expected <= layers < expected + 1 / 4


def test_time_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "Timer", Linear)
    with pytest.raises(RequestError, match=r"target_latency_ratio 0\.3: 0\.43 is the least that channels can reach"):
        sparsity_for(stream_of("channels", 4), torch.zeros(3, 16), 0.3)
    with pytest.raises(RequestError, match=r"target_latency_ratio 0\.5: 0\.55 is the least that layers can reach"):
        sparsity_for(stream_of("layers", 4), torch.zeros(3, 16), 0.5)


def test_the_clock_is_the_machines() -> None:
    def work() -> torch.Tensor:
        sleep(0.02)
        return torch.ones(1)

    assert seconds(work) >= 0.02


def test_units_are_as_many_as_a_run_would_leave() -> None:
    model = tiny_model("llama")
    structure = structure_of(model, [f"model.layers.{i}" for i in range(3)], "structured", lambda name: True)
    assert len({kind_of(structure, index) for index in range(3)}) == 1
    keeps = first_units(structure, 1, 0.5)
    assert {name: len(units) for name, units in keeps.items()} == {"mlp": 24, "self_attn.groups": 1}
    assert first_units(structure, 1, 0.0) == {}
