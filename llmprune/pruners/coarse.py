"""The patterns that decide for the whole model, or by measures of their own: layers, experts, the width of the residual stream.

One row has everything that the rest of the program needs to know of such a pattern. Reading it loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

WHOLE_MODEL = "which decides for the whole model"
_REFUSED = dict.fromkeys(("quality", "method", "polish", "max_ppl_increase", "pad"), WHOLE_MODEL)
_SHARED = dict.fromkeys(("allocation", "solver"), WHOLE_MODEL)
_WIDTH = "where every matrix reads or writes the residual channels"


@dataclass(frozen=True)
class Coarse:
    """criteria: names that it can rank by, the default first; ``scores``: also by any criterion of weights. budget: the base of the sparsity.
    allocations: names of those that can share the budget out over the layers, the default first; empty: none does. solvers: likewise
    those that repair what is kept. refuses: option -> why.
    repairs: the kept weights are corrected towards the dense path's outputs. chooses: for the whole model, before the first block, which is a
    separate record in the journal. pruner: the function that makes its BlockPruner.
    """

    name: str
    criteria: tuple[str, ...]
    budget: str
    pruner: str
    help: str
    allocations: tuple[str, ...] = ()
    solvers: tuple[str, ...] = ()
    refuses: dict[str, str] = field(default_factory=dict)
    scores: bool = False
    repairs: bool = True
    chooses: bool = True


COARSE = {
    row.name: row
    for row in (
        Coarse(
            "layers",
            criteria=("measured", "block_influence"),
            budget="the layers",
            pruner="llmprune.pruners.layers:layer_pruner",
            help="whole layers, those without which predictions change least (or --criterion block_influence)",
            refuses=_REFUSED | _SHARED | {"round_to": WHOLE_MODEL},
        ),
        Coarse(
            "experts",
            criteria=("routed_norm",),
            budget="the experts",
            pruner="llmprune.pruners.experts:expert_pruner",
            help="experts of a mixture that add least to their tokens (router weight times output norm), with their router rows",
            allocations=("uniform", "sensitivity"),
            solvers=("mask_only", "refit"),
            refuses=_REFUSED
            | {"round_to": WHOLE_MODEL, "options": "whose parts have none", "target_latency_ratio": "where a token goes through as many as before"},
            repairs=False,
            chooses=False,
        ),
        Coarse(
            "hidden",
            criteria=("wanda",),
            budget="all that they hold",
            pruner="llmprune.pruners.hidden:width_pruner",
            help="residual channels, from every block, the embeddings and the head",
            refuses=_REFUSED | _SHARED | dict.fromkeys(("target_latency_ratio", "skip", "only"), _WIDTH),
            scores=True,
        ),
    )
}
