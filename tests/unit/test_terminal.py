"""What is printed: no name is lost and no figure is broken, on a narrow terminal and in a pipe."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from llmprune.errors import at_home
from llmprune.maths.runs import MOST, runs_of
from llmprune.report.terminal import say, show
from llmprune.results import Row

NAMES = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3)]
HEADS = ("matrix", "shape", "zeros [1]")
ROWS = [(name, "4,096 x 4,096", "8,388,608") for name in NAMES]


def printed(width: int | None, heads: tuple[str, ...] = HEADS, rows: list[tuple[str, ...]] = ROWS, names: int = 1) -> str:
    """On a terminal so wide; None: in a pipe."""
    console = Console(file=io.StringIO(), width=width, force_terminal=width is not None, color_system=None, highlight=False)
    show(console, "a [title]", heads, rows, names)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [30, 60, 80, 200, None])
def test_a_table_keeps_every_name_and_figure(width: int | None) -> None:
    text = printed(width)
    assert width is None or max(map(len, text.splitlines())) <= max(width, len("    shape: 4,096 x 4,096"), len(NAMES[0]))
    joined = "".join(line.split("│")[1].strip() if "│" in line else line for line in text.splitlines())
    assert all(name in joined for name in NAMES)
    assert text.count("8,388,608") == text.count("4,096 x 4,096") == 3
    assert "zeros [1]" in text
    assert "…" not in text


def test_a_pipe_has_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = [("a" * 70, "b" * 70, "1")]
    (line,) = (line for line in printed(None, rows=rows).splitlines() if "aaa" in line)
    assert "a" * 70 in line
    assert "b" * 70 in line


def test_brackets_in_a_path_are_no_markup() -> None:
    console = Console(file=io.StringIO(), width=20)
    say(console, "saved: out[bold]/x y")
    assert console.file.getvalue() == "saved: out[bold]/x y\n"  # type: ignore[attr-defined]


def test_only_the_home_folder_itself_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    home = os.path.expanduser("~")  # noqa: PTH111
    said = f"{home} {home}/a file://{home}/b /data{home}/c {home}2/d {home}.old"
    assert at_home(said) == f"~ ~/a file://~/b /data{home}/c {home}2/d {home}.old"
    assert at_home(Path(home) / "x") == "~/x"


def test_zeros_that_no_mask_dropped() -> None:
    zeros = torch.zeros(8, 64, dtype=torch.bool)
    zeros[0, :5] = zeros[3, 7] = True
    few = Row("m", 8, 64, 0.5, 262, None, 1, kept_zeros=runs_of(zeros))
    assert few.own_zeros == 6
    zeros[:, ::2] = True
    assert zeros.sum() > MOST  # too many runs to be recorded
    assert Row("m", 8, 64, 0.25, 128 + 77, None, 1, kept_zeros=runs_of(zeros)).own_zeros == 77
    assert Row("m", 8, 64, 0.5, 0, None, 1, kept=(1, 2), units=4).own_zeros == 0
