"""What blocks hand on beside hidden states: further values that a block returns and the next one takes as arguments.

While calls are recorded, a placeholder stands for each such value. The call then names it in a mapping that all calls of a micro-batch share, into
which the block before writes whenever it runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Rest:
    """Placeholder for one of the values that a block returns after its hidden states, at ``place`` of the tuple."""

    block: int
    place: int


class Handed(dict[tuple[int, int], Any]):
    """The further values that blocks have returned, by (block, place). keep: all of them, rather than those of the last two blocks."""

    keep = False

    def put(self, block: int, values: tuple[Any, ...]) -> None:
        """What a block has returned after its hidden states. It may run again, so the values that it took itself stay."""
        for key in [key for key in self if key[0] == block or (key[0] < block - 1 and not self.keep)]:
            del self[key]
        self.update({(block, place): value for place, value in enumerate(values, 1)})


@dataclass(frozen=True)
class Carried:
    """An argument that the block before has returned."""

    handed: Handed
    key: tuple[int, int]


@dataclass(frozen=True)
class Call:
    """Arguments of one block besides its hidden states; ``keyword`` names those when they are not the first positional argument. handed: where
    the further values that it returns are left, with its number; None where the next block takes none.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None = None
    handed: Handed | None = field(default=None, compare=False)
    block: int = 0

    def arguments(self) -> Call:
        """With the values that the block before has left, which must have run."""
        return self.with_values(lambda value: value.handed[value.key] if isinstance(value, Carried) else value)

    def with_values(self, change: Any) -> Call:
        """With each argument changed."""
        return replace(self, args=tuple(change(a) for a in self.args), kwargs={k: change(v) for k, v in self.kwargs.items()})


def only_from(call: Call, block: int) -> bool:
    """Whether the placeholders among a call's arguments stand for values of that block alone, none of them inside a container."""
    values = [*call.args, *call.kwargs.values()]
    return all(value.block == block if isinstance(value, Rest) else not _has_rest(value) for value in values)


def with_names(calls: list[Call]) -> list[Call]:
    """Recorded calls with the names of carried values in place of their placeholders."""
    handed = Handed()
    takes = [_has_rest((call.args, call.kwargs)) for call in calls] + [False]

    def name(value: Any) -> Any:
        return Carried(handed, (value.block, value.place)) if isinstance(value, Rest) else value

    return [replace(call.with_values(name), handed=handed if takes[i + 1] else None, block=i) for i, call in enumerate(calls)]


def _has_rest(value: Any) -> bool:
    """Whether a placeholder is in an argument."""
    if isinstance(value, dict | tuple | list):
        return any(_has_rest(inner) for inner in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Rest)
