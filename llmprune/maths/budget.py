"""One budget of weights shared out over matrices: histograms with one threshold, shifts, the cheapest choice, whole weights, and levels."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

LOWEST, HIGHEST, PER_OCTAVE = -160, 96, 64  # of the base-2 logarithms that a histogram distinguishes
MOST = 0.99  # of a matrix that may be dropped where its ratio is chosen


def log_histogram(logs: Tensor) -> Tensor:
    """Counts of base-2 logarithms, in float64, in bins of 1/64 octave; minus infinity (a score of zero) counts as the lowest."""
    bins = (HIGHEST - LOWEST) * PER_OCTAVE
    places = ((logs.float().nan_to_num(LOWEST, HIGHEST, LOWEST) - LOWEST) * PER_OCTAVE).clamp_(0, bins - 1)
    return torch.bincount(places.flatten().long(), minlength=bins).double().cpu()


def share_above(histogram: Tensor, value: float) -> float:
    """The share of what was counted that lies above a value, to a bin."""
    place = int((math.log2(value) - LOWEST) * PER_OCTAVE) if value > 0 else 0
    return float(histogram[max(0, place + 1) :].sum() / histogram.sum())


def shares_below(histograms: dict[str, Tensor], share: float) -> dict[str, float]:
    """Of each histogram, the share below the one value below which ``share`` of all is. Empty histograms are left out."""
    counted = {name: h for name, h in histograms.items() if len(h)}
    if not counted:
        return {}
    together = torch.stack(list(counted.values())).sum(0)
    below = together.cumsum(0)
    place = int(torch.searchsorted(below, share * below[-1]))
    place = min(place, len(below) - 1)
    inside = float((share * below[-1] - (below[place] - together[place])) / together[place].clamp_min(1))
    return {name: float((h[:place].sum() + inside * h[place]) / h.sum()) for name, h in counted.items()}


def spend(wanted: dict[str, float], sizes: dict[str, int], sparsity: float) -> dict[str, float]:
    """Ratios in [0, MOST] that meet the budget: the wanted ones, all shifted by one constant (clamped to the ends)."""
    goal, most = sparsity * sum(sizes.values()), max(MOST, sparsity)

    def shifted(by: float) -> dict[str, float]:
        return {name: min(most, max(0.0, ratio + by)) for name, ratio in wanted.items()}

    low, high = -max(wanted.values()), most - min(wanted.values())
    for _ in range(100):
        middle = (low + high) / 2
        spent = sum(ratio * sizes[name] for name, ratio in shifted(middle).items())
        low, high = (middle, high) if spent < goal else (low, middle)
    return in_whole_weights(shifted(high), sizes, sparsity)


def in_whole_weights(ratios: dict[str, float], sizes: dict[str, int], sparsity: float) -> dict[str, float]:
    """Ratios of whole weights whose sum is the budget's: each is rounded down, those nearest to one more get it. No matrix loses all its
    weights; where the budget leaves too few for that, the ratios are unchanged.
    """
    counts = {name: int(ratio * sizes[name]) for name, ratio in ratios.items()}
    missing = round(sparsity * sum(sizes.values())) - sum(counts.values())
    room = [name for name in sizes if counts[name] + 1 < sizes[name]]
    if not 0 <= missing <= len(room):
        return ratios
    for name in sorted(room, key=lambda name: (counts[name] - ratios[name] * sizes[name], name))[:missing]:
        counts[name] += 1
    return {name: counts[name] / sizes[name] for name in ratios}


def cheapest(curves: dict[str, tuple[Tensor, Tensor]], sizes: dict[str, int], sparsity: float) -> dict[str, float]:
    """Ratios that meet the budget at the least sum of losses.

    curves: ratios [K], ascending from the least that a matrix may lose, and the loss at each; in between the loss is the lower convex hull. Its
    pieces are taken in the order of their loss per weight, which is the optimum of the Lagrangian for every budget. Matrices without a curve get
    the asked ratio.
    """
    counts = {name: round(size * (float(curves[name][0][0]) if name in curves else sparsity)) for name, size in sizes.items()}
    left = round(sparsity * sum(sizes.values())) - sum(counts.values())
    pieces = [(slope / sizes[name], k, name, end) for name, curve in curves.items() for k, (slope, end) in enumerate(_hull(*curve))]
    for _, _, name, end in sorted(pieces):
        taken = min(max(0, round(end * sizes[name]) - counts[name]), max(0, left))
        counts[name] += taken
        left -= taken
    ratios = {name: count / sizes[name] for name, count in counts.items()}
    return spend(ratios, sizes, sparsity) if left or any(r >= 1 for r in ratios.values()) else ratios  # every curve may be at its end


def _hull(ratios_K: Tensor, losses_K: Tensor) -> list[tuple[float, float]]:
    """(slope, ratio at its end) of the pieces of the lower convex hull; slopes ascend."""
    points: list[tuple[float, float]] = []
    for x, y in zip(ratios_K.tolist(), losses_K.tolist(), strict=True):
        while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(points[-1], (x, y)):
            points.pop()
        points.append((x, y))
    return [(_slope(a, b), b[0]) for a, b in pairwise(points)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def on_levels(wanted: dict[str, float], sizes: dict[str, int], levels: dict[str, tuple[float, ...]], sparsity: float) -> dict[str, float]:
    """Ratios that are all among a matrix's levels (ascending), as near to the wanted ones as possible: the least sum of size * difference ** 2 among
    those that spend no more than the budget and leave less than the smallest step of it.
    """
    ratios = {name: levels[name][0] for name in sizes}
    left = sparsity * sum(sizes.values()) - sum(ratios[name] * size for name, size in sizes.items())
    steps = [
        (((up - wanted[name]) ** 2 - (low - wanted[name]) ** 2) / (up - low), k, name)
        for name in sizes
        for k, (low, up) in enumerate(pairwise(levels[name]))
    ]
    for _, k, name in sorted(steps):
        cost = (levels[name][k + 1] - levels[name][k]) * sizes[name]
        if ratios[name] == levels[name][k] and cost <= left + 0.5:
            ratios[name] = levels[name][k + 1]
            left -= cost
    return ratios
