"""Peak memory against the plan that was printed before, for twelve pairs of a model and a method, each run in a separate process.

    python scripts/bench_plan.py                 all twelve (about ten minutes on two cores)
    python scripts/bench_plan.py --only wanda    those whose name holds this

The models are random, 1,024 wide, two blocks. Measured is the high-water mark of the process above what it holds once everything is imported;
the promise is 0.7 to 1.15 times the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LEAST, MOST = 0.7, 1.15
WINDOWS, LENGTH = 20, 512
PAIRS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"sparsity": 0.5, "method": "magnitude"}),
    ("llama", {"sparsity": 0.5, "method": "wanda"}),
    ("llama", {"sparsity": 0.5, "method": "sparsegpt"}),
    ("llama", {"sparsity": 0.5, "quality": "fast"}),
    ("llama", {"pattern": "2:4"}),
    ("llama", {"pattern": "channels", "sparsity": 0.25}),
    ("llama", {"sparsity": 0.5, "criterion": "obd_fisher", "solver": "mask_only"}),
    ("llama-bf16", {"sparsity": 0.5, "method": "sparsegpt"}),
    ("gpt2", {"pattern": "2:4", "method": "sparsegpt"}),
    ("gpt2", {"pattern": "channels", "sparsity": 0.25, "quality": "fast"}),
    ("mixtral", {"sparsity": 0.5, "method": "wanda"}),
    ("mixtral", {"sparsity": 0.5, "method": "sparsegpt"}),
)


def make(kind: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

    heads = {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 8000}
    config: Any = {
        "llama": lambda: LlamaConfig(**heads, intermediate_size=2816),
        "llama-bf16": lambda: LlamaConfig(**heads, intermediate_size=2816, tie_word_embeddings=True),
        "gpt2": lambda: GPT2Config(n_embd=1024, n_head=16, n_layer=2, vocab_size=8000),
        "mixtral": lambda: MixtralConfig(**heads, intermediate_size=1536, num_local_experts=4, num_experts_per_tok=2),
    }[kind]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if "bf16" in kind else torch.float32).save_pretrained(folder)


def child(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """One run in this process: bytes planned and measured."""
    import accelerate  # noqa: F401
    import torch

    import llmprune.api  # noqa: F401  (imports are not part of a run's peak)
    from llmprune.benchmark.memory import forget_peak, peak_resident, resident
    from llmprune.recipe.reading import read_recipe
    from llmprune.run.job import run
    from llmprune.run.prepare import prepare
    from llmprune.stream import heap

    heap.steady()  # as the command line does
    ids_NL = torch.randint(5, 500, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    recipe = read_recipe(None, {"model": model, "output": f"{model}-out", "accept_damage": True} | options)
    if not forget_peak():
        sys.exit("this system does not let a process take its high-water mark back")
    before = resident()
    job = prepare(recipe, ids_NL, overwrite=True, restart=True)
    run(job)
    return {"planned": job.footprint.peak.total, "measured": (peak_resident() or 0) - before, "phase": job.footprint.peak.name}


def measure(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="llmprune-plan-") as folder:
        model = Path(folder) / kind
        threads = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for about in (["make", kind, str(model)], ["run", str(model), json.dumps(options)]):
            done = subprocess.run([sys.executable, __file__, *about], env=threads, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
        return json.loads(done.stdout.strip().splitlines()[-1])


def pairs(only: str = "") -> tuple[int, int]:
    """(pairs whose peak lies within the promise, all)."""
    good = count = 0
    for kind, options in PAIRS:
        name = f"{kind} {' '.join(str(value) for value in options.values())}"
        if only not in name:
            continue
        found = measure(kind, options)
        ratio = found["measured"] / found["planned"]
        good, count = good + (LEAST <= ratio <= MOST), count + 1
        print(f"{name:<40} planned {found['planned'] / 1e6:7,.0f} MB, measured {found['measured'] / 1e6:7,.0f} MB: {ratio:.2f}", flush=True)
    return good, count


def main() -> None:
    if sys.argv[1:2] == ["make"]:
        return make(sys.argv[2], Path(sys.argv[3]))
    if sys.argv[1:2] == ["run"]:
        print(json.dumps(child(sys.argv[2], json.loads(sys.argv[3]))))
        return None
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="")
    good, count = pairs(parser.parse_args().only)
    print(f"{good} of {count} within {LEAST} to {MOST} of the plan")
    return None


if __name__ == "__main__":
    main()
