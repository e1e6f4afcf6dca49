"""Every prunable matrix of a block as a [R, C] view: nn.Linear, Conv1D (stored transposed), one expert of a fused 3-D parameter.

R = output rows, C = input columns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Not pruned unless --only names them: routers (the name is a whole path component), Mamba's x_proj and dt_proj, the few coefficients by which
# Gemma 3n mixes its streams.
# Norms, embeddings and short convolutions do not count as matrices.
LEFT_ALONE = re.compile(r"(^|\.)(gate|router|shared_expert_gate|x_proj|dt_proj|modality_router|prediction_coefs|correction_coefs)(\.|$)")


@dataclass(frozen=True)
class Matrix:
    """One matrix of a block: where it is and how it is stored."""

    name: str  # path inside the block; one expert has its index in brackets, unless the checkpoint has a name for it
    parameter: str
    expert: int | None
    transposed: bool  # stored [C, R]
    rows: int
    columns: int
    first: int | None = None  # number of its first row, where checkpoints store the rows in several tensors; None: it has them all

    @property
    def whole(self) -> str:
        """The name of all rows that the model multiplies at once."""
        return name_of(self.parameter, self.expert)

    @property
    def bias(self) -> str:
        """The path of the bias beside it, if it has one."""
        return f"{self.parameter.removesuffix('weight')}bias" if self.expert is None else f"{self.parameter}_bias"

    def stored(self, block: nn.Module) -> Tensor:
        """The stored slice, sharing memory with the parameter."""
        return self.slice_of(block.get_parameter(self.parameter).data)

    def slice_of(self, parameter: Tensor) -> Tensor:
        """The stored slice of a tensor that has the parameter's shape: of its mask, perhaps."""
        if self.expert is None:
            return parameter
        one = self.columns if self.transposed else self.rows  # of a stack whose experts lie one after the other in two dimensions
        return parameter.view(-1, one, parameter.shape[-1])[self.expert] if parameter.dim() == 2 else parameter[self.expert]

    def view(self, block: nn.Module) -> Tensor:
        """[R, C] view, sharing memory with the parameter."""
        return self.part_of(self.whole_view(block))

    def whole_view(self, block: nn.Module) -> Tensor:
        """The view with all rows that the model multiplies at once."""
        return self._turned(self.stored(block))

    def view_of(self, parameter: Tensor) -> Tensor:
        """As ``view``, of a tensor that has the parameter's shape."""
        return self.part_of(self._turned(self.slice_of(parameter)))

    def _turned(self, stored: Tensor) -> Tensor:
        return stored.T if self.transposed else stored

    def part_of(self, whole: Tensor, dim: int = 0) -> Tensor:
        """The matrix's own rows, which lie along ``dim``."""
        return whole if self.first is None else whole.narrow(dim, self.first, self.rows)


@dataclass(frozen=True)
class Selection:
    """Which matrices are pruned: all but the default exceptions and ``skip``, or only those that ``only`` names.

    Both are regular expressions searched in the full name, such as ``model.layers.3.mlp.down_proj.weight``.
    """

    skip: str | None = None
    only: str | None = None

    def skips(self, name: str) -> bool:
        return bool(self.skip) and bool(re.search(str(self.skip), name))

    def takes(self, name: str) -> bool:
        if self.skips(name):
            return False
        return bool(re.search(self.only, name)) if self.only else not LEFT_ALONE.search(name)

    def names(self, name: str) -> bool:
        """Whether ``only`` names it explicitly."""
        return bool(self.only) and self.takes(name)


def block_matrices(block: nn.Module) -> list[Matrix]:
    """All matrices of a block, in the order of its parameters; works on the meta device too."""
    found = []
    for path, module in block.named_modules():
        prefix = f"{path}." if path else ""
        if flat := _flat_stacks(module):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 2:
                    one = parameter.unflatten(0, (flat, -1))
                    # gate, up and down of one shape: what is last leads back, so it is stored the other way round
                    found += [_matrix(f"{prefix}{name}", e, name == "w2", one[e]) for e in range(flat)]
            continue
        if isinstance(module, nn.Linear | Conv1D):
            transposed = isinstance(module, Conv1D)
            found.append(_matrix(f"{prefix}weight", None, transposed, module.weight))
            continue
        transposed = _stacks_transposed(module)
        # a bare 2-D "weight" is a router's: it multiplies like a Linear. 3-D parameters are stacks of experts.
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and parameter.dim() == 2 and not isinstance(module, nn.Embedding):
                found.append(_matrix(f"{prefix}{name}", None, False, parameter))
            elif parameter.dim() == 3 and not isinstance(module, nn.Conv1d):
                turned = transposed or _adds_bias(module, name)
                found += [_matrix(f"{prefix}{name}", e, turned, parameter[e]) for e in range(parameter.shape[0])]
    return found


def unrecognised(block: nn.Module) -> dict[str, int]:
    """Parameters of two dimensions or more which are neither matrices found above, nor convolutions, embeddings or biases: weights of each, by
    name. They stay as they are.
    """
    matrices = {matrix.parameter for matrix in block_matrices(block)}
    apart = {f"{path}.weight" for path, module in block.named_modules() if isinstance(module, nn.Conv1d | nn.Embedding)}
    bare = ((name, p) for name, p in block.named_parameters() if p.dim() > 1 and not name.endswith("bias"))
    return {name: p.numel() for name, p in bare if name not in matrices | apart}


def _flat_stacks(module: nn.Module) -> int:
    """How many matrices lie one after the other in each two-dimensional parameter of a module: groups of a grouped Linear, or DBRX's experts."""
    groups = getattr(module, "n_groups", 0) if isinstance(module, nn.Linear) else 0
    return groups or (getattr(module, "moe_num_experts", 0) if isinstance(getattr(module, "w2", None), nn.Parameter) else 0)


def _stacks_transposed(module: nn.Module) -> bool:
    """Whether a module's stacks of experts are stored [E, C, R]. transformers' experts interface says so; models that do not use it are
    recognised by gate and up in one stack [E, D, 2F] before the down projection [E, F, D]. ``watch`` checks it when they are used.
    """
    stacks = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    fused = len(stacks) == 2 and stacks[0].shape[1:] == (stacks[1].shape[2], 2 * stacks[1].shape[1])
    return getattr(module, "is_transposed", fused)


def _adds_bias(module: nn.Module, name: str) -> bool:
    """Whether a stack lies beside the bias that torch.baddbmm adds to its products, the outputs of a stack [E, C, R]: the blocks of a block-diagonal
    matrix. ``watch`` checks it when they are used.
    """
    stem, _, last = name.rpartition("_")
    bias = dict(module.named_parameters(recurse=False)).get(f"{stem}_bias")
    stack = module.get_parameter(name)
    return last == "weight" and bias is not None and bias.shape == stack.shape[::2]


def name_of(parameter: str, expert: int | None) -> str:
    return parameter if expert is None else f"{parameter}[{expert}]"


def _matrix(parameter: str, expert: int | None, transposed: bool, stored: Tensor) -> Matrix:
    rows, columns = reversed(stored.shape) if transposed else stored.shape
    return Matrix(name_of(parameter, expert), parameter, expert, transposed, rows, columns)
