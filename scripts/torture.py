"""The promises about faults, one row each: what was tried, what was found, and whether that is the figure to reach.

    python scripts/torture.py                 every row in full, within an hour on two cores
    python scripts/torture.py --quick         a part of each that the tests leave out, about a minute
    python scripts/torture.py --only kills

Exit code 1 when any row falls short. A row that cannot be tried on this machine says so and counts as neither.
"""

from __future__ import annotations

import os

# before torch is loaded: forks take no threads along
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = str(ROOT)  # for processes that a run starts

from faults import rows  # noqa: E402
from faults.children import preload  # noqa: E402
from faults.disasters import disasters  # noqa: E402
from faults.fuzz import fuzzed  # noqa: E402
from faults.mutants import mutants  # noqa: E402
from faults.rows import Outcome  # noqa: E402


@dataclass(frozen=True)
class Row:
    """One line of the table. asked: the figure to reach, in words; run: tries it, in part if ``quick``; tests: those that try the part each time."""

    name: str
    asked: str
    run: Callable[[bool], Outcome]
    tests: str = ""


def by_tests(file: str, which: str) -> Callable[[bool], Outcome]:
    """A row that is a set of tests, slow ones too."""

    def run(part: bool) -> Outcome:
        words = ["-q", "-m", "slow or not slow", file, "-k", which]
        done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
        return Outcome(lines[-1], done.returncode == 0, tuple(line for line in lines if line.startswith("FAILED")))

    return run


def by_count(what: Callable[[int], tuple[str, str]], count: int) -> Callable[[bool], Outcome]:
    """A row of so many cases; reached when the figure says all of them."""

    def run(part: bool) -> Outcome:
        figure, detail = what(count)
        done, _, cases = figure.partition("/")
        listing, *faults = detail.splitlines()
        return Outcome(f"{figure} ({listing})", not cases or done == cases, tuple(faults))

    return run


def memory(quick: bool) -> Outcome:
    """The plan of twelve runs against their peaks; of the first one, if ``quick``."""
    only = "llama 0.5 m" if quick else ""
    words = [sys.executable, "scripts/bench_plan.py", "--only", only]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    *each, last = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
    good, _, rest = last.partition(" of ")
    return Outcome(last, done.returncode == 0 and rest.startswith(f"{good} "), () if rest.startswith(f"{good} ") else tuple(each))


ROWS = (
    Row("kills", "200/200 resumed byte-identical, 0 half-old outputs", rows.kills),
    Row("file operations", "all resumed, also with unsynced data lost; with fsync off some fail", rows.operations),
    Row("mutants", "1,000/1,000: refused in one line, or right", by_count(mutants, 1000), "tests/faults/test_mutants.py"),
    Row("fuzz", "100,000 inputs, no exception but llmprune's own", by_count(fuzzed, 100_000), "tests/faults/test_fuzz.py"),
    Row("disasters", "all stopped, or recovered from and recorded", by_count(disasters, 1), "tests/faults/test_disasters.py"),
    Row("memory plan", "12 of 12 within 0.7 to 1.15 of the plan", memory),
    Row("disks", "20/20 sizes in one line, resumable", rows.disks),
    Row("races", "50/50 with exactly one winner", rows.races),
    Row(
        "hub",
        "whichever request fails, the same command finishes",
        by_tests("tests/cli/test_push.py", "whatever_request_fails"),
        "tests/cli/test_push.py",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part of each row that the tests leave out")
    parser.add_argument("--only", choices=[row.name for row in ROWS], action="append", help="this row; may be repeated")
    args = parser.parse_args()
    preload()
    began, short = time.monotonic(), False
    for row in ROWS:
        if args.only and row.name not in args.only:
            continue
        if args.quick and row.tests:
            print(f"{row.name:<16} tested            by {row.tests}  (asked: {row.asked})", flush=True)
            continue
        start = time.monotonic()
        try:
            outcome = row.run(args.quick)
        except Exception as error:  # the next rows are tried all the same
            outcome = Outcome(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], False, tuple(getattr(error, "__notes__", ())))
        word = {True: "reached", False: "short", None: "not tried"}[outcome.reached]
        print(f"{row.name:<16} {word:<9} {time.monotonic() - start:6.0f} s  {outcome.figure}  (asked: {row.asked})", flush=True)
        for fault in outcome.faults[:20]:
            print(f"    {fault}", flush=True)
        short |= outcome.reached is False
    print(f"{time.monotonic() - began:.0f} s in all")
    sys.exit(int(short))


if __name__ == "__main__":
    main()
