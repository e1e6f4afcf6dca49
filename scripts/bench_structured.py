"""What half-size blocks buy: a random Llama against one with half of every block's FFN channels and key-value groups, by ``llmprune bench``.

    python scripts/bench_structured.py --threads 2 --kv-heads 12

The cut model is what structured pruning by 50 % leaves, made straight from its config: speed does not depend on which units are kept. Both are saved,
loaded by plain transformers, measured by turns, and deleted afterwards.

The most that decode can reach: a token reads every weight of the blocks and of the head once, and the cache; the head stays whole, so
    (dense blocks + head + cache) / (cut blocks + head + cache)
bytes bound the ratio where memory is what decode waits for. The most that prefill can reach is the same of its multiply-adds, where the head works
for the last token alone. Beside the median of the rounds' ratios stands best against best: the one that other processes disturb least.
On a machine that others use too, set OMP_WAIT_POLICY=passive: threads that spin while they wait for one that was put aside lose a factor of 5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.utils.logging import disable_progress_bar

WIDTH, BLOCKS, VOCABULARY, HEAD_DIM = 768, 12, 32_000, 64
FFN, HEADS = 2048, 12


def config(ffn: int, heads: int, kv_heads: int, positions: int) -> LlamaConfig | MistralConfig:
    """A Llama of these sizes. Llama wants a head count that divides the width; for others Mistral without its window is the same network."""
    shape: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": ffn,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**shape) if WIDTH % heads == 0 else MistralConfig(sliding_window=None, **shape)


def save(folder: Path, shape: LlamaConfig | MistralConfig, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=dtype).save_pretrained(folder)
    return folder


def block_bytes(folder: Path) -> int:
    """Bytes of the blocks' tensors on disk."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys() if ".layers." in name)  # noqa: SIM118
    return total


def most(dense: float, cut: float, kept: float) -> float:
    """The ratio that is left when ``kept`` stands on both sides."""
    return (dense + kept) / (cut + kept)


def bounds(args: argparse.Namespace, blocks: tuple[int, int], caches: list[int], itemsize: int) -> tuple[float, float]:
    """The most that prefill and decode can reach. Bytes a decoded token reads, operations (multiply-adds) a prompt costs."""
    head, tokens = WIDTH * VOCABULARY, args.prompt_length * args.batch
    grown = [c * (1 + args.new_tokens / 2 / args.prompt_length) for c in caches]  # on average over the decoded tokens
    decode = most(blocks[0] + grown[0], blocks[1] + grown[1], head * itemsize)
    attention = args.prompt_length * HEAD_DIM * HEADS * BLOCKS  # multiply-adds a token: two products, half of the positions
    work = [share / itemsize + attention * part for share, part in zip(blocks, (1.0, 0.5), strict=True)]
    return most(work[0] * tokens, work[1] * tokens, head * args.batch), decode


def bench(dense: Path, cut: Path, args: argparse.Namespace) -> dict[str, Any]:
    """``llmprune bench`` in a separate process; its table goes to standard output, its findings come back."""
    flags = ("threads", "prompt_length", "new_tokens", "batch", "repeat")
    words = [f"--{flag.replace('_', '-')}={getattr(args, flag)}" for flag in flags]
    command = [sys.executable, "-m", "llmprune", "bench", str(cut), "--against", str(dense), "--device", "cpu", *words, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def said(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} x ({ratio['lowest']:.2f}..{ratio['highest']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kv-heads", type=int, choices=(12, 4), default=12)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    disable_progress_bar()
    dtype, positions = getattr(torch, args.dtype), max(2048, args.prompt_length + args.new_tokens)
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-") as place:
        dense = save(Path(place) / "dense", config(FFN, HEADS, args.kv_heads, positions), dtype)
        cut = save(Path(place) / "cut", config(FFN // 2, HEADS // 2, args.kv_heads // 2, positions), dtype)
        found = bench(dense, cut, args)
        blocks = block_bytes(dense), block_bytes(cut)
    models, ratio = found["models"], found["ratios"][0]
    most_prefill, most_decode = bounds(args, blocks, [m["kv_cache"] for m in models], dtype.itemsize)
    work = f"prompt {args.prompt_length}, {args.new_tokens} new tokens, batch {args.batch}, {args.threads} threads, {args.dtype}"
    print(
        f"{models[0]['parameters']:,} parameters, {args.kv_heads} key-value heads; cut to {models[1]['parameters']:,}; {work}, {args.repeat} rounds"
    )
    for model in models:
        print(f"  {model['role']:<7} prefill {model['prefill']['median']:8.1f} tokens/s, decode {model['decode']['median']:6.1f} tokens/s")
    for what, limit, by in (("prefill", most_prefill, "operations"), ("decode", most_decode, "bytes")):
        best = models[1][what]["highest"] / models[0][what]["highest"]
        print(f"{what:<7} {said(ratio[what])}, best against best {best:.2f} x, at most {limit:.2f} x by its {by}")
    for note in found["notes"]:
        print(f"note: {note}")
    print(f"blocks on disk {blocks[1] / blocks[0]:.3f} x, the whole file {ratio['disk']:.3f} x; peak memory {ratio['peak_memory']:.2f} x")


if __name__ == "__main__":
    main()
