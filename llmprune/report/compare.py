"""Several results side by side: of runs, of sweeps, or of both. Perplexities stand in one column only where they have one definition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmprune.report.cells import Cell, Table, count, definition, number, percent, say
from llmprune.report.layers import grid_of, short_blocks
from llmprune.report.pictures import curves
from llmprune.report.sections import Section
from llmprune.report.stored import RUN, read_any
from llmprune.report.summary import named


@dataclass(frozen=True)
class Found:
    """What one evaluation set says of one result."""

    perplexity: float
    kl: float
    top1: float


@dataclass(frozen=True)
class Entry:
    """One pruned model. ``found`` and ``dense`` are by the definition of the numbers; ``left``: parameters that are neither zero nor gone, None where
    nobody counted; ``report``: of a run.
    """

    name: str
    source: tuple[str, str]  # name, and the hashes of its weights
    method: str
    pattern: str
    sparsity: float
    left: int | None
    found: dict[str, Found]
    dense: dict[str, float]
    report: dict[str, Any] | None = None


def entries(paths: Sequence[Path]) -> list[Entry]:
    """Of all results. Raises RequestError for what is none."""
    return _distinct([entry for path in paths for entry in _entries(path)])


def _entries(path: Path) -> Iterator[Entry]:
    kind, value = read_any(path)
    source = (value["source"]["name"], repr(sorted(value["source"]["files"].items())))
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    if kind == RUN:
        yield _of_run(folder.name, source, value)
        return
    dense = {definition(d): d["value"] for d in value["dense"]}
    for number_of_row, row in enumerate(value["rows"], 1):
        found = {definition(p): Found(p["value"], d["kl"], d["top1"]) for p, d in zip(row["perplexity"], row["divergence"], strict=True)}
        yield Entry(f"{folder.name} #{number_of_row}", source, row["method"], row["pattern"], row["sparsity"], None, found, dense)


def _of_run(name: str, source: tuple[str, str], value: dict[str, Any]) -> Entry:
    recipe, sparsity, smaller = value["recipe"], value["sparsity"], value["smaller"]
    found = {
        definition(pair["pruned"]): Found(pair["pruned"]["value"], pair["divergence"]["kl"], pair["divergence"]["top1"])
        for pair in value["perplexity"]
    }
    dense = {definition(pair["dense"]): pair["dense"]["value"] for pair in value["perplexity"]}
    left = smaller["parameters"] if smaller else sparsity["parameters"] - sparsity["zeros"]
    return Entry(name, source, named(recipe), recipe["pattern"], sparsity["pruned_matrices"], left, found, dense, value)


def _distinct(found: list[Entry]) -> list[Entry]:
    """Folders may have one last name."""
    seen: dict[str, int] = {}
    named = []
    for entry in found:
        seen[entry.name] = seen.get(entry.name, 0) + 1
        named.append(entry if seen[entry.name] == 1 else replace(entry, name=f"{entry.name} ({seen[entry.name]})"))
    return named


def definitions(found: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in found for name in entry.found))


def best(found: Sequence[Entry], by: str) -> set[str]:
    """Names of those that nothing beats: no other one is as small and as good, and better in one of the two. Small is said in parameters that are
    left, where all have them: what a sparsity is a share of differs between patterns.
    """
    counted = _all_counted(found)
    points = [(e.name, (e.left or 0) if counted else -e.sparsity, e.found[by].perplexity) for e in found if by in e.found]
    return {name for name, left, p in points if not any(t <= left and q <= p and (t, q) != (left, p) for _, t, q in points)}


def _all_counted(found: Sequence[Entry]) -> bool:
    return all(entry.left is not None for entry in found)


def compared(found: Sequence[Entry]) -> Table:
    """One row a result; of each definition the perplexity, the mean KL, the share of equal likeliest tokens."""
    names = definitions(found)
    marks = ["" if len(names) == 1 else f" [{number}]" for number in range(1, len(names) + 1)]
    front = best(found, names[0]) if names else set()
    heads = ["result", "method", "pattern", "sparsity", "left"]
    for mark in marks:
        heads += [f"perplexity{mark}", f"mean KL{mark}", f"top-1{mark}"]
    rows = [_dense_row(found, names)] if len({entry.source for entry in found}) == 1 else []
    for entry in found:
        cells = [say(entry.name), say(entry.method), say(entry.pattern), percent(entry.sparsity), count(entry.left)]
        for name in names:
            value = entry.found.get(name)
            cells += [number(value.perplexity), number(value.kl), percent(value.top1)] if value else [Cell("")] * 3
        rows.append((*cells, say("yes" if entry.name in front else "")))
    return Table((*heads, "best"), tuple(rows))


def _dense_row(found: Sequence[Entry], names: Sequence[str]) -> tuple[Cell, ...]:
    values = {name: value for entry in found for name, value in entry.dense.items()}
    cells = [cell for name in names for cell in (number(values[name]), Cell(""), Cell(""))]
    return (say("dense"), *[Cell("")] * 4, *cells, Cell(""))


def remarks(found: Sequence[Entry]) -> list[str]:
    """What has to be said with the table."""
    names = definitions(found)
    said = [f"perplexity{f' [{n}]' if len(names) > 1 else ''}: {name}" for n, name in enumerate(names, 1)]
    if len({entry.source for entry in found}) > 1:
        said.append("These are results of different models: " + ", ".join(sorted({entry.source[0] for entry in found})) + ".")
    if names:
        how = "has as few parameters left" if _all_counted(found) else "is as sparse"
        said.append(f"Best: no other result {how} and predicts as well, and is better in one of the two" + (", by [1]." if len(names) > 1 else "."))
    said.append("Mean KL(dense || pruned) in nats; top-1: the share of predictions whose likeliest token is the dense model's.")
    said.append("Left: parameters of the whole model that are neither zero nor gone.")
    said.append("Sparsity: the share of the pruned matrices that has gone; of a structured pattern, of what its units hold.")
    return said


def sections(found: Sequence[Entry]) -> Iterator[Section]:
    yield Section("comparison", "Side by side", table=compared(found), lines=tuple(remarks(found)))
    for n, name in enumerate(definitions(found), 1):
        yield _curve(found, name, n)
    runs = [(entry.name, entry.report) for entry in found if entry.report]
    if runs:
        errors = {name: [(float(n), b["output_error"]) for n, b in enumerate(report["blocks"])] for name, report in runs}
        picture = curves("errors", "Relative output error by block", errors, ("block", "relative error"), whole=True)
        yield Section("errors", "Error by block", ("Relative squared error of what leaves each block.",), picture, _by_block(runs))
        yield _sparsities(runs)
    texts = [(name, report["sample"]["pruned"].strip()) for name, report in runs if report["sample"] and "reason" not in report["sample"]]
    if texts:
        sample = next(report["sample"] for _, report in runs if report["sample"] and "reason" not in report["sample"])
        said = f"After “{sample['prompt']}”, always by the likeliest token. One sample measures nothing."
        yield Section("sample", "A sample of text", (said,), texts=(("dense", sample["dense"].strip()), *texts))


def _curve(found: Sequence[Entry], name: str, n: int) -> Section:
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in found:
        if name in entry.found:
            lines.setdefault(f"{entry.method} {entry.pattern}", []).append((entry.sparsity, entry.found[name].perplexity))
    points = {key: sorted(value) for key, value in lines.items()}
    dense = {entry.dense[name] for entry in found if name in entry.dense}
    level = ("dense", next(iter(dense))) if len(dense) == 1 else None
    picture = curves(f"frontier{n}", "Perplexity by sparsity", points, ("sparsity", "perplexity"), level=level)
    rows = [(say(key), percent(s), number(p)) for key, value in points.items() for s, p in value]
    return Section(f"frontier{n}", "Perplexity by sparsity", (name,), picture, Table(("method, pattern", "sparsity", "perplexity"), tuple(rows)))


def _by_block(runs: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    rows = [(say(name), say(b["block"]), number(b["output_error"])) for name, report in runs for b in report["blocks"]]
    return Table(("result", "block", "relative output error"), tuple(rows))


def _sparsities(runs: Sequence[tuple[str, dict[str, Any]]]) -> Section:
    lines, rows = {}, []
    for name, report in runs:
        grid = grid_of(report)
        points = []
        for n, block in enumerate(grid.blocks):
            groups = [group for (b, _), group in grid.groups.items() if b == block]
            share = sum(g.zeros for g in groups) / sum(g.weights for g in groups)
            points.append((float(n), share))
            rows.append((say(name), say(short_blocks((block,))[0]), percent(share)))
        lines[name] = points
    picture = curves("sparsities", "Sparsity by block", lines, ("block", "sparsity"), whole=True)
    return Section("sparsities", "Sparsity by block", picture=picture, table=Table(("result", "block", "sparsity"), tuple(rows)))
