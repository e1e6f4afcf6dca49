"""Reads a page the way a browser would, strictly: what does not nest, or names a thing twice, is an error."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


@dataclass
class Page(HTMLParser):
    """``numbers``: the value and the text of every data element; ``texts``: of every element by its tag; ``links``: all that could be fetched."""

    numbers: list[tuple[float, str]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    open: list[str] = field(default_factory=list)
    _value: str | None = None

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag}: an attribute twice"
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "srcset", "action", "data", "poster"):
                self.links.append(value or "")
            self.links += re.findall(r"url\(([^)]*)\)", value or "")
            assert not name.startswith("on"), f"{tag}: a script in {name}"
        if tag == "data":
            self._value = dict(attrs)["value"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"
        if tag == "data":
            self._value = None

    def handle_data(self, data: str) -> None:
        if self._value is not None:
            self.numbers.append((float(self._value), data))
        if data.strip() and self.open:
            self.texts.append((self.open[-1], data.strip()))


def read_page(text: str) -> Page:
    """Raises AssertionError for what is not well-formed."""
    assert text.lstrip().lower().startswith("<!doctype html>")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == [], f"never closed: {page.open}"
    assert len(page.ids) == len(set(page.ids)), "an id twice"
    for link in page.links:
        assert link.startswith(("#", "data:")), f"{link}: leads out of the page"
        assert link[1:] in page.ids or not link.startswith("#"), f"{link}: leads nowhere"
    return page


def rounds_to(value: float, text: str) -> bool:
    """Whether a text such as 45.3%, 1,234, 3.68 MB, 5e-07 or 1.2 s shows the value to its last digit."""
    found = re.match(r"(-?[\d,]*\.?\d+(?:e[+-]?\d+)?)\s*(%|GB|MB|bytes|ms|s|×)?$", text)
    if not found:
        return False
    shown, unit = found[1].replace(",", ""), found[2]
    scale = {"%": 0.01, "ms": 1e-3, "MB": 1e6, "GB": 1e9}.get(unit or "", 1.0)
    digits, _, power = shown.partition("e")
    decimals = len(digits.partition(".")[2])
    step = 10.0 ** (int(power or 0) - decimals) * scale
    return abs(float(shown) * scale - value) <= 0.5000001 * step
