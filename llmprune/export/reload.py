"""A finished checkpoint loaded by plain transformers in a separate process: its predictions are compared with those of the pruned model.

Run as ``python -m llmprune.export.reload FOLDER DTYPE``; token ids come in and logits go out as safetensors through its pipes, so that it ends
with the process that started it, and leaves no file behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from llmprune.errors import PromiseError


def reloaded_logits(folder: Path, scratch: Path, ids_1L: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, L, V]: predictions of the checkpoint in ``folder``, loaded in a fresh process. Raises PromiseError when it does not load."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    words = [sys.executable, "-m", "llmprune.export.reload", str(folder), str(dtype).removeprefix("torch.")]
    done = subprocess.run(words, input=save({"ids": ids_1L.cpu().contiguous()}), env=environment, capture_output=True, check=False)
    if done.returncode:
        said = (done.stderr.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
        raise PromiseError(f"the result does not load with transformers: {said[:300]}", "report this; nothing was published")
    return load(done.stdout)["logits"]


def main(folder: str, dtype: str) -> None:
    from transformers import AutoConfig

    from llmprune.model.wrappers import auto_class

    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)  # what libraries print must not mix with the logits
        code = (Path(folder) / "modeling_pruned.py").exists()
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        open_model: Any = auto_class(kind).from_pretrained  # which returns a pair here
        model, info = open_model(folder, dtype=getattr(torch, dtype), trust_remote_code=code, local_files_only=True, output_loading_info=True)
        wrong = {name: found for name, found in info.items() if found}
        if wrong:
            raise SystemExit(f"tensors that do not fit: {wrong}")
        with torch.no_grad():
            logits = model.eval()(input_ids=load(sys.stdin.buffer.read())["ids"], use_cache=False).logits
        answer.write(save({"logits": logits.float().contiguous()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
