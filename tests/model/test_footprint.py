"""The memory plan: its terms follow the model and the windows, it is refused where it cannot fit, and Gram matrices that do not fit wait."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuts import tiny
from families import tiny_windows

import llmprune
from llmprune.errors import RequestError
from llmprune.methods import build, find, names
from llmprune.recipe.reading import read_recipe
from llmprune.run.footprint import footprint
from llmprune.run.prepare import prepare
from llmprune.statistics import stages as statistics
from llmprune.stream.hidden_states import memory_limit

IDS = tiny_windows(8, 24)


def planned(folder: Path, windows: torch.Tensor = IDS, **options):
    recipe = read_recipe(None, {"model": str(folder), "output": str(folder.parent / "out"), "sparsity": 0.5, **options})
    return prepare(recipe, windows).footprint


def test_terms_are_those_of_the_shapes(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    found = planned(tmp_path / "model", method="sparsegpt", eval=[])
    terms = next(p.terms for p in found.phases if p.name == "prunes a block")
    block = model.model.layers[0]
    assert terms["a block's weights"] == 4 * sum(p.numel() for p in block.parameters())
    inputs = (32, block.self_attn.o_proj.in_features, 32, 48)  # q, k, v; o; gate, up; down
    assert terms["Gram matrices"] == 4 * sum(c**2 for c in inputs)
    calibration = IDS.numel() * 32 * 4
    assert 0 < terms["hidden states"] <= 2 * calibration
    twice = planned(tmp_path / "model", torch.cat([IDS, IDS]), method="sparsegpt")
    assert next(p.terms for p in twice.phases if p.name == "prunes a block")["hidden states"] > 1.5 * terms["hidden states"]


def test_gradients_keep_the_inputs_of_all_blocks(tmp_path, monkeypatch):
    """In memory where they fit, else in a file; and what the gradients are summed into is in a file."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    blocks, calibration = len(model.model.layers), IDS.numel() * 32 * 4
    for pattern in ({"pattern": "2:4", "sparsity": None}, {}):
        found = planned(tmp_path / "model", quality="balanced", eval=[], **pattern)
        for name in ("takes gradients", "takes the loss's gradient"):
            assert next(p.terms for p in found.phases if p.name == name)["inputs of the blocks"] == blocks * calibration
    sums = 4 * blocks * sum(m.out_features**2 for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear))
    assert found.spilled == sums
    trained = planned(tmp_path / "model", solver="kfac+reconstruct", target="asymmetric", eval=[])
    assert trained.spilled == sums + 4 * blocks * 32**2  # the metric of every block's outputs
    ranked = planned(tmp_path / "model", method="wanda", allocation="fisher", eval=[])
    assert "takes gradients" in {p.name for p in ranked.phases}
    monkeypatch.setattr("llmprune.run.footprint.memory_of", lambda device: 200 << 20)
    monkeypatch.setattr("llmprune.run.footprint._Estimate.hidden", lambda self: 60 << 20)
    assert planned(tmp_path / "model", quality="balanced", eval=[]).spilled >= sums + blocks * (60 << 20)


@pytest.mark.parametrize("options", [{"method": "sparsegpt"}, {"quality": "fast"}])
def test_gram_matrices_that_do_not_fit_wait_for_another_forward(options, tmp_path, monkeypatch):
    """The same zeros and weights as when all are held at once."""
    tiny("mixtral").save_pretrained(tmp_path / "model")
    found, most = [], []
    for room in (1 << 40, 3 * 4 * 48**2):
        monkeypatch.setattr(statistics, "memory_of", lambda device, room=room: room * statistics.GRAM_SHARE)
        fitting = statistics.fitting
        monkeypatch.setattr(statistics, "fitting", lambda *about, f=fitting: most.append(len(f(*about))) or f(*about))
        output = tmp_path / f"out-{len(found)}"
        llmprune.prune(tmp_path / "model", 0.5, calibration=IDS, output=str(output), accept_damage=True, **options)
        found.append((output / "model.safetensors").read_bytes())
        monkeypatch.undo()
    assert max(most) > 1
    assert found[0] == found[1]


def test_what_cannot_fit_is_refused_with_the_largest_terms(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr("llmprune.run.footprint.memory_of", lambda device: 20 << 20)
    with pytest.raises(RequestError, match=r"memory: .* are needed while it .*, 21 MB are free; the largest terms are .* and "):
        planned(tmp_path / "model", method="wanda")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_solver_that_says_nothing_is_planned_as_the_hungriest(tmp_path):
    """It was planned as mask_only, which holds least."""
    tiny("llama").save_pretrained(tmp_path / "model")
    recipe = read_recipe(None, {"model": str(tmp_path / "model"), "output": str(tmp_path / "out"), "sparsity": 0.5, "solver": "sparsegpt"})
    job = prepare(recipe, IDS)

    def solving(solver):
        found = footprint(job.stream, replace(job.plan, solver=solver), job.matrices, job.data)
        return next(p.terms["solver"] for p in found.phases if p.name == "prunes a block")

    theirs = SimpleNamespace(needs=frozenset({"gram"}), own_score=True, solve=job.plan.solver.solve)
    ours = {name: solving(build("solvers", name)) for name in names("solvers") if "gram" in find("solvers", name).needs}
    assert solving(theirs) >= max(ours.values()) > 0
    assert solving(theirs) >= 56 * 48**2  # the widest matrix has 48 inputs


def test_a_limit_of_the_control_group_counts(tmp_path, monkeypatch):
    """What a container leaves."""
    (tmp_path / "memory.max").write_text("300000000\n")
    (tmp_path / "memory.current").write_text("200000000\n")
    monkeypatch.setattr("llmprune.stream.hidden_states.Path", lambda _, name: tmp_path / name)
    assert memory_limit() == 100_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit() > 100_000_000


def test_a_limit_of_address_space_counts(tmp_path):
    """What ``ulimit -v`` leaves."""
    code = (
        "import resource, psutil; from llmprune.stream.hidden_states import memory_limit; "
        "resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (100 << 20), resource.RLIM_INFINITY)); "
        "print(memory_limit())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 50 << 20 < int(out) <= 100 << 20
