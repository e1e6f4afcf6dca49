"""CPU seconds of a Trainer's step with masks held, over those of the same step without; prints a table in Markdown.

    python scripts/bench_masks.py --tokens 256 1024 2048 --optimizers adamw_torch sgd adafactor --rounds 3

The model is a Llama of 21 million weights in its blocks' matrices (576 wide, 6 blocks, vocabulary 8,192), random, in float32; the masks are 2:4. The
two kinds of training take turns, each step is timed by the process's CPU seconds (other processes stretch the wall clock), and the medians are
compared. Tokens are those of one step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

from llmprune import SparsityCallback

VOCABULARY = 8192
SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3}
WARM = 2  # steps that are not counted


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._began)


def steps(tokens: int, optimizer: str, masked: bool, count: int) -> list[float]:
    """CPU seconds of each of ``count`` steps."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, vocab_size=VOCABULARY, max_position_embeddings=4096))
    ids_NL = torch.randint(VOCABULARY, (count + WARM, tokens))
    clock = Clock()
    callbacks = [clock, SparsityCallback("constant", pattern="2:4")] if masked else [clock]  # the clock stops after the masks' own work
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        args = TrainingArguments(
            output_dir=folder,
            max_steps=count + WARM,
            per_device_train_batch_size=1,
            optim=optimizer,
            weight_decay=0.1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        Trainer(model, args, train_dataset=[{"input_ids": ids, "labels": ids} for ids in ids_NL], callbacks=callbacks).train()
    return clock.seconds[WARM:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--optimizers", nargs="+", default=["adamw_torch", "sgd", "adafactor"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print("| optimizer | tokens | plain, s | held, s | ratio |\n|---|---:|---:|---:|---:|")
    for optimizer in chosen.optimizers:
        for tokens in chosen.tokens:
            found: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(chosen.rounds):
                for masked in found:
                    found[masked] += steps(tokens, optimizer, masked, chosen.steps)
            plain, held = (statistics.median(found[masked]) for masked in (False, True))
            print(f"| {optimizer} | {tokens} | {plain:.3f} | {held:.3f} | {held / plain:.3f} |", flush=True)


if __name__ == "__main__":
    main()
