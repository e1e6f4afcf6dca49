"""What a run finds, as values for all folders: rows of matrices, reports of blocks, perplexities, what was tried, saved, published."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any


def _without_defaults(part: Origin | Calibration) -> dict[str, Any]:
    """As JSON; empty fields are left out."""
    silent = {field.name for field in fields(part) if getattr(part, field.name) == field.default}
    return {name: value for name, value in asdict(part).items() if name not in silent}


@dataclass(frozen=True)
class Towers:
    """The parts of a model that text does not pass, by path, and their share of all weights: they stay as they are."""

    paths: tuple[str, ...]
    weights: int
    share: float

    def __str__(self) -> str:
        more = f" and {len(self.paths) - 3} more" if len(self.paths) > 3 else ""
        return f"{', '.join(self.paths[:3])}{more} ({self.share:.1%} of all weights) stay as they are: text does not pass them"


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run has pruned. files: sha256 of the weight files; bytes: of its plain weights; both unknown for a live model."""

    name: str
    revision: str | None
    files: dict[str, str]
    bytes: int | None = None
    quantised: str | None = None  # its quantisation method, if its weights were quantised
    left_behind: tuple[str, ...] = ()  # files that are too large to be copied
    towers: Towers | None = None  # of a vision-language model

    def to_json(self) -> dict[str, Any]:
        return _without_defaults(self)


@dataclass(frozen=True)
class Calibration:
    """The token windows that a run was calibrated on."""

    dataset: str
    split: str
    windows: int
    window: int  # tokens of each
    tokens: int
    sha256: str  # of all token ids
    drawn_from: str = ""  # among how many they were drawn, by which seed; empty for the first windows
    pictures: int = 0  # in all windows
    left_out: int = 0  # rows with pictures that fit into no window, or whose window has the tokens of another one
    bos: bool = False  # whether each window begins with BOS
    skipped: int = 0  # rows without text
    template: str = ""  # the columns of dialogues that the chat template has written out; empty for texts
    documents: int = 0  # dialogues that begin in the windows
    truncated: float = 0.0  # share of them that go on beyond the window where they begin

    @property
    def seen(self) -> str:
        """What the windows hold, in words."""
        left = f" ({self.left_out} rows left out that fit into no window, or repeat another one's tokens)" if self.left_out else ""
        found = f" with {self.pictures} pictures{left}" if self.pictures else ""
        made = f"({self.template} by the chat template, {self.truncated:.0%} cut at a window's end)"
        return found + (f" with {self.documents:,} dialogues {made}" if self.template else "")

    @property
    def aside(self) -> str:
        """What else is to be known of them, in words."""
        return (", each window begins with BOS" if self.bos else "") + (f", rows without text, skipped: {self.skipped:,}" if self.skipped else "")

    def to_json(self) -> dict[str, Any]:
        return _without_defaults(self)


@dataclass(frozen=True)
class Environment:
    """Where a run was made. versions: of Python, llmprune, and the libraries that its numbers depend on."""

    versions: dict[str, str]
    device: str
    dtype: str
    threads: int
    block_by_block: bool  # whether one block was in memory at a time, and not the whole model

    def to_json(self) -> dict[str, Any]:
        """Flattened: the versions beside the rest."""
        machine = asdict(self)
        return machine.pop("versions") | machine


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
    units: int | None = None  # that could be dropped
    kept: tuple[int, ...] | None = None  # numbers of the kept units
    parameters: int = 0  # of all units, in every tensor that writes or reads them
    kept_zeros: tuple[int, ...] | None = None  # of ``zeros``, those that no mask holds, as runs (maths/runs.py); None: not recorded

    @property
    def size(self) -> int:
        """The base of its sparsity."""
        return self.parameters if self.kept is not None else self.rows * self.columns

    @property
    def dropped(self) -> int:
        if self.kept is None or not self.units:
            return self.zeros
        return self.parameters // self.units * (self.units - len(self.kept))

    @property
    def own_zeros(self) -> int:
        """Zeros that no mask has dropped; where they were not recorded, those above the number asked for."""
        if self.kept is not None:
            return 0
        return max(0, self.zeros - math.ceil(self.asked * self.size)) if self.kept_zeros is None else sum(self.kept_zeros[1::2])

    @property
    def sparsity(self) -> float:
        return self.dropped / self.size if self.size else 0.0


@dataclass(frozen=True)
class BlockReport:
    """What happened to one block: its rows, the relative squared error of its output (None where it was pruned in training), and the other tensors
    that a repair changed in it.
    """

    block: str
    output_error: float | None
    rows: tuple[Row, ...]
    changed: tuple[str, ...] = ()  # full names
    seconds: dict[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Polished:
    """What whole-model distillation has done: mean KL(dense || pruned) on the calibration windows, in nats per token, before and after."""

    steps: int
    divergence_before: float
    divergence_after: float
    changed: tuple[str, ...]  # full names of the tensors that it changed
    half: bool = False  # products of the steps were taken in bfloat16


@dataclass(frozen=True)
class Trial:
    """An allocation that was tried: mean KL from the dense model on held-back windows, in nats, and whether its ratios were taken."""

    allocation: str
    divergence: float
    kept: bool


@dataclass(frozen=True)
class Round:
    """A round of pruning and recovery. before, after, dense: perplexities of the text that decided the recovery; None without one. increase: of the
    perplexity on held-back calibration windows over the dense model's, where there is a limit.
    """

    number: int
    pattern: str
    asked: float
    sparsity: float
    before: float | None = None
    after: float | None = None
    dense: float | None = None
    best: int = 0  # step of the recovery
    increase: float | None = None


@dataclass(frozen=True)
class Step:
    """One point of the frontier that a budget's search walked: the perplexity on held-back windows, and its increase over the dense model's."""

    sparsity: float
    perplexity: float
    increase: float


@dataclass(frozen=True)
class Smaller:
    """A smaller checkpoint as it was saved."""

    pattern: str
    patterns: tuple[str, ...]
    layers: tuple[int, ...]  # numbers in the source of the kept blocks
    parameters: int
    bytes: int
    remote_code: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Reloaded:
    """What loading the saved result has shown. difference: of its logits from the pruned model's on a window of ``tokens``, relative; None where
    they were not compared. equal: what else loads with the source's content; unread: what does not load from the source either. instead: why
    transformers did not load it, and what was done.
    """

    difference: float | None
    tokens: int
    equal: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    instead: str = ""

    def __str__(self) -> str:
        said = self.instead or "loaded again by transformers in a fresh process"
        if self.tokens and self.difference is None:
            said += ": the pruned model's logits are not finite, and were not compared"
        elif self.tokens:
            said += f": logits {f'within {self.difference:.2g} of' if self.difference else 'equal to'} the pruned model's"
        said += f"; equal to the source's: {', '.join(self.equal)}" if self.equal else ""
        return said + (f"; not compared, because the source's does not load here: {', '.join(self.unread)}" if self.unread else "")


@dataclass(frozen=True)
class Sample:
    """How the dense and the pruned model continue a prompt. chat: they answer it, through the chat template."""

    prompt: str
    tokens: int  # that each of them writes
    dense: str
    pruned: str
    chat: bool = False


@dataclass(frozen=True)
class NoSample:
    """Why there is no sample."""

    reason: str


@dataclass(frozen=True)
class Timings:
    """Seconds and bytes of one process; None where they were not measured."""

    seconds: float | None = None
    resumed_blocks: int = 0  # finished by an earlier process
    peak_memory: int | None = None  # of the whole process, libraries included
    planned_memory: int | None = None  # for the run, libraries not included
    recovery_seconds: float | None = None  # of the process that finished the last recovery


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

    @property
    def definition(self) -> str:
        """Its definition, besides the data set."""
        return f"{self.windows} windows of {self.window}, stride {self.window}, {self.tokens:,} targets, {self.dtype}"

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.dataset}, {self.split}, {self.definition})"


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
class Evaluation:
    """A run measured on one evaluation set: both perplexities, by the same definition, and the divergence of the predictions behind them."""

    dense: Perplexity
    pruned: Perplexity
    divergence: Divergence


@dataclass(frozen=True)
class Pushed:
    """What a push has done, or would do: ``commit`` is None if nothing was written."""

    repo: str
    url: str
    public: bool
    created: bool
    sent: dict[str, int]  # bytes by file
    removed: tuple[str, ...]
    left_out: tuple[str, ...]  # files of the folder that no run wrote
    commit: str | None
    complete: bool  # the repository holds the output
    unseen: str = ""  # why a dry run has not looked at the repository

    def __str__(self) -> str:
        state = f"not looked up: {self.unseen}" if self.unseen else "new" if self.created else "existing"
        where = f"{self.repo} ({'public' if self.public else 'private'}, {state})"
        what = f"{len(self.sent)} files, {sum(self.sent.values()):,} bytes"
        lines = [f"pushed to {where}: {what}" if self.commit else f"{where} holds it already" if self.complete else f"would push to {where}: {what}"]
        lines += [f"  {name}  {size:,}" for name, size in self.sent.items()] if not self.complete else []
        lines += [f"  {'removed' if self.commit else 'would remove'}: {name}" for name in self.removed]
        lines += [f"  left out: {name}, which no run wrote" for name in self.left_out]
        return "\n".join([*lines, self.url] if self.complete else lines)
