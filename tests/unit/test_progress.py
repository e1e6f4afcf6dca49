"""Time left and lines of progress, by a clock of the test's own."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llmprune.cli import progress
from llmprune.cli.progress import Course, clock_time, progress_shown

PLAN = (("dense evaluation", 10.0), ("gradients", 40.0), ("prune", 30.0), ("pruned evaluation", 15.0), ("write", 5.0))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def walk(course: Course, clock: Clock, name: str, seconds: float, steps: int = 10) -> list[tuple[float, float | None]]:
    """(the time, the estimate) after each step of a phase."""
    found = []
    for done in range(steps + 1):
        clock.now += seconds / steps if done else 0
        course.hear(name, done, steps)
        found.append((clock.now, course.left()))
    return found


def test_a_plan_that_is_right_gives_the_time_left_at_once() -> None:
    course = Course(PLAN, clock := Clock())
    for name, cost in PLAN:
        for now, left in walk(course, clock, name, 2 * cost):
            assert left == (pytest.approx(200 - now) if now else None)
    assert course.part == 1


def test_phases_of_a_kind_take_as_long_for_the_same_work() -> None:
    course = Course(PLAN, clock := Clock())
    walk(course, clock, "dense evaluation", 20)
    walk(course, clock, "gradients", 1000)
    walk(course, clock, "prune", 2)
    left = course.left()
    assert left == pytest.approx(30 + 5 * 1022 / 80)  # the evaluation as the dense one, the writing as all so far


def test_time_passes_between_two_steps() -> None:
    course = Course(PLAN, clock := Clock())
    walk(course, clock, "dense evaluation", 10)
    before = course.left()
    clock.now += 3
    assert course.left() == pytest.approx(before - 3)
    clock.now += 1e6
    assert course.left() == 0


def test_what_was_not_planned_and_what_is_left_out() -> None:
    course = Course(PLAN, clock := Clock())
    walk(course, clock, "dense evaluation", 10)
    walk(course, clock, "allocation", 7)  # in the place of the gradients, which never come
    assert course.left() == pytest.approx(90)
    walk(course, clock, "prune", 30)
    assert course.left() == pytest.approx(20)
    assert [phase.name for phase in course.phases] == ["dense evaluation", "allocation", "gradients", "prune", "pruned evaluation", "write"]


def test_phases_by_turns_and_again() -> None:
    course = Course([("sweep", 30.0), ("write", 10.0)], clock := Clock())
    course.hear("sweep", 0, 3)
    for row in range(3):
        walk(course, clock, "trials", 5)
        clock.now += 5
        course.hear("sweep", row + 1, 3)
    assert [phase.name for phase in course.phases].count("sweep") == 1
    assert course.phases[-2].seconds == 15
    twice = Course([("prune", 1.0), ("prune", 1.0)], clock)
    for _ in range(2):
        walk(twice, clock, "prune", 10)
    assert [phase.seconds for phase in twice.phases] == [10, 10]


def test_a_log_has_a_line_for_each_phase_and_for_every_few_per_cent(monkeypatch: pytest.MonkeyPatch) -> None:
    console, clock = Console(file=io.StringIO(), width=40), Clock()
    monkeypatch.setattr(progress, "err", console)
    monkeypatch.setattr(progress, "Course", lambda planned: Course(planned, clock))
    with progress_shown(PLAN) as hear:
        for name, cost in PLAN:
            for done in range(1001):
                clock.now += 10 * cost / 1000 if done else 0
                hear(name, done, 1000)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [name for name, _ in PLAN] == list(dict.fromkeys(line.split(":")[0] for line in lines))
    assert 20 <= len(lines) <= 30
    assert lines[0] == "dense evaluation: 0 of 1,000; time left: not known yet"
    assert "gradients: 0 of 1,000; 10% of all, 0:15:00 left" in lines
    assert all("left" in line for line in lines)


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (90000, "1 d 1 h")])
def test_times_in_words(seconds: float, said: str) -> None:
    assert clock_time(seconds) == said
