"""Soft top-k: a mask between 0 and 1 that sums to k and is differentiable; the sharper, the nearer to the k largest values.

    m = argmax over m in [0, 1]^W, sum m = k, of  sum v m + H(m) / beta  =  sigmoid(beta v + mu),  mu such that sum m = k
    d (w m) / d w = m + w m (1 - m) beta (dv/dw - c),  c = the same sum's mean under m (1 - m)

Tai, Tian and Lim, Spartan: Differentiable Sparsity via Regularized Transportation, https://arxiv.org/abs/2205.14107

Shapes: G = groups that have their own k, W = weights of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS, EXACT = 60, 1e-6  # of the search for mu; largest error of the sum, as a share of the weights


def soft_top_k(value_GW: Tensor, kept: float, sharpness: float) -> Tensor:
    """[G, W] in float32: each row sums to ``kept``, of W, to EXACT."""
    width = value_GW.shape[1]
    if kept >= width:
        return torch.ones_like(value_GW, dtype=torch.float32)
    logit_GW = sharpness * value_GW.float()
    odds = torch.logit(torch.tensor(kept / width, dtype=torch.float64)).to(logit_GW)
    low_G1, high_G1 = odds - logit_GW.amax(1, keepdim=True), odds - logit_GW.amin(1, keepdim=True)  # all as large as the largest, the smallest
    shift_G1 = odds - logit_GW.mean(1, keepdim=True)
    for _ in range(ROUNDS):
        mask_GW = torch.sigmoid(logit_GW + shift_G1)
        excess_G1 = mask_GW.sum(1, keepdim=True, dtype=torch.float64) - kept
        if bool((excess_G1.abs() <= EXACT * width).all()):
            break
        low_G1, high_G1 = torch.where(excess_G1 < 0, shift_G1, low_G1), torch.where(excess_G1 > 0, shift_G1, high_G1)
        newton_G1 = shift_G1 - (excess_G1 / (mask_GW * (1 - mask_GW)).sum(1, keepdim=True, dtype=torch.float64)).to(shift_G1)
        inside_G1 = (newton_G1 > low_G1) & (newton_G1 < high_G1)
        shift_G1 = torch.where(inside_G1, newton_G1, (low_G1 + high_G1) / 2)
    return mask_GW


def through_soft_top_k(gradient_GW: Tensor, weight_GW: Tensor, mask_GW: Tensor, scale: float, sharpness: float) -> Tensor:
    """[G, W] dL/dw, from dL/d(w m) and the mask m of the values |w| / ``scale``, which is taken as a constant."""
    gradient_GW, weight_GW = gradient_GW.float(), weight_GW.float()
    slope_GW = mask_GW * (1 - mask_GW)
    pull_GW = gradient_GW * weight_GW
    total_G1 = slope_GW.sum(1, keepdim=True)
    centre_G1 = (slope_GW * pull_GW).sum(1, keepdim=True) / total_G1.clamp_min(torch.finfo(torch.float32).tiny)
    return mask_GW * gradient_GW + sharpness / scale * weight_GW.sign() * slope_GW * (pull_GW - centre_G1)
