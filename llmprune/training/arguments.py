"""The settings of a recovery, and the TrainingArguments that they make together with the user's own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from llmprune.errors import MISTAKES, RequestError, mistake
from llmprune.maths.mixed_precision import faster_in_half

TOKENS_AT_ONCE = 2048  # of a micro-batch
WARM_UP = 0.1  # of the steps; then the rate falls to zero by a cosine
# what a recovery decides by itself, and the option that says it
OWN = {
    "output_dir": "output",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "learning_rate": "learning_rate",
    "seed": "seed",
    "data_seed": "seed",
    "gradient_accumulation_steps": "batch",
    "use_cpu": "device",
    "eval_steps": "every",
    "save_steps": "every",
    "logging_steps": "every",
}
# what would be ignored, or break a promise
REFUSED = (
    *("eval_strategy", "save_strategy", "save_total_limit", "save_only_model", "load_best_model_at_end", "metric_for_best_model", "eval_on_start"),
    *("resume_from_checkpoint", "ignore_data_skip", "remove_unused_columns", "label_names", "dataloader_drop_last", "auto_find_batch_size"),
    *("label_smoothing_factor", "push_to_hub", "deepspeed", "fsdp", "fsdp_config", "parallelism_config", "torch_compile", "use_liger_kernel"),
    *("do_train", "do_eval", "do_predict", "neftune_noise_alpha", "fp16"),
)


@dataclass(frozen=True)
class Settings:
    """batch: windows of a step. every: steps between evaluations. patience: evaluations without improvement after which it stops. arguments: of
    transformers' TrainingArguments, by name.
    """

    steps: int
    batch: int
    learning_rate: float
    every: int
    patience: int
    seed: int
    length: int  # tokens of a window
    arguments: Mapping[str, Any] = field(default_factory=dict)


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raises RequestError for a name that TrainingArguments does not have, or one that a recovery sets itself."""
    known = {one.name for one in fields(TrainingArguments) if one.init}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise RequestError(f"arguments: TrainingArguments has no {name!r}", f"did you mean {near[0]!r}?" if near else "see transformers' page")
        if name in OWN:
            raise RequestError(f"arguments: {name} is set by the option {OWN[name]}", f"give {OWN[name]} instead")
        if name in REFUSED:
            raise RequestError(f"arguments: {name} cannot be chosen for a recovery", "omit it")


def training_arguments(settings: Settings, folder: Path, device: torch.device) -> TrainingArguments:
    """Raises RequestError for values that TrainingArguments does not take, or a micro-batch that does not divide the batch."""
    given = dict(settings.arguments)
    micro = given.pop("per_device_train_batch_size", micro_batch(settings))
    if not isinstance(micro, int) or micro < 1 or settings.batch % micro:
        raise RequestError(f"arguments: per_device_train_batch_size {micro} does not divide the batch of {settings.batch}", "give a divisor of it")
    ours: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, round(WARM_UP * settings.steps)),
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "optim": "adamw_torch",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
        "log_level": "error",
    }
    fixed = {
        "output_dir": str(folder),
        "max_steps": settings.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings.batch // micro,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "use_cpu": device.type == "cpu",
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "logging_strategy": "steps",
        "eval_steps": settings.every,
        "save_steps": settings.every,
        "logging_steps": settings.every,
        "save_total_limit": 2,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_drop_last": True,
    }
    given.pop("bf16", None)
    try:
        made = TrainingArguments(**(ours | given | fixed))
    except MISTAKES as error:
        raise RequestError(f"arguments: TrainingArguments does not take them ({mistake(error)})", "check their values") from None
    if made.n_gpu > 1:
        made._n_gpu = 1  # else the Trainer copies the model to every device at every step
    return made


def check_machine(device: torch.device, processes: int) -> None:
    """Raises RequestError for what a recovery cannot use: transformers' Trainer takes the first GPU of a process."""
    if device.type == "cuda" and device.index not in (None, 0):
        raise RequestError(f"device {device}: a training runs on the first GPU", f"CUDA_VISIBLE_DEVICES={device.index} makes it the first")
    if processes > 1:
        raise RequestError(f"recover in {processes} processes: it runs in one", "start it without a launcher")


def in_half(settings: Settings, device: torch.device) -> bool:
    """Whether products are taken in bfloat16: as ``bf16`` of the arguments says, by default where that is faster. The training does so itself,
    and not accelerate, which would put the model's other forwards in bfloat16 too, and for good.
    """
    return bool(settings.arguments.get("bf16", faster_in_half(device)))


def micro_batch(settings: Settings) -> int:
    """The largest divisor of the batch whose windows have at most ``TOKENS_AT_ONCE`` tokens together; at least one window."""
    most = max(1, TOKENS_AT_ONCE // settings.length)
    return next(n for n in range(min(most, settings.batch), 0, -1) if settings.batch % n == 0)
