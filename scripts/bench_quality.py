"""Perplexity by method, pattern and sparsity on small real models, as ratios to this project's own SparseGPT in the same run.

    python scripts/bench_quality.py                      the bundled model
    python scripts/bench_quality.py --assets DIR         stories260K by its protocol: 128 x 256 calibration tokens, 200 evaluation windows
    python scripts/bench_quality.py --seeds 3            mean and spread over calibration draws

Excess is the mean negative log-likelihood above the dense model's. CPU seconds are of the pruning alone: no import, no evaluation.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch

import llmprune
from llmprune.job import prepare, run
from llmprune.recipe import read_recipe

CHOICES = [{"method": m} for m in ("magnitude", "wanda", "ria", "sparsegpt", "alps")] + [{"quality": q} for q in ("fast", "balanced")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, help="folder with stories260K and its texts")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5], help="unstructured sparsities")
    parser.add_argument("--pattern", nargs="*", default=["2:4"], help="N:M patterns")
    parser.add_argument("--seeds", type=int, default=1, help="calibration draws; the first is the first windows of the text")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def setting(assets: Path | None) -> tuple[dict[str, object], str, int | None]:
    """(what every run is asked, evaluation data, its number of windows)."""
    if assets is None:
        return {"model": "llama"}, "bundled-evaluation", None
    texts = assets / "text"
    model = {"model": str(assets / "stories260K"), "calibration": str(texts / "tinystories_ascii_calib.txt")}
    return model, str(texts / "tinystories_ascii_eval.txt"), 200


def measure(ask: dict[str, object], data: str, samples: int | None) -> tuple[float, float]:
    """(mean negative log-likelihood of the pruned model, CPU seconds of the pruning)."""
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "out")
        job = prepare(read_recipe(None, ask | {"samples": 128, "sequence_length": 256, "output": output}))
        job.evaluation.clear()
        began = time.process_time()
        run(job)
        seconds = time.process_time() - began
        return math.log(llmprune.evaluate(output, data, window=256, samples=samples)[0].value), seconds


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    base, data, samples = setting(options.assets)
    dense = math.log(llmprune.evaluate(str(base["model"]), data, window=256, samples=samples)[0].value)
    print(f"dense: perplexity {math.exp(dense):.4g}, torch {torch.__version__}, {options.threads} threads\n")
    print("| | pattern | perplexity | excess | spread | to sparsegpt | CPU seconds | to sparsegpt |")
    print("|---|---|---|---|---|---|---|---|")
    asked = [{"sparsity": s, "pattern": "unstructured"} for s in options.sparsity] + [{"pattern": p} for p in options.pattern]
    for pattern in asked:
        rows = {}
        for choice in CHOICES:
            draws = [{"shuffle": seed > 0, "seed": seed} for seed in range(options.seeds)]
            found = [measure(base | pattern | choice | draw, data, samples) for draw in draws]
            rows[" ".join(choice.values())] = ([nll - dense for nll, _ in found], statistics.mean(s for _, s in found))
        excess, seconds = statistics.mean(rows["sparsegpt"][0]), rows["sparsegpt"][1]
        for name, (values, spent) in rows.items():
            mean = statistics.mean(values)
            spread = max(values) - min(values)
            label = f"{pattern['pattern']} {pattern.get('sparsity', '')}".strip()
            cells = (name, label, f"{math.exp(dense + mean):.2f}", f"{mean:.3f}", f"{spread:.3f}", f"{mean / excess:.2f}")
            print("| " + " | ".join([*cells, f"{spent:.1f}", f"{spent / seconds:.2f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
