"""What a benchmark found: each model's figures, their ratios, and the 2:4 kernels matrix by matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmprune.benchmark.kernels import Kernel
from llmprune.benchmark.laps import Lap, Spread
from llmprune.checkpoint.files import FORMAT


@dataclass(frozen=True)
class Figures:
    """One model. Rates are tokens per second over all sequences of the batch, times are seconds, sizes are bytes.

    ``first_token`` is from the prompt to the first token known; ``peak_memory`` is the peak during laps, weights included and
    libraries not (None where it is unknown); ``kv_cache`` is what the cache holds after the prompt.
    """

    name: str
    role: str  # model, dense, pruned, or 2:4 kernels
    dtype: str
    prefill: Spread
    decode: Spread
    first_token: Spread
    peak_memory: int | None
    kv_cache: int
    parameters: int
    disk: int


@dataclass(frozen=True)
class Compared:
    """A model's figures over those of the reference: rates and times are taken round by round, then the median and the range."""

    role: str
    prefill: Spread
    decode: Spread
    first_token: Spread
    peak_memory: float | None
    kv_cache: float
    parameters: float
    disk: float


@dataclass(frozen=True)
class Setting:
    """What figures depend on: workload, machine, versions."""

    prompt_length: int
    new_tokens: int
    batch: int
    repeat: int
    device: str
    card: str
    threads: int
    compile: bool = False
    llmprune: str = ""
    torch: str = ""
    transformers: str = ""


@dataclass(frozen=True)
class Bench:
    """All that one run found. The first model is the reference of ``ratios``."""

    setting: Setting
    models: tuple[Figures, ...]
    ratios: tuple[Compared, ...]
    kernels: tuple[Kernel, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        kernels = [asdict(k) | {"speed_up": k.speed_up} for k in self.kernels]
        return {"format": FORMAT} | asdict(self) | {"kernels": kernels}


def compared(model: Figures, laps: Sequence[Lap], reference: Figures, theirs: Sequence[Lap]) -> Compared:
    """A model beside the reference; ``laps`` and ``theirs`` were run by turns, so each pair ran under the same load."""
    pairs = list(zip(laps, theirs, strict=True))
    memory = model.peak_memory / reference.peak_memory if model.peak_memory and reference.peak_memory else None
    return Compared(
        role=model.role,
        prefill=Spread.of([other.prefill / own.prefill for own, other in pairs]),
        decode=Spread.of([other.decode / own.decode for own, other in pairs]),
        first_token=Spread.of([own.first_token / other.first_token for own, other in pairs]),
        peak_memory=memory,
        kv_cache=model.kv_cache / reference.kv_cache,
        parameters=model.parameters / reference.parameters,
        disk=model.disk / reference.disk,
    )
