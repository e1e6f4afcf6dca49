"""The asymmetric, residual-aware target: what a matrix should have been for the pruned path to give the dense path's outputs.

Two streams run through the model, dense (inputs x, partners p) and pruned (x', p'). With H = sum x' x'^T, K = sum x x'^T and
E = sum (p - p') x'^T over calibration tokens, the least-squares correction of W is

    W' = W + share * [W (K - H) + E] (H + d I)^-1

where the partner p of W is what W x is added to (the residual stream, for matrices that write into it; else E = 0). W' is pruned
instead of W, under H. Own derivation; DuoGPT (https://arxiv.org/abs/2506.20194) describes a dense-output correction of this kind.
"""

from __future__ import annotations

from torch import Tensor

from llmprune.maths.linalg import factor_of
from llmprune.types import Stats

SHARE = 0.75  # how far to move towards the dense outputs; 0.5 to 1 is nearly flat
DAMPING = 0.01


def asymmetric_target(weight_RC: Tensor, stats: Stats, share: float = SHARE) -> Tensor:
    """The corrected weights; W itself where there are no dense statistics (experts, whose tokens differ between the streams)."""
    if stats.cross_CC is None or stats.gram_CC is None:
        return weight_RC
    wanted_RC = weight_RC @ (stats.cross_CC - stats.gram_CC)
    if stats.shrunk:  # K - H are sums; only what is inverted is shrunk
        wanted_RC += weight_RC * (stats.gram_CC.diagonal() * (stats.shrunk / (1 + stats.shrunk)))
    if stats.partner_RC is not None:
        wanted_RC += stats.partner_RC
    upper_CC = factor_of(stats, DAMPING).upper_CC
    return weight_RC + share * (wanted_RC @ upper_CC.T) @ upper_CC
