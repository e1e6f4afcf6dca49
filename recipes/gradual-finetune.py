"""Fine-tune with transformers' Trainer while 2:4 grows in: masks change during the first half of the steps. The result is an ordinary folder.

python recipes/gradual-finetune.py --steps 300
"""

import argparse

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.data.reading import read_windows
from llmprune.data.tokenizer import load_tokenizer

options = argparse.ArgumentParser()
options.add_argument("--model", default=str(BUNDLED / "llama"))
options.add_argument("--data", default="bundled-calibration")
options.add_argument("--steps", type=int, default=300)
options.add_argument("--output", default="llama-gradual-2of4")
asked = options.parse_args()

tokenizer = load_tokenizer(asked.model)
model = AutoModelForCausalLM.from_pretrained(asked.model, dtype="float32")
windows = read_windows(asked.data, "calibration", tokenizer, 128, None).ids_NL
data = [{"input_ids": ids, "labels": ids} for ids in windows]

callback = llmprune.SparsityCallback("gradual", pattern="2:4")
arguments = TrainingArguments("runs", max_steps=asked.steps, learning_rate=5e-4, lr_scheduler_type="cosine", save_strategy="no", report_to=[])
Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
print(llmprune.save_trained(callback, model, asked.output, tokenizer))
