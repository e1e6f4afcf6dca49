"""llmprune: one-shot pruning of Hugging Face language models.

    import llmprune
    report = llmprune.prune("llama", sparsity=0.5, pattern="2:4", output="llama-2of4")

Importing this package loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LlmpruneError", "bench", "evaluate", "evaluate_tasks", "load", "prune", "push"]

if TYPE_CHECKING:
    from llmprune.api import evaluate, evaluate_tasks, load, prune, push
    from llmprune.benchmark.run import bench
    from llmprune.errors import LlmpruneError


def __getattr__(name: str) -> Any:
    if name == "LlmpruneError":
        from llmprune.errors import LlmpruneError

        return LlmpruneError
    if name == "bench":
        from llmprune.benchmark.run import bench

        return bench
    if name in __all__:
        import llmprune.api

        return getattr(llmprune.api, name)
    raise AttributeError(f"module 'llmprune' has no attribute {name!r}")
