"""A crash at any file operation, with unsynced data kept, lost or half lost: the same command ends byte-identical; no output is ever half old."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from faults.disk import Recorder, content, recorded, write_out
from faults.runs import TINY, contents, distinct, fault, full_at, record, small_text

import llmprune
from llmprune.checkpoint import files

ASK = TINY | {"method": "magnitude", "sparsity": 0.5}
CHANNELS = ASK | {"pattern": "channels", "sparsity": 0.25}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "first"
    root.mkdir()
    small_text(root)
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Recorder, dict[str, object]]:
    """A run to a new output under the recorder, and its result."""
    root = tmp_path_factory.mktemp("plain")
    small_text(root)
    with pytest.MonkeyPatch.context() as before:
        before.chdir(root)
        return record(root, ASK)


def older(root: Path, monkeypatch) -> dict[str, object]:
    """An output that is there already."""
    monkeypatch.chdir(root)
    llmprune.prune(**ASK | {"sparsity": 0.25})
    return contents(root / "out")


@pytest.mark.parametrize(
    ("ask", "replaces", "most"),
    [
        (ASK, False, 3),
        (ASK, True, 3),
        pytest.param(ASK, False, 10**6, marks=pytest.mark.slow),
        pytest.param(ASK, True, 10**6, marks=pytest.mark.slow),
        pytest.param(CHANNELS, False, 30, marks=pytest.mark.slow),
    ],
)
def test_a_crash_at_file_operations(root, monkeypatch, plain, ask, replaces, most):
    """Evenly spaced over all that crashes can leave, the end included."""
    old = older(root, monkeypatch) if replaces else None
    recorder, new = plain if ask is ASK and not replaces else record(root, ask, overwrite=replaces)
    left = list(distinct(recorder.crashes))
    assert len(recorder.crashes) > 150
    assert len(left) > 200
    for name, tree in left[:: -max(1, len(left) // most)]:
        assert fault(tree, root.parent / "second", ask, new, old) == "", name


@pytest.mark.parametrize(("firsts", "step"), [(2, 120), pytest.param(4, 12, marks=pytest.mark.slow)])
def test_a_crash_while_going_on_after_a_crash(root, firsts, step):
    recorder, new = record(root, ASK)
    left = list(distinct(recorder.crashes))
    for _, tree in left[:: len(left) // firsts]:
        again = root.parent / "again"
        write_out(tree, again)
        if (again / "out").exists():
            continue
        second, _ = record(again, ASK)
        for name, tree in list(distinct(second.crashes))[::step]:
            assert fault(tree, root.parent / "second", ASK, new) == "", name


def test_no_block_is_repeated_while_what_distillation_has_made_is_written(root):
    """From the last block's record on: what it wrote lies beside the blocks that it started from, until all of it is on the disk."""
    ask = ASK | {"polish": "kd", "polish_steps": 2}
    recorder, new = record(root, ask)
    assert json.loads((root / "out" / "llmprune.json").read_text())["polish"]["changed"]
    last = next(n for n, c in enumerate(recorder.crashes) if "block-00007.json" in c.left["lost"].get("out.partial", {}))
    states = [(name, tree) for name, tree in distinct(recorder.crashes[last:]) if "output" in tree.get("out.partial", {})]
    assert len(states) > 100
    for name, tree in states[:: len(states) // 5]:
        assert fault(tree, root.parent / "second", ask, new) == "", name
        report = json.loads((root.parent / "second" / "out" / "llmprune.json").read_text())
        assert report["timings"]["resumed_blocks"] == 8, name


@pytest.mark.parametrize(
    "names", [["notes.txt"], ["modules/work.py"], ["lock", "row-00000.json"], ["lock", "identity.json", "rotated/model.safetensors"]]
)
def test_what_no_finished_run_has_left_stays(root, names):
    """Beside an output that is refused."""
    os.chdir(root)
    llmprune.prune(**ASK)
    for name in names:
        (root / "out.partial" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "out.partial" / name).write_text("mine")
    with pytest.raises(llmprune.LlmpruneError, match="exists already"):
        llmprune.prune(**ASK)
    left = {path.relative_to(root / "out.partial").as_posix(): path.read_text() for path in (root / "out.partial").rglob("*") if path.is_file()}
    assert left == dict.fromkeys(names, "mine")


def test_without_fsync_a_loss_of_power_is_noticed(root):
    """The control: the same test fails where fsync does nothing."""
    recorder, new = record(root, ASK, synced=False)
    last = recorder.crashes[-1].left["renamed"]
    assert fault(last, root.parent / "second", ASK, new) == "the output is neither the old one nor the new one"


def test_the_recorder_knows_the_folder(root, plain):
    """What it says that a killed process leaves at the end is what lies there."""
    recorder, new = plain
    write_out(recorder.crashes[-1].left["killed"], root.parent / "second")
    assert contents(root.parent / "second" / "out") == new
    assert sorted(p.name for p in (root.parent / "second").iterdir()) == ["out", "small.txt"]


def test_the_recorder_by_hand(tmp_path, monkeypatch):
    """A file is on the disk when it and its folder are synced; a rename takes both of its folders."""
    with recorded(tmp_path) as recorder:
        files.os.mkdir(tmp_path / "a")
        handle = files.os.open(tmp_path / "a" / "f", 0o102)
        files.os.pwrite(handle, b"four", 2)
        files.os.fsync(handle)
        files.os.close(handle)
        files.sync_folder(tmp_path / "a")
        files.os.rename(tmp_path / "a" / "f", tmp_path / "g")
        files.sync_folder(tmp_path)
    left = [(crash.operation.split()[0], crash.left) for crash in recorder.crashes]
    assert [name for name, _ in left] == ["mkdir", "open", "pwrite", "fsync", "fsync", "rename", "fsync", "end"]
    assert left[2][1]["killed"]["a"]["f"][1][0].data == b"fo"
    assert content(*left[3][1]["killed"]["a"]["f"]) == b"\0\0four"
    assert left[3][1]["renamed"]["a"]["f"] == (b"", ())
    assert left[5][1]["lost"] == {}
    assert left[6][1]["killed"] == {"a": {}, "g": (b"\0\0four", ())}
    assert left[6][1]["lost"] == {}
    assert left[7][1]["lost"] == {"a": {}, "g": (b"\0\0four", ())}


@pytest.mark.parametrize("share", [0.2, 0.85])
def test_a_full_disk_in_the_middle(root, plain, share):
    """From some operation on nothing can be made or grow: the run stops in one line, and goes on when there is space."""
    recorder, new = plain
    error = full_at(round(share * len(recorder.crashes)), root, ASK)
    assert "No space left" in str(error)
    assert not (root / "out").exists()
    llmprune.prune(**ASK)
    assert contents(root / "out") == new
