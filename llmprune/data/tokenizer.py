"""A checkpoint's own tokenizer, without running any code that comes with it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from llmprune.errors import MISTAKES, RequestError, first_line

UNRENDERED: tuple[type[Exception], ...] = (*MISTAKES, TemplateError)  # what a template raises for a dialogue that it does not take


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder, tried on a few words. Raises RequestError when it cannot be used."""
    with ThreadPoolExecutor(1) as pool:  # malformed files make its library panic, or raise errors without a narrower class
        loading = pool.submit(_load, folder, trust_remote_code)
        error = loading.exception()
    if error is None:
        return loading.result()
    said = first_line(error).replace(str(folder), folder.name)
    if "trust_remote_code" in str(error):
        said = "it needs custom code, which is not run"
    raise RequestError(
        f"{folder.name}: its tokenizer cannot be used ({said[:160]})", "repair or fetch its tokenizer files, or pass token ids in Python"
    )


def _load(folder: Path, trust_remote_code: bool) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    tokenizer("a few words")
    return tokenizer
