"""How methods are found: one public dataclass a file, helpers beside it, what they say of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest

import llmprune.solvers
from llmprune import methods
from llmprune.errors import RequestError
from llmprune.methods import DEFAULTS, KINDS, find, names, public_class, trait


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A folder whose files are found beside those of llmprune/solvers."""
    monkeypatch.setattr(llmprune.solvers, "__path__", [*llmprune.solvers.__path__, str(tmp_path)])
    return tmp_path


def test_a_helper_beside_a_method_is_no_method(beside):
    (beside / "_sums.py").write_text("HALF = 0.5\n")
    assert "_sums" not in names("solvers")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def solve(weight_RC): ...", "has no public dataclass"),
        ("class Mine: ...", "has no public dataclass"),
        ("import dataclasses\n@dataclasses.dataclass\nclass _Mine: ...", "has no public dataclass"),
        ("from dataclasses import dataclass\n@dataclass\nclass A: ...\n@dataclass\nclass B: ...", "has the public dataclasses A, B"),
    ],
)
def test_a_file_without_one_public_dataclass_is_refused_in_a_line(beside, request, text, says):
    name = f"odd{abs(hash(request.node.name))}"
    (beside / f"{name}.py").write_text(text)
    with pytest.raises(RequestError, match=f"llmprune.solvers.{name}: {says}"):
        find("solvers", name)


def test_the_one_public_class_is_found_among_helpers_and_imports():
    module = ModuleType("mine")
    mine, helper = dataclass(type("Mine", (), {"__module__": "mine"})), dataclass(type("_Part", (), {"__module__": "mine"}))
    vars(module).update(Mine=mine, _Part=helper, Elsewhere=dataclass(type("Elsewhere", (), {"__module__": "elsewhere"})))
    assert public_class(module) is mine


def test_what_methods_say_of_themselves():
    said = {trait_: sorted(n for kind in KINDS for n in names(kind) if trait(find(kind, n), trait_) != DEFAULTS[trait_]) for trait_ in DEFAULTS}
    assert said["units_only"] == ["block_obs", "taylor"]
    assert said["by_slab"] == ["sparsegpt"]
    assert said["tried"] == ["auto", "search"]
    assert said["fits_blocks"] == ["reconstruct"]


def test_the_default_memory_is_the_most_of_any_solver():
    """Of each of the two numbers."""
    ours = [trait(find("solvers", name), "work") for name in names("solvers")]
    assert DEFAULTS["work"] == tuple(map(max, zip(*ours, strict=True)))


def test_typed_doors_build_what_they_say():
    assert type(methods.criterion("wanda")) is find("criteria", "wanda")
    assert methods.solver("refit", steps=3).steps == 3
    assert methods.pattern("nm", n=1, m=4).levels == (0.0, 0.25, 0.5, 0.75)
    assert type(methods.allocation("owl")) is find("allocation", "owl")
