"""What each row of ``scripts/torture.py`` about files and crashes does. Every function runs in a fork with nothing computed before it."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from faults.children import Ended, finish, run_child, start
from faults.runs import TINY, contents, distinct, fault, record, small_text, whole

WORKERS = 2
SMALL = ["--model", "llama", "--samples", "8", "--sequence-length", "64", "--eval", "small.txt", "--output", "out"]
CASES = {
    f"{method} {pattern}": [*words.split(), "--pattern", pattern, *sparsity.split()]
    for pattern, sparsity, methods in (
        ("unstructured", "--sparsity 0.5", ("--method magnitude", "--method wanda", "--method sparsegpt", "--quality balanced")),
        ("2:4", "", ("--method magnitude", "--method wanda", "--method sparsegpt", "--quality balanced")),
        ("channels", "--sparsity 0.25", ("--method magnitude", "--method wanda", "--method taylor", "--quality balanced")),
        ("structured", "--sparsity 0.25", ("--quality fast",)),
        ("layers", "--sparsity 0.25", ("",)),
    )
    for words in methods
    for method in [words.split()[-1] if words else "measured"]
}
QUICK = ("magnitude unstructured", "wanda 2:4", "sparsegpt unstructured", "magnitude channels")


@dataclass(frozen=True)
class Outcome:
    """figure: what was found; reached: None where it cannot be tried on this machine; faults: each in a line."""

    figure: str
    reached: bool | None
    faults: tuple[str, ...] = ()


def in_workers(function: Any, tasks: list[Any]) -> list[Any]:
    with get_context("fork").Pool(WORKERS, maxtasksperchild=1) as pool:
        return list(pool.imap_unordered(function, tasks, chunksize=1))


def new_folder(above: Path, older: Path | None = None) -> Path:
    """An empty place for one run, with an older output where one is to be replaced."""
    folder = Path(tempfile.mkdtemp(dir=above)) / "here"
    folder.mkdir()
    small_text(folder, 4000)
    if older is not None:
        shutil.copytree(older, folder / "out")
    return folder


# kills


def kills(quick: bool) -> Outcome:
    names = QUICK if quick else tuple(CASES)
    total = 6 if quick else 200
    tasks = [(name, total // len(names) + (number < total % len(names))) for number, name in enumerate(names)]
    found = in_workers(killed, tasks)
    middle, wrong = sum(m for m, _ in found), [fault for _, faults in found for fault in faults]
    half = sum("half-old" in fault for fault in wrong)
    figure = f"{total - len(wrong)}/{total} resumed byte-identical ({middle} killed before the end, {len(names)} methods x patterns), {half} half-old"
    return Outcome(figure, not wrong, tuple(wrong))


def killed(task: tuple[str, int]) -> tuple[int, list[str]]:
    """(kills that came before the end, what went wrong) of a method with a pattern; every second run replaces an older output."""
    name, count = task
    words = [*SMALL, *CASES[name]]
    moments = random.Random(name)
    middle, wrong = 0, []
    with tempfile.TemporaryDirectory() as place:
        above = Path(place)
        first = new_folder(above)
        reference = run_child(words, first)
        if reference.code:
            return 0, [f"{name}: {reference.said[-300:]}"] * count
        new = contents(first / "out")
        older = new_folder(above)
        run_child([*SMALL, "--sparsity", "0.25", "--method", "magnitude"], older)
        for number in range(count):
            replaces = number % 2 == 1
            folder = new_folder(above, older / "out" if replaces else None)
            after = moments.uniform(0.0, 0.8 * reference.seconds)  # the first run is the slowest
            ended = run_child([*words, "--overwrite"] if replaces else words, folder, after)
            middle += ended.code < 0
            said = after_a_kill(folder, [*words, "--overwrite"] if replaces else words, new, contents(older / "out") if replaces else None)
            wrong += [f"{name}, killed after {after:.2f} s: {said}"] if said else []
            shutil.rmtree(folder.parent)
    return middle, wrong


def after_a_kill(folder: Path, words: list[str], new: dict[str, object], old: dict[str, object] | None) -> str:
    """What is wrong with the output as it was left, or with the same command after that; "" when nothing is."""
    output = folder / "out"
    finished = output.exists() and whole(output, new)
    if output.exists() and not finished and not (old is not None and whole(output, old)):
        return "half-old output"
    ended = run_child(words, folder)
    if ended.code and not (ended.code == 2 and finished):
        return f"exit {ended.code}: {ended.said[-300:]}"
    return "" if whole(output, new) else "another result"


# every file operation


def operations(quick: bool) -> Outcome:
    """quick: states evenly spaced; else all that a crash can leave, for a new output, a replaced one, and a smaller model's one in ten."""
    kinds = [("new", 140), ("replaced", 180)] if quick else [("new", 1), ("replaced", 1), ("smaller", 10)]
    tasks = [(kind, number, step) for kind, step in kinds for number in range(WORKERS)] + [("control", 0, 1)]
    found = in_workers(crashed, tasks)
    crashes = sum(n for kind, n, _, _ in found if kind != "control")
    wrong = [fault for kind, _, _, faults in found if kind != "control" for fault in faults]
    control = next(len(faults) for kind, _, _, faults in found if kind == "control")
    total = {kind: operations for kind, _, operations, _ in found if kind != "control"}
    said = ", ".join(f"{kind}: {n} operations" for kind, n in total.items())
    figure = f"{crashes - len(wrong)}/{crashes} states after a crash resumed ({said}); without fsync {control} fail"
    return Outcome(figure, not wrong and control > 0, tuple(wrong))


def crashed(task: tuple[str, int, int]) -> tuple[str, int, int, list[str]]:
    """(kind, states tried, file operations of the run, what went wrong) for this worker's share of the states."""
    torch.set_num_threads(1)
    kind, share, step = task
    ask = TINY | {"method": "magnitude", "sparsity": 0.5} | ({"pattern": "channels", "sparsity": 0.25} if kind == "smaller" else {})
    with tempfile.TemporaryDirectory() as place:
        root = new_folder(Path(place))
        small_text(root)
        old = None
        if kind == "replaced":
            record(root, ask | {"sparsity": 0.25})
            old = contents(root / "out")
        recorder, new = record(root, ask, overwrite=old is not None, synced=kind != "control")
        crashes = recorder.crashes[-3:] if kind == "control" else recorder.crashes
        states = list(distinct(crashes))[::step]
        states = states if kind == "control" else states[share::WORKERS]
        second = Path(place) / "second"
        said = [(name, fault(tree, second, ask, new, old)) for name, tree in states]
        os.chdir("/")
    return kind, len(states), len(recorder.crashes), [f"{kind}, {name}: {text}" for name, text in said if text]


# disks


def disks(quick: bool) -> Outcome:
    """A file system of every size from 1 % to 105 % of what a run needs at most; every second one is large at first and is filled by others."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False).returncode:
        return Outcome("not tried: this machine lets no tmpfs be mounted in a namespace (unshare -rm)", None)
    shares = [1, 40, 105] if quick else [round(1 + i * 104 / 19) for i in range(20)]
    found = in_workers(on_a_disk, [(share, number % 2 == 1) for number, share in enumerate(shares)])
    wrong = [text for text, _ in found if text]
    ends = [code for _, code in found]
    said = ", ".join(f"{ends.count(code)} exit {code}" for code in sorted(set(ends)))
    return Outcome(f"{len(shares) - len(wrong)}/{len(shares)} in one line or done, then resumed byte-identical ({said})", not wrong, tuple(wrong))


def on_a_disk(task: tuple[int, bool]) -> tuple[str, int]:
    """(what went wrong, exit code of the run on the small disk)."""
    share, filled = task
    words = [*SMALL, "--method", "magnitude", "--sparsity", "0.5"]
    with tempfile.TemporaryDirectory() as place:
        first = new_folder(Path(place))
        run_child(words, first)
        new, need = contents(first / "out"), space_of(first / "out")
        folder = new_folder(Path(place))
        enter_namespace()
        mount(folder, 4 * need if filled else need * share // 100 + (8 << 10))  # the text that is evaluated is there too
        try:
            small_text(folder, 4000)
            started = start(words, folder)
            if filled:
                fill(folder, need * share // 100)
            ended = finish(started)
            said = after_a_full_disk(folder, ended, words, new, 4 * need)
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    return f"{share} %: {said}" if said else "", ended.code


def after_a_full_disk(folder: Path, ended: Ended, words: list[str], new: dict[str, object], space: int) -> str:
    """What is wrong with the end of a run, or with the same command once there is space."""
    if ended.code and not (ended.code in (2, 3) and ended.one_line and not (folder / "out").exists()):
        return f"exit {ended.code}: {ended.said[-300:]}"
    (folder / "ballast").unlink(missing_ok=True)
    mount(folder, space, "remount,")
    last = run_child(words, folder) if ended.code else ended
    return "" if last.code == 0 and whole(folder / "out", new) else f"then exit {last.code}: {last.said[-300:]}"


def space_of(folder: Path) -> int:
    """Bytes that a run takes at most: its output, in pages, and what it asks for beside."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir()) + (1 << 20)


def enter_namespace() -> None:
    """Mounts of this process and its children are its own from here on."""
    new_user, new_mounts = 0x10000000, 0x00020000
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_user | new_mounts):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def mount(folder: Path, size: int, how: str = "") -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{how}size={max(4096, size)}", "tmpfs", str(folder)], check=True, capture_output=True)


def fill(folder: Path, left: int) -> None:
    """Once a run has begun there, leave it only this much space."""
    until = time.monotonic() + 30
    while not (folder / "out.partial").exists() and time.monotonic() < until:
        time.sleep(0.001)
    handle = os.open(folder / "ballast", os.O_CREAT | os.O_WRONLY)
    try:
        while (size := free_of(folder) - left) > 0:
            with suppress(OSError):  # the run took some of it in between
                os.posix_fallocate(handle, 0, size)
                break
    finally:
        os.close(handle)


def free_of(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


# races


def races(quick: bool) -> Outcome:
    count = 4 if quick else 50
    found = [text for texts in in_workers(raced, [count // WORKERS] * WORKERS) for text in texts]
    return Outcome(f"{count - len(found)}/{count} pairs with exactly one winner, the other one refused", not found, tuple(found))


def raced(count: int) -> list[str]:
    """What went wrong in so many pairs of the same run to one output, every second pair begun up to a run's length apart."""
    words = [*SMALL, "--method", "magnitude", "--sparsity", "0.5"]
    moments, wrong = random.Random(os.getpid()), []
    with tempfile.TemporaryDirectory() as place:
        first = new_folder(Path(place))
        reference = run_child(words, first)
        new = contents(first / "out")
        for number in range(count):
            folder = new_folder(Path(place))
            one = start(words, folder)
            time.sleep(moments.uniform(0.0, reference.seconds) if number % 2 else 0.0)
            other = start(words, folder)
            said = one_winner(finish(one), finish(other), folder, new)
            wrong += [f"pair {number}: {said}"] if said else []
    return wrong


def one_winner(one: Ended, other: Ended, folder: Path, new: dict[str, object]) -> str:
    """What is wrong with the ends of two runs; "" when one has won and the other says so."""
    if sorted((one.code, other.code)) != [0, 2]:
        return f"exits {one.code} and {other.code}: {one.said[-200:]} {other.said[-200:]}"
    winner, loser = (one, other) if one.code == 0 else (other, one)
    if not (loser.one_line and re.search(rf"in use by process {winner.pid}\b|exists already", loser.said)):
        return f"the loser says: {loser.said[-200:]}"
    left = sorted(path.name for path in folder.iterdir())
    return "" if whole(folder / "out", new) and left == ["out", "small.txt"] else f"left: {left}"
