"""2:4 kernels of torch on CUDA, against dense products of the same matrices. It measures, and promises nothing: the gain of a kernel
depends on the card, the shape, the dtype and the number of tokens.

R = output rows, C = input columns, T = tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmprune.benchmark.laps import Spread, in_turns, wait
from llmprune.errors import first_line

OLDEST = (8, 0)  # compute capability of Ampere, the first with 2:4 products

Compress = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kernel:
    """The products of all 2:4 matrices of one shape with ``tokens`` inputs, by turns dense and compressed: seconds of one product.

    ``sparse`` is None, and ``refused`` says why, where torch has no kernel for the shape or dtype: those matrices stay dense.
    """

    rows: int
    columns: int
    matrices: int
    tokens: int
    dense: Spread
    sparse: Spread | None
    refused: str | None = None

    @property
    def speed_up(self) -> float | None:
        """Dense seconds over compressed seconds; below 1 the kernel is slower."""
        return None if self.sparse is None else self.dense.median / self.sparse.median


def why_not(device: torch.device) -> str | None:
    """Why there are no 2:4 kernels on this device; None where there are."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < OLDEST:
        return "2:4 kernels need CUDA (Ampere or newer)"
    return None


def compressed(weight_RC: Tensor) -> Tensor:
    """The matrix in the format of torch's kernels: by cuSPARSELt where torch is built with it, else by CUTLASS.

    Raises RuntimeError for a shape, dtype or device without a kernel.
    """
    if torch.backends.cusparselt.is_available():
        return torch.sparse.to_sparse_semi_structured(weight_RC.contiguous())
    return torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight_RC.contiguous())


def keeps_2of4(weight_RC: Tensor) -> bool:
    """Whether no group of four along the input has more than two non-zeros."""
    return weight_RC.shape[1] % 4 == 0 and int((weight_RC != 0).unflatten(1, (-1, 4)).sum(-1).max()) <= 2


def two_of_four(model: nn.Module) -> dict[tuple[int, int], list[nn.Linear]]:
    """The nn.Linear modules whose weights keep 2:4, by shape [R, C]."""
    found: dict[tuple[int, int], list[nn.Linear]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and keeps_2of4(module.weight.data):
            found.setdefault((module.out_features, module.in_features), []).append(module)
    return found


@torch.no_grad()
def convert(model: Any, tokens: tuple[int, ...], repeat: int, compress: Compress = compressed) -> list[Kernel]:
    """Measure the 2:4 matrices of a model shape by shape, and leave them compressed in it, so that the whole model can be measured next."""
    found = []
    for (rows, columns), modules in two_of_four(model).items():
        dense = [m.weight.data for m in modules]
        inputs = [torch.randn(count, columns, dtype=dense[0].dtype, device=dense[0].device) for count in tokens]
        sparse, refused = _tried(dense, inputs, compress)
        for input_TC in inputs:
            sides = [_products(input_TC, weights) for weights in (dense, sparse) if weights]
            spreads = [Spread.of(seconds) for seconds in in_turns(sides, repeat)]
            found.append(Kernel(rows, columns, len(modules), len(input_TC), spreads[0], spreads[1] if sparse else None, refused))
        for module, weight in zip(modules if sparse else [], sparse, strict=True):
            module.weight = nn.Parameter(weight, requires_grad=False)
    return found


def _tried(dense: list[Tensor], inputs: list[Tensor], compress: Compress) -> tuple[list[Tensor], str | None]:
    """The compressed matrices, or none and the reason of the first that torch refuses."""
    try:
        sparse = [compress(weight) for weight in dense]
        for input_TC in inputs:
            F.linear(input_TC, sparse[0])
    except RuntimeError as error:
        return [], first_line(error)[:160]
    return sparse, None


def _products(input_TC: Tensor, weights: list[Tensor]) -> Callable[[], float]:
    """Seconds of one product: all matrices of the shape one after another, as in a model, so that none stays in a cache."""

    def run() -> float:
        wait(input_TC.device)
        began = perf_counter()
        for weight in weights:
            F.linear(input_TC, weight)
        wait(input_TC.device)
        return (perf_counter() - began) / len(weights)

    return run
