"""The section of a page about measured speeds."""

from __future__ import annotations

from collections.abc import Callable

from llmprune.benchmark.laps import Spread
from llmprune.benchmark.result import Bench
from llmprune.report.cells import Cell, PageTable, Section, number, ratio, say, seconds, size


def speeds(bench: Bench) -> Section:
    """Medians of a ``llmprune bench --json``, with the ratios to its first model."""
    models, found, setting = bench.models, bench.ratios, bench.setting
    heads = ("", *(f"{m.role}: {m.name}" for m in models), *(f"{r.role} over {models[0].role}" for r in found))
    rows = []
    for label, field, written in MEASURES:
        values = [written(_median(getattr(m, field))) for m in models]
        over = [Cell("") if value is None else ratio(value) for value in (_median(getattr(r, field)) for r in found)]
        rows.append((say(label), *values, *over))
    said = (
        f"Medians of {setting.repeat} rounds by turns; prompt {setting.prompt_length}, {setting.new_tokens} new tokens, "
        f"batch {setting.batch}, {setting.device} ({setting.card}), {setting.threads} threads."
    )
    return Section("speeds", "Measured speed", (said,), table=PageTable(heads, tuple(rows)), lines=bench.notes)


MEASURES: tuple[tuple[str, str, Callable[..., Cell]], ...] = (
    ("prefill, tokens/s", "prefill", number),
    ("decode, tokens/s", "decode", number),
    ("time to first token", "first_token", seconds),
    ("peak memory", "peak_memory", size),
    ("key-value cache", "kv_cache", size),
    ("on disk", "disk", size),
)


def _median(value: Spread | float | None) -> float | None:
    return value.median if isinstance(value, Spread) else value
