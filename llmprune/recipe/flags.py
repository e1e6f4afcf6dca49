"""How the command line shows a field of a recipe, declared on the field itself; its text is the field's description."""

from __future__ import annotations

from dataclasses import dataclass

MOST_USED = "Options"
WHAT = "What to prune"
HOW = "How"
BUDGET = "Budgets, instead of a sparsity"
SMALLER = "Structured patterns"
DATA = "Data"
OUTPUT = "Output"
HUB = "Hub"
ROUNDS = "In rounds"
MACHINE = "Machine"

PANELS = (MOST_USED, WHAT, HOW, BUDGET, SMALLER, ROUNDS, DATA, OUTPUT, HUB, MACHINE)  # of the help, in its order


@dataclass(frozen=True)
class Flag:
    """Metadata of a field.

    value: the kind of its value, as shown in the help (FLOAT, PATH); by default from the field's type.
    default: in words, where it is not a fixed value.
    name: of the flag, where it is not the field's: for a table, whose entries are given one by one.
    """

    panel: str
    value: str = ""
    default: str = ""
    name: str = ""
