"""Statistics by the names of their fields: what a method may ask for, their shapes in another order of channels, sums that add up.

Shapes: T = tokens, R = output rows, C = input columns.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_windows
from torch import Tensor

from llmprune.methods import KINDS, build, names
from llmprune.model.matrices import Selection
from llmprune.pruners.matrix import solve_at
from llmprune.pruners.plan import Work
from llmprune.ratios.measured import dense_gradients, measure, seen_with_gradients
from llmprune.recipe.recipe import Recipe
from llmprune.statistics.gradients import loss_gradients
from llmprune.statistics.stages import accumulate_cross, at_once
from llmprune.statistics.sums import accumulate_input
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.live import LiveStream
from llmprune.stream.selected import selected
from llmprune.types import SILENT, STATISTICS, Stats, shape_of, statistics_of

R, C = 6, 8
IDS_NL = tiny_windows(4, 16)
INPUTS = statistics_of("inputs")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def summed(value_TC: Tensor, dense_TC: Tensor) -> Stats:
    stats = Stats()
    accumulate_input(stats, value_TC, INPUTS)
    accumulate_cross(stats, value_TC, dense_TC)
    assert stats.gram_CC is not None
    stats.gram_CC = stats.gram_CC.tril() + stats.gram_CC.tril(-1).T  # as when the sums are finished
    return stats


def test_every_field_says_what_it_is() -> None:
    roles = {f.name: f.metadata["role"] for f in fields(Stats)}
    assert {name for name, role in roles.items() if role == "derived"} == {"shrunk", "beside_C", "factors"}
    assert {name for name, role in roles.items() if role == "own"} == {"norm_scale_C", "first_grad_RC", "several"}
    assert all(shape_of(f.name) in ("R", "C", "RC", "CC", "BQQ") for f in fields(Stats) if "Tensor" in str(f.type))
    assert len(STATISTICS) == len({f.name for f in STATISTICS.values()})


def test_methods_ask_for_what_there_is() -> None:
    asked = {(kind, name): vars(type(build(kind, name))).get("needs", frozenset()) for kind in KINDS for name in names(kind)}
    assert frozenset().union(*asked.values()) - STATISTICS.keys() == frozenset()


def test_the_page_names_every_statistic() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "extending.md").read_text()
    assert [stat for stat in STATISTICS if f"`{stat}`" not in page] == []


def test_another_order_of_channels_is_that_of_every_column() -> None:
    """The sums of permuted inputs; and every other tensor that has columns."""
    value_TC, dense_TC, order_C = random(40, C), random(40, C, seed=1), torch.randperm(C, generator=torch.Generator().manual_seed(2))
    ours, wanted = summed(value_TC, dense_TC).permuted(order_C), summed(value_TC[:, order_C], dense_TC[:, order_C])
    for name, value in wanted.accumulated():
        torch.testing.assert_close(vars(ours)[name], value, rtol=1e-6, atol=1e-5)
    sizes = {"R": R, "C": C, "B": 1, "Q": R}
    made = {f.name: random(*(sizes[letter] for letter in shape_of(f.name))) for f in fields(Stats) if "Tensor" in str(f.type)}
    moved = Stats(tokens=3, **made, factors={"of": "the old order"}).permuted(order_C)
    assert (moved.tokens, moved.factors) == (3, {})
    for name, value in made.items():
        expected = value if "C" not in shape_of(name) else value[..., order_C]
        assert torch.equal(vars(moved)[name], expected[order_C] if shape_of(name) == "CC" else expected), name


def test_sums_of_both_halves_are_those_of_all() -> None:
    value_TC, dense_TC = random(40, C), random(40, C, seed=1)
    both = summed(value_TC[:15], dense_TC[:15]) + summed(value_TC[15:], dense_TC[15:])
    whole = summed(value_TC, dense_TC)
    assert both.tokens == whole.tokens == 40
    names = [name for name, _ in whole.accumulated()]
    assert names == [name for name, _ in both.accumulated()] == ["input_sq_C", "input_sum_C", "gram_CC", "cross_CC"]
    for (_, ours), (_, wanted) in zip(both.accumulated(), whole.accumulated(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


def test_what_no_token_reached_adds_nothing_and_what_is_derived_is_left_out() -> None:
    stats = summed(random(10, C), random(10, C, seed=1))
    stats.factors["of"] = stats.beside_C = torch.ones(C)
    stats.norm_scale_C = torch.ones(C)
    for both in (stats + Stats(), Stats() + stats):
        assert all(torch.equal(ours, wanted) for (_, ours), (_, wanted) in zip(both.accumulated(), stats.accumulated(), strict=True))
        assert both.tokens == 10
        assert both.norm_scale_C is stats.norm_scale_C
        assert both.factors == {}
        assert both.beside_C is None


def test_gradients_of_both_halves_are_those_of_all() -> None:
    stream = LiveStream(tiny_model("llama"))
    matrices, needs = selected(stream, Selection()), statistics_of("loss", "window losses")
    first, second, whole = (loss_gradients(stream, ids_NL, matrices, needs) for ids_NL in (IDS_NL[:1], IDS_NL[1:], IDS_NL))
    for index, ms in matrices.items():
        for m in ms:
            parts = [Stats(**found.fields(index, m.name)) for found in (first, second, whole)]
            both, wanted = parts[0] + parts[1], parts[2]
            assert (both.grad_tokens, both.grad_windows) == (wanted.grad_tokens, wanted.grad_windows) == (IDS_NL.numel(), len(IDS_NL))
            assert both.first_grad_RC is parts[0].first_grad_RC
            for (name, ours), (_, theirs) in zip(both.accumulated(), wanted.accumulated(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()), msg=name)


@pytest.mark.parametrize(("ask", "shrinks"), [({"quality": "fast"}, True), ({"method": "alps"}, False)], ids=str)
@torch.no_grad()
def test_curves_of_few_tokens_rest_on_what_a_run_prunes_by(ask: dict[str, Any], shrinks: bool) -> None:
    """64 tokens for 32 or 48 inputs: few by our recipes, enough by the papers'. The method prunes by the shrunk sums; errors count by the sums."""
    stream = LiveStream(tiny_model("llama"))
    plan = Recipe(model="llama", sparsity=0.5, allocation="sensitivity", **ask).plan()
    matrices = selected(stream, Selection(only="mlp"))
    gradients = loss_gradients(stream, IDS_NL, matrices, frozenset({"grad_out_sq"}))
    found = measure(Work(stream, IDS_NL, plan, matrices, gradients), SILENT)[""]
    flow = Flow(stream, IDS_NL)
    with stream.block(0) as block:
        statistics = at_once(flow, 0, block, matrices[0], plan.needs | {"gram", "grad_out_sq"}, Clock())
        sums = {name: stats.gram_CC.clone() for name, stats in statistics.items() if stats.gram_CC is not None}
        grown = {id(stats): 3 * (len(sums[name]) / stats.tokens - 1 / 64) for name, stats in statistics.items()}
        for stats in {id(s): s for s in statistics.values()}.values() if shrinks else ():
            stats.shrunk = grown[id(stats)]
            assert stats.gram_CC is not None
            stats.gram_CC.diagonal().mul_(1 + stats.shrunk)
        gradients.add_to(0, statistics)
        for m in matrices[0]:
            name, stats = f"{stream.path_of(0)}.{m.name}", statistics[m.name]
            assert stats.grad_out_sq_R is not None
            ratios, errors = found[name]
            for ratio, error in zip(ratios.tolist(), errors.tolist(), strict=True):
                apart_RC = (m.view(block) - solve_at(m.view(block).float(), stats, plan, ratio, name).weight_RC).double()
                rows_R = ((apart_RC @ sums[m.name].double()) * apart_RC).sum(1)
                assert error == pytest.approx(float((rows_R * stats.grad_out_sq_R / stats.grad_tokens).sum()), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(
    ("ask", "with_gradients"),
    [
        ({}, True),
        ({"method": "wanda", "allocation": "fisher"}, True),
        ({"allocation": "owl"}, True),
        ({"allocation": "sensitivity"}, False),  # prunes each matrix on trial, for which it needs the Gram matrix
        ({"method": "sparsegpt", "allocation": "owl"}, False),  # no gradients, so there is no forward of theirs
        ({"method": "sparsegpt"}, False),  # uniform ratios need nothing
    ],
)
def test_an_allocation_takes_its_sums_of_inputs_from_the_forward_of_the_gradients(
    ask: dict[str, Any], with_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where column sums are all that it looks at: its measures are those of a forward of its own, which it then does not make."""
    stream = LiveStream(tiny_model("llama"))
    plan = Recipe(model="llama", sparsity=0.5, **ask).plan()
    matrices = selected(stream, Selection())
    assert bool(seen_with_gradients(plan)) == with_gradients
    if not with_gradients:
        return
    gradients = dense_gradients(stream, IDS_NL, matrices, [plan], SILENT)
    assert gradients is not None
    with monkeypatch.context() as patch:
        patch.delattr("llmprune.ratios.measured.survey")  # which goes forward
        found = measure(Work(stream, IDS_NL, plan, matrices, gradients), SILENT)[""]
    gradients.inputs = {}
    monkeypatch.setattr("llmprune.ratios.measured.seen_with_gradients", lambda plan: frozenset())
    expected = measure(Work(stream, IDS_NL, plan, matrices, gradients), SILENT)[""]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=0, msg=name)
