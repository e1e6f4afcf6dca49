"""Rich tables: what a run did, block by block, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmprune.benchmark.kernels import Kernel
from llmprune.benchmark.laps import Spread
from llmprune.benchmark.result import Bench
from llmprune.errors import at_home
from llmprune.report.cells import number
from llmprune.report.compare import Result, compared, remarks
from llmprune.report.frontier import QUICK, SweepReport
from llmprune.report.inspection import Inspected
from llmprune.report.result import Report
from llmprune.results import BlockReport, Smaller

MOST_NOTES = 10


def print_report(report: Report, console: Console) -> None:
    """The closing table: per block sparsity, relative output error, seconds; then the perplexities, notes and where the result is."""
    smaller = any(row.kept is not None for row in report.rows)
    what = "units kept" if smaller else "matrices"
    table = Table("block", what, "ratios", "sparsity", "output error", "seconds", title=f"pruned {report.source.name}")
    for column in table.columns[1:]:
        column.justify = "right"
    for block in report.blocks:
        weights = sum(r.size for r in block.rows)
        sparsity = sum(r.dropped for r in block.rows) / weights if weights else 0.0
        seconds = sum(block.seconds.values())
        cells = (f"{sparsity:.2%}", number(block.output_error, 3).text, f"{seconds:.2f}")
        table.add_row(block.block, units_of(block) if smaller else str(len(block.rows)), ratios_of(block), *cells)
    console.print(table)
    share = report.zeros / report.parameters
    dropped = f"{'cut out' if smaller else 'zeros'}: {report.zeros:,} of {report.weights:,}"
    whose = f"parameters of {report.recipe['pattern']}" if smaller else "weights in pruned matrices"
    console.print(f"{dropped} {whose} ({report.sparsity:.4%}, asked {report.asked:.4%}), {share:.2%} of the model", soft_wrap=True)
    if report.smaller:
        print_smaller(report, report.smaller, console)
    for trial in report.tried:
        kept = ", kept" if trial.kept else ""
        console.print(f"allocation {trial.allocation}: mean KL from the dense model on held-back windows {trial.divergence:.4g}{kept}")
    for step in report.frontier:
        console.print(f"frontier: sparsity {step.sparsity:.4f}, perplexity on held-back windows {step.perplexity:.4g} ({step.increase:+.2%})")
    if report.polish:
        was, now = report.polish.divergence_before, report.polish.divergence_after
        console.print(f"polish: {report.polish.steps} steps, mean KL from the dense model on the calibration windows {was:.4g} -> {now:.4g}")
    for pair in report.perplexity:
        console.print(f"perplexity, dense:  {pair.dense}", soft_wrap=True)
        console.print(f"perplexity, pruned: {pair.pruned}", soft_wrap=True)
        console.print(f"divergence: {pair.divergence}", soft_wrap=True)
    if report.reloaded:
        console.print(str(report.reloaded), markup=False, soft_wrap=True)
    for note in report.notes[:MOST_NOTES]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if len(report.notes) > MOST_NOTES:
        console.print(f"note: and {len(report.notes) - MOST_NOTES} more in llmprune.json")
    if report.output is not None:
        console.print(f"saved: {at_home(report.output)}", soft_wrap=True)


def print_recovery(report: Report, console: Console) -> None:
    """What the last training did: a line for each text, what is left of the pruning's loss, and where the result is."""
    found = report.recovered[-1]
    console.print(f"{report.source.name}: {found.said}", markup=False, soft_wrap=True)
    for one in found.measured:
        dense = f"{one.dense.value:.4g} dense, " if one.dense else ""
        left = f"; {one.excess:.1%} of the excess over the dense model's loss is left" if one.excess is not None else ""
        decides = ", which chose the step" if one.decides else ""
        said = f"perplexity: {dense}{one.before.value:.4g} before, {one.after.value:.4g} after{left}"
        text = one.after
        console.print(f"{said} ({text.dataset}, {text.split}, {text.definition}{decides})", markup=False, soft_wrap=True)
    if report.reloaded:
        console.print(str(report.reloaded), markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if report.output is not None:
        console.print(f"saved: {at_home(report.output)}", markup=False, soft_wrap=True)


def print_smaller(report: Report, found: Smaller, console: Console) -> None:
    """What was saved."""
    layers = f", {len(found.layers)} of {len(report.blocks)} layers" if found.pattern == "layers" else ""
    console.print(f"smaller model: {found.parameters:,} of {report.parameters:,} parameters{layers}, {found.bytes:,} bytes of weights")


def units_of(block: BlockReport) -> str:
    """Kept units of all units; for many like matrices, such as experts, their totals."""
    found: dict[str, list[int]] = {}
    for row in block.rows:
        both = found.setdefault(row.what, [0, 0])
        both[0] += len(row.kept or ())
        both[1] += row.units or 0
    if "layers" in found:
        return "stays" if found["layers"][0] else "goes"
    return ", ".join(f"{kept:,} of {units:,} {what}" for what, (kept, units) in found.items())


def print_sweep(report: SweepReport, console: Console) -> None:
    """The frontier: one line per pruning."""
    names = [f"{kind}, {dense.dataset}" for dense in report.dense for kind in ("perplexity", "mean KL")]
    table = Table("method", "pattern", "sparsity", *names, "seconds", title=f"sweep of {report.source.name}")
    table.add_row("dense", "", "0", *(cell for dense in report.dense for cell in (f"{dense.value:.4g}", "")), "")
    for row in report.rows:
        found = zip(row.perplexity, row.divergence, strict=True)
        cells = (cell for value, moved in found for cell in (f"{value.value:.4g}", f"{moved.kl:.4g}"))
        table.add_row(row.method, row.pattern, f"{row.sparsity:.2%}", *cells, f"{row.seconds:.1f}")
    console.print(table)
    if report.quick:
        console.print(QUICK, soft_wrap=True)
    for dense in report.dense:
        console.print(f"perplexity, dense: {dense}", soft_wrap=True)
    console.print(f"saved: {at_home(report.output)} (sweep.json, sweep.md, sweep.svg)", soft_wrap=True)


def print_comparison(found: list[Result], console: Console) -> None:
    """One line per result; then the definitions of the numbers."""
    value = compared(found)
    table = Table(title="comparison", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, head in enumerate(value.heads):
        figures = any(row[place].value is not None for row in value.rows)
        table.add_column(head, justify="right" if figures else "left", no_wrap=figures, overflow="fold", min_width=len(head))
    for row in value.rows:
        table.add_row(*(escape(cell.text) for cell in row))
    console.print(table)
    for line in remarks(found):
        console.print(line, markup=False, soft_wrap=True)


def ratios_of(block: BlockReport) -> str:
    """The least and the greatest ratio that a block's matrices were asked for."""
    ends = (f"{end(r.asked for r in block.rows):.1%}" for end in (min, max)) if block.rows else ()
    return " to ".join(dict.fromkeys(ends))


def print_inspection(found: list[Inspected], console: Console) -> None:
    table = Table("matrix", "shape", "zeros", "sparsity", "keeps")
    for item in found:
        table.add_row(item.matrix, f"{item.rows} x {item.columns}", f"{item.zeros:,}", f"{item.sparsity:.4%}", " ".join(item.patterns))
    console.print(table)
    weights = sum(i.rows * i.columns for i in found)
    zeros = sum(i.zeros for i in found)
    console.print(f"{len(found)} matrices, {zeros:,} of {weights:,} weights are zero ({zeros / max(1, weights):.4%})")


def print_bench(found: Bench, console: Console) -> None:
    """Figures side by side with their ratios to the first model's; then the 2:4 kernels and the notes."""
    said, reference = found.setting, found.models[0]
    how = f"{said.repeat} rounds by turns; {said.device} ({said.card}), {said.threads} threads" + (", compiled" if said.compile else "")
    work = f"prompt {said.prompt_length}, {said.new_tokens} new tokens, batch {said.batch}, greedy, key-value cache"
    console.print(f"{work}; {how}, torch {said.torch}, transformers {said.transformers}", soft_wrap=True, markup=False)
    table = Table("median (lowest..highest)")
    for model in found.models:
        table.add_column(f"{model.role}\n{model.name}\n{model.dtype}", justify="right")
    for ratio in found.ratios:
        table.add_column(f"{ratio.role} /\n{reference.role}", justify="right")
    for label, field, written in ROWS:
        values = [written(getattr(model, field)) for model in found.models]
        table.add_row(label, *values, *(_ratio(getattr(ratio, field)) for ratio in found.ratios))
    console.print(table)
    if found.kernels:
        console.print(_kernel_table(found.kernels))
    for note in found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _kernel_table(kernels: tuple[Kernel, ...]) -> Table:
    """One row per shape and number of tokens: microseconds of one product, and dense over 2:4, below 1 where the kernel is slower."""
    table = Table("2:4 matrices", "count", "tokens", "dense us", "2:4 us", "dense / 2:4")
    for kernel in kernels:
        sparse = _spread(kernel.sparse, 1e6) if kernel.sparse else f"stays dense: {kernel.refused}"
        gain = "" if kernel.speed_up is None else f"{kernel.speed_up:.2f} x, {'faster' if kernel.speed_up > 1 else 'slower'}"
        shape = f"{kernel.rows} x {kernel.columns}"
        table.add_row(shape, str(kernel.matrices), str(kernel.tokens), _spread(kernel.dense, 1e6), sparse, gain)
    return table


def _spread(value: Spread, scale: float = 1.0) -> str:
    low, mid, high = (f"{v * scale:,.{0 if v * scale >= 1000 else 1}f}" for v in (value.lowest, value.median, value.highest))
    return f"{mid} ({low}..{high})"


def _ratio(value: Spread | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, Spread):
        return f"{value.median:.2f} x ({value.lowest:.2f}..{value.highest:.2f})"
    return f"{value:.2f} x"


def _size(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 1e6:,.1f} MB"


ROWS: tuple[tuple[str, str, Callable[..., str]], ...] = (
    ("prefill, tokens/s", "prefill", _spread),
    ("decode, tokens/s", "decode", _spread),
    ("time to first token, ms", "first_token", lambda value: _spread(value, 1e3)),
    ("peak memory", "peak_memory", _size),
    ("key-value cache", "kv_cache", _size),
    ("parameters", "parameters", lambda value: f"{value:,}"),
    ("on disk", "disk", _size),
)
