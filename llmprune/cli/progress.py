"""How far a command is: one bar for each phase and one for all of them on a terminal, lines in a log or a pipe; on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from time import monotonic
from typing import Any

from llmprune.cli.console import err

Progress = Callable[[str, int, int], None]  # (phase, done, total)
EVERY = 0.05  # of the whole command: how often there is a line in a log
QUIET = 2.0  # seconds between two lines of one phase, at least
SILENT = 300.0  # seconds without a line, at most
SURE = 0.2  # share of a phase after which its own speed alone counts
DAY = 86400


@dataclass
class Phase:
    """A part of the work. cost: an estimate in a unit that all phases of a command share; 0 where there is none."""

    name: str
    cost: float = 0.0
    done: int = 0
    total: int = 0  # 0: it has not begun
    seconds: float = 0.0

    @property
    def share(self) -> float:
        return self.done / self.total if self.total else 0.0

    @property
    def finished(self) -> bool:
        return bool(self.total) and self.done >= self.total

    @property
    def kind(self) -> str:
        """Phases of one kind take as long for the same cost: evaluations of two models."""
        return self.name.rpartition(" ")[2]


class Course:
    """The phases of a command in order, and what they tell of the time that is left. What was not planned finds its place when it begins."""

    def __init__(self, planned: Sequence[tuple[str, float]], clock: Callable[[], float] = monotonic) -> None:
        self.phases = [Phase(name, cost) for name, cost in planned]
        self.clock, self.began = clock, clock()
        self._heard, self._at = self.began, 0

    @property
    def now(self) -> Phase:
        return self.phases[self._at]

    def hear(self, name: str, done: int, total: int) -> Phase:
        """The phase that has come so far. The time since the last call was spent on it, or on the one before it if it only begins."""
        before = self.now if self.phases else None
        self._at = self._place(name, done)
        now, phase = self.clock(), self.now
        (before if before is not None and before.total and not done else phase).seconds += now - self._heard
        phase.done, phase.total = done, max(total, 1)
        self._heard = now
        return phase

    def _place(self, name: str, done: int) -> int:
        known = [place for place, phase in enumerate(self.phases) if phase.name == name]
        begun = [place for place in known if self.phases[place].total]
        if begun and done >= self.phases[begun[-1]].done and not (self.phases[begun[-1]].finished and done < self.phases[begun[-1]].total):
            return begun[-1]
        waiting = [place for place in known if not self.phases[place].total]
        if waiting:
            return waiting[0]
        place = min(self._at + (not self.phases or self.now.finished), len(self.phases)) if self.phases else 0
        self.phases.insert(place, Phase(name))
        return place

    def left(self) -> float | None:
        """Seconds; None while nothing is known."""
        parts = [self._left_of(phase) for phase in self.phases[self._at :] if not phase.finished]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or not any(phase.seconds for phase in self.phases):
            return None
        return max(0.0, sum(known) - (self.clock() - self._heard))

    def _left_of(self, phase: Phase) -> float | None:
        """By the phase's own speed, once it is known well, and by that of the others before."""
        expected = self._expected(phase)
        if not phase.done:
            return expected
        own = phase.seconds / phase.share
        known = 1.0 if expected is None else min(1.0, phase.share / SURE)
        return (own * known + (expected or 0.0) * (1 - known)) * (1 - phase.share)

    def _expected(self, phase: Phase) -> float | None:
        """Seconds of a whole phase, by its cost and the speed of the others; None where nothing is known of it."""
        measured = [one for one in self.phases if one.cost and one.done and one is not phase]
        alike = [one for one in measured if one.kind == phase.kind] or measured
        work = sum(one.cost * one.share for one in alike)
        return phase.cost * sum(one.seconds for one in alike) / work if work and (phase.cost or not phase.done) else None

    def said(self) -> str:
        """The share of the whole command and the time left, in words."""
        left = self.left()
        if left is None:
            return "time left: not known yet"
        spent = self.clock() - self.began
        return f"{spent / max(spent + left, 1e-9):.0%} of all, {clock_time(left)} left"

    @property
    def part(self) -> float:
        """Share of the time of the whole command."""
        left, spent = self.left(), self.clock() - self.began
        return 0.0 if left is None else spent / max(spent + left, 1e-9)


def clock_time(seconds: float) -> str:
    """Hours, minutes and seconds; of more than a day, days and hours."""
    whole = round(seconds)
    days, rest = divmod(whole, DAY)
    return f"{days} d {rest // 3600} h" if days else f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"


@contextmanager
def progress_shown(planned: Sequence[tuple[str, float]] = (), passing: bool = False) -> Iterator[Progress]:
    """What shows the progress of a command. planned: its phases in order, with their costs, as far as they are known. passing: of something short,
    which leaves nothing.
    """
    course = Course(planned)
    with _bars(course, passing) if err.is_terminal else _lines(course, passing) as progress:
        yield progress


@contextmanager
def _bars(course: Course, passing: bool) -> Iterator[Progress]:
    from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Said(ProgressColumn):
        """Of a phase how much is done, of the whole the time left."""

        def render(self, task: Any) -> Text:
            return Text(course.said() if task.fields.get("whole") else f"{task.completed:,.0f}/{task.total:,.0f}")

    with Bars(TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn(), Said(), console=err, transient=passing) as bars:
        tasks: dict[int, Any] = {}
        whole: list[Any] = []

        def progress(name: str, done: int, total: int) -> None:
            phase = course.hear(name, done, total)
            if id(phase) not in tasks:
                for task in whole:
                    bars.remove_task(task)
                tasks[id(phase)] = bars.add_task(name, total=total)
                whole[:] = [bars.add_task("in all", total=1.0, whole=True)]  # the last row
                bars.tasks[-1].start_time = course.began
            bars.update(tasks[id(phase)], completed=done, total=total)
            bars.update(whole[0], completed=course.part)

        yield progress


@contextmanager
def _lines(course: Course, passing: bool) -> Iterator[Progress]:
    """A line when a phase begins, every few per cent, and at least every few minutes."""
    ended = Event()
    shown: dict[str, Any] = {"phase": None, "part": 0.0, "at": course.clock()}

    def line() -> None:
        phase = course.now
        err.print(f"{phase.name}: {phase.done:,} of {phase.total:,}; {course.said()}", markup=False, soft_wrap=True)
        shown.update(phase=phase, part=course.part, at=course.clock())

    def progress(name: str, done: int, total: int) -> None:
        phase = course.hear(name, done, total)
        further = abs(course.part - shown["part"]) >= EVERY and course.clock() - shown["at"] >= QUIET
        begins = phase is not shown["phase"] and not phase.finished and (not passing or course.clock() - course.began >= QUIET)
        if begins or further:
            line()

    def watch() -> None:
        while not ended.wait(1.0):
            if course.phases and course.now.total and course.clock() - shown["at"] >= SILENT:
                line()

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield progress
    finally:
        ended.set()
        watcher.join()
