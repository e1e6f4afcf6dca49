"""Seconds by part of the work on one block."""

from __future__ import annotations

from time import perf_counter


class Clock:
    """``lap`` adds the time since the last one to a part; ``of_which`` splits off time that was measured elsewhere."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, part: str, of_which: dict[str, float] | None = None) -> None:
        now = perf_counter()
        spent = now - self._last
        self._last = now
        for other, seconds in (of_which or {}).items():
            self._add(other, seconds)
            spent -= seconds
        self._add(part, spent)

    def _add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
