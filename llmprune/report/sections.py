"""What report.html says, section by section: texts, pictures and the tables behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from llmprune.benchmark.result import Bench
from llmprune.evaluation.answers import TaskResult
from llmprune.report.cells import NUMBERS, Cell, PageTable, Section, Tile, count, definition, number, percent, say, seconds, size
from llmprune.report.grid import Grid, grid_of, short, short_blocks
from llmprune.report.pictures import bars, curves, heat_map
from llmprune.report.recovered import Recovered, text_of
from llmprune.report.result import Report
from llmprune.report.speeds import speeds
from llmprune.results import BlockReport, Evaluation, NoSample, Polished, Round, Sample, Step, Timings, Trial

MOST_NOTES = 200
ALIKE = 0.0005  # shares that differ by less are written the same
BROKEN = 50.0  # nats: no curve has room for such a loss


def tiles(report: Report) -> Iterator[Tile]:
    yield Tile("sparsity", percent(report.sparsity), f"of the pruned matrices; asked {report.asked:.2%}")
    for pair in report.perplexity:
        yield Tile("perplexity", number(pair.pruned.value), f"dense {pair.dense.value:.4g}; {pair.dense.dataset}")
        yield Tile("mean KL", number(pair.divergence.kl, 3), "nats from the dense model's predictions")
        yield Tile("same likeliest token", percent(pair.divergence.top1, 1), "as the dense model")
    for measured in report.recovered[-1].measured if report.recovered else ():
        yield Tile("after recovery", number(measured.after.value), f"before {measured.before.value:.4g}; {measured.after.dataset}")
    yield Tile("parameters" if report.smaller else "non-zero parameters", count(report.left), f"of {report.parameters:,}")


def sections(report: Report, bench: Bench | None = None) -> Iterator[Section]:
    grid = grid_of(report.blocks)
    yield asked_and_got(report)
    if report.perplexity:
        yield quality(report.perplexity)
    if report.tasks:
        yield tasks(report.tasks)
    if grid:
        yield sparsity(grid)
    if any(block.output_error is not None for block in report.blocks):
        yield errors(report.blocks)
    yield from ratios(report, grid)
    if report.tried:
        yield tried(report.tried)
    if report.frontier:
        yield frontier(report.frontier)
    if report.polish:
        yield polish(report.polish)
    if report.rounds:
        yield rounds(report.rounds)
    for n, training in enumerate(report.recovered):
        yield recovery(training, n)
    yield sizes(report)
    yield timings(report.timings, report.blocks)
    notes = report.joined_notes
    if notes:
        more = len(notes) - MOST_NOTES
        lines = tuple(notes[:MOST_NOTES]) + ((f"and {more:,} more in llmprune.json",) if more > 0 else ())
        yield Section("notes", "Warnings and notes", lines=lines)
    yield provenance(report)
    if report.sample:
        yield sample(report.sample)
    if bench:
        yield speeds(bench)


def asked_and_got(report: Report) -> Section:
    recipe, data = report.recipe, report.calibration
    parts = " + ".join(p for p in (recipe["criterion"], recipe["solver"]) if p)
    how = ": ".join(p for p in (recipe["method"] or recipe["quality"], parts) if p)
    windows = "none: masked in training"
    if data:
        windows = f"{data.windows} windows of {data.window}{data.seen} from {data.dataset} ({data.split}){data.aside}"
    rows = [
        ("pattern", say(recipe["pattern"])),
        ("method", say(how)),
        ("ratios", say(recipe["allocation"])),
        ("calibration", say(windows)),
        ("sparsity asked, of the pruned matrices", percent(report.asked, 4)),
        ("sparsity got", percent(report.sparsity, 4)),
        ("dropped weights", count(report.zeros)),
        ("weights in pruned matrices", count(report.weights)),
    ]
    if report.own_zeros:
        rows.insert(-1, ("of them no mask has dropped: zeros of the source's own", count(report.own_zeros)))
    return Section("asked", "Asked and got", table=_pairs(rows))


def quality(found: Sequence[Evaluation]) -> Section:
    """One column per data set."""
    rows = (
        (say("perplexity, dense"), *(number(pair.dense.value) for pair in found)),
        (say("perplexity, pruned"), *(number(pair.pruned.value) for pair in found)),
        (say("mean KL(dense || pruned), nats"), *(number(pair.divergence.kl) for pair in found)),
        (say("same likeliest token"), *(percent(pair.divergence.top1) for pair in found)),
    )
    said = (
        "Perplexity: exp of the mean negative log-likelihood of all but the first token of each window; windows do not overlap. "
        "The other two are over the same predictions.",
        *(f"Measured on {definition(pair.pruned)}." for pair in found),
    )
    return Section("quality", "Quality", said, table=PageTable(("", *(pair.dense.dataset for pair in found)), rows))


def tasks(found: Sequence[TaskResult]) -> Section:
    """One row per metric, with its standard error."""
    rows = []
    for task in found:
        for key, value in task.metrics.items():
            metric, _, kept = key.partition(",")
            if not metric.endswith("_stderr"):
                error = number(task.metrics.get(f"{metric}_stderr,{kept}"))
                name = metric if kept in ("", "none") else f"{metric} ({kept})"
                how = (count(task.samples), count(task.shots), say(task.task_version), say(task.dtype), say(task.lm_eval))
                rows.append((say(task.task), say(name), number(value), error, *how))
    heads = ("task", "metric", "value", "standard error", "questions", "few-shot", "version", "dtype", "lm-eval")
    said = "Of the pruned model, by lm-evaluation-harness. Numbers of different versions, shots or questions are not comparable."
    return Section("tasks", "Tasks", (said,), table=PageTable(heads, tuple(rows)))


def sparsity(grid: Grid) -> Section:
    """A heat map, or one sentence where all shares are equal."""
    values = [[_share(grid, block, kind) for kind in grid.kinds] for block in grid.blocks]
    low, high = (end(v for row in values for v in row if v is not None) for end in (min, max))
    if high - low < ALIKE:
        picture, said = "", f"Every matrix of every block has lost {low:.1%} of its weights."
    else:
        picture = heat_map("heat", "Dropped share by block and matrix", short_blocks(grid.blocks), short(grid.kinds), values)
        said = f"Dropped share of each matrix, in per cent: blocks down, kinds of matrices across; from {low:.1%} to {high:.1%}."
    heads = ("block", "matrices", "count", "weights", "dropped", "sparsity", "asked", "squared error")
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
    return Section("sparsity", "Sparsity by layer", (said,), picture, PageTable(heads, rows, note), folds=NUMBERS)


def errors(blocks: Sequence[BlockReport]) -> Section:
    points = [(float(n), b.output_error) for n, b in enumerate(blocks) if b.output_error is not None]
    picture = curves("errors", "Relative output error by block", {"error": points}, ("block", "relative error"), whole=True)
    said = "Squared error of each block's output over its squared norm on the calibration windows, with all blocks before it pruned too."
    rows = tuple((say(b.block), number(b.output_error), say(", ".join(b.changed))) for b in blocks)
    return Section("errors", "Error by block", (said,), picture, PageTable(("block", "relative output error", "also changed"), rows), folds=NUMBERS)


def ratios(report: Report, grid: Grid) -> Iterator[Section]:
    """Only if the ratios of the matrices differ."""
    if not grid.ratios_differ:
        return
    lines: dict[str, list[tuple[float, float]]] = {}
    for kind, name in zip(grid.kinds, short(grid.kinds), strict=True):
        found = ((n, grid.groups.get((block, kind))) for n, block in enumerate(grid.blocks))
        lines[name] = [(float(n), sum(g.asked) / 2) for n, g in found if g]
    picture = curves("ratios", "Ratio by block and matrix", lines, ("block", "ratio"), whole=True, percent="y")
    name = report.recipe["allocation"]
    said = f"What the allocation {name!r} asked of each matrix" + ("; of several experts, the middle of the range." if _several(grid) else ".")
    rows = tuple((say(row.matrix), percent(row.asked), number(report.reasons.get(row.matrix))) for row in report.rows if not _several(grid))
    table = PageTable(("matrix", "ratio", "rests on"), rows, "The number that a ratio is based on is the allocation's own measure.") if rows else None
    yield Section("ratios", "Ratios", (said,), picture, table, folds=NUMBERS)


def tried(found: Sequence[Trial]) -> Section:
    rows = tuple((say(trial.allocation), number(trial.divergence), say("kept" if trial.kept else "")) for trial in found)
    said = "Each was tried on the whole model and measured on held-back calibration windows."
    return Section("tried", "Allocations tried", (said,), table=PageTable(("allocation", "mean KL, nats", ""), rows))


def frontier(found: Sequence[Step]) -> Section:
    steps = sorted(found, key=lambda step: step.sparsity)
    points = [(step.sparsity, step.perplexity) for step in steps]
    picture = curves("frontier", "Perplexity by sparsity", {"tried": points}, ("sparsity", "perplexity"), percent="x")
    rows = tuple((percent(step.sparsity), number(step.perplexity), percent(step.increase)) for step in steps)
    said = "Sparsities that were tried to meet the allowed increase, on held-back calibration windows."
    return Section("frontier", "Frontier", (said,), picture, PageTable(("sparsity", "perplexity", "increase over dense"), rows), folds=NUMBERS)


def polish(found: Polished) -> Section:
    rows = [
        ("steps", count(found.steps)),
        ("mean KL on the calibration windows before, nats", number(found.divergence_before)),
        ("and after", number(found.divergence_after)),
        ("tensors changed", count(len(found.changed))),
    ]
    rows += [("matrix products of the steps", say("bfloat16"))] if found.half else []
    return Section("polish", "Distillation of the whole model", table=_pairs(rows))


def rounds(found: Sequence[Round]) -> Section:
    heads = ("round", "pattern", "sparsity", "pruned", "recovered", "dense", "step kept", "increase")
    rows = []
    for one in found:
        values = (number(value) for value in (one.before, one.after, one.dense))
        grown = say("") if one.increase is None else percent(one.increase)
        rows.append((count(one.number), say(one.pattern), percent(one.sparsity), *values, count(one.best), grown))
    said = (
        "Perplexities of the text that chose the step of each recovery; the increase is that of held-back calibration windows over the dense model."
    )
    return Section("rounds", "Rounds", (said,), table=PageTable(heads, tuple(rows)))


def recovery(found: Recovered, n: int) -> Section:
    """number: of the training, for names that are unique in the page."""
    texts = [text_of(one.after) for one in found.measured if one.decides]
    held = {text: [(float(step), math.exp(losses[k])) for step, losses in found.held_out if losses[k] < BROKEN] for k, text in enumerate(texts)}
    picture = curves(f"recovery{n}", "Held-out perplexity by step", held, ("step", "perplexity, held out"), whole=True)
    if found.losses:
        losses = {"training loss": [(float(step), loss) for step, loss in found.losses]}
        picture += curves(f"loss{n}", "Training loss by step", losses, ("step", "training loss"), whole=True)
    rows = tuple((say(text), number(dense), number(before), number(after)) for text, dense, before, after in found.figures)
    measured = tuple(f"Measured on {definition(one.after)}." for one in found.measured)
    heads = ("perplexity on", "dense", "before", "after")
    said = (f"{found.said[:1].upper()}{found.said[1:]}; every zero has stayed.", *measured)
    return Section(f"recovery{n}", "Recovery", said, picture, PageTable(heads, rows), lines=found.notes, folds=NUMBERS)


def sample(found: Sample | NoSample) -> Section:
    if isinstance(found, NoSample):
        return Section("sample", "A sample of text", (f"None: {found.reason}.",))
    how = "answer, through the chat template," if found.chat else "continue"
    said = f"Both models {how} “{found.prompt}” for {found.tokens} tokens, greedily. One sample measures nothing."
    return Section("sample", "A sample of text", (said,), texts=(("dense", found.dense.strip()), ("pruned", found.pruned.strip())))


def sizes(report: Report) -> Section:
    smaller = report.smaller
    rows = [
        ("parameters of the source", count(report.parameters)),
        ("dropped weights", count(report.zeros)),
        ("share of the model", percent(report.zeros / report.parameters)),
        ("weights of the source on disk", size(report.source.bytes)),
    ]
    if towers := report.source.towers:
        rows += [(", ".join(towers.paths), count(towers.weights)), ("share of the model that text does not pass", percent(towers.share))]
    if found := report.reloaded:
        apart = say(found.instead or "not finite") if found.difference is None else number(found.difference, 2)
        rows.append(("logits when loaded again, relative difference", apart))
    checked = (f"The result was checked before it was published: {found}.",) if found else ()
    if not smaller:
        said = "Sparse weights are plain zeros in plain safetensors: the files are no smaller, and dense kernels are no faster."
        return Section("sizes", "Sizes", (said, *checked), table=_pairs(rows))
    rows += [("parameters saved", count(smaller.parameters)), ("weights on disk", size(smaller.bytes))]
    said = f"{smaller.pattern}: the saved model is smaller, and {len(smaller.layers)} blocks remain."
    return Section("sizes", "Sizes", (said, *checked), table=_pairs(rows))


def provenance(report: Report) -> Section:
    rows = [("source", say(report.source.name)), ("revision", say(report.source.revision))]
    rows += [(f"sha256 of {file}", say(digest)) for file, digest in report.source.files.items()]
    rows += [("sha256 of the calibration tokens", say(report.calibration.sha256))] if report.calibration else []
    rows += [(f"recipe: {key}", say(_written(value))) for key, value in report.recipe.items() if value not in (None, False, [], {})]
    rows += [(key.replace("_", " "), say(value)) for key, value in sorted(report.environment.to_json().items())]
    return Section("provenance", "Where it comes from", table=_pairs(rows), folds="source, recipe, versions")


def timings(found: Timings, blocks: Sequence[BlockReport]) -> Section:
    """The one section that differs between equal runs."""
    parts = dict[str, float]()
    for block in blocks:
        for part, spent in block.seconds.items():
            parts[part] = parts.get(part, 0.0) + spent
    rest = (found.seconds or 0.0) - sum(parts.values())
    parts |= {"all the rest": rest} if rest > 0 and not found.resumed_blocks else {}
    rows = [(name, seconds(spent)) for name, spent in parts.items()]
    rows += [("this process in all", seconds(found.seconds))] if found.seconds is not None else []
    rows += [("blocks finished by an earlier process", count(found.resumed_blocks))] if found.resumed_blocks else []
    rows += [("peak memory of the process, libraries included", size(found.peak_memory))] if found.peak_memory else []
    rows += [("the last recovery", seconds(found.recovery_seconds))] if found.recovery_seconds is not None else []
    rows += [("planned for the run, libraries not included", size(found.planned_memory))] if found.planned_memory else []
    picture = bars("time", "Seconds by part of the work", parts, "seconds") if parts else ""
    said = "Work on the blocks by part; the rest is gradients, ratios, perplexities, samples, copying."
    return Section("timings", "Time and memory", (said,), picture=picture, table=_pairs(rows), folds=NUMBERS)


def _pairs(rows: list[tuple[str, Cell]]) -> PageTable:
    return PageTable((), tuple((say(name), cell) for name, cell in rows))


def _share(grid: Grid, block: str, kind: str) -> float | None:
    group = grid.groups.get((block, kind))
    return group.sparsity if group else None


def _range(ends: tuple[float, float]) -> Cell:
    return percent(ends[0]) if ends[0] == ends[1] else Cell(f"{ends[0]:.2%} to {ends[1]:.2%}")


def _several(grid: Grid) -> bool:
    return any(group.matrices > 1 for group in grid.groups.values())


def _written(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
