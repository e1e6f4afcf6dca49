"""Slow references, written from the papers' equations in float64: plain loops, explicit inverses, sorting by hand.

Shapes: R = output rows, C = input columns, G = columns decided together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Choose = Callable[[Tensor, int], Tensor]  # (saliency_RG, number that goes) -> keep_RG


def smallest_go(scores: list[float], k: int) -> list[bool]:
    """Keep flags: the k smallest go, of equal ones the earlier."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    gone = set(order[:k])
    return [i not in gone for i in range(len(scores))]


def stable_argsort_keep(score: np.ndarray, k: int) -> np.ndarray:
    """``drop_smallest`` by numpy's stable sort along the last axis."""
    order = np.argsort(score, axis=-1, kind="stable")
    keep = np.ones(score.shape, dtype=bool)
    np.put_along_axis(keep, order[..., :k], False, axis=-1)
    return keep


def choose_in_matrix(saliency_RG: Tensor, drop: int) -> Tensor:
    return torch.tensor(smallest_go(saliency_RG.flatten().tolist(), drop)).view(saliency_RG.shape)


def choose_in_rows(saliency_RG: Tensor, drop: int) -> Tensor:
    """Each row lets ``drop // R`` go; what remains goes one by one to the rows whose next smallest weight matters least."""
    rows = saliency_RG.shape[0]
    share, extra = divmod(drop, rows)
    ordered = [sorted(row) for row in saliency_RG.tolist()]
    nexts = [row[share] if share < len(row) else float("inf") for row in ordered]
    more = [not kept for kept in smallest_go(nexts, extra)]
    return torch.tensor([smallest_go(row, share + more[r]) for r, row in enumerate(saliency_RG.tolist())])


def choose_n_of_m(n: int, m: int) -> Choose:
    def choose(saliency_RG: Tensor, drop: int) -> Tensor:
        groups = saliency_RG.reshape(-1, m).tolist()
        return torch.tensor([smallest_go(group, m - n) for group in groups]).view(saliency_RG.shape)

    return choose


@dataclass
class Naive:
    weight_RC: Tensor
    keep_RC: Tensor
    lost: float


def damped(gram_CC: Tensor, damping: float) -> Tensor:
    h_CC = gram_CC.double()
    return h_CC + damping * h_CC.diagonal().mean() * torch.eye(len(h_CC), dtype=torch.float64)


def naive_sparsegpt(weight_RC: Tensor, gram_CC: Tensor, damping: float, drop: int, choose: Choose, slab: int, decide: int | None) -> Naive:
    """OBS column by column: for column c the earlier rows and columns of H are deleted and the rest is inverted anew.

    saliency_c = w_c^2 / [H^-1]_cc;  w -= w_c / [H^-1]_cc * [H^-1]_c:  for every dropped w_c (Frantar and Alistarh 2023, eq. 3 and 4).
    The mask of ``decide`` columns (None: of a whole slab) is chosen when the sweep reaches the first of them.
    """
    h_CC = damped(gram_CC, damping)
    weight_RC = weight_RC.double().clone()
    columns = weight_RC.shape[1]
    inverses = [torch.linalg.inv(h_CC[c:, c:]) for c in range(columns)]
    keep_RC = torch.ones_like(weight_RC, dtype=torch.bool)
    lost = 0.0
    for a in range(0, columns, slab):
        b = min(a + slab, columns)
        quota = drop * b // columns - drop * a // columns
        for c in range(a, b):
            if (c - a) % (decide or slab) == 0:
                d = min(c + (decide or slab), b)
                own_G = torch.stack([inverses[j][0, 0] for j in range(c, d)])
                keep_RC[:, c:d] = choose(weight_RC[:, c:d] ** 2 / own_G, quota)
            wrong_R = torch.where(keep_RC[:, c], 0.0, weight_RC[:, c]) / inverses[c][0, 0]
            lost += float((wrong_R**2).sum() * inverses[c][0, 0])
            weight_RC[:, c:] -= wrong_R[:, None] * inverses[c][0]
            weight_RC[~keep_RC[:, c], c] = 0.0
    return Naive(weight_RC, keep_RC, lost)


def output_error(change_RC: Tensor, h_CC: Tensor) -> float:
    """tr(D H D^T): with H = X^T X the squared change of the outputs, summed over rows and tokens."""
    change_RC = change_RC.double()
    return float(((change_RC @ h_CC.double()) * change_RC).sum())


def best_repair(weight_RC: Tensor, keep_RC: Tensor, h_CC: Tensor) -> Tensor:
    """The least-squares weights under a given mask, row by row: H_kk w'_k = (H w)_k."""
    weight_RC, h_CC = weight_RC.double(), h_CC.double()
    out_RC = torch.zeros_like(weight_RC)
    for r, keep_C in enumerate(keep_RC):
        if bool(keep_C.any()):
            out_RC[r, keep_C] = torch.linalg.solve(h_CC[keep_C][:, keep_C], (h_CC @ weight_RC[r])[keep_C])
    return out_RC


def naive_greedy(weight_RC: Tensor, h_CC: Tensor, columns: list[list[int]], remove: int, groups: int, metric_RR: Tensor) -> tuple[list[bool], float]:
    """Greedy removal of units of columns, every candidate set's least-squares weights solved anew; (keep flags, weighed error of the last set)."""
    keep = [True] * len(columns)
    run = len(columns) // groups
    quota = [remove // groups] * groups
    lost = 0.0

    def error(gone: list[int]) -> float:
        keep_C = torch.ones(weight_RC.shape[1], dtype=torch.bool)
        for u in gone:
            keep_C[columns[u]] = False
        change_RC = best_repair(weight_RC, keep_C.expand_as(weight_RC), h_CC) - weight_RC.double()
        return float(((change_RC @ h_CC.double()) * (metric_RR.double() @ change_RC)).sum())

    for _ in range(remove):
        gone = [u for u, stays in enumerate(keep) if not stays]
        prices = {u: error([*gone, u]) for u, stays in enumerate(keep) if stays and quota[u // run]}
        cheapest = min(prices, key=lambda u: (prices[u], u))
        keep[cheapest] = False
        quota[cheapest // run] -= 1
        lost = prices[cheapest]
    return keep, lost
