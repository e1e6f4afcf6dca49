"""llmprune: one-shot pruning of Hugging Face language models.

    import llmprune
    report = llmprune.prune("llama", sparsity=0.5, pattern="2:4", output="llama-2of4")

Importing this package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "LlmpruneError",
    "Masks",
    "PromiseError",
    "RegularisationCallback",
    "Report",
    "RequestError",
    "Sparsifier",
    "SparsityCallback",
    "StoppedError",
    "bench",
    "evaluate",
    "evaluate_tasks",
    "init_mask",
    "load",
    "prune",
    "push",
    "read_masks",
    "recover",
    "save",
    "save_trained",
]
ELSEWHERE = {  # than in the api
    "LlmpruneError": "llmprune.errors",
    "Masks": "llmprune.training.masks",
    "PromiseError": "llmprune.errors",
    "Report": "llmprune.report.result",
    "RequestError": "llmprune.errors",
    "StoppedError": "llmprune.errors",
    "RegularisationCallback": "llmprune.training.regularisation",
    "Sparsifier": "llmprune.training.sparsifier",
    "SparsityCallback": "llmprune.training.callback",
    "bench": "llmprune.benchmark.run",
    "init_mask": "llmprune.run.initial",
    "read_masks": "llmprune.training.masks",
    "save_trained": "llmprune.run.trained",
}

if TYPE_CHECKING:
    from llmprune.api import evaluate, evaluate_tasks, load, prune, push, recover, save
    from llmprune.benchmark.run import bench
    from llmprune.errors import LlmpruneError, PromiseError, RequestError, StoppedError
    from llmprune.report.result import Report
    from llmprune.run.initial import init_mask
    from llmprune.run.trained import save_trained
    from llmprune.training.callback import SparsityCallback
    from llmprune.training.masks import Masks, read_masks
    from llmprune.training.regularisation import RegularisationCallback
    from llmprune.training.sparsifier import Sparsifier


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(ELSEWHERE.get(name, "llmprune.api")), name)
    raise AttributeError(f"module 'llmprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
