"""Many cases in one test: ``folded`` reads like pytest's ``parametrize``, but loops, where a test for each case costs more than the case.

A failure says which case it was: the exception carries it as a note, which pytest prints. Fixtures are made once for all cases.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

Test = Callable[..., None]


class Case:
    """One turn of a loop over cases; whatever is raised in it carries the case's name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(f"case: {self._name}")


def folded(names: str | tuple[str, ...], cases: Iterable[Any]) -> Callable[[Test], Test]:
    """Call the test once for each case, in order: a value of the named argument, or one of each for several names."""
    several, cases = isinstance(names, tuple), list(cases)
    assert cases, "a test of nothing"

    def fold(test: Test) -> Test:
        @functools.wraps(test)
        def run(**given: Any) -> None:
            for number, values in enumerate(cases):
                named = dict(zip(names, values, strict=True)) if several else {names: values}
                with Case(f"{number}, {named}"):
                    test(**given, **named)

        return without(run, test, *(names if several else (names,)))

    return fold


def without(run: Test, test: Test, *names: str, instead: tuple[str, ...] = ()) -> Test:
    """``run`` with the signature of ``test`` but for the arguments that it gives itself; ``instead``: those that it takes for them."""
    left = [p for p in inspect.signature(test).parameters.values() if p.name not in names]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in instead]
    run.__signature__ = inspect.Signature([*left, *added])  # type: ignore[attr-defined]
    return run
