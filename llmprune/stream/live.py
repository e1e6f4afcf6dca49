"""A model that is in memory already, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.checkpoint.names import stored_rows
from llmprune.model.blocks import Walk
from llmprune.model.wrappers import towers
from llmprune.stream.hidden_states import place_hidden


class LiveStream:
    """A model that is in memory already; its weights are changed in place."""

    width: Tensor | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.walk = Walk(model)
        self.names = [f"{self.walk.path}.{i}" for i in range(len(self.walk.blocks))]
        self.scratch: Path | None = None

    @property
    def towers(self) -> dict[str, int]:
        return towers(self.model)

    def path_of(self, index: int) -> str:
        return [*self.names, self.walk.head_path][index]

    @contextmanager
    def block(self, index: int, dense: bool = False) -> Iterator[nn.Module]:
        yield self.model.get_submodule(self.path_of(index))

    @contextmanager
    def outer(self, towers: bool = False) -> Iterator[None]:
        yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        yield

    def stored_dtype(self, index: int, parameter: str) -> torch.dtype:
        return self.model.get_submodule(self.path_of(index)).get_parameter(parameter).dtype

    def stored_rows(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        return stored_rows(self.model, numbers)

    def keep(self, index: int, parameters: Iterable[str], again: bool = False) -> dict[str, str]:
        return {}

    @contextmanager
    def trial(self) -> Iterator[None]:
        places = {path: self.model.get_submodule(path) for path in [*self.names, self.walk.head_path]}
        parameters = {f"{path}.{name}": p for path, place in places.items() for name, p in place.named_parameters()}
        before = place_hidden(sum(p.nbytes for p in parameters.values()), torch.device("cpu"), self.scratch)
        for name, parameter in parameters.items():
            before[name] = parameter.data.clone()
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data.copy_(before[name])

    def device_of(self, index: int) -> torch.device:
        return next(self.model.get_submodule(self.path_of(index)).parameters()).device
