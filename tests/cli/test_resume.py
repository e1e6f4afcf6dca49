"""An interrupted run goes on with the same command and ends byte-identical; nothing half-done ever looks finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.runs import contents, small_text
from forked import running
from often import often

import llmprune
from llmprune.checkpoint.files import lock_folder
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.cli.main import main
from llmprune.recipe.reading import read_recipe
from llmprune.run.job import run
from llmprune.run.prepare import prepare
from llmprune.types import Listener

ASK = {"model": "llama", "sparsity": 0.5, "method": "wanda", "samples": 8, "sequence_length": 64, "eval": ["small.txt"], "output": "out"}


class Stop(Exception):
    pass


def run_until(step: str, block: int, **ask: object) -> None:
    """Start a run and stop it when it reports this block of this step as done."""

    def progress(at: str, done: int, total: int) -> None:
        if (at, done) == (step, block):
            raise Stop

    with pytest.raises(Stop):
        run(prepare(read_recipe(None, ASK | ask)), Listener(progress=progress))
    assert not Path("out").exists()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small_text(tmp_path, 4000)
    return tmp_path


MAX = {"method": None, "quality": "max", "polish_steps": 3, "samples": 4, "sequence_length": 32}


RESUMED: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt"},
    "balanced": {"method": None, "quality": "balanced"},
    "max": MAX,
    "auto": {"allocation": "auto"},
    "budget": {"sparsity": None, "max_ppl_increase": 0.5},
    "permuted": {"sparsity": None, "pattern": "2:4", "permute": True, "method": None, "sequence_length": 61},
}


@pytest.mark.parametrize("case", often(RESUMED, "balanced", "auto"))
def test_resumed_equals_uninterrupted(here, case):
    named = RESUMED[case]
    llmprune.prune(**{**ASK, **named, "output": "whole"})
    stops = [("dense evaluation", 3), ("prune", 1), ("prune", 5), ("prune", 8), ("pruned evaluation", 4)]
    if named is MAX:
        stops[-1:-1] = [("polish", 2), ("polish", 3)]
    if "max_ppl_increase" in named:
        stops[1:1] = [("budget", 1), ("budget", 3)]
    if "allocation" in named:
        stops[1:1] = [("trials", 2)]
    for step, block in stops:
        run_until(step, block, **named)
    report = llmprune.prune(**{**ASK, **named})
    assert report.timings.resumed_blocks == 8
    assert contents(Path("out")) == contents(Path("whole"))
    assert sorted(p.name for p in here.iterdir()) == ["out", "small.txt", "whole"]


def test_damaged_state_falls_back(here):
    """A damaged record or damaged tensors: the run goes on from the block before."""
    llmprune.prune(**{**ASK, "output": "whole"})
    run_until("prune", 6)
    record = Path("out.partial/block-00004.json")
    record.write_text(record.read_text()[:50])
    weights = Path("out.partial/output/model.safetensors")
    layout = json.loads(weights.read_bytes()[8 : 8 + int.from_bytes(weights.read_bytes()[:8], "little")])
    start = 8 + int.from_bytes(weights.read_bytes()[:8], "little") + layout["model.layers.2.mlp.up_proj.weight"]["data_offsets"][0]
    with open(weights, "r+b") as file:
        file.seek(start + 100)
        file.write(b"\x55\xaa")
    report = llmprune.prune(**ASK)
    assert report.timings.resumed_blocks == 2
    assert contents(Path("out")) == contents(Path("whole"))


def test_another_request_is_refused_and_restart_discards(here):
    run_until("prune", 3)
    with pytest.raises(llmprune.LlmpruneError, match=r"another recipe: sparsity \(then 0.5, now 0.6\)") as refused:
        llmprune.prune(**{**ASK, "sparsity": 0.6})
    assert refused.value.exit_code == 2
    assert "--restart" in refused.value.hint
    report = llmprune.prune(**{**ASK, "sparsity": 0.6}, restart=True)
    assert report.timings.resumed_blocks == 0
    assert report.sparsity == pytest.approx(0.6, abs=1e-4)


def test_another_dtype_or_number_of_threads_is_refused_by_name(here):
    """Sums round differently there."""
    run_until("prune", 3)
    with pytest.raises(llmprune.LlmpruneError, match=r"out\.partial: started with another .*dtype"):
        llmprune.prune(**{**ASK, "dtype": "bfloat16"})
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(llmprune.LlmpruneError, match=r"out\.partial: started with .*threads"):
            llmprune.prune(**ASK)
    finally:
        torch.set_num_threads(threads)
    assert llmprune.prune(**ASK).timings.resumed_blocks == 3


def test_an_edited_text_or_tokenizer_is_refused_by_name(here):
    """Its windows were kept beside the journal, and a file of the same name would have been taken for the one that they were cut from."""
    shutil.copytree(BUNDLED / "llama", "model")
    Path("rows.txt").write_text((BUNDLED / "calibration.txt").read_text())
    ask = {"model": "model", "calibration": "rows.txt"}
    run_until("prune", 3, **ask)
    named = {"rows.txt": "calibration rows.txt", "small.txt": "evaluation 1, small.txt", "model/tokenizer.json": "tokenizer tokenizer.json"}
    for path, name in named.items():
        before = Path(path).read_text()
        Path(path).write_text(before + "\n")
        with pytest.raises(llmprune.LlmpruneError, match=rf'started with another text: {name} \(then "sha256 \w+\.\.\., now "sha256') as refused:
            llmprune.prune(**{**ASK, **ask})
        assert (refused.value.exit_code, "--restart" in refused.value.hint) == (2, True)
        Path(path).write_text(before)
    Path("else").mkdir()
    Path("else/rows.txt").write_text("Another text of the same name. " * 2000)
    with pytest.raises(llmprune.LlmpruneError, match=r"another text: calibration rows\.txt"):
        llmprune.prune(**{**ASK, **ask, "calibration": "else/rows.txt"})
    assert llmprune.prune(**{**ASK, **ask}).timings.resumed_blocks == 3


def test_one_run_at_a_time(here):
    handle = lock_folder(Path("out.partial"))
    with pytest.raises(llmprune.LlmpruneError, match="in use by process"):
        llmprune.prune(**ASK)
    os.close(handle)
    llmprune.prune(**ASK)


def test_a_run_that_another_one_has_outrun(here):
    """Both were checked before either had begun: the later one is refused, and leaves nothing."""
    late = prepare(read_recipe(None, ASK))
    llmprune.prune(**ASK)
    with pytest.raises(llmprune.LlmpruneError, match="exists already"):
        run(late)
    assert sorted(p.name for p in here.iterdir()) == ["out", "small.txt"]


def test_a_folder_that_is_no_run_is_left_alone(here):
    Path("out.partial").mkdir()
    Path("out.partial/thesis.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(llmprune.LlmpruneError, match="not the state of a run"):
            llmprune.prune(**ASK, restart=restart)
    assert Path("out.partial/thesis.txt").read_text() == "mine"


def test_a_crash_between_the_two_renames_of_an_overwrite(here, monkeypatch):
    llmprune.prune(**{**ASK, "method": "magnitude"})
    before = contents(Path("out"))
    renames = []
    real = os.rename

    def rename(source, target):
        if renames:
            raise Stop
        renames.append(source)
        real(source, target)

    monkeypatch.setattr("llmprune.checkpoint.files.os.rename", rename)
    with pytest.raises(Stop):
        llmprune.prune(**ASK, overwrite=True)
    monkeypatch.undo()
    os.chdir(here)
    assert not Path("out").exists()
    report = llmprune.prune(**ASK, overwrite=True)
    assert report.timings.resumed_blocks == 8
    assert contents(Path("out")) != before
    assert sorted(p.name for p in here.iterdir()) == ["out", "small.txt"]


def waiting(words: list[str]) -> None:
    """The command, in a process that waits, when two blocks are on the disk, until a signal ends it: no other process has to be quick enough."""

    def wait(event: str, values: tuple[object, ...]) -> None:
        if event == "open" and "block-00002.json" in str(values[0]) and Path("out.partial/block-00001.json").exists():
            print("waiting", flush=True)
            while True:
                signal.pause()

    sys.addaudithook(wait)
    main(words)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_real_signals(here, number, code):
    """A process stopped by a signal in the middle: the promised exit code, no output, and the next run finishes."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in ASK.items() if name != "eval"]
    with running(lambda: waiting([*words, "--eval", "small.txt"])) as process:
        said = next((line for line in process.stdout if line == "waiting\n"), "ended")
        process.send_signal(number)
        printed = process.communicate()[1]
    assert said == "waiting\n", printed
    assert process.returncode == code
    assert "Traceback" not in printed
    assert "the same command resumes" in printed or number == signal.SIGKILL
    assert not Path("out").exists()
    report = llmprune.prune(**ASK)
    assert report.timings.resumed_blocks == 2
    llmprune.prune(**{**ASK, "output": "whole"})
    assert contents(Path("out")) == contents(Path("whole"))
