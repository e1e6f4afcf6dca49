"""Train a sparse model from random weights: masks by SNIP before the first step, held during all of them.

python recipes/sparse-from-scratch.py --steps 1000
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.data.reading import read_windows
from llmprune.data.tokenizer import load_tokenizer

options = argparse.ArgumentParser()
options.add_argument("--config", default="", help="folder with a config.json and a tokenizer; by default the bundled model's")
options.add_argument("--data", default="bundled-calibration")
options.add_argument("--sparsity", type=float, default=0.8)
options.add_argument("--steps", type=int, default=1000)
options.add_argument("--output", default="sparse-from-scratch")
asked = options.parse_args()

with tempfile.TemporaryDirectory() as scratch:
    config = Path(asked.config or Path(scratch, "config"))
    if not asked.config:
        shutil.copytree(BUNDLED / "llama", config, ignore=shutil.ignore_patterns("*.safetensors"))
    initial = Path(scratch, "initial")
    llmprune.init_mask(config, asked.sparsity, criterion="snip", data=asked.data, samples=8, sequence_length=128, output=initial)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(initial, dtype="float32"), load_tokenizer(initial)
    masks = llmprune.read_masks(initial, model)

windows = read_windows(asked.data, "calibration", tokenizer, 128, None).ids_NL
data = [{"input_ids": ids, "labels": ids} for ids in windows]

callback = llmprune.SparsityCallback("constant", masks=masks)
arguments = TrainingArguments("runs", max_steps=asked.steps, learning_rate=3e-3, lr_scheduler_type="cosine", save_strategy="no", report_to=[])
Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
print(llmprune.save_trained(callback, model, asked.output, tokenizer))
