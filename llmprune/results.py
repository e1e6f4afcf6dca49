"""What a run finds: rows of matrices, reports of blocks, perplexities, what was published."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """What happened to one matrix."""

    matrix: str
    rows: int
    columns: int
    asked: float  # ratio that the allocation gave
    zeros: int  # exact count in the saved dtype
    lost: float | None
    tokens: int
    notes: tuple[str, ...] = ()
    saliency: tuple[float, float] | None = None  # share that N:M can hold, in the source's order of input channels and in the one chosen
    what: str = ""  # units of a structured pattern: its name
    units: int | None = None  # that could go
    kept: tuple[int, ...] | None = None  # numbers of the units that stay
    parameters: int = 0  # that all units hold, in whatever writes and reads them

    @property
    def size(self) -> int:
        """What its sparsity is a share of."""
        return self.parameters if self.kept is not None else self.rows * self.columns

    @property
    def gone(self) -> int:
        if self.kept is None or self.units is None:
            return self.zeros
        return self.parameters // self.units * (self.units - len(self.kept))

    @property
    def sparsity(self) -> float:
        return self.gone / self.size


@dataclass(frozen=True)
class BlockReport:
    """What happened to one block: its rows, the relative squared error of its output, and what else a repair has changed in it."""

    block: str
    output_error: float
    rows: tuple[Row, ...]
    changed: tuple[str, ...] = ()  # full names
    seconds: dict[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Polished:
    """What whole-model distillation has done: mean KL(dense || pruned) on the calibration windows, in nats a token, before and after."""

    steps: int
    divergence_before: float
    divergence_after: float
    changed: dict[int, list[str]]  # block -> parameters that have changed


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with its definition: exp of the mean NLL over the L-1 targets of non-overlapping windows."""

    value: float
    dataset: str
    split: str
    window: int
    windows: int
    tokens: int  # number of predicted targets
    dtype: str

    def __str__(self) -> str:
        return (
            f"{self.value:.4g} ({self.dataset}, {self.split}, {self.windows} windows of {self.window}, "
            f"stride {self.window}, {self.tokens:,} targets, {self.dtype})"
        )


@dataclass(frozen=True)
class Divergence:
    """How far a pruned model's next-token distributions are from the dense one's, over the predictions that a perplexity counts: mean
    KL(dense || pruned) in nats, and the share of predictions whose likeliest token is the same.
    """

    kl: float
    top1: float
    dataset: str
    split: str
    window: int
    windows: int
    tokens: int  # number of predictions
    dtype: str

    def __str__(self) -> str:
        return (
            f"mean KL(dense || pruned) {self.kl:.4g} nats, likeliest token equal in {self.top1:.2%} of {self.tokens:,} predictions ({self.dataset})"
        )


@dataclass(frozen=True)
class Pushed:
    """What a push has done, or would do: ``commit`` is None where nothing was written."""

    repo: str
    url: str
    public: bool
    created: bool
    sent: dict[str, int]  # bytes by file
    removed: tuple[str, ...]
    left_out: tuple[str, ...]  # files of the folder that no run wrote
    commit: str | None
    complete: bool  # the repository holds the output

    def __str__(self) -> str:
        where = f"{self.repo} ({'public' if self.public else 'private'}, {'new' if self.created else 'existing'})"
        what = f"{len(self.sent)} files, {sum(self.sent.values()):,} bytes"
        lines = [f"pushed to {where}: {what}" if self.commit else f"{where} holds it already" if self.complete else f"would push to {where}: {what}"]
        lines += [f"  {name}  {size:,}" for name, size in self.sent.items()] if not self.complete else []
        lines += [f"  {'removed' if self.commit else 'would remove'}: {name}" for name in self.removed]
        lines += [f"  left out: {name}, which no run wrote" for name in self.left_out]
        return "\n".join([*lines, self.url] if self.complete else lines)
