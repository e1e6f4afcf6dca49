"""What the checkpoint stores as tensors of their own are matrices of their own, also where the model makes one parameter of them.

Shapes: R = output rows, C = input columns, T = tokens.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from families import save_tiny, tiny_model, tiny_windows
from often import often
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.engine import prune
from llmprune.model.matrices import Matrix, Selection, block_matrices
from llmprune.pruners.choice import fine_pruner
from llmprune.pruners.plan import Work
from llmprune.recipe.recipe import Recipe
from llmprune.run.footprint import inputs_of
from llmprune.statistics.gradient_taps import Taps
from llmprune.statistics.sums import Watch
from llmprune.stream.live import LiveStream
from llmprune.stream.selected import numbered, selected, stored_matrices
from llmprune.stream.stream import Stream
from llmprune.types import SILENT

IDS_NL = tiny_windows()
APART = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "qwen3_next"]  # gate and up are stored apart
FUSED = ["phi3", "gpt_oss", "granitemoe", "llama4_text", "gpt2", "falcon_new"]
METHODS: list[dict[str, Any]] = [{"method": "magnitude"}, {"quality": "balanced"}, {"method": "sparsegpt", "pattern": "2:4", "permute": True}]


@pytest.mark.parametrize(
    ("family", "method"), often(product(APART, METHODS), *(("mixtral", method) for method in METHODS), ("qwen3_moe", METHODS[-1]))
)
def test_rows_and_counts_are_those_of_the_files_tensors(family: str, method: dict[str, Any], tmp_path: Path) -> None:
    """In a folder; and a live model is reported, pruned and saved alike."""
    source = save_tiny(family, tmp_path / "model", torch.float32)
    sparsity = {} if "pattern" in method else {"sparsity": 0.5}
    ask = {"calibration": IDS_NL, "allocation": "uniform", "accept_damage": True, **sparsity, **method}
    report = llmprune.prune(source, output=str(tmp_path / "out"), device="cpu", **ask)
    files = load_file(tmp_path / "out" / "model.safetensors")
    for row in report.rows:
        assert list(files[row.matrix].shape) == [row.rows, row.columns], row.matrix
        assert int((files[row.matrix] == 0).sum()) == row.zeros == row.rows * row.columns // 2, row.matrix
    experts = {key for key in files if ".experts." in key and key.endswith(".weight")}
    assert experts
    assert experts <= {row.matrix for row in report.rows}

    live = AutoModelForCausalLM.from_pretrained(source)
    assert llmprune.prune(live, **ask).blocks == report.blocks
    live.save_pretrained(tmp_path / "live")
    saved = load_file(tmp_path / "live" / "model.safetensors")
    assert saved.keys() == files.keys()
    assert [key for key in files if not torch.equal(files[key], saved[key])] == []


@pytest.mark.parametrize("family", FUSED)
def test_what_is_stored_fused_is_one_matrix(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    stream = LiveStream(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    for index, block in enumerate(stream.walk.blocks):
        assert stored_matrices(stream, index, block) == block_matrices(block)


def test_a_part_can_be_taken_alone(tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "model")
    ask: dict[str, Any] = {"sparsity": 0.5, "calibration": IDS_NL, "quality": "balanced"}
    llmprune.prune(source, output=str(tmp_path / "out"), only=r"experts\.\d+\.up_proj", **ask)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if ".experts." in key and "up_proj" in key}


def test_an_interrupted_run_goes_on_with_the_same_parts(tmp_path: Path) -> None:
    source = save_tiny("mixtral", tmp_path / "model")
    ask: dict[str, Any] = {"sparsity": 0.5, "calibration": IDS_NL, "quality": "max", "polish": "none", "overwrite": True}

    class Halt(BaseException):
        pass

    def halt(step: str, done: int, total: int) -> None:
        if step == "prune" and done == 2:
            raise Halt

    whole = llmprune.prune(source, output=str(tmp_path / "whole"), **ask)
    with pytest.raises(Halt):
        llmprune.prune(source, output=str(tmp_path / "out"), on_progress=halt, **ask)
    assert llmprune.prune(source, output=str(tmp_path / "out"), **ask).blocks == whole.blocks
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


REFITTED = {"criterion": "wanda", "solver": "refit", "target": "asymmetric", "pattern": "2:4"}
BY_ROWS = [REFITTED, {"method": "sparsegpt", "pattern": "2:4"}, {"method": "wanda", "sparsity": 0.5}]


def halved(matrix: Matrix) -> list[Matrix]:
    """A matrix in two parts of unequal height."""
    rows = matrix.rows // 3
    first = replace(matrix, name=f"{matrix.name}.a", rows=rows, first=0)
    return [first, replace(matrix, name=f"{matrix.name}.b", rows=matrix.rows - rows, first=rows)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("ask", BY_ROWS)
def test_parts_of_any_matrix_are_pruned_as_its_rows_are(family: str, ask: dict[str, Any]) -> None:
    """By methods that go row by row, also stage by stage; those that write into the stream stay whole, for what their products are added to."""
    plan = Recipe(model="x", allocation="uniform", **ask).plan()
    streams = [LiveStream(tiny_model(family).requires_grad_(False)) for _ in range(2)]
    matrices = selected(streams[0], Selection())
    parts = {i: [part for m in ms for part in (halved(m) if m.columns < m.rows else [m])] for i, ms in matrices.items()}
    assert all(len(parts[i]) > len(ms) for i, ms in matrices.items())
    works = [Work(stream, IDS_NL, plan, ms) for stream, ms in zip(streams, (matrices, parts), strict=True)]
    pruners = [fine_pruner(work, dict.fromkeys(work.sizes, plan.sparsity)) for work in works]
    reports = [prune(work.stream, IDS_NL, pruner, {}, SILENT) for work, pruner in zip(works, pruners, strict=True)]
    zeros = [sum(row.zeros for report in found for row in report.rows) for found in reports]
    assert zeros[0] == zeros[1] > 0
    for (name, ours), theirs in zip(streams[1].model.named_parameters(), streams[0].model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["plain", "turned", "stacked"])
def test_parts_share_their_input_and_have_rows_of_the_gradient(kind: str) -> None:
    block = nn.Module()
    block.weight = nn.Parameter(torch.randn(1, 6, 4) if kind == "stacked" else torch.randn(6, 4), requires_grad=False)
    parts = halved(Matrix("w", "weight", 0 if kind == "stacked" else None, False, 6, 4))
    value_TC = torch.randn(5, 4)

    def run(value_TC: Tensor) -> Tensor:
        if kind == "turned":
            return (block.weight @ value_TC.T).square().sum()
        return F.linear(value_TC, block.weight[0] if kind == "stacked" else block.weight).square().sum()

    watching = Watch(block, parts, frozenset({"gram"}))
    with watching:
        run(value_TC)
    watching.close()
    for part in parts:
        assert watching.stats[part.name] is watching.stats[parts[0].name]
        torch.testing.assert_close(watching.stats[part.name].gram_CC, value_TC.T @ value_TC)
    taps, leaf_TC = Taps(block, parts, frozenset({"grad", "grad_out_sq"})), value_TC.clone().requires_grad_()
    with taps:
        loss = run(leaf_TC.clone())
    loss.backward()
    taps.next_batch()
    for part in parts:
        product_TR = F.linear(value_TC, part.view(block))
        torch.testing.assert_close(taps.sums["grad", part.name], 2 * product_TR.T @ value_TC)
        torch.testing.assert_close(taps.sums["grad_out_sq", part.name], 4 * product_TR.square().sum(0))


class Stored:
    """A stream of one block, whose checkpoint is made by a function of the numbered parameters."""

    def __init__(self, store: Any) -> None:
        self.stored_rows = store

    def path_of(self, index: int) -> str:
        return f"model.layers.{index}"


def block_of(*shape: int) -> nn.Module:
    block = nn.Module()
    block.up = nn.Parameter(torch.randn(*shape), requires_grad=False)
    return block


def names_of(store: Any, index: int = 3) -> list[tuple[str, int | None, int]]:
    """(name, first row, rows) of the parts of a stack of two experts of 6 rows."""
    return [(m.name, m.first, m.rows) for m in stored_matrices(cast(Stream, Stored(store)), index, block_of(2, 6, 4))]


def test_stacks_that_are_stored_apart_are_named_by_tensor_and_expert() -> None:
    def store(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        (stack,) = numbers.values()
        return {"model.layers.3.moe.gate.weight": stack[:, :2], "model.layers.3.moe.up.weight": stack[:, 2:]}

    gate, up = "moe.gate.weight", "moe.up.weight"
    assert names_of(store) == [(f"{gate}[0]", 0, 2), (f"{up}[0]", 2, 4), (f"{gate}[1]", 0, 2), (f"{up}[1]", 2, 4)]


def test_a_name_that_is_not_of_the_block_is_not_taken() -> None:
    def store(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        (stack,) = numbers.values()
        return {f"tower.1.h.3.w{e}.{part}": rows for e in range(2) for part, rows in enumerate(stack[e].split(3))}

    assert names_of(store) == [("up[0][0:3]", 0, 3), ("up[0][3:6]", 3, 3), ("up[1][0:3]", 0, 3), ("up[1][3:6]", 3, 3)]


def test_rows_in_another_order_and_rows_that_are_missing_leave_a_matrix_whole() -> None:
    def interleaved(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        (stack,) = numbers.values()
        return {"model.layers.3.even": stack[:, ::2], "model.layers.3.odd": stack[:, 1::2]}

    def missing(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        (stack,) = numbers.values()
        return {"model.layers.3.gate": stack[:, :3], "model.layers.3.up": stack[:, 3:5]}

    for store in (interleaved, missing, lambda numbers: {}):
        assert names_of(store) == [("up[0]", None, 6), ("up[1]", None, 6)]


def test_transposed_rows_are_numbered_along_the_last_axis() -> None:
    wholes = [Matrix(f"up[{e}]", "up", e, True, 6, 4) for e in range(2)]
    (numbers,) = numbered("path", wholes).values()
    assert numbers.shape == (2, 1, 6)
    assert (numbers.diff(dim=-1) == 1).all()
    part = replace(wholes[1], first=2, rows=3)
    block = block_of(2, 4, 6)
    assert torch.equal(part.view(block), block.up[1].T[2:5])


def test_memory_is_planned_for_one_input_of_all_parts() -> None:
    stream = LiveStream(tiny_model("mixtral"))
    for index, ms in selected(stream, Selection()).items():
        assert inputs_of(ms) == inputs_of([m for m in block_matrices(stream.walk.blocks[index]) if Selection().takes(m.name)])
