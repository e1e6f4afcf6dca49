"""Options of methods: the fields of their dataclasses, from a recipe's table to the method, checked by type and range."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Literal

import pytest
import torch
from families import tiny_model, tiny_windows
from pydantic import Field

import llmprune
from llmprune.errors import RequestError
from llmprune.methods import KINDS, find, names
from llmprune.recipe.options import options_of
from llmprune.recipe.parts import Part, assigned
from llmprune.recipe.reading import read_recipe
from llmprune.recipe.values import read_toml


@dataclass(frozen=True)
class Mine:
    power: Annotated[float, Field(gt=0, lt=2, description="of the norm")] = 0.5
    order: Literal["up", "down"] = "up"
    steps: int = 3
    even: bool = False
    levels: tuple[float, ...] = ()
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.even and self.steps % 2:
            raise ValueError(f"{self.steps} steps are not even")


PART = Part("criterion", "criteria", "mine", Mine)


def recipe(**values):
    return read_recipe(None, {"model": "llama", "sparsity": 0.5} | values)


def test_options_are_the_plain_fields_with_type_default_and_meaning():
    assert [str(option) for option in options_of(Mine).values()] == [
        "power: float = 0.5  of the norm",
        "order: 'up' | 'down' = 'up'",
        "steps: int = 3",
        "even: bool = False",
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"power": "big"}, "option power 'big': input should be a valid number"),
        ({"power": 2.0}, "option power 2.0: input should be less than 2"),
        ({"power": True}, "option power True: input should be a valid number"),
        ({"steps": 1.5}, "option steps 1.5: input should be a valid integer"),
        ({"order": "left"}, "option order 'left': input should be 'up' or 'down'"),
        ({"powr": 1.0}, "option 'powr' is unknown"),
        ({"levels": 1.0}, "option 'levels' is unknown"),
        ({"needs": "gram"}, "option 'needs' is unknown"),
        ({"solver.power": 1.0}, "option 'solver.power' is unknown"),
        ({"power": 1.0, "criterion.power": 1.0}, "option 'criterion.power' is given twice"),
    ],
)
def test_what_no_option_can_be_is_refused(given, says):
    with pytest.raises(RequestError) as refused:
        assigned(given, [PART])
    assert says in refused.value.message
    assert refused.value.hint


def test_a_value_that_the_method_refuses_becomes_a_line():
    with pytest.raises(RequestError, match="criterion mine: 3 steps are not even"):
        PART.make({"even": True}, 0)


def test_an_option_goes_to_the_part_that_has_it():
    made = recipe(criterion="ria", solver="refit", allocation="owl", options={"power": 1, "steps": 7, "width": 0.1, "damping": 0.05}).made()
    assert (made["criterion"].power, made["solver"].steps, made["solver"].damping, made["allocation"].width) == (1.0, 7, 0.05, 0.1)


def test_an_option_of_two_parts_needs_its_role():
    with pytest.raises(RequestError, match="option 'damping' is one of criterion and solver") as refused:
        recipe(criterion="obs", solver="refit", options={"damping": 0.1})
    assert refused.value.hint == "write criterion.damping"
    made = recipe(criterion="obs", solver="refit", options={"solver.damping": 0.1}).made()
    assert (made["criterion"].damping, made["solver"].damping) == (0.01, 0.1)


def test_the_solver_over_blocks_has_a_role_of_its_own():
    made = recipe(criterion="wanda", solver="refit+reconstruct", options={"solver.steps": 5, "block_solver.steps": 9}).made()
    assert (made["solver"].steps, made["block_solver"].steps) == (5, 9)
    made = recipe(criterion="wanda", solver="reconstruct", options={"steps": 9}).made()
    assert made["solver"] is made["block_solver"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"options": {"n": 1}, "pattern": "2:4", "sparsity": None}, "option 'n' is unknown"),  # the spelling says it
        ({"options": {"group": "row"}}, "option 'group' is unknown"),  # the recipe has a key for it
        ({"options": {"damping": -1.0}}, "option damping -1.0: input should be greater than or equal to 0"),
        ({"options": {"damping": [1]}}, "options.damping"),
        ({"options": {"damping": 0.1}, "pattern": "layers"}, "option 'damping' is unknown"),
    ],
)
def test_options_are_checked_with_the_recipe(values, says):
    with pytest.raises(RequestError) as refused:
        recipe(**values)
    assert says in refused.value.message


def test_a_recipe_file_has_a_table_of_options_and_flags_go_on_top(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('model = "llama"\nsparsity = 0.5\nsolver = "admm"\n\n[options]\ndamping = 0.02\niterations = 40\n')
    assert read_toml(file)["options"] == {"damping": 0.02, "iterations": 40}
    read = read_recipe(file, {"options": {"damping": 0.03}})
    assert (read.made()["solver"].damping, read.made()["solver"].iterations) == (0.03, 40)


def test_options_are_part_of_what_a_run_is_known_by():
    """However they are named."""
    short, long = (recipe(solver="admm", options={name: 0.02}).resolved() for name in ("damping", "solver.damping"))
    assert short == long
    assert short["options"] == {"solver.damping": 0.02}
    assert short != recipe(solver="admm", options={"damping": 0.03}).resolved()
    assert recipe(solver="admm").resolved()["options"] == {}


@pytest.mark.parametrize(
    ("values", "role"),
    [({"criterion": "random"}, "criterion"), ({"allocation": "search"}, "allocation"), ({"criterion": "wanda", "solver": "reconstruct"}, "solver")],
)
def test_a_method_that_draws_takes_the_recipes_seed(values, role):
    assert recipe(**values, seed=7).made()[role].seed == 7
    assert recipe(**values).made()[role].seed == 0
    assert recipe(**values, seed=7, options={"seed": 5}).made()[role].seed == 5


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in names(kind)])
def test_options_of_ours_say_what_they_mean(kind, name):
    """But for those that a recipe sets by its own keys; and defaults are in range."""
    for option in options_of(find(kind, name)).values():
        assert option.meaning or kind == "patterns" or option.name == "seed", option
        assert option.read(option.default) == option.default
    assert all(f.init for f in fields(find(kind, name)))


def test_what_takes_an_option_changes_by_it_and_by_the_seed():
    """The keyword of llmprune.prune is the recipe's table; seed 0 draws what it drew before there was one."""

    def weights(**asked):
        model = tiny_model("llama")
        report = llmprune.prune(model, 0.5, calibration=tiny_windows(), **asked)
        return report, {name: p for name, p in model.named_parameters() if name in {f"{r.matrix}" for b in report.blocks for r in b.rows}}

    def same(left, right):
        return all(left[name].equal(right[name]) for name in left)

    plain, first = weights(criterion="random")
    assert plain.recipe["seed"] == 0
    assert same(first, weights(criterion="random", seed=0)[1])
    assert not same(first, weights(criterion="random", seed=7)[1])
    assert same(first, weights(criterion="random", seed=7, options={"criterion.seed": 0})[1])
    name, kept = next(iter(first.items()))
    noise = torch.rand(kept.shape, generator=torch.Generator().manual_seed(0))  # what it drew before recipes' seeds reached it
    assert float(noise[kept != 0].mean()) > 0.7 > 0.3 > float(noise[kept == 0].mean()), name
    report, damped = weights(solver="sparsegpt", options={"damping": 10.0})
    assert report.recipe["options"] == {"solver.damping": 10.0}
    assert not same(damped, weights(solver="sparsegpt")[1])
