"""FFN channels, heads and KV groups of architectures without a table: which config fields count them is found by trying, and proved.

A field is changed, a model without weights is built from the changed config, and the shapes that shrank show where the units lie. Proved is that a
random block of the smaller config, with the remaining tensors, computes what the whole block computes beside zeros.

Shapes: U = units, K = places of one unit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.errors import RequestError
from llmprune.model.families.lookup import family_of
from llmprune.model.matrices import Matrix, block_matrices
from llmprune.model.skeleton import UNBUILDABLE, build_skeleton
from llmprune.structured.counted import COUNTS, Count
from llmprune.structured.derived import shapes, unlike
from llmprune.structured.fields import put
from llmprune.structured.slicing import empty_block, slice_parameters
from llmprune.structured.spaces import Axis, Reader, Space, all_spaces, places
from llmprune.structured.trial import Trial, Unproven

LAYOUTS = 16  # that are tried for one field


@dataclass(frozen=True)
class Shrunk:
    """A dimension of a tensor that is ``each`` places shorter with every unit less; ``rest`` places belong to none."""

    name: str
    dim: int
    each: int
    rest: int


def derived_spaces(model: PreTrainedModel, path: str, pattern: str) -> list[tuple[Space, ...]]:
    """The spaces of every block of the list ``path`` under a pattern of ``COUNTS``; ``model`` may be without weights.

    Raises RequestError where no config field is proved to count the units, with the step that failed.
    """
    found: list[list[Space]] = [[] for _ in model.get_submodule(path).children()]
    proved: set[str] = set()
    failed: list[Unproven] = []
    for count in COUNTS[pattern](model, path):
        names = [name for name, _ in count.fields]
        if proved.isdisjoint(names):
            try:
                spaces = Proof(model, path, pattern, count).spaces()
            except Unproven as error:
                failed.append(Unproven(f"{' and '.join(names)}: {error}", error.step))
                continue
            proved.update(names)
            for block, more in zip(found, spaces, strict=True):
                block.extend(more)
    if not proved:
        why = max(failed, key=lambda error: error.step, default="no field of its config counts them")
        raise RequestError(f"{model.config.model_type} cannot be cut by {pattern}: {why}", "its weights can be pruned without a structured pattern")
    return [tuple(block) for block in found]


def model_spaces(model: PreTrainedModel, path: str, patterns: Sequence[str]) -> list[tuple[Space, ...]]:
    """The spaces of every block of the list ``path``: those of the table of its family, under all patterns, or else derived under ``patterns``.

    Raises RequestError where a pattern is not derived.
    """
    blocks = list(model.get_submodule(path).children())
    if family_of(model.config) is not None:
        return [tuple(all_spaces(model.config, index, block)) for index, block in enumerate(blocks)]
    each = [derived_spaces(model, path, pattern) for pattern in patterns if pattern in COUNTS]
    return [tuple(space for found in each for space in found[index]) for index in range(len(blocks))]


def named_spaces(model: PreTrainedModel, path: str, names: Collection[str]) -> list[tuple[Space, ...]]:
    """``model_spaces`` under the patterns that have spaces of these names. Raises RequestError where no pattern has."""
    patterns: list[str] = []
    left, why = set(names), ""
    for pattern in COUNTS if family_of(model.config) is None else ():
        if left:
            try:
                found = {space.name for block in derived_spaces(model, path, pattern) for space in block}
            except RequestError as error:
                why = why or str(error)
                continue
            patterns += [pattern] if found & left else []
            left -= found
    if left and family_of(model.config) is None:
        raise RequestError(f"{model.config.model_type}: no space is named {sorted(left)[0]!r}" + (f"; {why}" if why else ""), "")
    return model_spaces(model, path, patterns)


def require_buildable(model: PreTrainedModel, path: str, spaces: Sequence[Sequence[Space]]) -> None:
    """Raises RequestError where blocks without a table cannot be built one by one in sizes of their own, as layers of different sizes are."""
    if family_of(model.config) is not None:
        return
    hint = "use --uniform, or --pad"
    for index, block in enumerate(model.get_submodule(path).children()):
        fewer = {space.name: torch.arange(space.units // 2) for space in spaces[index]}
        if any(count != 1 or "." in name for space in spaces[index] for name, count in space.config):
            raise RequestError(f"{model.config.model_type}: its config has no plain fields for layers of different sizes", hint)
        try:
            own = empty_block(block, model.config, index, spaces[index], fewer)
        except UNBUILDABLE as error:
            raise RequestError(f"{model.config.model_type}: {path}.{index} cannot be built in a size of its own ({error})", hint) from None
        wanted = {name: tuple(t.shape) for name, t in slice_parameters(block, spaces[index], fewer).items()}
        if shapes(own) != wanted:
            raise RequestError(f"{model.config.model_type}: {path}.{index} cannot be built in a size of its own", hint)


class Proof:
    """One choice of config fields, tried on a model."""

    def __init__(self, model: PreTrainedModel, path: str, pattern: str, count: Count) -> None:
        self.model, self.path, self.pattern, self.count = model, path, pattern, count
        self.blocks = list(model.get_submodule(path).children())

    def smaller(self, units: int) -> PreTrainedModel:
        """The model of so many units, without weights."""
        saved = {name: value for name, value in self.model.config.to_dict().items() if name != "auto_map"}
        for name, value in self.count.fixed:
            put(saved, self.model.config, name, value)
        for name, each in self.count.fields:
            put(saved, self.model.config, name, each * units)
        try:
            return build_skeleton(saved, torch.float32)
        except RequestError as error:
            raise Unproven(f"{units} instead of {self.count.units}: {error}", 2) from None

    def spaces(self) -> list[list[Space]]:
        units = self.count.units
        shrunk = self.shrunk(self.smaller(units - 1), units - 1)
        self.check(shrunk)
        trial, kinds = None, self.kinds(shrunk)
        fewer = units // 2 + 1 if units > 3 else units - 1
        failed = ""
        for layouts in islice(self.layouts(shrunk), LAYOUTS):
            spaces = [list(self.of_block(i, shrunk[i], layouts)) for i in range(len(self.blocks))]
            if trial is None:
                smaller = self.smaller(fewer)
                if self.shrunk(smaller, fewer) != shrunk:
                    raise Unproven(f"{fewer} instead of {units} do not leave as many places fewer", 2)
                trial = Trial(self.model, smaller, self.path)
            failed = next((f for i in kinds if (f := trial.differs(i, spaces[i], fewer, self.pattern))), "")
            if not failed:
                return spaces
        raise Unproven(failed, 4)

    def shrunk(self, smaller: PreTrainedModel, units: int) -> list[list[Shrunk]]:
        """What shrank in each block. Raises Unproven for any other change."""
        outside, wanted = (shapes(m, f"{self.path}.") for m in (smaller, self.model))
        if outside != wanted:
            raise Unproven(f"changes {sorted(outside.items() ^ wanted.items())[0][0]} too", 1)
        own = list(smaller.get_submodule(self.path).children())
        if len(own) != len(self.blocks):
            raise Unproven("changes the number of blocks", 1)
        found = [self.shrunk_in(shapes(a), shapes(b), units) for a, b in zip(self.blocks, own, strict=True)]
        if not any(found):
            raise Unproven("has no effect on the blocks", 0)
        return found

    def shrunk_in(self, whole: dict[str, tuple[int, ...]], cut: dict[str, tuple[int, ...]], units: int) -> list[Shrunk]:
        if whole.keys() != cut.keys():
            raise Unproven(f"changes whether there is {sorted(whole.keys() ^ cut.keys())[0]}", 1)
        found = []
        for name, shape in whole.items():
            if len(shape) != len(cut[name]):
                raise Unproven(f"changes the dimensions of {name}", 1)
            for dim, (size, less) in enumerate(zip(shape, cut[name], strict=True)):
                each, odd = divmod(size - less, self.count.units - units)
                if odd or each < 0 or size < each * self.count.units:
                    raise Unproven(f"{name} is {less} instead of {size} long", 1)
                if each:
                    found.append(Shrunk(name, dim, each, size - each * self.count.units))
        return found

    def kinds(self, shrunk: list[list[Shrunk]]) -> list[int]:
        """One block of each kind among those that have units."""
        found: list[int] = []
        for i, block in enumerate(self.blocks):
            if shrunk[i] and all(unlike(self.blocks[j], block, j, i) is not None for j in found):
                found.append(i)
        return found

    def check(self, shrunk: list[list[Shrunk]]) -> None:
        """Channels are columns of the matrices that read them, rows of those that write them, and nothing else."""
        for block, found in zip(self.blocks, shrunk, strict=True):
            matrices = {m.parameter: m for m in block_matrices(block)}
            biases = {m.bias for m in matrices.values() if m.parameter in {s.name for s in found}}
            for s in found:
                if s.name not in matrices and s.name not in biases:
                    raise Unproven(f"{s.name} is cut too", 3)
            readers = [s for s in found if _reads(s, matrices)]
            if found and not readers:
                raise Unproven("nothing reads what it counts", 3)

    def layouts(self, shrunk: list[list[Shrunk]]) -> Iterator[dict[tuple[str, int], tuple[int, tuple[int, ...]]]]:
        """For every dimension (its first place, the runs of one unit)."""
        every = {(s.name, s.dim): s for found in shrunk for s in found}
        options = {}
        for key, s in every.items():
            runs = [(1,) * s.each, (s.each,)] if s.each > 1 else [(1,)]
            options[key] = [(start, widths) for widths in runs for start in ((0, s.rest) if s.rest else (0,))]
        for chosen in product(*options.values()):
            yield dict(zip(options, chosen, strict=True))

    def of_block(self, index: int, shrunk: list[Shrunk], layouts: dict[tuple[str, int], tuple[int, tuple[int, ...]]]) -> Iterator[Space]:
        block = self.blocks[index]
        matrices: dict[str, list[Matrix]] = {}
        for m in block_matrices(block):
            matrices.setdefault(m.parameter, []).append(m)
        first = {name: ms[0] for name, ms in matrices.items()}
        readers = [s for s in shrunk if _reads(s, first)]
        others = [s for s in shrunk if s not in readers]

        def index_UK(s: Shrunk) -> Tensor:
            start, widths = layouts[s.name, s.dim]
            return places(self.count.units, widths) + start

        for reader in readers:
            mine = [s for s in others if reader is max(readers, key=lambda r: _common(r.name, s.name))]
            for matrix in matrices[reader.name]:
                e = matrix.expert
                axes = tuple(Axis(s.name, s.dim - (e is not None), index_UK(s), e) for s in mine)
                parent = reader.name.removesuffix(".weight").rpartition(".")[0] or reader.name.removesuffix(".weight")
                yield Space(
                    self.pattern,
                    parent if e is None else f"{parent}[{e}]",
                    self.count.units,
                    axes,
                    (Reader(matrix.name, index_UK(reader)),),
                    config=self.count.fields,
                    fixed=self.count.fixed,
                )


def _reads(s: Shrunk, matrices: dict[str, Matrix]) -> bool:
    """Whether what shrank are the input columns of a matrix."""
    m = matrices.get(s.name)
    return m is not None and s.dim - (m.expert is not None) == (0 if m.transposed else 1)


def _common(a: str, b: str) -> int:
    """How many components two paths have in common at their start."""
    pairs = list(zip(a.split("."), b.split("."), strict=False))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
