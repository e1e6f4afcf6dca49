"""Spaces: units of one block that can be removed, and everything removed with each. Made from a family's table and the block's own shapes.

Shapes: U = units, K = places of one unit, R, C = rows and columns of a matrix, E = experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmprune.errors import RequestError
from llmprune.model.families.lookup import TABLES, family_of
from llmprune.model.families.table import HEADS, Cut, Family, Part, Residual, Scale
from llmprune.model.matrices import Matrix, block_matrices

PATTERNS = ("channels", "heads", "kv-groups", "experts", "kernel", "layers", "hidden")
DERIVED = ("channels", "heads", "kv-groups", "experts", "layers")  # where an architecture has no table
ROUNDED = ("channels", "kernel", "hidden")
WITHOUT = {
    "channels": "its config cannot express a number of FFN channels",
    "heads": "it has no attention heads",
    "kv-groups": "it has no KV groups",
    "experts": "it has no experts",
    "kernel": "it has no short convolutions",
}


@dataclass(frozen=True)
class Axis:
    """Places along one dimension of a parameter (or buffer) that belong to units."""

    parameter: str  # path inside the block, as in block.named_parameters()
    dim: int  # of the stored tensor; of one expert's slice where expert is not None
    index_UK: Tensor  # long
    expert: int | None = None


@dataclass(frozen=True)
class Reader:
    """A matrix whose input is the units' output: what a least-squares refit repairs."""

    matrix: str  # Matrix.name, "mlp.down_proj.weight" or "mlp.experts.down_proj[3]"
    columns_UK: Tensor  # its input columns that carry each unit


@dataclass(frozen=True)
class Space:
    """Units of one block that can be removed, and everything removed with each. ``axes`` and ``readers`` do not overlap."""

    pattern: str
    name: str  # unique inside the block, over all patterns
    units: int
    axes: tuple[Axis, ...]
    readers: tuple[Reader, ...]  # empty for experts
    groups: int = 1  # the units lie in this many equal consecutive runs, and equally many must be kept in each
    config: tuple[tuple[str, int], ...] = ()  # (config field, its value per kept unit)
    least: int = 1  # units that must be kept
    fixed: tuple[tuple[str, Any], ...] = ()  # config fields to write out, because their default would follow the cut
    scales: tuple[Scale, ...] = ()  # parameters that a cut rescales, by the root of the share of kept units
    legal: tuple[int, ...] = ()  # numbers of units that the model's own config can express; empty: any


def refusal(config: PreTrainedConfig, pattern: str) -> str | None:
    """Why the architecture cannot be cut by this pattern, and which it can, in one line; None when it can."""
    family = family_of(config)
    if pattern not in PATTERNS:
        return f"{pattern!r} is not a structured pattern; there are {', '.join(PATTERNS)}"
    if family is None:
        cuts = f"only {', '.join(DERIVED)} can be cut"
        no_table = f"{config.model_type}: no table of its structure, so {cuts}; there is one for {', '.join(sorted(TABLES))}"
        return None if pattern in DERIVED else no_table
    reason = _reason(family, pattern)
    works = " and ".join(p for p in PATTERNS if _reason(family, p) is None)
    return None if reason is None else f"{config.model_type} cannot be cut by {pattern}: {reason}; it can by {works}"


def _reason(family: Family, pattern: str) -> str | None:
    if pattern in family.refused or pattern in ("layers", "hidden"):
        return family.refused.get(pattern)
    return None if any(cut.pattern == pattern for cut in family.cuts) else WITHOUT[pattern]


def require(config: PreTrainedConfig, pattern: str) -> None:
    """Raises RequestError where the architecture cannot be cut by this pattern."""
    reason = refusal(config, pattern)
    if reason is not None:
        raise RequestError(*reason.split("; ", 1))


def required(config: PreTrainedConfig, pattern: str | None = None) -> Family:
    """The family's table. Raises RequestError when there is none, or when it refuses the pattern."""
    family = family_of(config)
    reason = refusal(config, pattern or "hidden") if pattern or family is None else None
    if family is None or reason is not None:
        raise RequestError(*(reason or "").split("; ", 1))
    return family


def spaces_of(config: PreTrainedConfig, index: int, block: nn.Module, pattern: str) -> list[Space]:
    """The spaces of one block (number ``index``) under one pattern; none where the block has no such part, and for ``layers``.

    Works on the meta device too. Raises RequestError where the architecture cannot be cut so.
    """
    return _resolved(required(config, pattern), block, (pattern,))


def all_spaces(config: PreTrainedConfig, index: int, block: nn.Module) -> list[Space]:
    """The spaces of one block under every pattern that its family knows; none without a table."""
    return [] if family_of(config) is None else _resolved(required(config), block, PATTERNS)


def outer_space(model: PreTrainedModel) -> Space:
    """The residual channels outside the blocks: embeddings, last norm, head; parameters by their paths in the model.

    Raises RequestError where the width cannot be cut.
    """
    stream = required(model.config, "hidden").residual
    assert stream is not None  # families that do not refuse the pattern have it
    names = {id(module): name for name, module in model.named_modules()}
    embeddings, head = (f"{names[id(module)]}.weight" for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    table_VD = model.get_parameter(embeddings)
    tied = head in model.all_tied_weights_keys or model.get_parameter(head) is table_VD
    each_UK = places(table_VD.shape[1], (1,))
    paths = [embeddings] + ([] if tied else [head])
    scaled = 0 if stream.scaled_embeddings else 1
    return Space(
        "hidden",
        "hidden",
        len(each_UK),
        (*(Axis(path, 1, each_UK) for path in paths), Axis(stream.last_norm, 0, each_UK)),
        (),
        config=(("hidden_size", 1),),
        fixed=stream.fixed,
        # a head that shares the embeddings' weight shares their scale too
        scales=(Scale(paths[0], scaled), Scale(stream.last_norm, -1 - tied * scaled, float(stream.plus_one))),
    )


def places(units: int, widths: tuple[int, ...]) -> Tensor:
    """[U, K]: for each width, every unit has a run of that many neighbours; one layout after another, from place 0."""
    runs, start = [], 0
    for width in widths:
        runs.append(start + torch.arange(units)[:, None] * width + torch.arange(width))
        start += units * width
    return torch.cat(runs, 1)


def tensors_of(block: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by path: everything that a checkpoint holds of a block."""
    held = block.state_dict(keep_vars=True)
    return {name: held[name] for name in held}


def _resolved(family: Family, block: nn.Module, patterns: tuple[str, ...]) -> list[Space]:
    matrices: dict[str, list[Matrix]] = {}
    for matrix in block_matrices(block):
        matrices.setdefault(matrix.parameter, []).append(matrix)
    layout = _Layout(tensors_of(block), matrices)
    found = [space for cut in family.cuts if cut.pattern in patterns for space in layout.spaces(cut)]
    return [*found, layout.stream(family.residual)] if family.residual and "hidden" in patterns else found


@dataclass(frozen=True)
class _Layout:
    """One block's tensors, and its matrices by parameter."""

    tensors: dict[str, Tensor]
    matrices: dict[str, list[Matrix]]

    def spaces(self, cut: Cut) -> Iterator[Space]:
        if not self.names((cut.reader or cut.writes[0]).path):
            return
        readers = self.matrices[self.weight(cut.reader.path)] if cut.reader else [None]
        for reader in readers:
            expert = reader.expert if reader else None
            units = self.routed(cut) if cut.pattern == "experts" else cut.units or (reader.columns if reader else 0)
            yield Space(
                cut.pattern,
                cut.name if expert is None else f"{cut.name}[{expert}]",
                units,
                tuple(self.axes(cut, units, expert)),
                (Reader(reader.name, layout_UK(cut.reader, units, reader.columns)),) if reader and cut.reader else (),
                cut.groups,
                cut.config,
                cut.least,
                cut.fixed,
                tuple(scale for written in cut.scales for scale in self.scales(written)),
            )

    def routed(self, cut: Cut) -> int:
        """The number of experts that the block's router chooses among: in a result of an earlier cut it may be the layer's own."""
        return len(self.tensors[self.names(cut.writes[-1].path)[0]])

    def stream(self, residual: Residual) -> Space:
        """The residual channels of one block. They must be the same ones in every block, and outside (``outer_space``)."""
        norms = [n for path in (*residual.norms, *residual.inner_norms) for n in self.names(path)]
        rows = [n for path in residual.writes for n in self.names(path)]
        columns = [self.weight(path) for path in residual.reads if self.names(path)]
        width = len(self.tensors[norms[0]])
        each_UK = places(width, (1,))
        stacked = {name: int(ms[0].expert is not None) for name, ms in self.matrices.items()}
        # rows and columns of a stack of experts are one dimension later; of a bias, or a stack of biases, the last dimension counts
        axes = [Axis(name, 0, each_UK) for name in norms]
        axes += [Axis(name, stacked.get(name, self.tensors[name].dim() - 1) + self.rows_dim(name), each_UK) for name in rows]
        axes += [Axis(name, stacked[name] + 1 - self.rows_dim(name), each_UK) for name in columns]
        offset = float(residual.plus_one)
        scales = [Scale(name, 1) for name in rows] + [Scale(n, -1, offset) for path in residual.norms for n in self.names(path)]
        scales += [Scale(name, -1) for name in columns if residual.bare]
        return Space("hidden", "hidden", width, tuple(axes), (), config=(("hidden_size", 1),), fixed=residual.fixed, scales=tuple(scales))

    def scales(self, scale: Scale) -> Iterator[Scale]:
        """For every tensor that its path names."""
        for name in self.names(scale.path):
            yield Scale(name, scale.power, scale.offset)

    def axes(self, cut: Cut, units: int, expert: int | None) -> Iterator[Axis]:
        for part in cut.writes:
            for name in self.names(part.path):
                dim = 0 if cut.pattern == "experts" else self.rows_dim(name)
                yield self.axis(name, dim, part, units, expert)
        for part in cut.reads:
            name = self.weight(part.path)
            yield self.axis(name, 1 - self.rows_dim(name), part, units, expert)

    def axis(self, name: str, dim: int, part: Part, units: int, expert: int | None) -> Axis:
        tensor = self.tensors[name]
        size = tensor.shape[dim] if expert is None else tensor.shape[dim + 1]
        return Axis(name, dim, layout_UK(part, units, size), expert)

    def names(self, path: str) -> list[str]:
        """What a part's path names: a parameter and the bias beside it, or everything inside a module."""
        return [name for name in self.tensors if name in (path, f"{path}_bias") or name.startswith(f"{path}.")]

    def weight(self, path: str) -> str:
        return path if path in self.tensors else f"{path}.weight"

    def rows_dim(self, name: str) -> int:
        """The stored dimension that is the rows of a matrix; of vectors and convolutions the first."""
        return int(name in self.matrices and self.matrices[name][0].transposed)


def layout_UK(part: Part, units: int, size: int) -> Tensor:
    """[U, K]: where the units of a part lie among ``size`` places."""
    if part.widths:
        return places(units, part.widths)
    width, rest = divmod(size, units * part.copies)
    if rest:
        raise RequestError(f"{part.path}: {size} places for {units} units", "the config does not describe this block")
    return places(units, (width,) * part.copies)


def check_keep(space: Space, keep_K: Tensor) -> None:
    """Raises RequestError for unit numbers that are not sorted, unique and in range, too few, or not equally many in each group."""
    count = len(keep_K)
    if count and (int(keep_K[0]) < 0 or int(keep_K[-1]) >= space.units or bool((keep_K[1:] <= keep_K[:-1]).any())):
        raise RequestError(f"{space.name}: kept units must be sorted numbers below {space.units}, each once", "")
    each = torch.bincount(keep_K * space.groups // space.units, minlength=space.groups)
    if count < space.least or bool((each != each[0]).any()):
        legal = [n for n in range(space.groups, space.units + 1, space.groups) if n >= space.least]
        raise RequestError(
            f"{space.name}: {count} of {space.units} units kept, {each.tolist()} in its {space.groups} groups",
            f"keep equally many in each group: {', '.join(map(str, legal))}",
        )


def legal_counts(config: PreTrainedConfig, space: Space, round_to: int = 1, native: bool = True) -> list[int]:
    """The numbers of units that may be kept. ``round_to`` applies to single channels; the full number is always allowed.

    native: the count must be expressible in the model's own config (one count for all layers), not in a config of each layer.
    """
    step = math.lcm(space.groups, round_to if space.pattern in ROUNDED else 1)
    counts = {n for n in range(step, space.units, step) if n >= space.least} | {space.units}
    sizes, family = dict(space.config), family_of(config)
    if native and space.legal:
        counts &= {*space.legal}
    if native and family and family.divides and family.substitute is None:
        if HEADS in sizes:
            counts = {n for n in counts if config.hidden_size % (n * sizes[HEADS]) == 0}
        if space.pattern == "hidden":
            counts = {n for n in counts if n % getattr(config, HEADS) == 0}
    return sorted(counts)


def closest_count(counts: list[int], wanted: float) -> int:
    """The legal count nearest to the one wanted; of two equally near, the larger."""
    return min(counts, key=lambda n: (abs(n - wanted), -n))
