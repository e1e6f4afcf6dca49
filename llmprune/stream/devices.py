"""Where a run computes, and in which dtype."""

from __future__ import annotations

import torch
from accelerate import PartialState

from llmprune.checkpoint.source import DTYPES, Source
from llmprune.errors import RequestError, first_line


def choose_device(device: str) -> torch.device:
    """The device asked for; "auto" is accelerate's choice, or the CPU if that device has no float64, which sums need (Apple's ``mps``).

    Raises RequestError.
    """
    if device == "auto":
        best = torch.device(PartialState().default_device)
        return best if _has_float64(best) else torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"device {device!r}: {first_line(error)[:120]}", "give auto, cpu, or a device that torch sees") from None
    if chosen.type == "meta":
        raise RequestError("device 'meta': holds no values", "give auto, cpu, or a device that torch sees")
    if not _has_float64(chosen):
        raise RequestError(f"device {device!r}: has no float64, which sums and solvers need", "--device cpu")
    return chosen


def _has_float64(device: torch.device) -> bool:
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def choose_dtype(dtype: str, device: torch.device, source: Source) -> torch.dtype:
    """The compute dtype asked for; "auto" is float32 on CPU (half precision is slow there) and the checkpoint's elsewhere."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    stored = {DTYPES.get(e.dtype) for e in source.tensors.values()} - {None}
    return next((d for d in (torch.bfloat16, torch.float16) if d in stored), torch.float32)
