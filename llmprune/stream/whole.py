"""The fallback for checkpoints that cannot be loaded or written back block by block: the whole model in memory, through public calls alone.

Runs of this kind are not resumed, and need as much memory as the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.checkpoint.sink import Sink
from llmprune.checkpoint.source import DTYPES, Source, open_folder
from llmprune.errors import RequestError, StoppedError
from llmprune.model.skeleton import NOT_FOLLOWED
from llmprune.model.wrappers import auto_class
from llmprune.stream.live import LiveStream


class WholeStream(LiveStream):
    """A live model loaded by ``from_pretrained``; ``finish`` saves it by ``save_pretrained`` and writes the changed tensors to the sink."""

    resumable = False

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        if source.decoder is not None:
            raise RequestError(f"{source.name}: {source.decoder.method}, and its tensors cannot be converted block by block", "dequantise it first")
        chosen = [key for key in NOT_FOLLOWED if "implementation" in key and key in source.config]
        if chosen:
            raise StoppedError(f"config.json: names its own {chosen[0]}, which is not followed", "remove the key")
        auto = auto_class(str(source.config.get("model_type")))
        self.skeleton: PreTrainedModel = auto.from_pretrained(source.folder, dtype=dtype, trust_remote_code=False)
        nn.Module.to(self.skeleton, device)
        self.skeleton.eval().requires_grad_(False)
        self.skeleton.set_experts_implementation("eager")
        super().__init__(self.skeleton)
        self.source = source
        self.device = device
        self.dtype = dtype
        self.sink: Sink | None = None

    def write_to(self, sink: Sink) -> None:
        self.sink = sink

    def stored_dtype(self, index: int, parameter: str) -> torch.dtype:
        """The most frequent float dtype of the checkpoint: the tensors that a parameter is made of are unknown here."""
        stored = [DTYPES[e.dtype] for e in self.source.tensors.values() if e.dtype in DTYPES and DTYPES[e.dtype].is_floating_point]
        return max(set(stored), key=stored.count)

    def keep(self, index: int, parameters: Iterable[str], again: bool = False) -> dict[str, str]:
        return {}

    def finish(self) -> None:
        """Write every tensor that differs from the source. Raises StoppedError when save_pretrained names or shapes tensors differently."""
        assert self.sink is not None
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            self.skeleton.save_pretrained(folder)
            saved = open_folder(Path(folder), self.source.name)
            odd = sorted(k for k, e in saved.tensors.items() if k not in self.source.tensors or self.source.tensors[k].shape != e.shape)
            if odd:
                raise StoppedError(f"{odd[0]}: save_pretrained stores it differently from the source", "report this architecture")
            for key in saved.tensors:
                before = self.source.read(key)
                after = saved.read(key).to(before.dtype)
                if not torch.equal(before, after):
                    self.sink.write({key: after})
