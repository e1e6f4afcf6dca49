"""Training in mixed precision: matrix products of bfloat16, where the device multiplies those faster; weights, moments and losses of float32.

Micikevicius et al., Mixed Precision Training, https://arxiv.org/abs/1710.03740; bfloat16 has float32's range, so that losses need no scale.
"""

from __future__ import annotations

import torch

CPU_SUPPORT = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # what torch knows of a CPU


def faster_in_half(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and any(getattr(torch.cpu, ask, bool)() for ask in CPU_SUPPORT)


def is_mixed(device: torch.device, dtype: torch.dtype, wanted: bool) -> bool:
    """Whether products are taken in bfloat16: if that is ``wanted`` and faster. dtype: of the model; only float32 is changed."""
    return wanted and dtype == torch.float32 and faster_in_half(device)


def mixed_precision(device: torch.device, dtype: torch.dtype, wanted: bool) -> torch.autocast:
    """The context of a forward pass, in mixed precision if it is to be ``is_mixed``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=is_mixed(device, dtype, wanted))
