"""Is the model, run block by block, the model? One window through its own forward and through its blocks, with one block in memory at a time.

Shapes: L = tokens of a window, T = some of them, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from llmprune.errors import RequestError
from llmprune.evaluation.perplexity import TARGETS_AT_ONCE
from llmprune.maths.linalg import all_finite
from llmprune.model.blocks import CANNOT_WALK
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream

ALIKE = {torch.float32: 1e-4}  # relative difference of logits; the same products in the same order give none
ROUNDED_ALIKE = 0.05  # in other dtypes


@torch.no_grad()
def check_replay(stream: Stream, ids_1L: Tensor) -> float | None:
    """Relative difference between the logits of the model's own forward and those of its blocks run one by one; tokens are those of one window.

    The own forward is given another last token, which must not change the predictions before it. None for a window of one token, which shows
    nothing, and where the blocks give logits that are not finite: a run says where those begin. Raises RequestError for predictions that differ.
    """
    if ids_1L.shape[1] < 2:
        return None
    flow, most = Flow(stream, ids_1L), ALIKE.get(stream.walk.model.dtype, ROUNDED_ALIKE)
    own_1LV = _own_logits(stream, _with_another_end(ids_1L, stream), flow)
    ((_, replayed_1LV),) = flow.logits()
    if not all_finite(replayed_1LV):
        return None
    apart = difference(own_1LV[:, :-1], replayed_1LV[:, :-1])
    if apart <= most:
        return apart
    del own_1LV
    name = type(stream.walk.model).__name__
    if difference(_own_logits(stream, ids_1L), replayed_1LV) <= most:
        raise RequestError(
            f"{name}: its predictions depend on tokens after them", "give a causal language model: its perplexity is of the next token"
        )
    raise RequestError(f"{name}: run block by block, its logits differ from its own forward's by {apart:.3g} of the largest", CANNOT_WALK)


def difference(wanted: Tensor, got: Tensor) -> float:
    """Largest difference of logits [..., V] over the largest logit, some positions at a time, since logits are large."""
    found = []
    for wanted_TV, got_TV in zip(wanted.flatten(0, -2).split(TARGETS_AT_ONCE), got.flatten(0, -2).split(TARGETS_AT_ONCE), strict=True):
        wanted_TV, got_TV = wanted_TV.float().cpu(), got_TV.float().cpu()
        found.append(torch.stack([(wanted_TV - got_TV).abs().max(), wanted_TV.abs().max()]))
    apart, largest = torch.stack(found).amax(0)
    return float(apart / largest.clamp_min(1e-30))


def _with_another_end(ids_1L: Tensor, stream: Stream) -> Tensor:
    """The window with its last token replaced, by another one of it if there is one."""
    last = int(ids_1L[0, -1])
    others = ids_1L[0][(ids_1L[0] != last) & ~stream.walk.pictures.stands_in(ids_1L[0])]
    vocabulary = stream.walk.model.get_parameter(f"{stream.walk.embeddings_path}.weight").shape[0]
    changed_1L = ids_1L.clone()
    changed_1L[0, -1] = int(others[0]) if len(others) else (last + 1) % vocabulary
    return changed_1L


def _own_logits(stream: Stream, ids_1L: Tensor, flow: Flow | None = None) -> Tensor:
    """[1, L, V]: of the model's own forward, which gets its blocks one at a time. A flow passes through each block while it is there."""
    last = len(stream.names) - 1
    with ExitStack() as outside:
        outside.enter_context(stream.outer(towers=stream.walk.pictures.with_any(ids_1L)))

        @contextmanager
        def around(index: int) -> Iterator[None]:
            if index == 0:
                outside.close()  # the embeddings have done their work
            with stream.block(index) as block:
                if flow is not None:
                    flow.through(index, block)
                yield
            if index == last:
                outside.enter_context(stream.outer(towers=stream.walk.pictures.with_any(ids_1L)))

        return stream.walk.forward(ids_1L, around)
