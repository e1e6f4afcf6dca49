"""Gradients of a block's matrices, accumulated in a backward pass through the block: y = W x gives dL/dW = sum over tokens of g x^T, g = dL/dy.

Weights need no ``requires_grad``: the input of every product is held, and a hook on its output receives g. So only what was asked for is computed.

T = tokens, C = input columns, R = output rows.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.errors import StoppedError
from llmprune.maths.coupled_rows import gram_of_rows
from llmprune.model.matrices import Matrix
from llmprune.statistics.products import Products, Use
from llmprune.types import STATISTICS, Stat, accumulate, shape_of, statistics_of

LARGE = frozenset(stat for stat in statistics_of("loss", "window losses") if shape_of(STATISTICS[stat].name) != "R")  # kept in a file
PER_WEIGHT = frozenset(stat for stat in statistics_of("loss", "window losses") if shape_of(STATISTICS[stat].name) == "RC")


class Taps(TorchFunctionMode):
    """Active while the block runs forward; it accumulates in the backward pass. Call ``next_batch`` after each of those.

    ``sums`` maps (statistic, matrix) to a float32 sum; a matrix that no gradient reached has none.
    """

    def __init__(self, block: nn.Module, matrices: list[Matrix], needs: frozenset[Stat]) -> None:
        super().__init__()
        self.sums: dict[tuple[Stat, str], Tensor] = {}
        self.tokens: Counter[str] = Counter()
        self._needs = needs
        self._per_weight = bool(needs & PER_WEIGHT)
        self._products = Products(block, matrices)
        self._awaited: Counter[str] = Counter()  # products of this micro-batch whose gradient has not arrived yet
        self._present: dict[str, Tensor] = {}  # gradient [R, C] of this micro-batch alone
        self._first = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        uses = [u for u in self._products.uses(func, args, kwargs) if u.value.numel()]  # an expert may get no token
        out = func(*args, **kwargs)
        for use in uses:
            self._awaited[use.matrix.name] += 1
            # a product that does not depend on the block's input has a gradient too
            (out if out.requires_grad else out.requires_grad_()).register_hook(partial(self._arrived, use, use.value._version))
        return out

    def _arrived(self, use: Use, version: int, gradient: Tensor) -> None:
        name = use.matrix.name
        if use.value._version != version:
            raise StoppedError(f"{name}: its input was changed in place before its gradient was taken", "report this architecture")
        gradient_TR = use.of(gradient).reshape(-1, use.matrix.rows).float()
        self.tokens[name] += gradient_TR.shape[0]
        if "grad_out_sq" in self._needs:
            accumulate(self.sums, ("grad_out_sq", name), gradient_TR.square().sum(0))
        if "grad_out_gram" in self._needs:
            accumulate(self.sums, ("grad_out_gram", name), gram_of_rows(gradient_TR))
        if self._per_weight:
            self._multiply(name, gradient_TR, use.value.detach().reshape(-1, use.matrix.columns).float())
        self._awaited[name] -= 1
        if not self._awaited[name]:
            self._fold(name)

    def _multiply(self, name: str, gradient_TR: Tensor, value_TC: Tensor) -> None:
        if name in self._present:
            self._present[name].addmm_(gradient_TR.T, value_TC)
        else:
            self._present[name] = gradient_TR.T @ value_TC

    def _fold(self, name: str) -> None:
        """The gradient of this micro-batch is complete."""
        gradient_RC = self._present.pop(name, None)
        if gradient_RC is None:
            return
        if "grad_sq" in self._needs:
            accumulate(self.sums, ("grad_sq", name), gradient_RC.square())
        if "first_grad" in self._needs and self._first:
            accumulate(self.sums, ("first_grad", name), gradient_RC.clone())
        if "grad" in self._needs:
            accumulate(self.sums, ("grad", name), gradient_RC)

    def next_batch(self) -> None:
        for name in list(self._present):  # one of its products did not contribute to the loss
            self._fold(name)
        self._awaited.clear()
        self._first = False

    def close(self, path: str = "") -> None:
        """Raises StoppedError when a sum is not finite. path: of the block, for that message."""
        for (_, name), total in self.sums.items():
            if not bool(torch.isfinite(total).all()):
                full = f"{path}.{name}" if path else name
                raise StoppedError(f"{full}: the gradient of the loss is not finite", "compute in --dtype float32, or check the model")
