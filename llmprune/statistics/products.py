"""Products with a block's matrices, seen as torch computes them: they follow parameters, not modules, so it does not matter which module multiplies.

T = tokens, C = input columns, R = output rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmprune.errors import StoppedError
from llmprune.model.matrices import Matrix

# product -> positions of (input, weight) among its arguments, with torch's keyword names
_PRODUCTS: dict[Any, tuple[int, int]] = {
    F.linear: (0, 1),
    torch.matmul: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
    torch.mm: (0, 1),
    Tensor.mm: (0, 1),
    torch.addmm: (1, 2),
    Tensor.addmm: (1, 2),
    torch.bmm: (0, 1),
    Tensor.bmm: (0, 1),
    torch.baddbmm: (1, 2),
    Tensor.baddbmm: (1, 2),
}
_WEIGHT_KEYWORDS = ("weight", "other", "mat2", "batch2")
_INPUT_KEYWORDS = ("mat1", "batch1", "input")  # "input" last: it is the bias of addmm


@dataclass(frozen=True)
class Use:
    """One matrix in one product; ``place`` is its place in the output of a product with all experts at once, else None."""

    matrix: Matrix
    value: Tensor  # [..., C]: what enters it
    place: int | None
    turned: bool = False  # W @ x^T instead of x @ W^T: tokens are the last axis of the input, and of the product

    def of(self, out: Tensor) -> Tensor:
        """[..., R]: this matrix's part of the product, or of its gradient. Matrices that are multiplied as one have the same ``out``."""
        product = out if self.place is None else out[self.place]
        return self.matrix.part_of(product.mT if self.turned else product, dim=-1)


class Products:
    """Finds the uses of some matrices of a block among the functions that torch is asked to compute."""

    def __init__(self, block: nn.Module, matrices: list[Matrix]) -> None:
        self._views: dict[int, tuple[Tensor, list[Matrix]]] = {}  # what is multiplied as one, and the matrices in it
        for m in matrices:
            self._views.setdefault(m.stored(block).data_ptr(), (m.whole_view(block), []))[1].append(m)
        self._stacks = {block.get_parameter(m.parameter).data_ptr() for m in matrices if m.expert is not None}

    def uses(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Use]:
        """Raises StoppedError when a matrix is used in another orientation than expected."""
        places = _PRODUCTS.get(func)
        weight = _argument(args, kwargs, places[1], _WEIGHT_KEYWORDS) if places else None
        if places is None or not isinstance(weight, Tensor) or weight.dim() < 2:
            return []
        value = _argument(args, kwargs, places[0], _INPUT_KEYWORDS)
        if isinstance(value, nn.Parameter) and value.dim() == 2 and value.data_ptr() in self._views:
            return [replace(use, turned=True) for use in self._uses(weight.mT, value.mT, None)]
        return list(self._uses(value, weight.mT if func is F.linear else weight, None))

    def _uses(self, value: Tensor, weight: Tensor, place: int | None) -> Iterator[Use]:
        """value @ weight is about to be computed; both are stacks where all experts are multiplied at once."""
        if weight.dim() == 3 and weight.data_ptr() in self._stacks and value.shape[:-2] == weight.shape[:1]:
            for i, (value_TC, weight_CR) in enumerate(zip(value, weight, strict=True)):
                yield from self._uses(value_TC, weight_CR, i)
        elif weight.dim() == 2 and weight.data_ptr() in self._views:
            view_RC, matrices = self._views[weight.data_ptr()]
            _check_use(matrices[0], view_RC, weight.T)
            yield from (Use(matrix, value, place) for matrix in matrices)


def _check_use(matrix: Matrix, view_RC: Tensor, used_RC: Tensor) -> None:
    """The operand is the whole matrix, its columns facing the inputs. For a square matrix the shape alone would not show a transposed one."""
    if view_RC.shape != used_RC.shape or view_RC.stride() != used_RC.stride():
        transposed = (view_RC.shape, view_RC.stride()) == (used_RC.T.shape, used_RC.T.stride())
        how = "transposed" if transposed else f"as {list(used_RC.shape)} of its {list(view_RC.shape)} weights, or in another order"
        raise StoppedError(
            f"{matrix.name}: a product uses it {how}, so that its columns do not face the inputs",
            "exclude it with --skip, and report this architecture",
        )


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, keywords: tuple[str, ...]) -> Any:
    if position < len(args):
        return args[position]
    return next((kwargs[k] for k in keywords if k in kwargs), None)
