"""Protocol W of ``bench_quality.py``: a real model (SmolLM2-135M) by every method, measured on its calibration's kind of text and on two others.

Every run is one line of the record (JSON): perplexity, mean KL(dense || pruned) and equal likeliest tokens on each text, CPU seconds of the pruning
alone and its peak memory. A run that the record holds is not repeated, so the tables can be made in several sittings; they are printed from it.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from llmprune.benchmark.memory import forget_peak, peak_resident
from llmprune.checkpoint.resolve import open_source
from llmprune.data.reading import read_windows
from llmprune.data.tokenizer import load_tokenizer
from llmprune.errors import RequestError
from llmprune.evaluation.beside import Dense, dense_pass, pruned_pass
from llmprune.recipe.reading import read_recipe
from llmprune.run.job import run
from llmprune.run.prepare import open_stream, prepare
from llmprune.stream.heap import steady
from llmprune.stream.stream import Stream
from llmprune.types import SILENT

Plan = dict[str, Any]  # method, pattern, sparsity, samples, seed
Row = dict[str, Any]  # a plan and what was measured
Ratios = dict[str, dict[str, float]]  # shape -> method -> excess as a ratio to the reference's
OWN, OTHERS = "WikiText", ("TinyStories", "bundled")
WINDOW, OWN_BYTES, OWN_WINDOWS, OTHER_WINDOWS = 512, 125_000, 57, 16
REFERENCE, FLAP = "sparsegpt", "flap"
SHAPES = (("unstructured", 0.5), ("unstructured", 0.6), ("unstructured", 0.7), ("2:4", 0.5), ("4:8", 0.5))
CUTS = (("channels", 0.25), ("structured", 0.2))
METHODS, CUT_METHODS = (REFERENCE, "balanced", "fast", "wanda", "alps", "magnitude"), (FLAP, "taylor", "balanced")
ORDER = ("magnitude", "wanda", REFERENCE, "alps", FLAP, "taylor", "fast", "balanced", "max")  # of the table
DRAWN_AGAIN = (REFERENCE, "balanced")
QUALITIES = ("fast", "balanced", "max")


def protocol_w(model: str, assets: Path, record: Path, samples: int, seeds: int, only: list[str], biased: Callable[[str, Path], str]) -> Ratios:
    """Make the runs that the record lacks and print the table; its ratios, by shape and method. only: names of methods and patterns; all, if there
    are none. biased: copies a model into a folder, with the biases that FLAP needs.
    """
    steady()  # as the command line, whose peak memory is meant
    known = {key(row) for row in rows_of(record)}
    missing = [plan for plan in plans(samples, seeds) if key(plan) not in known and (not only or {plan["method"], shape_of(plan)} <= set(only))]
    with tempfile.TemporaryDirectory() as folder:
        dense = dense_results(model, assets, Path(folder)) if missing else {}
        for plan in missing:
            source = biased(model, Path(folder) / "biased") if plan["method"] == FLAP else model
            with record.open("a") as file:
                file.write(json.dumps(plan | measured(source, assets, plan, dense)) + "\n")
            print(rows_of(record)[-1], flush=True)
    return print_table([row for row in rows_of(record) if row["samples"] == samples])


def plans(samples: int, seeds: int) -> list[Plan]:
    """The most telling runs first."""
    first = [(method, shape, 0) for method in METHODS for shape in SHAPES] + [(method, cut, 0) for cut in CUTS for method in CUT_METHODS]
    again = [(method, shape, seed) for seed in range(1, seeds) for shape in SHAPES for method in DRAWN_AGAIN]
    longest = [("max", shape, 0) for shape in SHAPES]
    return [
        {"method": method, "pattern": pattern, "sparsity": sparsity, "samples": samples, "seed": seed}
        for method, (pattern, sparsity), seed in [*first, *longest, *again]
    ]


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("method", "pattern", "sparsity", "samples", "seed"))


def shape_of(row: Row) -> str:
    """As it is written in a table."""
    return row["pattern"] if ":" in row["pattern"] else f"{row['pattern'].replace('unstructured', '')} {row['sparsity']:.0%}".strip()


def rows_of(record: Path) -> list[Row]:
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def opened(model: str) -> Stream:
    return open_stream(open_source(model), torch.float32, torch.device("cpu"))


def calibration(assets: Path) -> str:
    return str(assets / "text" / "wikitext2_tokens_valid.txt")


def dense_results(model: str, assets: Path, folder: Path) -> dict[str, Dense]:
    """The dense model on each text."""
    own = folder / "own.txt"
    own.write_bytes((assets / "text" / "wikitext2_raw_test.txt").read_bytes()[:OWN_BYTES])
    texts = {OWN: (str(own), OWN_WINDOWS), OTHERS[0]: (str(assets / "text" / "tinystories_ascii_eval.txt"), OTHER_WINDOWS)}
    texts[OTHERS[1]] = ("bundled-evaluation", OTHER_WINDOWS)
    tokenizer, stream = load_tokenizer(open_source(model).folder), opened(model)
    windows = {name: read_windows(data, "evaluation", tokenizer, WINDOW, count).first(count) for name, (data, count) in texts.items()}
    return {name: dense_pass(stream, found, False, None, SILENT) for name, found in windows.items()}


def measured(model: str, assets: Path, plan: Plan, dense: dict[str, Dense]) -> Row:
    """One run; the reason where the request is refused."""
    name = "quality" if plan["method"] in QUALITIES else "method"
    ask = {"model": model, "calibration": calibration(assets), "sequence_length": WINDOW, "samples": plan["samples"], name: plan["method"]}
    ask |= {"pattern": plan["pattern"], "seed": plan["seed"], "shuffle": plan["seed"] > 0}
    ask |= {} if ":" in plan["pattern"] else {"sparsity": plan["sparsity"]}
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "out")
        forget_peak()
        try:
            seconds = cpu_seconds(ask | {"output": output})
        except RequestError as error:
            return {"refused": error.message}
        spent: Row = {"cpu_seconds": round(seconds, 1), "peak_mib": (peak_resident() or 0) >> 20, "threads": torch.get_num_threads()}
        spent["cpu"] = torch.backends.cpu.get_cpu_capability()
        stream = opened(output)
        for text, reference in dense.items():
            perplexity, apart = pruned_pass(reference, stream)
            spent[text] = {"dense": reference.perplexity.value, "perplexity": perplexity.value, "kl": apart.kl, "top1": apart.top1}
    return spent


def cpu_seconds(ask: dict[str, Any]) -> float:
    """Of one pruning run, without its preparation and evaluation."""
    job = prepare(read_recipe(None, ask))
    job = replace(job, data=replace(job.data, evaluation=()))
    began = time.process_time()
    run(job)
    return time.process_time() - began


def excess(row: Row, text: str = OWN) -> float:
    return math.log(row[text]["perplexity"] / row[text]["dense"])


def ratio(ours: list[Row], theirs: list[Row], value: Callable[[Row], float]) -> float | None:
    """Of the means over the draws that both have; None if they have none in common."""
    seeds = {row["seed"] for row in ours} & {row["seed"] for row in theirs}
    mine, other = (sum(value(row) for row in rows if row["seed"] in seeds) for rows in (ours, theirs))
    return mine / other if other else None


def written(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def print_table(rows: list[Row]) -> Ratios:
    """Means over the draws, and ratios to sparsegpt's, or to FLAP's where units are cut out."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((shape_of(row), row["method"]), []).append(row)
    print(f"| | | draws | perplexity | excess | ratio | KL | top-1 | {' | '.join(OTHERS)} | CPU s | ratio | MiB |")
    print("|" + "---|" * (11 + len(OTHERS)))
    ratios: Ratios = {}
    for (shape, method), ours in sorted(found.items(), key=place):
        if "refused" in ours[0]:
            print(f"| {method} | {shape} | | {ours[0]['refused']} |")
            continue
        measured_too = [row for row in found.get((shape, FLAP if ours[0]["pattern"] in dict(CUTS) else REFERENCE), []) if OWN in row]
        print("| " + " | ".join([method, shape, str(len(ours)), *cells(ours, measured_too)]) + " |")
        if (beside := ratio(ours, measured_too, excess)) is not None:
            ratios.setdefault(shape, {})[method] = beside
    return ratios


def place(item: tuple[tuple[str, str], list[Row]]) -> tuple[int, int]:
    """Of a shape and method in the table."""
    (_, method), rows = item
    return [*SHAPES, *CUTS].index((rows[0]["pattern"], rows[0]["sparsity"])), ORDER.index(method)


def cells(ours: list[Row], theirs: list[Row]) -> list[str]:
    own = [row[OWN] for row in ours]
    kl, top1, seconds, mib = (
        statistics.mean(values)
        for values in zip(*((t["kl"], t["top1"], r["cpu_seconds"], r["peak_mib"]) for t, r in zip(own, ours, strict=True)), strict=True)
    )
    beyond = statistics.mean(excess(row) for row in ours)
    others = [f"{typical(ours, text):.2f} ({written(ratio(ours, theirs, partial(excess, text=text)))})" for text in OTHERS]
    quality = [f"{typical(ours, OWN):.2f}", f"{beyond:.3f}", written(ratio(ours, theirs, excess)), f"{kl:.3f}", f"{top1:.1%}", *others]
    alike = [row for row in theirs if all(row[kind] == ours[0][kind] for kind in ("cpu", "threads"))]
    return [*quality, f"{seconds:.0f}", written(ratio(ours, alike, itemgetter("cpu_seconds"))), f"{mib:.0f}"]


def typical(rows: list[Row], text: str) -> float:
    """The perplexity of the mean negative log-likelihood."""
    return math.exp(statistics.mean(math.log(row[text]["perplexity"]) for row in rows))
