"""The frontier of a sweep: perplexity against sparsity, as a Markdown table and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from llmprune.results import Divergence, Perplexity


@dataclass(frozen=True)
class SweepRow:
    """One pruning: what was asked, the share of exact zeros that came out, and what each evaluation set says of it."""

    method: str
    pattern: str
    asked: float
    sparsity: float
    perplexity: tuple[Perplexity, ...]
    divergence: tuple[Divergence, ...]  # from the dense model, on the same windows
    seconds: float = field(compare=False)  # of the pruning, without what is shared


@dataclass(frozen=True)
class SweepReport:
    """All rows, with the dense perplexities. ``output`` holds them as sweep.json, sweep.md and sweep.svg."""

    dense: tuple[Perplexity, ...]
    rows: tuple[SweepRow, ...]
    calibration: dict[str, Any]
    source: dict[str, Any]
    environment: dict[str, Any]
    output: Path
    quick: bool = False  # by the dense model's statistics

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "output"}


QUICK = "quick: by the dense model's statistics; a run of its own goes by those of the pruned model and comes out better"


def markdown(report: dict[str, Any]) -> str:
    """One line a row, each number under its definition."""
    lines = [f"# {report['source']['name']}: perplexity against sparsity", ""]
    for dense in report["dense"]:
        lines.append(f"- dense {dense['value']:.4g} on {_definition(dense)}")
    if report["quick"]:
        lines.append(f"- {QUICK}")
    lines += ["", "| method | pattern | sparsity | " + " | ".join(f"perplexity, {d['dataset']}" for d in report["dense"]) + " | seconds |"]
    lines += ["|---" * (4 + len(report["dense"])) + "|"]
    for row in report["rows"]:
        values = " | ".join(f"{p['value']:.4g}" for p in row["perplexity"])
        lines.append(f"| {row['method']} | {row['pattern']} | {row['sparsity']:.4f} | {values} | {row['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any]) -> bytes:
    """An SVG: one curve a method and pattern, a picture an evaluation set, the dense model as a line."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "llmprune", "svg.fonttype": "none"}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4 * max(1, len(report["dense"])), 4.4), layout="constrained")
        axes = figure.subplots(1, max(1, len(report["dense"])), squeeze=False)[0]
        for number, (axis, dense) in enumerate(zip(axes, report["dense"], strict=False)):
            for (method, pattern), rows in _curves(report).items():
                points = sorted((row["sparsity"], row["perplexity"][number]["value"]) for row in rows)
                label = method if pattern == "unstructured" else f"{method} {pattern}"
                axis.plot(*zip(*points, strict=True), marker="o" if pattern == "unstructured" else "s", label=label)
            axis.axhline(dense["value"], color="grey", linewidth=0.8, label="dense")
            axis.set(xlabel="sparsity", ylabel="perplexity", yscale="log", title=dense["dataset"])
            axis.legend()
        out = BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _curves(report: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        curves.setdefault((row["method"], row["pattern"]), []).append(row)
    return curves


def _definition(value: dict[str, Any]) -> str:
    windows = f"{value['windows']} windows of {value['window']}, stride {value['window']}"
    return f"{value['dataset']} ({value['split']}, {windows}, {value['tokens']:,} targets, {value['dtype']})"
