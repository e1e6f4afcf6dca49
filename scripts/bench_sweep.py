"""Seconds of a sweep of four sparsities against four separate runs, start-up excluded, on a random Llama of 134M parameters.

    python scripts/bench_sweep.py --methods wanda sparsegpt balanced --windows 32 --length 256

Both prune and measure the perplexity on as many other windows; runs also write their checkpoints. CPU seconds of this process; imports, the making of
the model and the preparation (reading headers, hashing) are in neither.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from bench_speed import SHAPES, Task, make

from llmprune.data.windows import Windows
from llmprune.recipe.reading import recipes_of_sweep
from llmprune.run.job import run
from llmprune.run.prepare import Job, prepare
from llmprune.run.sweep import prepare_sweep, run_sweep

SPARSITIES = ["0.4", "0.5", "0.6", "0.7"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=["wanda", "sparsegpt", "balanced"])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    return work(), time.process_time() - began


def with_evaluation(job: Job, windows: Windows) -> Job:
    return replace(job, data=replace(job.data, evaluation=(windows,)))


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    draw = torch.Generator().manual_seed(0)
    calibration_NL, unseen_NL = (torch.randint(3, SHAPES["134m"].vocabulary, (options.windows, options.length), generator=draw) for _ in range(2))
    unseen = Windows(unseen_NL, "random tokens", "unseen")
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model")
        make(Task("make", model, asdict(SHAPES["134m"]), length=options.length))
        print("| | four runs | sweep | ratio | quick sweep | ratio |\n|---|---|---|---|---|---|")
        for method in options.methods:
            asked = recipes_of_sweep(None, {"model": model, "accept_damage": True}, [method], SPARSITIES, ["unstructured"])
            alone = 0.0
            for number, recipe in enumerate(asked):
                one = recipe.model_copy(update={"output": str(Path(folder) / f"{method}{number}")})
                job = with_evaluation(prepare(one, calibration_NL), unseen)
                alone += seconds(lambda job=job: run(job))[1]
            found = []
            for quick in (False, True):
                sweep = prepare_sweep(asked, Path(folder) / f"sweep-{method}-{quick}", windows=calibration_NL, quick=quick)
                sweep = replace(sweep, job=with_evaluation(sweep.job, unseen))
                report, spent = seconds(lambda sweep=sweep: run_sweep(sweep))
                assert len(report.rows) == len(asked)
                found.append(f"{spent:.1f} | {alone / spent:.2f}")
            print(f"| {method} | {alone:.1f} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
