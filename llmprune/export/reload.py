"""A finished checkpoint loaded by plain transformers in a fresh process: what fits, what it predicts, and what loads beside it.

Run as ``python -m llmprune.export.reload SOURCE DTYPE``; one request comes in and one answer goes out through its pipes, each a line of JSON and
a tensor as safetensors, so that it ends with the process that started it, and leaves no file behind. Most of its time goes into imports and the
source's tokenizer, which it does while it waits.

Shapes: L = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import load, save
from torch import Tensor

from llmprune.checkpoint.companions import processor_files, tokenizer_files
from llmprune.data.tokenizer import UNRENDERED, load_tokenizer
from llmprune.errors import PromiseError, RequestError, mistake, out_of_memory
from llmprune.model.skeleton import UNBUILDABLE
from llmprune.model.wrappers import auto_class

TEXT = "The first thing to know about a river: 3 × 7 is twenty-one, “quoted”, naïve, 你好.\n\n\tend"
TURNS = [{"role": "user", "content": "How long is the river?"}, {"role": "assistant", "content": "Long."}]


@dataclass(frozen=True)
class Loaded:
    """What plain transformers makes of a folder. unfit: keys, by what is wrong with them; equal: whether a part of the source's folder (tokenizer,
    chat template, processor) loads from this one with the same content, None where it does not load from the source's either.
    """

    logits_1LV: Tensor
    unfit: dict[str, list[str]]
    equal: dict[str, bool | None]


class Reloader:
    """The fresh process. source: the folder of the checkpoint that was pruned; scratch: for code that transformers copies; dtype: of the weights."""

    def __init__(self, source: Path, scratch: Path, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype
        self.words = [sys.executable, "-m", "llmprune.export.reload", str(source), str(dtype).removeprefix("torch.")]
        self.environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Let it import what it needs; its memory is that of the libraries until it is asked."""
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self.words, stdin=pipe, stdout=pipe, stderr=pipe, env=self.environment)

    def ask(self, folder: Path, ids_1L: Tensor) -> None:
        """Let the process, if it is started, load the checkpoint in ``folder`` from now on; ``load`` waits for it."""
        if self._process is None or self._process.stdin is None:
            return
        with suppress(BrokenPipeError), self._process.stdin as pipe:  # its exit code says why it has ended
            pipe.write(packed({"folder": str(folder)}, {"ids": ids_1L.cpu().contiguous()}))
        self._process.stdin = None

    def load(self, folder: Path, ids_1L: Tensor) -> Loaded:
        """What the checkpoint in ``folder`` is to the process. Raises PromiseError when it does not load, MemoryError when its memory runs out."""
        self.start()
        self.ask(folder, ids_1L)
        assert self._process is not None
        answer, said = self._process.communicate()
        if self._process.returncode in (-signal.SIGKILL, errno.ENOMEM):
            raise MemoryError
        if self._process.returncode:
            last = (said.decode(errors="replace").strip().splitlines() or [f"exit code {self._process.returncode}"])[-1]
            raise PromiseError(f"the result does not load with transformers: {last[:300]}", "report this; nothing was published")
        found, tensors = unpacked(answer)
        return Loaded(tensors["logits"], found["unfit"], found["equal"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def packed(said: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    return json.dumps(said).encode() + b"\n" + save(tensors)


def unpacked(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    said, _, tensors = data.partition(b"\n")
    return json.loads(said), load(tensors)


@torch.no_grad()
def loaded(wanted: Mapping[str, Any], folder: Path, dtype: torch.dtype, ids_1L: Tensor) -> Loaded:
    """What this process makes of ``folder``. Experts run one by one, as they do while a model is pruned, so that both compute alike.

    wanted: ``parts_of`` the source's folder.
    """
    from transformers import AutoConfig

    own_class = (folder / "modeling_pruned.py").exists()
    kind = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).model_type
    open_model: Any = auto_class(kind).from_pretrained  # which returns a pair here
    model, info = open_model(folder, dtype=dtype, trust_remote_code=own_class, local_files_only=True, output_loading_info=True)
    model.set_experts_implementation("eager")
    logits_1LV = model.eval()(input_ids=ids_1L, use_cache=False).logits.float().contiguous()
    return Loaded(logits_1LV, {what: sorted(map(str, keys)) for what, keys in info.items() if keys}, equal_parts(wanted, parts_of(folder)))


def parts_of(folder: Path) -> dict[str, Any]:
    """What a folder has beside the weights, as it loads: tokenizer, chat template, processor. None where it does not load."""
    found: dict[str, Any] = {}
    if tokenizer_files(folder):
        tokenizer = _tokenizer(folder)
        found["tokenizer"] = None if tokenizer is None else _of_tokenizer(tokenizer)
        if tokenizer is not None and tokenizer.chat_template:
            found["chat template"] = _of_template(tokenizer)
    if processor_files(folder):
        processor = _processor(folder)
        found["processor"] = None if processor is None else processor.to_dict()
    return found


def equal_parts(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> dict[str, bool | None]:
    """Whether a folder has all parts of the source's, with the same content; None where the source's does not load."""
    return {part: None if content is None else got.get(part) == content for part, content in wanted.items()}


def _opened(open_it: Callable[..., Any], folder: Path) -> Any:
    """None where it does not load, which the machine may be the reason for: a package that is not installed, say."""
    try:
        return open_it(folder, local_files_only=True, trust_remote_code=False)
    except (*UNBUILDABLE, OSError):
        return None


def _tokenizer(folder: Path) -> Any:
    try:
        return load_tokenizer(folder)
    except RequestError:
        return None


def _processor(folder: Path) -> Any:
    """Of images, video or sound; transformers' own gives back the tokenizer of a model that needs none."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

    kinds = (AutoProcessor, AutoImageProcessor, AutoFeatureExtractor)
    return next((found for kind in kinds if hasattr(found := _opened(kind.from_pretrained, folder), "to_dict")), None)


def _of_tokenizer(tokenizer: Any) -> tuple[Any, ...]:
    return type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer(TEXT)["input_ids"]


def _of_template(tokenizer: Any) -> tuple[Any, ...]:
    """The template, and what it makes of a dialogue, if it takes this one."""
    try:
        return tokenizer.chat_template, tokenizer.apply_chat_template(TURNS, tokenize=False)
    except UNRENDERED as error:
        return tokenizer.chat_template, str(error)


def main(source: str, dtype: str) -> None:
    from transformers import AutoConfig

    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)  # what libraries print must not mix with the answer
        config = _opened(AutoConfig.from_pretrained, Path(source))
        if config is not None:
            auto_class(config.model_type)._model_mapping.get(type(config), None)  # imports the class
        try:
            wanted = parts_of(Path(source))
            request = sys.stdin.buffer.read()
            if not request:  # the run has ended without a result
                return
            asked, tensors = unpacked(request)
            found = loaded(wanted, Path(asked["folder"]), getattr(torch, dtype), tensors["ids"])
        except (*UNBUILDABLE, OSError, MemoryError) as error:
            raise SystemExit(errno.ENOMEM if out_of_memory(error) else mistake(error)) from None
        answer.write(packed({"unfit": found.unfit, "equal": found.equal}, {"logits": found.logits_1LV}))
    os._exit(0)  # nothing is left to be done, and taking the model apart would take as long as loading it


if __name__ == "__main__":
    main(*sys.argv[1:])
