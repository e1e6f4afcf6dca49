"""How data are named: a file, a folder, a data set, or a mixture such as ``a.jsonl*0.7,b.txt*0.3``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from llmprune.errors import RequestError

PART = re.compile(r"\s*(.+?)\s*\*\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*(?:,|$)")
EXACT = 1e-6


def is_path(spec: str) -> bool:
    """Whether something of this name exists."""
    return os.path.exists(Path(spec).expanduser())  # noqa: PTH110  whatever the name is, it raises nothing


def mixture(spec: str) -> list[tuple[str, float]]:
    """(name, share) of each part; none where the spec is no mixture. What exists under the whole name is no mixture.

    Raises RequestError for parts without a share, and shares that are not 1 together.
    """
    if is_path(spec):
        return []
    found, at = [], 0
    while match := PART.match(spec, at):
        found.append((match[1], float(match[2]) / (100 if match[3] else 1)))
        at = match.end()
    if not found:
        return []
    if spec[at:].strip():
        raise RequestError(f"mixture {spec!r}: {spec[at:].strip()!r} has no share", "write a.jsonl*0.7,b.txt*0.3")
    shares = [share for _, share in found]
    if abs(sum(shares) - 1) > EXACT or not all(shares):
        raise RequestError(f"mixture {spec!r}: the shares are {' + '.join(f'{s:g}' for s in shares)} = {sum(shares):g}", "they are to be 1 together")
    return found


def shown(spec: str) -> str:
    """A spec as it is saved: paths as their last name."""
    parts = mixture(spec)
    if parts:
        return ",".join(f"{shown(name)}*{share:g}" for name, share in parts)
    return last_name(spec)


def last_name(place: str) -> str:
    """Of a path that exists; anything else as it is."""
    return Path(place).expanduser().resolve().name if is_path(place) else place
