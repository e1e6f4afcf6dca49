"""True gradients of the whole model's loss with one block in memory at a time.

Forward once, keeping the input of each block; then backward from the loss: each block is loaded again, run again on its input, and passes the
gradient of that input to the block before. L = sum over the targets of all windows of the next-token negative log-likelihood; L_n is window n's.
Targets are the text's next tokens for gradients of weights; where only the second moment of the outputs' gradients is wanted, they are drawn from the
model's own predictions, which makes it the Fisher information (Kunstner et al., https://arxiv.org/abs/1905.12558).

Shapes: N = windows, L = tokens of a window, D = hidden width, R = output rows, C = input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmprune.maths.coupled_rows import LEAST, gram_of_rows, root_of, rows_together
from llmprune.model.carried import Call, Carried
from llmprune.model.matrices import Matrix
from llmprune.model.pictures import IGNORED
from llmprune.statistics.gradient_taps import LARGE, PER_WEIGHT, Taps
from llmprune.statistics.stages import at_head
from llmprune.statistics.sums import Watch
from llmprune.stream.flow import Flow
from llmprune.stream.hidden_states import FileHidden, MemoryHidden, place_hidden
from llmprune.stream.stream import Stream
from llmprune.types import SILENT, STATISTICS, Listener, Stat, Stats, accumulate, shape_of, statistics_of

GRADIENTS = statistics_of("loss", "window losses")
SEED = 0  # of drawn targets


class LossGradients:
    """Gradient sums of the matrices of all blocks: vectors in memory, sums as large as the weights in an unnamed file."""

    def __init__(self, stream: Stream, matrices: dict[int, list[Matrix]], needs: frozenset[Stat], windows: int) -> None:
        self.needs = needs
        self.windows = windows
        self.inputs: dict[int, dict[str, Stats]] = {}  # of a block: what enters its matrices, where that was asked for
        self._devices = {index: stream.device_of(index) for index in matrices}
        self._matrices = {(index, m.name): m for index, ms in matrices.items() for m in ms}
        self._tokens: dict[tuple[int, str], int] = {}
        self._held: set[tuple[int, Stat, str]] = set()
        self._outputs: dict[int, int] = {}  # tokens whose gradients are summed
        self._vectors = MemoryHidden(torch.device("cpu"))
        self._weights = FileHidden(stream.scratch)

    def put(self, index: int, taps: Taps) -> None:
        for (stat, name), total in taps.sums.items():
            self._place(stat)[index, stat, name] = total
            self._held.add((index, stat, name))
        self._tokens |= {(index, name): tokens for name, tokens in taps.tokens.items()}

    def put_output(self, index: int, gradients: Iterable[Tensor]) -> None:
        """Sum G of a block's output, for ``metric``. gradients: [N, L, D] of each micro-batch."""
        sums: dict[str, Tensor] = {}
        self._outputs[index] = 0
        for gradient_NLD in gradients:
            gradient_TD = gradient_NLD.reshape(-1, gradient_NLD.shape[-1]).float()
            accumulate(sums, "output", gram_of_rows(gradient_TD))
            self._outputs[index] += len(gradient_TD)
        self._weights[index, "grad_out_gram", ""] = sums["output"]

    def metric(self, index: int) -> Tensor | None:
        """[B, Q, Q] in float32: the Cholesky factor of G_d of a block's output (llmprune.maths.coupled_rows); None if it was not asked for, or no
        gradient reached the block.
        """
        if index not in self._outputs:
            return None
        gram_BQQ = self._weights[index, "grad_out_gram", ""].to(self._devices[index])
        root_BQQ = root_of(Stats(grad_out_gram_BQQ=gram_BQQ, grad_tokens=self._outputs[index]), LEAST)
        return root_BQQ if root_BQQ is None else root_BQQ.float()

    def fields(self, index: int, name: str) -> dict[str, Any]:
        """The fields of Stats for one matrix's gradients; zeros where no token reached it, and then grad_tokens is 0."""
        sums = {STATISTICS[stat].name: self._sum(index, stat, name).to(self._devices[index]) for stat in sorted(self.needs)}
        return sums | {"grad_tokens": self._tokens.get((index, name), 0), "grad_windows": self.windows}

    def _sum(self, index: int, stat: Stat, name: str) -> Tensor:
        if (index, stat, name) in self._held:
            return self._place(stat)[index, stat, name]
        matrix = self._matrices[index, name]
        return torch.zeros(shape_at(STATISTICS[stat].name, matrix))

    def _place(self, stat: Stat) -> MemoryHidden | FileHidden:
        return self._weights if stat in LARGE else self._vectors

    def add_to(self, index: int, statistics: dict[str, Stats]) -> None:
        """Give the statistics of a block's matrices, or of some of them, their gradients.

        Matrices that share an input share one Stats, but no gradient: each gets a separate Stats, whose other fields, including ``factors``,
        are still the shared ones. Call it when the watching is over.
        """
        for name, stats in statistics.items():
            statistics[name] = replace(stats, **self.fields(index, name))


def shape_at(name: str, matrix: Matrix) -> tuple[int, ...]:
    """The shape of a sum for one matrix."""
    together = rows_together(matrix.rows)
    sizes = {"R": matrix.rows, "C": matrix.columns, "B": matrix.rows // together, "Q": together}
    return tuple(sizes[letter] for letter in shape_of(name))


@torch.no_grad()
def loss_gradients(
    stream: Stream,
    windows_NL: Tensor,
    matrices: dict[int, list[Matrix]],
    needs: frozenset[Stat],
    listen: Listener = SILENT,
    outputs: bool = False,
    inputs: frozenset[Stat] = frozenset(),
) -> LossGradients:
    """The gradient statistics among ``needs`` for the matrices of each block, in float32, of the stream's model as it is: dense, if nothing has
    been pruned yet (a stream that has a sink reads finished blocks from there).

    grad, grad_sq and first_grad are of [R, C], grad_out_sq of [R], grad_out_gram of [B, Q, Q]; types.Stats defines each. outputs: sum G of
    the blocks' outputs too. inputs: statistics of what enters the matrices, for ``LossGradients.inputs``. ``listen`` hears of (blocks done, twice
    the number of blocks). Peak memory: a block, its activations for one micro-batch, the requested sums of its matrices, and the inputs of the
    blocks unless they are kept in a file.
    Raises StoppedError when a gradient is not finite.
    """
    needs &= GRADIENTS
    if needs == {"first_grad"}:
        windows_NL = windows_NL[:1]
    flow = Flow(stream, windows_NL, size=1 if needs & statistics_of("window losses") else None)
    result = LossGradients(stream, matrices, needs, len(windows_NL))
    shared = HandedOn()
    blocks = len(stream.names)
    entered, result.inputs = forward(flow, shared, listen, matrices if inputs else {}, inputs)
    if inputs and matrices.get(blocks):
        with stream.block(blocks) as head:
            result.inputs[blocks] = at_head(flow, None, head, matrices[blocks], inputs)
    draw = None if needs & PER_WEIGHT else torch.Generator().manual_seed(SEED)
    result.put(blocks, from_loss(flow, matrices.get(blocks, []), needs, draw))
    for index in reversed(range(blocks)):
        with stream.block(index) as block, frozen(block):
            taps = Taps(block, matrices[index], needs)
            if outputs:
                result.put_output(index, (flow.outputs[batch] for batch in range(len(flow))))
            for batch in range(len(flow)):
                flow.outputs[batch] = backward(flow, index, block, batch, entered[index, batch], taps, shared)
                taps.next_batch()
            taps.close(stream.path_of(index))
        result.put(index, taps)
        listen.progress("gradients", 2 * blocks - index, 2 * blocks)
    return result


def forward(
    flow: Flow, shared: HandedOn, listen: Listener, matrices: dict[int, list[Matrix]], needs: frozenset[Stat]
) -> tuple[MemoryHidden | FileHidden, dict[int, dict[str, Stats]]]:
    """(the input of each block, by (block, micro-batch); what enters the matrices). The output of the last block is left in ``flow.hidden``."""
    blocks = len(flow.stream.names)
    # it may take half of the memory: place_hidden reckons with two generations
    entered = place_hidden(blocks * flow.size // 2, flow.stream.device_of(0), flow.stream.scratch)
    for handed in (call.handed for calls in flow.calls for call in calls if call.handed is not None):
        handed.keep = True  # blocks run once more, from the last to the first
    inputs: dict[int, dict[str, Stats]] = {}
    for index in range(blocks):
        with flow.stream.block(index) as block:
            watching = Watch(block, matrices[index], needs, path=flow.stream.path_of(index)) if index in matrices else None
            for batch in range(len(flow)):
                entered[index, batch] = flow.hidden[batch]
                with shared.written(index, flow.calls[batch][index]), watching or nullcontext():
                    flow.outputs[batch] = flow.run(index, block, batch)
                if watching is not None:
                    watching.next_batch()
        if watching is not None:
            watching.close()
            inputs[index] = watching.stats
        flow.advance()
        listen.progress("gradients", index + 1, 2 * blocks)
    return entered, inputs


def from_loss(flow: Flow, matrices: list[Matrix], needs: frozenset[Stat], draw: torch.Generator | None = None) -> Taps:
    """``flow.outputs`` becomes dL / d(output of the last block), one window at a time, because logits are large. Sums of the head, if asked for.
    draw: of targets from the predictions.
    """
    with flow.stream.block(len(flow.stream.names)) as head:
        taps = Taps(head, matrices, needs)
        gradients = (_window_gradient(flow, ids_1L, hidden_1LD, taps, draw) for ids_1L, hidden_1LD in flow.windows())
        for batch, ids_NL in enumerate(flow.ids):
            flow.outputs[batch] = torch.cat([next(gradients) for _ in range(len(ids_NL))])
    taps.close(flow.stream.path_of(len(flow.stream.names)))
    return taps


def _window_gradient(flow: Flow, ids_1L: Tensor, hidden_1LD: Tensor, taps: Taps, draw: torch.Generator | None) -> Tensor:
    leaf_1LD = hidden_1LD.clone().requires_grad_()
    with torch.enable_grad():
        with taps:
            logits_LV = flow.stream.walk.logits(ids_1L, leaf_1LD.clone())[0]
        targets_L, logits_LV = flow.stream.walk.pictures.targets(ids_1L[0]), logits_LV[:-1].float()
        if draw is not None:
            targets_L = drawn(logits_LV, targets_L, draw)
        loss = F.cross_entropy(logits_LV, targets_L, reduction="sum")
    (gradient_1LD,) = torch.autograd.grad(loss, leaf_1LD)
    taps.next_batch()
    return gradient_1LD


@torch.no_grad()
def drawn(logits_LV: Tensor, targets_L: Tensor, draw: torch.Generator) -> Tensor:
    """Targets drawn from the predictions, in place of those that count: the same ones on any device."""
    cumulative_LV = logits_LV.softmax(-1).cumsum_(-1)
    at_L1 = torch.rand(len(logits_LV), 1, generator=draw).to(logits_LV.device) * cumulative_LV[:, -1:]
    drawn_L = torch.searchsorted(cumulative_LV, at_L1).squeeze(1).clamp_(max=logits_LV.shape[-1] - 1)
    return torch.where(targets_L == IGNORED, targets_L, drawn_L)


def backward(flow: Flow, index: int, block: nn.Module, batch: int, entered_NLD: Tensor, taps: Taps, shared: HandedOn) -> Tensor:
    """Run the block again on one micro-batch and propagate the gradient in ``flow.outputs`` back through it: dL / d(its input)."""
    device = flow.stream.device_of(index)
    leaf_NLD = entered_NLD.to(device, copy=True).requires_grad_()
    with torch.enable_grad(), shared.lent(index, flow.calls[batch][index]) as handed:
        with taps:
            left_NLD = flow.run(index, block, batch, leaf_NLD.clone())  # a block may change its input in place, but not a leaf
        pairs = [(left_NLD, flow.outputs[batch].to(device)), *handed()]
        torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
    assert leaf_NLD.grad is not None
    return leaf_NLD.grad


@contextmanager
def frozen(block: nn.Module) -> Iterator[None]:
    """Context in which the parameters of a live model collect no gradients."""
    wanted = [p for p in block.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


class HandedOn:
    """Tensors that blocks put into a mapping of their calls for later blocks, as layers do that share keys and values: gradients flow back
    through it too. Calls of one micro-batch hold the same mapping, so its id and the key identify an entry.
    """

    def __init__(self) -> None:
        self._writer: dict[tuple[int, Hashable], int] = {}
        self._owed: dict[tuple[int, Hashable], list[Tensor | None]] = {}  # gradient of each tensor, from later blocks

    @contextmanager
    def written(self, index: int, call: Call) -> Iterator[None]:
        """Around a block's first run: the new entries are made by it."""
        before = {place for place, _, _ in _entries(call)}
        yield
        self._writer |= {place: index for place, _, _ in _entries(call) if place not in before}

    @contextmanager
    def lent(self, index: int, call: Call) -> Iterator[Callable[[], list[tuple[Tensor, Tensor]]]]:
        """Around a block's second run and its backward pass: earlier blocks' entries are leaves, whose gradients are kept for their writers.

        Yields a function that returns, after the run, (tensor, gradient) of the block's own entries.
        """
        leaves: dict[tuple[int, Hashable], list[Tensor]] = {}
        for place, mapping, tensors in _entries(call):
            if self._writer.get(place, -1) >= index:
                del mapping[place[1]]
            else:
                leaves[place] = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
                mapping[place[1]] = tuple(leaves[place]) if isinstance(mapping[place[1]], tuple) else leaves[place][0]
        yield lambda: [pair for place, _, tensors in _entries(call) if place not in leaves for pair in self._due(place, tensors)]
        for place, lent in leaves.items():
            owed = self._owed.get(place, [None] * len(lent))
            self._owed[place] = [_sum(before, leaf.grad) for before, leaf in zip(owed, lent, strict=True)]

    def _due(self, place: tuple[int, Hashable], tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        owed = self._owed.pop(place, [None] * len(tensors))
        return [(t, gradient.to(t.device)) for t, gradient in zip(tensors, owed, strict=True) if gradient is not None]


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right.to(left.device)


def _entries(call: Call) -> list[tuple[tuple[int, Hashable], MutableMapping[Any, Any], list[Tensor]]]:
    """((id of the mapping, key), mapping, tensors) of all that the mappings of a call hold; an entry is one tensor or a tuple of them."""
    values = [v.handed if isinstance(v, Carried) else v for v in (*call.args, *call.kwargs.values(), call.handed)]
    mappings = list({id(v): v for v in values if isinstance(v, MutableMapping)}.values())
    listed = [((id(m), key), m, list(value) if isinstance(value, tuple) else [value]) for m in mappings for key, value in m.items()]
    return [entry for entry in listed if all(isinstance(t, Tensor) for t in entry[2])]
