"""The few values that are passed between folders, and the protocols that methods follow.

Shapes: R = output rows, C = input columns, T = tokens, N = windows, L = window length, D = hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor, nn

from llmprune.results import BlockReport, Polished, Step

Mask: TypeAlias = Tensor  # bool [R, C]; True = keep: the only polarity in the code base

# What a method asks for: a field of Stats that has a source, without its shape ("input_sq" is input_sq_C)
Stat: TypeAlias = str
StatSource: TypeAlias = Literal["inputs", "loss", "window losses", "norms"]  # window losses: the gradients of single windows


def _said(role: Literal["accumulated", "own", "derived"], source: StatSource | None = None) -> dict[str, str | None]:
    """What a field of Stats is. accumulated: a sum over calibration windows, which adds over micro-batches and processes; own: not a sum, the same
    in every process; derived: made of others, again where those change. source: where it comes from, if methods can ask for it.
    """
    return {"role": role, "source": source}


SUM, INPUT_SUM, LOSS_SUM, WINDOW_SUM = (_said("accumulated", source) for source in (None, "inputs", "loss", "window losses"))
OF_NORM, OF_WINDOW, DERIVED = _said("own", "norms"), _said("own", "window losses"), _said("derived")


@dataclass
class Stats:
    """The statistics of one matrix; None = not asked for. A tensor's name ends in its shape.

    Matrices that share an input share one Stats object, so what is derived from it (``factors``) is computed once.
    """

    tokens: int = field(default=0, metadata=SUM)
    input_sq_C: Tensor | None = field(default=None, metadata=INPUT_SUM)  # sum over tokens of x_c ** 2
    input_sum_C: Tensor | None = field(default=None, metadata=INPUT_SUM)  # sum over tokens of x_c
    gram_CC: Tensor | None = field(default=None, metadata=INPUT_SUM)  # sum over tokens of x x^T
    shrunk: float = field(default=0.0, metadata=DERIVED)  # growth of the Gram matrix's diagonal, relative to the sums (maths/linalg.py, shrink)
    cross_CC: Tensor | None = field(default=None, metadata=SUM)  # sum of x x'^T: dense path's inputs by the pruned path's
    partner_RC: Tensor | None = field(default=None, metadata=SUM)  # sum of (p - p') x'^T: what the products are added to; one matrix's own
    several: bool = field(default=False, metadata=_said("own"))  # it has different inputs in one forward
    norm_scale_C: Tensor | None = field(default=None, metadata=OF_NORM)  # scale of the norm whose output this is, if it is one's
    # of the dense model's summed next-token loss; one matrix's own (statistics/gradients.py, also for its targets)
    grad_RC: Tensor | None = field(default=None, metadata=LOSS_SUM)  # dL/dW, summed over windows
    grad_sq_RC: Tensor | None = field(default=None, metadata=WINDOW_SUM)  # sum over windows of (dL_n/dW) ** 2
    grad_out_sq_R: Tensor | None = field(default=None, metadata=LOSS_SUM)  # sum over tokens of (dL/dy_r) ** 2, y = W x
    grad_out_gram_BQQ: Tensor | None = field(default=None, metadata=LOSS_SUM)  # sum over tokens of g g^T, g = dL/dy, in B blocks of Q rows
    first_grad_RC: Tensor | None = field(default=None, metadata=OF_WINDOW)  # dL/dW of the first window alone
    grad_tokens: int = field(default=0, metadata=SUM)  # tokens in these sums; 0: none reached the matrix
    grad_windows: int = field(default=0, metadata=SUM)  # windows in these sums
    beside_C: Tensor | None = field(default=None, metadata=DERIVED)  # scores of what writes an input and is dropped with it; one matrix's own
    factors: dict[Any, Any] = field(default_factory=dict, metadata=DERIVED)  # what linalg has derived from the Gram matrix

    def accumulate(self, name: str, value: Tensor) -> None:
        """Add the sum over a micro-batch to the field ``name``; ``value`` is owned by the sum from then on, and may be changed."""
        accumulate(vars(self), name, value)

    def accumulated(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the existing sums, in the order of the fields: what several processes add up, beside the counts."""
        sums = ((f.name, getattr(self, f.name)) for f in fields(self) if f.metadata["role"] == "accumulated")
        return ((name, value) for name, value in sums if isinstance(value, Tensor))

    def __add__(self, other: Stats) -> Stats:
        """The statistics over the windows of both. Derived fields are left out; fields that are not sums are the first one's, if it has them."""
        assert self.shrunk == other.shrunk == 0, "a shrunk Gram matrix is not a sum"
        pairs = {f.name: (f.metadata["role"], getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        sums = {name: both(a, b) for name, (role, a, b) in pairs.items() if role == "accumulated"}
        return Stats(**sums, **{name: b if a is None else a for name, (role, a, b) in pairs.items() if role == "own"})

    def permuted(self, order_C: Tensor) -> Stats:
        """Of the same matrix with its input channels in another order: every C of a tensor's shape is reordered."""
        moved: dict[str, Any] = {n: _permuted(value, shape_of(n), order_C) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, factors={})


def accumulate(sums: dict[Any, Any], key: Any, value: Tensor) -> None:
    """Add the sum over a micro-batch to that of the ones before it, in place; ``value`` is owned by the sum where it is the first."""
    if sums.get(key) is None:
        sums[key] = value
    else:
        sums[key].add_(value)


def both(a: Any, b: Any) -> Any:
    """a + b, where either may be missing."""
    return a if b is None else b if a is None else a + b


def shape_of(name: str) -> str:
    """The shape that a name ends in: "RC" of "grad_sq_RC"."""
    return name.rpartition("_")[2]


def _permuted(value: Tensor, shape: str, order_C: Tensor) -> Tensor:
    for dim, letter in enumerate(shape):
        if letter == "C":
            value = value[(slice(None),) * dim + (order_C,)]
    return value


STATISTICS: dict[Stat, Field[Any]] = {f.name.rpartition("_")[0]: f for f in fields(Stats) if f.metadata["source"]}  # that can be asked for


def statistics_of(*sources: StatSource) -> frozenset[Stat]:
    """The statistics that come from these sources."""
    return frozenset(stat for stat, found in STATISTICS.items() if found.metadata["source"] in sources)


@dataclass(frozen=True)
class Pruned:
    """What a solver returns for one matrix."""

    weight_RC: Tensor
    keep_RC: Mask
    lost: float | None = None  # squared error added to the outputs, summed over rows and calibration tokens
    notes: tuple[str, ...] = ()  # what had to be done differently (damping retries and the like)


class Criterion(Protocol):
    """Scores every weight; the smallest scores are dropped first. It may say ``units_only`` too (llmprune.methods)."""

    @property
    def needs(self) -> frozenset[Stat]: ...

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor: ...


class Pattern(Protocol):
    """Which shapes of zeros are allowed."""

    @property
    def unit(self) -> int:
        """Columns that are decided together; 1: any weight on its own."""
        ...

    @property
    def tall(self) -> int:
        """Rows that are decided together."""
        ...

    @property
    def local(self) -> bool:
        """Whether every ``unit`` columns of a row are decided by themselves."""
        ...

    @property
    def levels(self) -> tuple[float, ...]:
        """The only ratios that a matrix may lose, ascending; empty: any."""
        ...

    def dropped(self, rows: int, columns: int, sparsity: float) -> int:
        """Exact number of weights to drop from a [rows, columns] matrix."""
        ...

    def at(self, ratio: float) -> Pattern:
        """The pattern of a matrix that loses ``ratio``: itself, unless matrices of one run differ in it."""
        ...

    def project(self, score_RC: Tensor, drop: int) -> Mask:
        """Keep-mask with exactly ``drop`` False, for the smallest scores that the pattern allows to drop."""
        ...


class Solver(Protocol):
    """Chooses the mask (from the score, or its own saliency) and repairs the kept weights. It may say more of itself (llmprune.methods)."""

    @property
    def needs(self) -> frozenset[Stat]: ...

    @property
    def own_score(self) -> bool:
        """True: ranks by its own saliency and takes no criterion."""
        ...

    def solve(self, weight_RC: Tensor, score_RC: Tensor | None, stats: Stats, pattern: Pattern, drop: int) -> Pruned: ...


class BlockSolver(Protocol):
    """Repairs the matrices of a block together, when all of them have their masks."""

    def fit(
        self,
        masked: list[nn.Parameter],
        free: list[nn.Parameter],
        outputs: Callable[[int], tuple[Tensor, Tensor]],
        batches: int,
        settle: Callable[[], None],
    ) -> bool: ...


@dataclass(frozen=True)
class Seen:
    """What an allocation may look at of one matrix of the dense model."""

    weight_RC: Tensor
    stats: Stats
    score_RC: Tensor | None  # the criterion's scores; None unless the allocation is ``scored``, or no token reached the matrix
    pruned_at: Callable[[float], Tensor]  # the weights [R, C] as the plan's own method prunes them at a ratio
    levels: tuple[float, ...] = ()  # some of the only ratios that it can lose; empty: any
    units_UK: Tensor | None = None  # the columns of each unit that is dropped as a whole; None: single weights are


class Allocation(Protocol):
    """Shares one budget out over the matrices, by a few numbers measured on each of the dense model."""

    @property
    def needs(self) -> frozenset[Stat]: ...

    @property
    def looks_at(self) -> str:
        """Of the dense model: "nothing", "weights"; "inputs" or "prunings", which take a forward."""
        ...

    @property
    def scored(self) -> bool:
        """Measures the criterion's scores."""
        ...

    def measure(self, seen: Seen) -> Tensor:
        """What ``share`` needs to know of one matrix; empty if it is unknown."""
        ...

    def share(
        self, measured: dict[str, Tensor], sizes: dict[str, int], blocks: dict[str, str], sparsity: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        """(ratio of each named matrix, the number that it is based on), given its number of weights and its block. The mean of the ratios over the
        weights is the sparsity, to one weight.
        """
        ...


class TriedAllocation(Protocol):
    """Tries ratios on the whole model (llmprune.ratios.trials): those of other allocations, and its improvement of the best of them."""

    @property
    def starts(self) -> tuple[str, ...]:
        """Names of the allocations that are tried."""
        ...

    @property
    def evolves(self) -> bool:
        """Whether it continues from the best of them by ``improve``, which moves single weights."""
        ...

    def improve(self, room: dict[str, tuple[int, int]], fitness: Callable[[list[dict[str, int]], int], list[float]]) -> dict[str, int] | None:
        """Steps of equal weight counts by which each matrix moves up or down from the best start, of sum 0; None to keep the start.

        room: the lowest and the highest step of each matrix that can move. fitness: the divergence from the dense model of each of some
        candidates (matrices that are not named do not move), on a number of windows.
        """
        ...


class Records(Protocol):
    """Where a run records its decisions, for a later process to resume by."""

    def read(self, name: str) -> dict[str, Any] | None: ...

    def write(self, name: str, value: dict[str, Any]) -> None: ...


def _nothing(*event: object) -> None:
    """The default of every callback."""


@dataclass(frozen=True)
class Listener:
    """Callbacks of a run; by default they do nothing."""

    progress: Callable[[str, int, int], None] = _nothing  # (step, done, total)
    on_block: Callable[[int, BlockReport, dict[str, str]], None] = _nothing  # (number, report, hashes of what was written) of a pruned block
    on_step: Callable[[Step], None] = _nothing  # of a sparsity that was tried for a budget
    on_polish: Callable[[Polished, dict[str, str]], None] = _nothing  # (report, hashes of what was written)


SILENT = Listener()
