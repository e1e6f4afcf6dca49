"""The frontier of a sweep: perplexity against sparsity, as a Markdown table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from llmprune.checkpoint.files import FORMAT
from llmprune.report.fields import Fields
from llmprune.report.pictures import logarithmic
from llmprune.report.result import environment_of
from llmprune.results import Calibration, Divergence, Environment, Origin, Perplexity

SWEEP = "sweep.json"


@dataclass(frozen=True)
class SweepRow:
    """One pruning: what was asked, the share of exact zeros that came out, and its figures on each evaluation set."""

    method: str
    pattern: str
    asked: float
    sparsity: float
    perplexity: tuple[Perplexity, ...]
    divergence: tuple[Divergence, ...]  # from the dense model, on the same windows
    seconds: float = field(compare=False)  # of the pruning, without shared work


@dataclass(frozen=True)
class SweepReport:
    """All rows, with the dense perplexities. ``output`` holds them as sweep.json, sweep.md and sweep.svg."""

    dense: tuple[Perplexity, ...]
    rows: tuple[SweepRow, ...]
    calibration: Calibration
    source: Origin
    environment: Environment
    output: Path = field(compare=False)
    quick: bool = False  # by the dense model's statistics

    def to_json(self) -> dict[str, Any]:
        """The content of sweep.json."""
        plain = asdict(self)
        del plain["output"]
        return {"format": FORMAT} | plain | {name: getattr(self, name).to_json() for name in ("source", "calibration", "environment")}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], name: str, output: Path) -> SweepReport:
        """Reads the result of ``to_json``. name: of the file, for messages; output: its folder. Raises RequestError for anything else."""
        fields = Fields(content, name, "a sweep's sweep.json")
        get = fields.get
        return cls(
            dense=get("dense", tuple[Perplexity, ...]),
            rows=get("rows", tuple[SweepRow, ...]),
            calibration=get("calibration", Calibration),
            source=get("source", Origin),
            environment=environment_of(fields),
            output=output,
            quick=get("quick", bool, False),
        )


QUICK = "quick: by the dense model's statistics; a separate run uses those of the pruned model and gives better results"


def markdown(report: SweepReport) -> str:
    """One line per row, each number under its definition."""
    lines = [f"# {report.source.name}: perplexity against sparsity", ""]
    for dense in report.dense:
        lines.append(f"- dense {dense.value:.4g} on {dense.dataset} ({dense.split}, {dense.definition})")
    if report.quick:
        lines.append(f"- {QUICK}")
    lines += ["", "| method | pattern | sparsity | " + " | ".join(f"perplexity, {d.dataset}" for d in report.dense) + " | seconds |"]
    lines += ["|---" * (4 + len(report.dense)) + "|"]
    for row in report.rows:
        values = " | ".join(f"{p.value:.4g}" for p in row.perplexity)
        lines.append(f"| {row.method} | {row.pattern} | {row.sparsity:.4f} | {values} | {row.seconds:.1f} |")
    return "\n".join(lines) + "\n"


def draw(report: SweepReport) -> bytes:
    """An SVG: one curve per method and pattern, one plot per evaluation set, the dense model as a line."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "llmprune", "svg.fonttype": "none"}):
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter

        figure = Figure(figsize=(6.4 * max(1, len(report.dense)), 4.4), layout="constrained")
        axes = figure.subplots(1, max(1, len(report.dense)), squeeze=False, sharey=True)[0]
        values = [one.value for of in (report.dense, *(row.perplexity for row in report.rows)) for one in of]
        for number, (axis, dense) in enumerate(zip(axes, report.dense, strict=False)):
            for (method, pattern), rows in _curves(report).items():
                points = sorted((row.sparsity, row.perplexity[number].value) for row in rows)
                label = method if pattern == "unstructured" else f"{method} {pattern}"
                axis.plot(*zip(*points, strict=True), marker="o" if pattern == "unstructured" else "s", label=label)
            axis.axhline(dense.value, color="grey", linewidth=0.8, label="dense")
            axis.set(xlabel="sparsity", title=dense.dataset)
            axis.xaxis.set_major_formatter(PercentFormatter(1))
            axis.legend()
        if report.dense:
            axes[0].set_ylabel("perplexity" + logarithmic(axes[0], values))
        out = BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _curves(report: SweepReport) -> dict[tuple[str, str], list[SweepRow]]:
    curves: dict[tuple[str, str], list[SweepRow]] = {}
    for row in report.rows:
        curves.setdefault((row.method, row.pattern), []).append(row)
    return curves
