"""Which order of input channels lets N:M keep most of a score.

Pool and Yu, Channel Permutations for N:M Sparsity, https://papers.nips.cc/paper/2021/hash/6e8404c3b93a9527c8db241a1846599a-Abstract.html

Shapes: S = spans (inside one, channels may trade places), K = copies that move together, W = channels of a span, R, C = rows and columns of a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 16


def best_order(score_RC: Tensor, columns_SKW: Tensor, n: int, m: int, rounds: int = 40, rows: int = 512, seed: int = 0) -> Tensor:
    """[S, W]: an order in which N of every M consecutive channels hold more of a score, on the rows that decide never less than the present one.

    Groups are paired at random, again and again; in each pair the exchange of two channels that gains most is made, if any gains. Scores are
    non-negative and add up; with many rows a sample of them decides. seed: of the pairs and the sample.
    """
    spans, _, width = columns_SKW.shape
    if width % m or m > LARGEST:  # groups would lie across spans; or trying all exchanges would take too long
        return torch.arange(width).repeat(spans, 1)
    generator = torch.Generator().manual_seed(seed)
    if score_RC.shape[0] > rows:
        score_RC = score_RC[torch.randperm(score_RC.shape[0], generator=generator)[:rows].to(score_RC.device)]
    orders = []
    for s in range(spans):
        score_WR = score_RC[:, columns_SKW[s]].permute(2, 0, 1).reshape(width, -1)
        orders.append(_exchange(score_WR, n, m, rounds, generator))
    return torch.stack(orders).cpu()


def _exchange(score_WR: Tensor, n: int, m: int, rounds: int, generator: torch.Generator) -> Tensor:
    groups = score_WR.shape[0] // m
    order_GM = torch.arange(groups * m, device=score_WR.device).view(groups, m)
    for _ in range(rounds if groups > 1 else 0):
        pairs_P2 = torch.randperm(groups, generator=generator)[: groups // 2 * 2].view(-1, 2).to(score_WR.device)
        for chunk_P2 in pairs_P2.split(max(1, (1 << 22) // (m * m * m * score_WR.shape[1]))):
            left_PM, right_PM = order_GM[chunk_P2[:, 0]], order_GM[chunk_P2[:, 1]]
            lefts, rights = [left_PM], [right_PM]
            for i in range(m):
                for j in range(m):
                    left, right = left_PM.clone(), right_PM.clone()
                    left[:, i], right[:, j] = right_PM[:, j], left_PM[:, i]
                    lefts.append(left)
                    rights.append(right)
            kept = _kept(score_WR, torch.stack(lefts), n) + _kept(score_WR, torch.stack(rights), n)
            best_P = kept.argmax(0)  # of equal ones the first: nothing is moved without gain
            pick = (best_P, torch.arange(len(best_P), device=best_P.device))
            order_GM[chunk_P2[:, 0]], order_GM[chunk_P2[:, 1]] = torch.stack(lefts)[pick], torch.stack(rights)[pick]
    return order_GM.view(-1)


def _kept(score_WR: Tensor, groups_OPM: Tensor, n: int) -> Tensor:
    """[options, pairs]: the sum over rows of the N largest scores of each group."""
    return score_WR[groups_OPM].topk(n, dim=2).values.sum((2, 3), dtype=torch.float64)
