"""Peak memory of pruning runs: a deep model against a shallow one, and a 1.1 B model in all.

    python scripts/bench_memory.py deep big

deep  24 blocks against 6, 1024 wide, same hidden states: the peak above ``import torch, transformers`` may grow by a tenth
big   the 1.1 B shape in bfloat16, wanda: the whole process may take 3 GB

Each run is a fresh process from a checkpoint to a checkpoint; its peak is ru_maxrss. Memory is shown in all, above ``import torch,
transformers``, and above the start of the run (llmprune imported, the skeleton built); the last is the strictest to compare by.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import asdict
from typing import Any

from bench_speed import SHAPES, Shape, Task, child

LIMIT = 3_000  # MB
GROWTH = 1.10


def measure(shape: Shape, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run on a model made for it."""
    folder = tempfile.mkdtemp(prefix="llmprune-bench-", dir=args.folder)
    base = {"model": f"{folder}/model", "shape": asdict(shape), "windows": args.windows, "length": args.length, "threads": args.threads}
    try:
        child(Task("make", **base))
        run = child(Task("folder", method=method, **base))
    finally:
        shutil.rmtree(folder)
    run["above_start"] = run["total_memory"] - run["memory_at_start"]
    print(
        f"{method:<10}{shape.blocks:>3} blocks {shape.width} wide, {shape.dtype}: {run['total_memory']:,.0f} MiB in all, "
        f"{run['memory']:,.0f} above the imports of torch and transformers, {run['above_start']:,.0f} above the start; {run['wall']:.0f} s",
        flush=True,
    )
    return run


def deep(args: argparse.Namespace) -> None:
    for method in args.method:
        shallow, high = (measure(Shape(1024, 2816, n, 16, 16, args.vocabulary, args.dtype), method, args) for n in (6, 24))
        ratios = {key: high[key] / shallow[key] for key in ("memory", "above_start")}
        verdict = "met" if ratios["memory"] <= GROWTH else "MISSED"
        print(f"{method}: 24 / 6 blocks {ratios['memory']:.3f} (target at most {GROWTH}: {verdict}), above the start {ratios['above_start']:.3f}")


def big(args: argparse.Namespace) -> None:
    megabytes = measure(SHAPES["1.1b"], "wanda", args)["total_memory"] * 1.048576
    print(f"wanda: 1.1b takes {megabytes:,.0f} MB in all (target under {LIMIT:,}: {'met' if megabytes < LIMIT else 'MISSED'})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="+", choices=("deep", "big"))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument(
        "--method", action="append", choices=("wanda", "sparsegpt", "fast", "balanced"), help="of deep; repeatable; the first two by default"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights of deep")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="of deep")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where models are made for the time of a run; the system's temporary folder by default")
    args = parser.parse_args()
    args.method = args.method or ["wanda", "sparsegpt"]
    for what in args.what:
        {"deep": deep, "big": big}[what](args)


if __name__ == "__main__":
    main()
