"""The files that belong to a model's weights (tokenizer, templates, licences): all of its folder except what the rules below exclude.

The rules are names alone, so that a download from the Hub, which sees nothing else, follows them too; and of local files what they hold: a
sub-folder with weights, code or a config of its own is another model, a checkpoint of a training run or an environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from llmprune.checkpoint.files import UNHASHED, make_folder, write_whole

LARGEST = 100 << 20  # bytes; larger files are not copied, and are named in a note
SUFFIXES = ("bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf", "ggml", "onnx", "onnx_data", "ot", "npz", "npy", "pkl", "tflite", "mlmodel")
WEIGHTS = (
    *(f"*.{suffix}{index}" for suffix in SUFFIXES for index in ("", ".index.json")),
    "openvino_*",
    "consolidated*",
    "params.json",
    "adapter_model*",
)
CODE = ("*.py", "*.pyc", "*.so", "*.ipynb", "*.sh")
TRAINING = ("trainer_state.json", "optimizer*", "scheduler*", "rng_state*", "*_results.json", "events.out.*", "*.log", "*.tmp", "*.lock")
DATA = ("*.parquet", "*.arrow", "*.jsonl", "*.csv", "*.tsv", "*.zip", "*.tar", "*.gz")
PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.mp4")  # of a card about the unpruned model
QUANTISED = ("*quant*config.json",)  # what is written is not
STAYS = (*WEIGHTS, *CODE, *TRAINING, *DATA, *PICTURES, *QUANTISED, "report.html")
FOLDERS = ("original", "onnx", "openvino", "coreml", "metal", "gguf", "runs", "logs", "wandb", "checkpoint-*", "global_step*", "custom_generate")

WRITTEN = ("*.safetensors", "*.safetensors.index.json", "config.json", "README*", *UNHASHED)  # every output has its own
TEMPLATES = "additional_chat_templates"
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "*.tiktoken", "tekken.json"),
    *("chat_template*", f"{TEMPLATES}/*"),
)
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

NOT_FETCHED = (
    *(f"{place}{name}" for place in ("", "*/") for name in (*STAYS, *(f"{folder}/*" for folder in FOLDERS), ".*")),
    *(f"*/{name}" for name in WRITTEN if name != "config.json"),  # which shows that a sub-folder is another model
)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def companions(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder and its sub-folders that belong to any version of its weights."""
    return [path for path in _candidates(folder) if path.stat().st_size <= LARGEST]


def too_large(folder: Path) -> list[str]:
    """Names of files that are not copied only because of their size."""
    return [path.relative_to(folder).as_posix() for path in _candidates(folder) if path.stat().st_size > LARGEST]


def tokenizer_files(folder: Path) -> list[Path]:
    """What a tokenizer is loaded from."""
    return [path for path in companions(folder) if matches(path.relative_to(folder).as_posix(), TOKENIZER)]


def processor_files(folder: Path) -> list[Path]:
    """What a processor of pictures, video or sound is loaded from, beside the tokenizer."""
    return [folder / name for name in PROCESSOR if (folder / name).is_file()]


def copy_companions(source: Path, folder: Path) -> None:
    """Copy them into the folder of an output."""
    for path in companions(source):
        target = folder / path.relative_to(source)
        make_folder(target.parent)
        write_whole(target, path.read_bytes())


def _candidates(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.is_symlink() and not matches(path.name, FOLDERS) and not _foreign(path):
                yield from _candidates(path)
        elif path.is_file() and not matches(path.name, (*STAYS, *WRITTEN)):
            yield path


def _foreign(folder: Path) -> bool:
    """A folder that is not part of the model above it, or cannot be read."""
    signs = (*WEIGHTS, *CODE, *TRAINING, *DATA, "*.safetensors", "config.json")
    return not os.access(folder, os.R_OK | os.X_OK) or any(matches(path.name, signs) for path in folder.rglob("*"))
