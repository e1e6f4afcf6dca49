"""Machines that lack what Linux has."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune.checkpoint.files import lay_out
from llmprune.errors import RequestError
from llmprune.stream import devices
from llmprune.stream.devices import choose_device


def test_a_file_is_laid_out_where_space_cannot_be_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "posix_fallocate")
    lay_out(tmp_path / "shard", b"head", 10)
    assert (tmp_path / "shard").read_bytes() == b"head" + bytes(6)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a device that knows no float64."""
    empty = torch.empty

    def without_float64(*size: Any, dtype: torch.dtype = torch.float32, device: torch.device) -> torch.Tensor:
        if device.type == "mps" and dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32 instead.")
        return empty(*size, dtype=dtype)

    class State:
        default_device = torch.device("mps")

    monkeypatch.setattr(torch, "empty", without_float64)
    monkeypatch.setattr(devices, "PartialState", State)


@pytest.mark.usefixtures("mac")
def test_a_device_without_float64_is_refused_and_never_chosen() -> None:
    with pytest.raises(RequestError, match="device 'mps': has no float64") as refused:
        choose_device("mps")
    assert refused.value.hint == "--device cpu"
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
