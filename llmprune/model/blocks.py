"""The decoder blocks of any causal LM, and what its own forward passes to each of them.

A model is run once with a recorder in place of every block: each recorder keeps the arguments meant for its block and passes the
hidden states through. Blocks can then be run one at a time with exactly what the model would have given them; the real blocks may be
on the meta device meanwhile.

Shapes: N = windows, L = tokens of a window, D = hidden width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.errors import RequestError, first_line
from llmprune.model.carried import Call, Rest, only_from, with_names
from llmprune.model.pictures import Pictures
from llmprune.model.wrappers import is_wrapper, others

CANNOT_WALK = "the architecture cannot be walked block by block"
ROUTER_LOGITS = "output_router_logits"
WIDEST = 3  # values that a block may return
# why a walk fails, the most telling first
MORE = "its blocks hand on more than hidden states"
ORDER = "its blocks do not run once each, in order"
PLACES = "its blocks see more or fewer hidden states than tokens"
CHANGE = "the hidden states change between the blocks"


class _AllRecorded(Exception):
    """Ends the model's forward once the last block has been reached: neither final norm nor head is needed."""


def find_blocks(model: PreTrainedModel) -> str:
    """Path of the ModuleList of decoder blocks: the only outermost one as long as the config says, or else the only one in the decoder. Of a wrapper
    only its decoder counts: a tower may have as many blocks.

    Raises RequestError when the model has none, or several that could be it.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)  # of the encoder, of half-blocks, or missing in some
    names = {id(module): name for name, module in model.named_modules()}
    decoder = model.get_decoder()
    apart = {id(m) for tower in others(model) for m in tower.modules()}
    roots = ((decoder, count), (decoder, None)) if is_wrapper(model) else ((decoder, count), (model, count), (decoder, None))
    for root, length in roots:
        lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) == (length or len(m))]
        outermost = [m for m in lists if not any(m is not o and names[id(m)].startswith(names[id(o)] + ".") for o in lists)]
        outermost = [m for m in outermost if id(m) not in apart] or outermost
        if len(outermost) == 1 and len(outermost[0]):
            return names[id(outermost[0])]
    found = ", ".join(f"{names[id(m)]} ({len(m)})" for m in outermost[:4]) or "none"
    raise RequestError(f"{type(model).__name__}: no single list of decoder blocks; module lists: {found}", CANNOT_WALK)


class _Recorder(nn.Module):
    """Stands in for a block: hands its call to ``receive`` and passes on what that returns."""

    def __init__(self, block: nn.Module, receive: Callable[[Tensor, Call], Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: the recorder owns no weights
        object.__setattr__(self, "_receive", receive)

    def __getattr__(self, name: str) -> Any:
        """Models read attributes of their blocks, such as ``layer_type``."""
        return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self._receive(args[0], Call(args[1:], kwargs))
        kwargs = dict(kwargs)
        return self._receive(kwargs.pop("hidden_states"), Call((), kwargs, "hidden_states"))


@contextmanager
def _replaced(blocks: nn.ModuleList, receive: Callable[[int, Tensor, Call], Any]) -> Iterator[None]:
    real = list(blocks)
    for i, block in enumerate(real):
        blocks[i] = _Recorder(block, partial(receive, i))
    try:
        yield
    finally:
        for i, block in enumerate(real):
            blocks[i] = block


@contextmanager
def _surrounded(blocks: nn.ModuleList, around: Callable[[int], AbstractContextManager[None]]) -> Iterator[None]:
    """The blocks stay in place, and run inside a context; inside it they can be run like any others."""
    before = [vars(block).get("forward") for block in blocks]

    def forward(i: int, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        surrounding, blocks[i].forward = blocks[i].forward, plain
        try:
            with around(i):
                return plain(*args, **kwargs)
        finally:
            blocks[i].forward = surrounding

    for i, block in enumerate(blocks):
        block.forward = partial(forward, i, block.forward)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own


@contextmanager
def _logits_alone(model: PreTrainedModel) -> Iterator[None]:
    """A model whose config asks for its routers' balancing loss gives its logits alone: blocks that do not run in place leave no router's logits."""
    asking = [own for own in (model.config, model.config.get_text_config(decoder=True)) if getattr(own, ROUTER_LOGITS, False)]
    for own in asking:
        setattr(own, ROUTER_LOGITS, False)
    try:
        yield
    finally:
        for own in asking:
            setattr(own, ROUTER_LOGITS, True)


class Walk:
    """Runs a model around its blocks.

    ``returned`` counts the values in the tuple that a block returns, 0 for no tuple; known after the first recording, or a sole block's first run.
    ``streams`` counts the residual streams that each token has where it has several (Gemma 3n), else 0; known after the first recording.
    ``pictures`` holds what an image-text model sees with some windows.

    Raises RequestError when the blocks cannot be found or share weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.path = find_blocks(model)
        self.blocks: nn.ModuleList = model.get_submodule(self.path)  # type: ignore[assignment]
        self.returned: int | None = None
        self.streams = 0
        self.pictures = Pictures()
        self.head_path, self.embeddings_path = _outside(model)
        _refuse_shared(model, self.path, self.blocks)

    @property
    def head_free(self) -> bool:
        """The head is a Linear whose weight is not tied."""
        tied = {name for pair in self.model.all_tied_weights_keys.items() for name in pair}
        embeddings = self.model.get_submodule(self.embeddings_path).weight
        return isinstance(self.head, nn.Linear) and f"{self.head_path}.weight" not in tied and self.head.weight is not embeddings

    @property
    def head(self) -> nn.Module:
        """The module that makes logits, lm_head in most models."""
        return self.model.get_submodule(self.head_path)

    def record(self, ids_NL: Tensor) -> tuple[Tensor, list[Call]]:
        """(hidden states that enter block 0, the call of every block) for one micro-batch of token ids."""
        faults: set[str] = set()
        for returned in range(WIDEST + 1) if self.returned is None else (self.returned,):
            recorded = self._record(ids_NL, returned, faults)
            if recorded is not None:
                if self.returned is None and len(self.blocks) > 1:
                    self.returned = returned
                    self._refuse_loops(ids_NL[:1])
                return recorded
        why = next((fault for fault in (MORE, ORDER, PLACES) if fault in faults), CHANGE)
        raise RequestError(f"{type(self.model).__name__}: {why} ({self.path})", CANNOT_WALK)

    def _record(self, ids_NL: Tensor, returned: int, faults: set[str]) -> tuple[Tensor, list[Call]] | None:
        """None, and why in ``faults``, when a block's recorder did not get exactly what the one before it passed on."""
        first: list[Tensor] = []  # as it was passed on, and a copy, so that a change in place is noticed too
        calls: list[Call] = []
        own: list[str] = []

        def receive(i: int, hidden: Tensor, call: Call) -> Any:
            if not first:
                first.extend((hidden, hidden.clone()))
            if not _unchanged(hidden, *first):
                own.append(CHANGE)
            elif not only_from(call, i - 1):
                own.append(MORE)
            elif i != len(calls):
                own.append(ORDER)
            calls.append(call)
            if len(calls) == len(self.blocks) or own:
                raise _AllRecorded
            return _as_returned(hidden, returned, i)

        try:
            with _replaced(self.blocks, receive):
                self._run(ids_NL)
        except _AllRecorded:
            faults.update(own)
        except (ValueError, TypeError, IndexError, AttributeError) as error:  # the model uses more of a block's output than hidden states
            if calls:
                return None
            if is_wrapper(self.model):
                raise RequestError(
                    f"{type(self.model).__name__}: takes no text alone ({first_line(error)[:160]})", "give a model that does"
                ) from None
            raise
        if len(calls) < len(self.blocks) and not own:
            faults.add(ORDER)  # the last blocks were left out
        if own or len(calls) < len(self.blocks):
            return None
        hidden = first[1]
        self.streams = len(hidden) if hidden.dim() == 4 and hidden.shape[1:3] == ids_NL.shape else 0
        if not self.streams and hidden.shape[:2] != ids_NL.shape:
            faults.add(PLACES)
            return None
        return self._joined(hidden), with_names(calls)

    def _run(self, ids_NL: Tensor) -> Any:
        """The model's own forward, with the pictures of the windows."""
        seen = {name: t.to(ids_NL.device) for name, t in self.pictures.inputs(ids_NL).items()}
        numbers = {name: t.to(self.model.dtype) for name, t in seen.items() if t.is_floating_point()}
        return self.model(input_ids=ids_NL, use_cache=False, **seen | numbers)

    def _joined(self, hidden: Tensor) -> Tensor:
        """[N, L, D] hidden states of a block's own: several residual streams [S, N, L, D/S] of each token side by side."""
        return hidden.permute(1, 2, 0, 3).flatten(2) if self.streams else hidden

    def _parted(self, hidden_NLD: Tensor) -> Tensor:
        """The hidden states as a block takes them."""
        return hidden_NLD.unflatten(2, (self.streams, -1)).permute(2, 0, 1, 3).contiguous() if self.streams else hidden_NLD

    def _refuse_loops(self, ids_NL: Tensor) -> None:
        """Recording ends at the last block: check once that the model then continues to its head. On a window of full length, since some models
        change for good when they see a short one.
        """
        visits: list[int] = []

        def receive(i: int, hidden: Tensor, call: Call) -> Any:
            visits.append(i)
            return _as_returned(hidden, self.returned or 0, i)

        def at_head(*_: Any) -> None:
            raise _AllRecorded

        hook = self.head.register_forward_pre_hook(at_head)
        try:
            with _replaced(self.blocks, receive):
                self._run(ids_NL)
        except _AllRecorded:
            pass
        finally:
            hook.remove()
        if visits != list(range(len(self.blocks))):
            raise RequestError(
                f"{type(self.model).__name__}: {len(visits)} runs of its {len(self.blocks)} blocks",
                CANNOT_WALK,
            )

    def logits(self, ids_NL: Tensor, hidden_NLD: Tensor) -> Tensor:
        """[N, L, V]: the model's own final norm and head on the hidden states that leave the last block."""
        last = len(self.blocks) - 1

        def receive(i: int, hidden: Tensor, call: Call) -> Any:
            out = self._parted(hidden_NLD) if i == last else hidden
            return _as_returned(out, self.returned or 0, i)

        embeddings = self.model.get_parameter(f"{self.embeddings_path}.weight")
        with _replaced(self.blocks, receive), _logits_alone(self.model):
            return self.model(input_ids=ids_NL.to(embeddings.device), use_cache=False).logits  # the ids may be where the head is

    def forward(self, ids_NL: Tensor, around: Callable[[int], AbstractContextManager[None]]) -> Tensor:
        """[N, L, V]: logits of the model's own forward, which runs each block inside ``around(its number)``."""
        embeddings = self.model.get_parameter(f"{self.embeddings_path}.weight")
        with _surrounded(self.blocks, around), _logits_alone(self.model):
            return self._run(ids_NL.to(embeddings.device)).logits

    def replay(self, block: nn.Module, hidden_NLD: Tensor, call: Call) -> Tensor:
        """Run one block with its recorded call; the hidden states that leave it. What else the next block takes is left in the call."""
        hidden = self._parted(hidden_NLD)
        named = {call.keyword: hidden} if call.keyword else {}
        out = block(*(() if named else (hidden,)), *call.args, **named, **call.kwargs)
        several = isinstance(out, tuple | list)
        if len(self.blocks) == 1:
            self.returned = len(out) if several else 0
        if call.handed is not None:
            call.handed.put(call.block, tuple(out[1:]))
        return self._joined(out[0] if several else out)


def _as_returned(hidden: Tensor, returned: int, block: int) -> Any:
    """Hidden states as a block would return them: alone, or first in a tuple of so many values."""
    return (hidden, *(Rest(block, place) for place in range(1, returned))) if returned else hidden


def _outside(model: PreTrainedModel) -> tuple[str, str]:
    """Paths of the modules that make logits and that embed token ids."""
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(model.get_output_embeddings())], names[id(model.get_input_embeddings())]


def _unchanged(hidden: Any, passed: Tensor, copy: Tensor) -> bool:
    """The same tensor that was passed on, or a view of all of it (some models slice from 0 on), with the same values."""
    if not isinstance(hidden, Tensor) or hidden.data_ptr() != passed.data_ptr():
        return False
    return hidden.shape == passed.shape and hidden.stride() == passed.stride() and torch.equal(hidden, copy)


def _refuse_shared(model: PreTrainedModel, path: str, blocks: nn.ModuleList) -> None:
    """A weight that several blocks use would be pruned once for each of them, on different inputs."""
    hint = "models whose blocks share weights cannot be pruned block by block"
    for target, source in model.all_tied_weights_keys.items():  # on the meta device tied weights are only declared
        if target.startswith(f"{path}.") or source.startswith(f"{path}."):
            raise RequestError(f"{target}: shared with {source}", hint)
    users: dict[int, int] = {}
    for i, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if users.setdefault(id(parameter), i) != i:
                raise RequestError(f"{path}.{i}.{name}: shared with block {users[id(parameter)]}", hint)


class Interned:
    """Keeps one copy of equal tensors among recorded calls: masks and rotary tables repeat from block to block and batch to batch."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], list[Tensor]] = {}
        self._same: dict[int, tuple[Tensor, Tensor]] = {}

    def batch(self, calls: list[Call]) -> list[Call]:
        self._same = {}
        return [call.with_values(self._value) for call in calls]

    def _value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) is tuple:
            return tuple(self._value(v) for v in value)
        return value  # lists and dicts are not copied: some models let their blocks fill them

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._same:
            twins = self._kept.setdefault((tuple(tensor.shape), tensor.dtype, tensor.device), [])
            twin = next((t for t in twins if torch.equal(t, tensor)), None)
            if twin is None:
                twin = tensor
                twins.append(tensor)
            self._same[id(tensor)] = (tensor, twin)  # the tensor is kept alive, so its id is unique
        return self._same[id(tensor)][1]
