"""Pictures of a page: SVG by matplotlib, to be embedded in HTML. The same numbers give the same bytes.

matplotlib has no style sheets, so a picture is drawn in marker colours that are replaced by the page's (light and dark) afterwards. One unit is one
CSS pixel at the width of a phone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 350  # pixels
INK, LINE = "#0a0b01", "#0a0b02"
SERIES = tuple(f"#0a0b1{n}" for n in range(8))  # the page's colours --c0 to --c7
COLOURS = {INK: "currentColor", LINE: "var(--line)"} | {marker: f"var(--c{n})" for n, marker in enumerate(SERIES)}
STYLE: Any = {
    "svg.hashsalt": "llmprune",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is not mathematics
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
FADED = 0.08  # opacity of the least value of a heat map
MOST_TEXTS = 400  # cells of a heat map that have room for their number
MOST_LABELS = 24
FAR = 5


def heat_map(name: str, label: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """Rows from top to bottom. None: no such cell. The colour runs from least to greatest in steps of 5 %: small differences look small."""
    known = [value for row in values for value in row if value is not None]
    low, high = int(min(known) * 20) / 20, -(-max(known) * 20 // 1) / 20
    if high - low < 0.05:  # all alike: in the middle
        low, high = low - 0.05, low + 0.05
    span = high - low
    written = len(known) <= MOST_TEXTS and len(columns) <= 10

    def paint(axis: Axes) -> None:
        from matplotlib.patches import Rectangle

        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value is not None:
                    opacity = FADED + (0.75 - FADED) * (value - low) / span
                    axis.add_patch(Rectangle((x, y), 0.96, 0.92, facecolor=SERIES[0], alpha=opacity, linewidth=0))
                    if written:
                        axis.text(x + 0.48, y + 0.5, f"{value:.1%}".removesuffix("%"), ha="center", va="center", fontsize=9)
        axis.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        axis.set_xticks([x + 0.48 for x in range(len(columns))], columns, rotation=40, ha="right", rotation_mode="anchor")
        every = -(-len(rows) // MOST_LABELS)
        axis.set_yticks([y + 0.46 for y in range(0, len(rows), every)], rows[::every])
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)

    return draw(name, f"{label}: {low:.0%} (faint) to {high:.0%} (strong)", min(1000, 74 + 19 * len(rows)), paint)


def curves(
    name: str,
    label: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    axes: tuple[str, str],
    level: tuple[str, float] | None = None,
    whole: bool = False,
    percent: str = "",
    reach: tuple[float, float] | None = None,
) -> str:
    """One line per name, and below them their key. level: a horizontal line, such as the dense model's value. whole: x is a count. percent: the axes
    of shares, of "xy". reach: ends of the x axis, where several pictures have the same. Values of very different size get a logarithmic axis.
    """
    values = [y for points in lines.values() for _, y in points] + ([level[1]] if level else [])

    def paint(axis: Axes) -> None:
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        for number, points in enumerate(lines.values()):
            axis.plot(*zip(*points, strict=True), color=SERIES[number % len(SERIES)], marker=MARKERS[number // len(SERIES) % len(MARKERS)][0])
        if level is not None:
            axis.axhline(level[1], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.set(xlabel=axes[0], ylabel=axes[1] + ("" if "y" in percent else logarithmic(axis, values)))
        if reach is not None:
            room = max(0.02, (reach[1] - reach[0]) / 20)
            axis.set_xlim(reach[0] - room, reach[1] + room)
        for name in percent:
            shares = {"x": axis.xaxis, "y": axis.yaxis}[name]
            shares.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            shares.set_major_formatter(PercentFormatter(1, decimals=None))
        if "y" in percent:
            axis.set_ylim(min(0, *values), max(values) * 1.05 or 1)
        if whole:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(True, axis="y")

    return draw(name, label, 200, paint) + (key([*lines], level[0] if level else "") if len(lines) > 1 or level else "")


def logarithmic(axis: Axes, values: Sequence[float]) -> str:
    """Makes the y axis logarithmic where the values are of very different size; what its label then says of it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not (min(values) > 0 and max(values) >= FAR * min(values)):
        return ""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))  # by default matplotlib writes powers as mathematics
    axis.yaxis.set_minor_formatter(NullFormatter())
    return ", logarithmic"


def key(names: Sequence[str], level: str = "") -> str:
    """What the marks of some curves mean: a list outside the picture, so that its names wrap like text. level: the name of the dashed line."""
    from html import escape

    marks = [(MARKERS[n // len(SERIES) % len(MARKERS)][1], f' style="color: var(--c{n % len(SERIES)})"', name) for n, name in enumerate(names)]
    marks += [("╌", "", level)] if level else []
    return f'<ul class="key">{"".join(f"<li><span{colour}>{mark}</span> {escape(name)}</li>" for mark, colour, name in marks)}</ul>'


def bars(name: str, label: str, values: dict[str, float], unit: str) -> str:
    """One horizontal bar per name, the first on top."""

    def paint(axis: Axes) -> None:
        names = list(values)[::-1]
        axis.barh(names, [values[n] for n in names], color=SERIES[0], height=0.62)
        axis.set(xlabel=unit)
        axis.grid(True, axis="x")
        axis.tick_params(axis="y", length=0)

    return draw(name, label, 52 + 22 * len(values), paint)


MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"))  # as matplotlib has them, and as text does


def draw(name: str, label: str, height: int, paint: Any) -> str:
    """The SVG of what ``paint`` draws into one pair of axes. name: of the picture, unique in its page. label: for those who cannot see it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        figure.patch.set_visible(False)
        axis = figure.add_subplot()
        axis.patch.set_visible(False)
        paint(axis)
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return inlined(out.getvalue(), name, label)


def inlined(svg: str, name: str, label: str) -> str:
    """A stand-alone SVG as part of a page: no prolog, no metadata, no style sheet; unique names; the page's colours and fonts."""
    from html import escape

    body = svg[svg.index("<svg") :].strip()
    for part in (r"<!--.*?-->", r"<metadata>.*?</metadata>", r"<style.*?</style>"):
        body = re.sub(part, "", body, flags=re.DOTALL)
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    rest = rest.replace("xlink:href=", "href=")
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'(href="|url\()#', rf"\1#{name}-", rest)
    rest = re.sub(r"'DejaVu Sans'.*?sans-serif", "system-ui, sans-serif", rest)
    for marker, colour in COLOURS.items():
        rest = rest.replace(marker, colour)
    rest = re.sub(r"\n\s*", "\n", rest)
    return f'<svg {box[0]} role="img" aria-label="{escape(label)}">{rest}'
