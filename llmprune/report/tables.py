"""Rich tables: what a run did, block by block, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from llmprune.benchmark.kernels import Kernel
from llmprune.benchmark.laps import Spread
from llmprune.benchmark.result import Bench
from llmprune.errors import at_home
from llmprune.report.cells import number
from llmprune.report.compare import Result, compared, remarks
from llmprune.report.frontier import QUICK, SweepReport
from llmprune.report.inspection import Inspected
from llmprune.report.result import Report
from llmprune.report.terminal import say, show
from llmprune.results import BlockReport, Smaller

MOST_NOTES = 10


def print_report(report: Report, console: Console) -> None:
    """The closing table: per block sparsity, relative output error, seconds; then the perplexities, notes and where the result is."""
    smaller = any(row.kept is not None for row in report.rows)
    what = "units kept" if smaller else "matrices"
    rows = []
    for block in report.blocks:
        weights = sum(r.size for r in block.rows)
        sparsity = sum(r.dropped for r in block.rows) / weights if weights else 0.0
        seconds = sum(block.seconds.values())
        cells = (f"{sparsity:.2%}", number(block.output_error, 3).text, f"{seconds:.2f}")
        rows.append((block.block, units_of(block) if smaller else str(len(block.rows)), ratios_of(block), *cells))
    show(console, f"pruned {report.source.name}", ("block", what, "ratios", "sparsity", "output error", "seconds"), rows, names=1 + smaller)
    share = report.zeros / report.parameters
    dropped = f"{'cut out' if smaller else 'zeros'}: {report.zeros:,} of {report.weights:,}"
    whose = f"parameters of {report.recipe['pattern']}" if smaller else "weights in pruned matrices"
    own = f"; {report.own_zeros:,} of them no mask has dropped: zeros of the source's own" if report.own_zeros else ""
    say(console, f"{dropped} {whose} ({report.sparsity:.4%}, asked {report.asked:.4%}{own}), {share:.2%} of the model")
    if report.smaller:
        print_smaller(report, report.smaller, console)
    for trial in report.tried:
        kept = ", kept" if trial.kept else ""
        say(console, f"allocation {trial.allocation}: mean KL from the dense model on held-back windows {trial.divergence:.4g}{kept}")
    for step in report.frontier:
        say(console, f"frontier: sparsity {step.sparsity:.4f}, perplexity on held-back windows {step.perplexity:.4g} ({step.increase:+.2%})")
    if report.polish:
        was, now = report.polish.divergence_before, report.polish.divergence_after
        half = " with products in bfloat16" if report.polish.half else ""
        say(console, f"polish: {report.polish.steps} steps{half}, mean KL from the dense model on the calibration windows {was:.4g} -> {now:.4g}")
    for pair in report.perplexity:
        say(console, f"perplexity, dense:  {pair.dense}")
        say(console, f"perplexity, pruned: {pair.pruned}")
        say(console, f"divergence: {pair.divergence}")
    if report.reloaded:
        say(console, str(report.reloaded))
    notes = report.joined_notes
    for note in notes[:MOST_NOTES]:
        say(console, f"note: {note}")
    if len(notes) > MOST_NOTES:
        say(console, f"note: and {len(notes) - MOST_NOTES} more in llmprune.json")
    if report.output is not None:
        say(console, f"saved: {at_home(report.output)}")


def print_recovery(report: Report, console: Console) -> None:
    """What the last training did: a line for each text, what is left of the pruning's loss, and where the result is."""
    found = report.recovered[-1]
    say(console, f"{report.source.name}: {found.said}")
    for one in found.measured:
        dense = f"{one.dense.value:.4g} dense, " if one.dense else ""
        left = f"; {one.excess:.1%} of the excess over the dense model's loss is left" if one.excess is not None else ""
        decides = ", which chose the step" if one.decides else ""
        said = f"perplexity: {dense}{one.before.value:.4g} before, {one.after.value:.4g} after{left}"
        text = one.after
        say(console, f"{said} ({text.dataset}, {text.split}, {text.definition}{decides})")
    if report.reloaded:
        say(console, str(report.reloaded))
    for note in found.notes:
        say(console, f"note: {note}")
    if report.output is not None:
        say(console, f"saved: {at_home(report.output)}")


def print_smaller(report: Report, found: Smaller, console: Console) -> None:
    """What was saved."""
    layers = f", {len(found.layers)} of {len(report.blocks)} layers" if found.pattern == "layers" else ""
    say(console, f"smaller model: {found.parameters:,} of {report.parameters:,} parameters{layers}, {found.bytes:,} bytes of weights")


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
    rows = [("dense", "", "0", *(cell for dense in report.dense for cell in (f"{dense.value:.4g}", "")), "")]
    for row in report.rows:
        found = zip(row.perplexity, row.divergence, strict=True)
        cells = (cell for value, moved in found for cell in (f"{value.value:.4g}", f"{moved.kl:.4g}"))
        rows.append((row.method, row.pattern, f"{row.sparsity:.2%}", *cells, f"{row.seconds:.1f}"))
    show(console, f"sweep of {report.source.name}", ("method", "pattern", "sparsity", *names, "seconds"), rows, names=2)
    if report.quick:
        say(console, QUICK)
    for dense in report.dense:
        say(console, f"perplexity, dense: {dense}")
    say(console, f"saved: {at_home(report.output)} (sweep.json, sweep.md, sweep.svg)")


def print_comparison(found: list[Result], console: Console) -> None:
    """One line per result; then the definitions of the numbers."""
    value = compared(found)
    show(console, "comparison", value.heads, [[cell.text for cell in row] for row in value.rows], names=3, light=True)
    for line in remarks(found):
        say(console, line)


def ratios_of(block: BlockReport) -> str:
    """The least and the greatest ratio that a block's matrices were asked for."""
    ends = (f"{end(r.asked for r in block.rows):.1%}" for end in (min, max)) if block.rows else ()
    return " to ".join(dict.fromkeys(ends))


def print_inspection(found: list[Inspected], console: Console) -> None:
    rows = [(i.matrix, f"{i.rows} x {i.columns}", f"{i.zeros:,}", f"{i.sparsity:.4%}", " ".join(i.patterns)) for i in found]
    show(console, "", ("matrix", "shape", "zeros", "sparsity", "keeps"), rows)
    weights = sum(i.rows * i.columns for i in found)
    zeros = sum(i.zeros for i in found)
    say(console, f"{len(found)} matrices, {zeros:,} of {weights:,} weights are zero ({zeros / max(1, weights):.4%})")


def print_bench(found: Bench, console: Console) -> None:
    """Figures side by side with their ratios to the first model's; then the 2:4 kernels and the notes."""
    said, reference = found.setting, found.models[0]
    how = f"{said.repeat} rounds by turns; {said.device} ({said.card}), {said.threads} threads" + (", compiled" if said.compile else "")
    work = f"prompt {said.prompt_length}, {said.new_tokens} new tokens, batch {said.batch}, greedy, key-value cache"
    say(console, f"{work}; {how}, torch {said.torch}, transformers {said.transformers}")
    heads = ["median (lowest..highest)", *(f"{model.role}\n{model.name}\n{model.dtype}" for model in found.models)]
    heads += [f"{ratio.role} /\n{reference.role}" for ratio in found.ratios]
    rows = []
    for label, field, written in ROWS:
        values = [written(getattr(model, field)) for model in found.models]
        rows.append((label, *values, *(_ratio(getattr(ratio, field)) for ratio in found.ratios)))
    show(console, "", heads, rows)
    if found.kernels:
        show(console, "", ("2:4 matrices", "count", "tokens", "dense us", "2:4 us", "dense / 2:4"), [_kernel_row(kernel) for kernel in found.kernels])
    for note in found.notes:
        say(console, f"note: {note}")


def _kernel_row(kernel: Kernel) -> tuple[str, ...]:
    """Of one shape and number of tokens: microseconds of one product, and dense over 2:4, below 1 where the kernel is slower."""
    sparse = _spread(kernel.sparse, 1e6) if kernel.sparse else f"stays dense: {kernel.refused}"
    gain = "" if kernel.speed_up is None else f"{kernel.speed_up:.2f} x, {'faster' if kernel.speed_up > 1 else 'slower'}"
    return (f"{kernel.rows} x {kernel.columns}", str(kernel.matrices), str(kernel.tokens), _spread(kernel.dense, 1e6), sparse, gain)


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
