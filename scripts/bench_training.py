"""Training with masks on the bundled model and its calibration text, measured on its evaluation text; prints tables in Markdown.

    python scripts/bench_training.py gradual --sparsity 0.85
    python scripts/bench_training.py initial --sparsity 0.8 --steps 400

gradual: a mask that grows during training against masks of the smallest magnitudes from the first step, both trained for the same steps.
initial: the model's architecture from random weights, masked before training in several ways and trained for the same steps, beside the dense one.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.data.reading import read_windows

WINDOW, BATCH = 128, 8
SOURCE = BUNDLED / "llama"


def trained(model: Any, steps: int, rate: float, seed: int, callbacks: list[Any]) -> float:
    """Train on the calibration text; seconds."""
    ids_NL = read_windows("bundled-calibration", "calibration", AutoTokenizer.from_pretrained(SOURCE), WINDOW, None).ids_NL
    rows = [{"input_ids": ids_L, "labels": ids_L} for ids_L in ids_NL]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            weight_decay=0.01,
            seed=seed,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model, args, train_dataset=rows, callbacks=callbacks)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        began = time.perf_counter()
        trainer.train()
    return time.perf_counter() - began


def measured(model: Any) -> float:
    """Perplexity on the evaluation text, by llmprune of the saved model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(SOURCE).save_pretrained(folder)
        return llmprune.evaluate(folder, "bundled-evaluation", window=WINDOW, dtype="float32")[0].value


def zeros(model: Any) -> float:
    counted = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
    return sum(int((p == 0).sum()) for p in counted) / sum(p.numel() for p in counted)


def gradual(args: argparse.Namespace) -> None:
    print(f"bundled model at {args.sparsity:.0%}, {args.steps} steps of {BATCH} x {WINDOW} tokens, rate {args.rate:g}\n")
    print("| masks | zeros | perplexity before training | after | seconds |\n|---|---|---|---|---|")
    for name, method in (
        ("magnitude at once, held", "constant"),
        ("gradual", "gradual"),
        ("soft", "soft"),
        ("movement", "movement"),
        ("rigl", "rigl"),
        ("none (dense)", ""),
    ):
        model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
        callbacks = [llmprune.SparsityCallback(method, args.sparsity)] if method else []
        before = ""
        if method == "constant":
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                llmprune.init_mask("llama", args.sparsity, criterion="magnitude", output=out)
                before = f"{llmprune.evaluate(out, 'bundled-evaluation', window=WINDOW, dtype='float32')[0].value:.2f}"
        seconds = trained(model, args.steps, args.rate, args.seed, callbacks)
        print(f"| {name} | {zeros(model):.2%} | {before} | {measured(model):.2f} | {seconds:.0f} |", flush=True)


def initial(args: argparse.Namespace) -> None:
    print(f"the bundled model's architecture from random weights at {args.sparsity:.0%}, {args.steps} steps, rate {args.rate:g}, seed {args.seed}\n")
    print("| masks | zeros | perplexity | seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config"
        shutil.copytree(SOURCE, config, ignore=shutil.ignore_patterns("*.safetensors"))
        for number, (criterion, allocation) in enumerate([("", None), *product(("random", "magnitude", "snip", "grasp"), ("uniform", "erk"))]):
            out = Path(folder) / str(number)
            ask = {"data": "bundled-calibration", "samples": 8} if criterion in ("snip", "grasp") else {}
            share = args.sparsity if criterion else 1e-6
            llmprune.init_mask(config, share, criterion=criterion or "random", allocation=allocation, seed=args.seed, output=out, **ask)
            model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            callbacks = [llmprune.SparsityCallback("constant", masks=llmprune.read_masks(out, model))] if criterion else []
            seconds = trained(model, args.steps, args.rate, args.seed, callbacks)
            named = f"{criterion}, {allocation}" if criterion else "none (dense)"
            print(f"| {named} | {zeros(model):.2%} | {measured(model):.2f} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("gradual", "initial"))
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=None, help="by default 1e-3 for gradual, 3e-3 for initial")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.rate = args.rate or {"gradual": 1e-3, "initial": 3e-3}[args.table]
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    {"gradual": gradual, "initial": initial}[args.table](args)


if __name__ == "__main__":
    main()
