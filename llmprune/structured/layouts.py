"""Where the units of a block lie, by the dimensions that shrink with them; in fused matrices by trying.

Shapes: U = units, K = places of one unit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor, nn

from llmprune.model.families.table import Scale
from llmprune.model.matrices import Matrix, block_matrices
from llmprune.structured.counted import Count
from llmprune.structured.spaces import Axis, Reader, Space, places, tensors_of
from llmprune.structured.trial import Unproven


@dataclass(frozen=True)
class Shrunk:
    """A dimension of a tensor that is ``each`` places shorter with every unit less; ``rest`` places belong to none."""

    name: str
    dim: int
    each: int
    rest: int


@dataclass(frozen=True)
class Layout:
    """For every dimension (its first place, the runs of one unit); scaled: norms run over all units."""

    runs: dict[Shrunk, tuple[int, tuple[int, ...]]]
    scaled: bool = False

    def index_UK(self, s: Shrunk, units: int) -> Tensor:
        start, widths = self.runs[s]
        return places(units, widths) + start


def shrunk_tensors(whole: dict[str, tuple[int, ...]], cut: dict[str, tuple[int, ...]], units: int, fewer: int) -> list[Shrunk]:
    """What of one block is smaller with fewer units, by the shapes of its tensors. Raises Unproven for any other change."""
    if whole.keys() != cut.keys():
        raise Unproven(f"changes whether there is {sorted(whole.keys() ^ cut.keys())[0]}", 1)
    found = []
    for name, shape in whole.items():
        if len(shape) != len(cut[name]):
            raise Unproven(f"changes the dimensions of {name}", 1)
        for dim, (size, less) in enumerate(zip(shape, cut[name], strict=True)):
            each, odd = divmod(size - less, units - fewer)
            if odd or each < 0 or size < each * units:
                raise Unproven(f"{name} is {less} instead of {size} long", 1)
            if each:
                found.append(Shrunk(name, dim, each, size - each * units))
    return found


def check_channels(blocks: Sequence[nn.Module], shrunk: Sequence[Sequence[Shrunk]]) -> None:
    """Channels are columns of the matrices that read them, rows of those that write them, and nothing else. Raises Unproven."""
    for block, found in zip(blocks, shrunk, strict=True):
        matrices = {m.parameter: m for m in block_matrices(block)}
        biases = {m.bias for m in matrices.values() if m.parameter in {s.name for s in found}}
        for s in found:
            if s.name not in matrices and s.name not in biases:
                raise Unproven(f"{s.name} is cut too", 3)


def layouts(count: Count, blocks: Sequence[nn.Module], shrunk: Sequence[Sequence[Shrunk]], runs: bool = False) -> Iterator[Layout]:
    """The possible layouts, the likeliest first. runs: the places of a unit are neighbours everywhere."""
    every = dict.fromkeys(s for found in shrunk for s in found)
    read = [s.each for block, found in zip(blocks, shrunk, strict=True) for s in found if _reads(s, _stacked(block))]
    size = max(1, min(read, default=1) // count.heads)
    found = {s: [(s.each,)] if runs else _runs(s.each, size, count.heads) for s in every}
    options = {s: [(start, widths) for widths in found[s] for start in dict.fromkeys((0, s.rest))] for s in every}
    for scaled in (False, True)[: 2 - runs]:
        for chosen in product(*options.values()):
            yield Layout(dict(zip(options, chosen, strict=True)), scaled)


def _runs(each: int, size: int, heads: int) -> list[tuple[int, ...]]:
    """The runs that the places of one unit may form: neighbours, or parts one after the other. size: of a head, or 1; heads: of a unit."""
    several, rest = divmod(each, size)
    if rest or several in (1, heads):
        return [(each,)]
    found: list[tuple[int, ...]] = [(size,) * several, (each,)] if heads == 1 else [(each,)]
    if several == heads + 2:  # queries, key, value
        found.append((heads * size, size, size))
    if several % 2 == 0 and several > 2:
        found.append((each // 2, each // 2))
    return found


def spaces_of_block(
    block: nn.Module, shrunk: Sequence[Shrunk], layout: Layout, pattern: str, count: Count, legal: tuple[int, ...] = ()
) -> Iterator[Space]:
    """A space for every matrix that reads units, with the writers whose paths are most like its own. Raises Unproven where there is none."""
    matrices = _stacked(block)
    stacks = {name for ms in matrices.values() for m in ms if m.expert is not None for name in (m.parameter, m.bias)}
    both = {s.name for s in shrunk if sum(o.name == s.name for o in shrunk) > 1}
    readers = [s for s in shrunk if _reads(s, matrices) and s.name not in both]
    others = [s for s in shrunk if s not in readers]
    if shrunk and not readers:
        raise Unproven("nothing reads what it counts", 3)
    for reader in readers:
        mine = [s for s in others if reader is max(readers, key=lambda r: _common(r.name, s.name))]
        if not mine or any((s.name in stacks) != (reader.name in stacks) for s in mine):
            raise Unproven(f"the writers of {reader.name} are not found", 3)
        for matrix in matrices[reader.name]:
            e = matrix.expert
            yield Space(
                pattern,
                _name(reader.name, pattern) + ("" if e is None else f"[{e}]"),
                count.units,
                tuple(Axis(s.name, s.dim - (e is not None), layout.index_UK(s, count.units), e) for s in mine),
                (Reader(matrix.name, layout.index_UK(reader, count.units)),),
                count.groups,
                count.fields,
                count.groups,
                count.fixed,
                tuple(_scales(mine, matrices)) if layout.scaled else (),
                legal,
            )


def expert_spaces(block: nn.Module, shrunk: Sequence[Shrunk], layout: Layout, count: Count, legal: tuple[int, ...]) -> Iterator[Space]:
    """A space for every module of nothing but stacks of experts, with the router whose path is most like its own. Raises Unproven where there is
    none, or experts shrink in another dimension too.
    """
    matrices = _stacked(block)
    stacks = {name for ms in matrices.values() for m in ms if m.expert is not None for name in (m.parameter, m.bias)}
    inside, routers = ([s for s in shrunk if (s.name in stacks) is there] for there in (True, False))
    if not inside and any("expert" in s.name for s in routers):
        raise Unproven("its experts are not in stacks", 3)
    if shrunk and not (inside and any(s.name in matrices for s in routers)):
        raise Unproven("no stack of experts shrinks with a router", 3)
    if several := next((s.name for s in inside if s.dim), None):
        raise Unproven(f"{several} is cut along another dimension than its experts", 3)
    modules = list(dict.fromkeys(_only(s.name, block, stacks) for s in inside))
    for module in modules:
        mine = [s for s in inside if s.name.startswith(f"{module}.")]
        mine += [s for s in routers if module == max(modules, key=lambda m: _common(m, s.name))]
        axes = tuple(Axis(s.name, s.dim, layout.index_UK(s, count.units)) for s in mine)
        yield Space("experts", module, count.units, axes, (), count.groups, count.fields, count.least, legal=legal)


def _only(parameter: str, block: nn.Module, names: Collection[str]) -> str:
    """The path of the largest module that holds a parameter, and none besides ``names``."""
    held = tensors_of(block)
    path = parameter.rpartition(".")[0]
    while (parent := path.rpartition(".")[0]) and all(name in names for name in held if name.startswith(f"{parent}.")):
        path = parent
    return path


def _scales(shrunk: Sequence[Shrunk], matrices: dict[str, list[Matrix]]) -> Iterator[Scale]:
    """A norm over all units, and the writer of a like name that it normalises, with its bias."""
    for norm in shrunk:
        first = norm.name.rpartition("_norm.weight")[0]
        if first:
            alike = [s.name for s in shrunk if s.each == norm.each and s.name.startswith(f"{first}_") and s.name in matrices]
            yield from (Scale(name, 1) for writer in alike for name in (writer, matrices[writer][0].bias))
            yield Scale(norm.name, -1)


def _name(reader: str, pattern: str) -> str:
    """Of a space: the module of its reader, which for channels may be the reader itself."""
    path = reader.removesuffix(".weight")
    parent = path.rpartition(".")[0]
    return parent or path if pattern == "channels" else f"{parent or path}.{pattern.removeprefix('kv-')}"


def _stacked(block: nn.Module) -> dict[str, list[Matrix]]:
    """The matrices of every parameter."""
    found: dict[str, list[Matrix]] = {}
    for m in block_matrices(block):
        found.setdefault(m.parameter, []).append(m)
    return found


def _reads(s: Shrunk, matrices: dict[str, list[Matrix]]) -> bool:
    """Whether what shrank are the input columns of a matrix."""
    m = matrices[s.name][0] if s.name in matrices else None
    return m is not None and s.dim - (m.expert is not None) == (0 if m.transposed else 1)


def _common(a: str, b: str) -> int:
    """How many components two paths have in common at their start."""
    pairs = list(zip(a.split("."), b.split("."), strict=False))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
