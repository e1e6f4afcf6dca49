"""Where a run computes, and in which dtype."""

from __future__ import annotations

import torch
from accelerate import PartialState

from llmprune.checkpoint.source import DTYPES, Source
from llmprune.errors import RequestError, first_line


def choose_device(device: str) -> torch.device:
    """The device asked for; "auto" is what accelerate finds best."""
    if device == "auto":
        return torch.device(PartialState().default_device)
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"device {device!r}: {first_line(error)[:120]}", "give auto, cpu, or a device that torch sees") from None
    return chosen


def choose_dtype(dtype: str, device: torch.device, source: Source) -> torch.dtype:
    """The compute dtype asked for; "auto" is float32 on CPU (half precision is slow there) and the checkpoint's elsewhere."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    stored = {DTYPES.get(e.dtype) for e in source.tensors.values()} - {None}
    return next((d for d in (torch.bfloat16, torch.float16) if d in stored), torch.float32)
