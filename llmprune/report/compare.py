"""Several results side by side: of runs, of sweeps, or of both. Perplexities share a column only if they have the same definition."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmprune.report.cells import NUMBERS, Cell, PageTable, Section, count, definition, number, percent, say
from llmprune.report.frontier import SweepReport
from llmprune.report.grid import grid_of, short_blocks
from llmprune.report.pictures import curves
from llmprune.report.result import Report
from llmprune.report.stored import read_any
from llmprune.report.summary import named
from llmprune.results import Divergence, Perplexity, Sample

SAME = 1.001  # greatest ratio of perplexities of one model on one text, on other machines


@dataclass(frozen=True)
class Found:
    """One result measured on one evaluation set."""

    perplexity: float
    kl: float | None  # None where it was not measured, as after a recovery
    top1: float | None


@dataclass(frozen=True)
class Result:
    """One pruned model. ``found`` and ``dense`` are by the definition of the numbers; ``left``: parameters neither zero nor removed, None where they
    were not counted; ``report``: of a run.
    """

    name: str
    source: tuple[str, str]  # name, and the hashes of its weights
    method: str
    pattern: str
    sparsity: float
    left: int | None
    found: dict[str, Found]
    dense: dict[str, float]
    report: Report | None = None


def results(paths: Sequence[Path]) -> list[Result]:
    """The entries of all results. Raises RequestError for anything that is not a result."""
    return _distinct([result for path in paths for result in _results(path)])


def _results(path: Path) -> Iterator[Result]:
    value = read_any(path)
    name = (path.resolve() if path.is_dir() else path.resolve().parent).name
    source = (value.source.name, repr(sorted(value.source.files.items())))
    yield from [_of_run(name, source, value)] if isinstance(value, Report) else _of_sweep(name, source, value)


def _of_run(name: str, source: tuple[str, str], value: Report) -> Result:
    found = dict(_found(pair.pruned, pair.divergence) for pair in value.perplexity)
    dense = {definition(pair.dense): pair.dense.value for pair in value.perplexity}
    method = named(value.recipe)
    if value.recovered and not value.perplexity:
        measured = [one for one in value.recovered[-1].measured if not one.decides]
        found = {definition(one.after): Found(one.after.value, None, None) for one in measured}
        dense = {definition(one.dense): one.dense.value for one in measured if one.dense}
        method = f"{method}, recovered"
    return Result(name, source, method, value.recipe["pattern"], value.sparsity, value.left, found, dense, value)


def _of_sweep(name: str, source: tuple[str, str], value: SweepReport) -> Iterator[Result]:
    dense = {definition(one): one.value for one in value.dense}
    for number_of_row, row in enumerate(value.rows, 1):
        found = dict(map(_found, row.perplexity, row.divergence))
        yield Result(f"{name} #{number_of_row}", source, row.method, row.pattern, row.sparsity, None, found, dense)


def _found(perplexity: Perplexity, divergence: Divergence) -> tuple[str, Found]:
    return definition(perplexity), Found(perplexity.value, divergence.kl, divergence.top1)


def _distinct(found: list[Result]) -> list[Result]:
    """Distinct names: folders may share their last name."""
    seen: dict[str, int] = {}
    named = []
    for result in found:
        seen[result.name] = seen.get(result.name, 0) + 1
        named.append(result if seen[result.name] == 1 else replace(result, name=f"{result.name} ({seen[result.name]})"))
    return named


def definitions(found: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(name for result in found for name in result.found))


def best(found: Sequence[Result], by: str) -> set[str]:
    """Names of those on the Pareto front: no other one is as small and as good, and better in one of the two. Size is the number of remaining
    parameters, where all have it: the base of a sparsity differs between patterns.
    """
    counted = _all_counted(found)
    points = [(e.name, (e.left or 0) if counted else -e.sparsity, e.found[by].perplexity) for e in found if by in e.found]
    return {name for name, left, p in points if not any(t <= left and q <= p and (t, q) != (left, p) for _, t, q in points)}


def shared_text(found: Sequence[Result]) -> str | None:
    """The first definition by which all results were measured. Results of one source have the same dense perplexity, or else their texts only share
    a name.
    """
    return next((name for name in definitions(found) if all(name in result.found for result in found) and _dense_agrees(found, name)), None)


def _dense_agrees(found: Sequence[Result], name: str) -> bool:
    dense: dict[object, list[float]] = {}
    for result in found:
        dense.setdefault(result.source, []).append(result.dense.get(name, math.nan))
    return not any(max(values) > SAME * min(values) for values in dense.values())


def _all_counted(found: Sequence[Result]) -> bool:
    return all(result.left is not None for result in found)


def compared(found: Sequence[Result]) -> PageTable:
    """One row per result; for each definition the perplexity, the mean KL, the share of equal likeliest tokens."""
    names = definitions(found)
    marks = ["" if len(names) == 1 else f" [{number}]" for number in range(1, len(names) + 1)]
    text = shared_text(found)
    front = best(found, text) if text else set()
    heads = ["result", "method", "pattern", "sparsity", "left"]
    for mark in marks:
        heads += [f"perplexity{mark}", f"mean KL{mark}", f"top-1{mark}"]
    rows = [_dense_row(found, names)[: None if text else -1]] if len({result.source for result in found}) == 1 else []
    for result in found:
        cells = [say(result.name), say(result.method), say(result.pattern), percent(result.sparsity), count(result.left)]
        for name in names:
            value = result.found.get(name)
            cells += [number(value.perplexity), number(value.kl), share(value.top1)] if value else [Cell("")] * 3
        rows.append((*cells, *([say("yes" if result.name in front else "")] if text else [])))
    return PageTable((*heads, "best") if text else tuple(heads), tuple(rows))


def share(value: float | None) -> Cell:
    return say(None) if value is None else percent(value)


def _dense_row(found: Sequence[Result], names: Sequence[str]) -> tuple[Cell, ...]:
    values = {name: value for result in found for name, value in result.dense.items()}
    cells = [cell for name in names for cell in (number(values.get(name)), Cell(""), Cell(""))]
    return (say("dense"), *[Cell("")] * 4, *cells, Cell(""))


def remarks(found: Sequence[Result]) -> list[str]:
    """The remarks below the table."""
    names = definitions(found)
    said = [f"perplexity{f' [{n}]' if len(names) > 1 else ''}: {name}" for n, name in enumerate(names, 1)]
    if len({result.source for result in found}) > 1:
        said.append("These are results of different models: " + ", ".join(sorted({result.source[0] for result in found})) + ".")
    text = shared_text(found)
    if text:
        how = "has as few remaining parameters" if _all_counted(found) else "is as sparse"
        by = f", by [{names.index(text) + 1}]" if len(names) > 1 else ""
        said.append(f"Best: no other result {how} and predicts as well, and is better in one of the two{by}.")
    else:
        said.append("None is called best: not all results were measured on the same text.")
    said.append("Mean KL(dense || pruned) in nats; top-1: the share of predictions whose likeliest token is the dense model's.")
    said.append("Left: parameters of the whole model that are neither zero nor removed.")
    said.append("Sparsity: the dropped share of the pruned matrices; for a structured pattern, of its units' parameters.")
    return said


def sections(found: Sequence[Result]) -> Iterator[Section]:
    yield Section("comparison", "Side by side", table=compared(found), lines=tuple(remarks(found)))
    shares = [result.sparsity for result in found if result.found]
    for n, name in enumerate(definitions(found), 1):
        yield _curve(found, name, n, (min(shares), max(shares)))
    runs = [(result.name, result.report) for result in found if result.report]
    if runs:
        yield from _errors(runs)
        yield _sparsities(runs)
    samples = [(name, report.sample) for name, report in runs if isinstance(report.sample, Sample)]
    if samples:
        first = samples[0][1]
        said = f"{'In answer to' if first.chat else 'After'} “{first.prompt}”, greedily. One sample measures nothing."
        texts = (("dense", first.dense.strip()), *((name, sample.pruned.strip()) for name, sample in samples))
        yield Section("sample", "A sample of text", (said,), texts=texts)


def _curve(found: Sequence[Result], name: str, n: int, reach: tuple[float, float]) -> Section:
    """reach: of the sparsities of all such charts, which have the same axis."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in found:
        if name in result.found:
            lines.setdefault(f"{result.method} {result.pattern}", []).append((result.sparsity, result.found[name].perplexity))
    points = {key: sorted(value) for key, value in lines.items()}
    dense = {result.dense[name] for result in found if name in result.dense}
    level = ("dense", next(iter(dense))) if len(dense) == 1 else None
    picture = curves(f"frontier{n}", "Perplexity by sparsity", points, ("sparsity", "perplexity"), level=level, percent="x", reach=reach)
    rows = [(say(key), percent(s), number(p)) for key, value in points.items() for s, p in value]
    table = PageTable(("method, pattern", "sparsity", "perplexity"), tuple(rows))
    return Section(f"frontier{n}", "Perplexity by sparsity", (name,), picture, table, folds=NUMBERS)


def _errors(runs: Sequence[tuple[str, Report]]) -> Iterator[Section]:
    """Of the results that have any: blocks that were pruned in training have none."""
    measured = {name: [(float(n), b.output_error) for n, b in enumerate(r.blocks) if b.output_error is not None] for name, r in runs}
    lines = {name: points for name, points in measured.items() if points}
    if lines:
        picture = curves("errors", "Relative output error by block", lines, ("block", "relative error"), whole=True)
        said = "Relative squared error of each block's output."
        yield Section("errors", "Error by block", (said,), picture, _by_block(runs), folds=NUMBERS)


def _by_block(runs: Sequence[tuple[str, Report]]) -> PageTable:
    rows = [(say(name), say(b.block), number(b.output_error)) for name, report in runs for b in report.blocks]
    return PageTable(("result", "block", "relative output error"), tuple(rows))


def _sparsities(runs: Sequence[tuple[str, Report]]) -> Section:
    lines, rows = {}, []
    for name, report in runs:
        grid = grid_of(report.blocks)
        points = []
        for n, block in enumerate(grid.blocks):
            groups = [group for (b, _), group in grid.groups.items() if b == block]
            share = sum(g.zeros for g in groups) / max(1, sum(g.weights for g in groups))
            points.append((float(n), share))
            rows.append((say(name), say(short_blocks((block,))[0]), percent(share)))
        lines[name] = points
    picture = curves("sparsities", "Sparsity by block", lines, ("block", "sparsity"), whole=True, percent="y")
    return Section("sparsities", "Sparsity by block", picture=picture, table=PageTable(("result", "block", "sparsity"), tuple(rows)), folds=NUMBERS)
