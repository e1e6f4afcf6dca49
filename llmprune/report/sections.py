"""What report.html says, section by section: texts, pictures and the tables behind them, from the content of llmprune.json alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmprune.report.cells import Cell, Table, count, definition, number, percent, ratio, say, seconds, size
from llmprune.report.layers import Grid, grid_of, short, short_blocks
from llmprune.report.pictures import bars, curves, heat_map

MOST_NOTES = 200


@dataclass(frozen=True)
class Tile:
    """One number that counts."""

    label: str
    cell: Cell
    said: str


@dataclass(frozen=True)
class Section:
    """``picture`` is SVG of our own; everything else is text. A table behind a picture is folded away. ``texts``: heads and texts side by side."""

    id: str
    title: str
    said: tuple[str, ...] = ()
    picture: str = ""
    table: Table | None = None
    texts: tuple[tuple[str, str], ...] = ()
    lines: tuple[str, ...] = ()


def tiles(report: dict[str, Any]) -> Iterator[Tile]:
    found = report["sparsity"]
    yield Tile("sparsity", percent(found["pruned_matrices"]), f"of the pruned matrices; asked {found['asked']:.2%}")
    for pair in report["perplexity"]:
        dense, pruned = pair["dense"]["value"], pair["pruned"]["value"]
        yield Tile("perplexity", number(pruned), f"dense {dense:.4g}; {pair['dense']['dataset']}")
        yield Tile("mean KL", number(pair["divergence"]["kl"], 3), "nats from the dense model's predictions")
        yield Tile("same likeliest token", percent(pair["divergence"]["top1"], 1), "as the dense model")
    smaller = report["smaller"]
    left = smaller["parameters"] if smaller else found["parameters"] - found["zeros"]
    yield Tile("parameters" if smaller else "non-zero parameters", count(left), f"of {found['parameters']:,}")


def sections(report: dict[str, Any], bench: dict[str, Any] | None = None) -> Iterator[Section]:
    grid = grid_of(report)
    yield asked_and_got(report)
    if report["perplexity"]:
        yield quality(report)
    if report.get("tasks"):  # what llmprune eval has added
        yield tasks(report["tasks"])
    if grid:
        yield sparsity(grid)
    if report["blocks"]:
        yield errors(report)
    yield from ratios(report, grid)
    if report["tried"]:
        yield tried(report)
    if report["frontier"]:
        yield frontier(report)
    if report["polish"]:
        yield polish(report["polish"])
    yield sizes(report)
    yield timings(report)
    if report["notes"]:
        more = len(report["notes"]) - MOST_NOTES
        lines = tuple(report["notes"][:MOST_NOTES]) + ((f"and {more:,} more in llmprune.json",) if more > 0 else ())
        yield Section("notes", "Warnings and notes", lines=lines)
    yield provenance(report)
    if report["sample"]:
        yield sample(report["sample"])
    if bench:
        yield speeds(bench)


def asked_and_got(report: dict[str, Any]) -> Section:
    recipe, found, data = report["recipe"], report["sparsity"], report["calibration"]
    parts = " + ".join(p for p in (recipe["criterion"], recipe["solver"]) if p)
    how = ": ".join(p for p in (recipe["method"] or recipe["quality"], parts) if p)
    windows = f"{data['windows']} windows of {data['window']} from {data['dataset']} ({data['split']})"
    rows = [
        ("pattern", say(recipe["pattern"])),
        ("method", say(how)),
        ("ratios", say(recipe["allocation"])),
        ("calibration", say(windows)),
        ("sparsity asked, of the pruned matrices", percent(found["asked"], 4)),
        ("sparsity got", percent(found["pruned_matrices"], 4)),
        ("weights that have gone", count(found["zeros"])),
        ("weights in pruned matrices", count(found["weights"])),
    ]
    return Section("asked", "Asked and got", table=_pairs(rows))


def quality(report: dict[str, Any]) -> Section:
    """A column a data set."""
    found = report["perplexity"]
    rows = (
        (say("perplexity, dense"), *(number(pair["dense"]["value"]) for pair in found)),
        (say("perplexity, pruned"), *(number(pair["pruned"]["value"]) for pair in found)),
        (say("mean KL(dense || pruned), nats"), *(number(pair["divergence"]["kl"]) for pair in found)),
        (say("same likeliest token"), *(percent(pair["divergence"]["top1"]) for pair in found)),
    )
    said = (
        "Perplexity: exp of the mean negative log-likelihood of all but the first token of each window; windows do not overlap. "
        "The other two are over the same predictions.",
        *(f"Measured on {definition(pair['pruned'])}." for pair in found),
    )
    return Section("quality", "Quality", said, table=Table(("", *(pair["dense"]["dataset"] for pair in found)), rows))


def tasks(found: list[dict[str, Any]]) -> Section:
    """A row a metric, with its standard error."""
    rows = []
    for task in found:
        for key, value in task["metrics"].items():
            metric, _, kept = key.partition(",")
            if not metric.endswith("_stderr"):
                error = number(task["metrics"].get(f"{metric}_stderr,{kept}"))
                name = metric if kept in ("", "none") else f"{metric} ({kept})"
                how = (count(task["samples"]), count(task["shots"]), say(task["task_version"]), say(task["dtype"]), say(task["lm_eval"]))
                rows.append((say(task["task"]), say(name), number(value), error, *how))
    heads = ("task", "metric", "value", "standard error", "questions", "few-shot", "version", "dtype", "lm-eval")
    said = "Of the pruned model, by lm-evaluation-harness. Numbers of different versions, shots or questions are no numbers of one thing."
    return Section("tasks", "Tasks", (said,), table=Table(heads, tuple(rows)))


def sparsity(grid: Grid) -> Section:
    values = [[_share(grid, block, kind) for kind in grid.kinds] for block in grid.blocks]
    picture = heat_map("heat", "Share that has gone by block and matrix", short_blocks(grid.blocks), short(grid.kinds), values)
    low, high = (end(v for row in values for v in row if v is not None) for end in (min, max))
    said = f"Share that has gone of each matrix, in per cent: blocks down, kinds of matrices across; from {low:.1%} to {high:.1%}."
    heads = ("block", "matrices", "count", "weights", "gone", "sparsity", "asked", "squared error")
    rows = tuple(
        (
            say(g.block),
            say(g.kind),
            count(g.matrices),
            count(g.weights),
            count(g.zeros),
            percent(g.sparsity),
            _range(g.asked),
            number(g.lost, 3),
        )
        for g in grid.groups.values()
    )
    note = "Squared error: what was added to the outputs, summed over outputs and calibration tokens."
    return Section("sparsity", "Sparsity by layer", (said,), picture, Table(heads, rows, note))


def errors(report: dict[str, Any]) -> Section:
    blocks = report["blocks"]
    points = [(float(n), b["output_error"]) for n, b in enumerate(blocks)]
    picture = curves("errors", "Relative output error by block", {"error": points}, ("block", "relative error"), whole=True)
    said = "Squared error of what leaves each block over its squared size on the calibration windows, all blocks before it pruned too."
    rows = tuple((say(b["block"]), number(b["output_error"]), say(", ".join(b["changed"]))) for b in blocks)
    return Section("errors", "Error by block", (said,), picture, Table(("block", "relative output error", "also changed"), rows))


def ratios(report: dict[str, Any], grid: Grid) -> Iterator[Section]:
    """Only where the matrices differ in what they were asked for."""
    if not grid.ratios_differ:
        return
    lines: dict[str, list[tuple[float, float]]] = {}
    for kind, name in zip(grid.kinds, short(grid.kinds), strict=True):
        found = ((n, grid.groups.get((block, kind))) for n, block in enumerate(grid.blocks))
        lines[name] = [(float(n), sum(g.asked) / 2) for n, g in found if g]
    picture = curves("ratios", "Ratio by block and matrix", lines, ("block", "ratio"), whole=True)
    name = report["recipe"]["allocation"]
    said = f"What the allocation {name!r} asked of each matrix" + ("; of several experts, the middle of the range." if _several(grid) else ".")
    rows = tuple(
        (say(row["matrix"]), percent(row["asked"]), number(report["reasons"].get(row["matrix"])))
        for row in (row for block in report["blocks"] for row in block["rows"])
        if not _several(grid)
    )
    table = Table(("matrix", "ratio", "rests on"), rows, "The number that a ratio rests on is the allocation's own measure.") if rows else None
    yield Section("ratios", "Ratios", (said,), picture, table)


def tried(report: dict[str, Any]) -> Section:
    rows = tuple((say(t["allocation"]), number(t["divergence"]), say("kept" if t["kept"] else "")) for t in report["tried"])
    said = "Each was tried on the whole model and measured on held-back calibration windows."
    return Section("tried", "Allocations tried", (said,), table=Table(("allocation", "mean KL, nats", ""), rows))


def frontier(report: dict[str, Any]) -> Section:
    steps = sorted(report["frontier"], key=lambda step: step["sparsity"])
    points = [(step["sparsity"], step["perplexity"]) for step in steps]
    picture = curves("frontier", "Perplexity by sparsity", {"tried": points}, ("sparsity", "perplexity"))
    rows = tuple((percent(s["sparsity"]), number(s["perplexity"]), percent(s["increase"])) for s in steps)
    said = "Sparsities that were tried out to meet the allowed increase, on held-back calibration windows."
    return Section("frontier", "Frontier", (said,), picture, Table(("sparsity", "perplexity", "increase over dense"), rows))


def polish(found: dict[str, Any]) -> Section:
    rows = [
        ("steps", count(found["steps"])),
        ("mean KL on the calibration windows before, nats", number(found["divergence_before"])),
        ("and after", number(found["divergence_after"])),
        ("tensors changed", count(len(found["changed"]))),
    ]
    return Section("polish", "Distillation of the whole model", table=_pairs(rows))


def sample(found: dict[str, Any]) -> Section:
    if "reason" in found:
        return Section("sample", "A sample of text", (f"None: {found['reason']}.",))
    said = f"Both models go on from “{found['prompt']}” for {found['tokens']} tokens, always by the likeliest. One sample measures nothing."
    return Section("sample", "A sample of text", (said,), texts=(("dense", found["dense"].strip()), ("pruned", found["pruned"].strip())))


def sizes(report: dict[str, Any]) -> Section:
    found, smaller = report["sparsity"], report["smaller"]
    rows = [
        ("parameters of the source", count(found["parameters"])),
        ("weights that have gone", count(found["zeros"])),
        ("share of the model", percent(found["zeros"] / found["parameters"])),
        ("weights of the source on disk", size(report["source"].get("bytes"))),
    ]
    if not smaller:
        said = "Sparse weights are plain zeros in plain safetensors: the files are no smaller, and dense kernels are no faster."
        return Section("sizes", "Sizes", (said,), table=_pairs(rows))
    rows += [("parameters saved", count(smaller["parameters"])), ("weights on disk", size(smaller["bytes"]))]
    loaded = smaller["difference"]
    rows += [("logits when loaded again, relative difference", say("not loaded") if loaded is None else number(loaded, 2))]
    said = f"{smaller['pattern']}: the saved model is smaller, and {len(smaller['layers'])} blocks are left."
    return Section("sizes", "Sizes", (said,), table=_pairs(rows))


def speeds(bench: dict[str, Any]) -> Section:
    """Medians of a ``llmprune bench --json``, with the ratios to its first model."""
    models, found, setting = bench["models"], bench["ratios"], bench["setting"]
    heads = ("", *(f"{m['role']}: {m['name']}" for m in models), *(f"{r['role']} over {models[0]['role']}" for r in found))
    rows = []
    for label, field, written in MEASURES:
        values = [written(_median(m[field])) for m in models]
        over = [Cell("") if r[field] is None else ratio(_median(r[field])) for r in found]
        rows.append((say(label), *values, *over))
    said = (
        f"Medians of {setting['repeat']} rounds by turns; prompt {setting['prompt_length']}, {setting['new_tokens']} new tokens, "
        f"batch {setting['batch']}, {setting['device']} ({setting['card']}), {setting['threads']} threads."
    )
    return Section("speeds", "Measured speed", (said,), table=Table(heads, tuple(rows)), lines=tuple(bench["notes"]))


MEASURES = (
    ("prefill, tokens/s", "prefill", number),
    ("decode, tokens/s", "decode", number),
    ("time to first token", "first_token", seconds),
    ("peak memory", "peak_memory", size),
    ("key-value cache", "kv_cache", size),
    ("on disk", "disk", size),
)


def provenance(report: dict[str, Any]) -> Section:
    rows = [("source", say(report["source"]["name"])), ("revision", say(report["source"]["revision"]))]
    rows += [(f"sha256 of {file}", say(digest)) for file, digest in report["source"]["files"].items()]
    rows += [("sha256 of the calibration tokens", say(report["calibration"]["sha256"]))]
    rows += [(f"recipe: {key}", say(_written(value))) for key, value in report["recipe"].items() if value not in (None, False, [], {})]
    rows += [(key.replace("_", " "), say(value)) for key, value in report["environment"].items()]
    return Section("provenance", "Where it comes from", table=_pairs(rows))


def timings(report: dict[str, Any]) -> Section:
    """The one section that differs between equal runs."""
    found, parts = report["timings"], dict[str, float]()
    for block in found["blocks"]:
        for part, spent in block.items():
            parts[part] = parts.get(part, 0.0) + spent
    rest = found.get("seconds", 0.0) - sum(parts.values())
    parts |= {"all the rest": rest} if rest > 0 and not found.get("resumed_blocks") else {}
    rows = [(name, seconds(spent)) for name, spent in parts.items()]
    rows += [("this process in all", seconds(found["seconds"]))] if "seconds" in found else []
    rows += [("blocks taken over from an earlier process", count(found["resumed_blocks"]))] if found.get("resumed_blocks") else []
    rows += [("most memory of the process, libraries included", size(found["peak_memory"]))] if found.get("peak_memory") else []
    rows += [("planned for the run, libraries not included", size(found["planned_memory"]))] if found.get("planned_memory") else []
    picture = bars("time", "Seconds by part of the work", parts, "seconds") if parts else ""
    said = "Work on the blocks by part; the rest is gradients, ratios, perplexities, samples, copying."
    return Section("timings", "Time and memory", (said,), picture=picture, table=_pairs(rows))


def _pairs(rows: list[tuple[str, Cell]]) -> Table:
    return Table((), tuple((say(name), cell) for name, cell in rows))


def _share(grid: Grid, block: str, kind: str) -> float | None:
    group = grid.groups.get((block, kind))
    return group.sparsity if group else None


def _range(ends: tuple[float, float]) -> Cell:
    return percent(ends[0]) if ends[0] == ends[1] else Cell(f"{ends[0]:.2%} to {ends[1]:.2%}")


def _several(grid: Grid) -> bool:
    return any(group.matrices > 1 for group in grid.groups.values())


def _median(value: Any) -> Any:
    return value["median"] if isinstance(value, dict) else value


def _written(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
