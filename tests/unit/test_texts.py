"""Which text is read: the file that was named, all of its rows, and windows drawn from the whole of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from huggingface_hub.utils import close_session

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.data import reading
from llmprune.data.documents import form_of
from llmprune.data.reading import read_windows
from llmprune.data.rows import rows
from llmprune.data.sources import find_source
from llmprune.data.texts import read_text
from llmprune.errors import RequestError

LENGTH = 8


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def text_of(path: Path | str) -> str:
    source = find_source(str(path), "calibration")
    return read_text(source, form_of(source)).text


def numbered(path: Path, rows: int) -> Path:
    """Rows of one window each; but for the joints of .jsonl, which are part of it."""
    lines = [f"{i:06d}" for i in range(rows)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines) if path.suffix == ".jsonl" else "".join(f"{x};\n" for x in lines))
    return path


def numbers(path: Path, wanted: int, seed: int | None) -> list[int]:
    found = read_windows(str(path), "calibration", Letters(), LENGTH, wanted, draw=seed)
    return [int("".join(map(chr, ids[:6]))) for ids in found.ids_NL.tolist()][:wanted]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone two")
    assert text_of(tmp_path / "a.txt") == "one two"


def test_a_name_is_not_a_pattern(tmp_path: Path) -> None:
    """``datasets`` takes paths for patterns: a[1].txt would be read from a1.txt."""
    for name in ("a1.txt", "ab.txt"):
        (tmp_path / name).write_text("another file")
    for name in ("a[1].txt", "a?.txt", "a*.txt", "[!x].txt"):
        (tmp_path / name).write_text(f"this is {name}")
        assert text_of(tmp_path / name) == f"this is {name}"


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_text("one two")
    assert text_of(tmp_path / "A.TXT") == "one two"


def test_one_column_is_read_of_all_rows(tmp_path: Path) -> None:
    """Rows without text in it are skipped, and counted."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": null, "title": "t"}\n{"text": "one", "title": "t"}\n{"text": 5, "title": "not this"}\n{"text": "two", "title": null}\n')
    assert text_of(rows) == "one\n\ntwo"
    source = find_source(str(rows), "calibration")
    assert read_text(source, form_of(source)).skipped == 2
    rows.write_text('{"a": "one", "n": 1}\n{"a": "two", "n": 2}\n')
    assert text_of(rows) == "one\n\ntwo"
    rows.write_text('{"a": "one", "b": "two"}\n')
    with pytest.raises(RequestError, match=r"rows.jsonl: no column 'text' or 'messages' among a, b"):
        text_of(rows)


def test_a_folder_of_a_data_sets_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("c4", "org/texts"):
        Path(name).mkdir(parents=True)
    assert find_source("c4", "calibration").builder == "allenai/c4"
    with pytest.raises(RequestError, match="texts: is a folder without data"):
        find_source("org/texts", "calibration")


def test_a_hub_that_cannot_be_reached_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the data set is read: a run that has its windows already resumes without it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    close_session()
    source = find_source("c4", "calibration")
    assert source.identity is None
    began = perf_counter()
    with pytest.raises(RequestError, match="data set 'allenai/c4': the Hub cannot be reached") as refused:
        next(rows(source))
    assert "give files of your own" in refused.value.hint
    assert perf_counter() - began < 5
    close_session()


def test_identities_follow_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = find_source(str(path), "calibration").identity
    assert first.startswith("sha256 ")
    path.write_text("two")
    assert find_source(str(path), "calibration").identity != first
    monkeypatch.setattr("llmprune.data.sources.HASHED", 2)
    assert find_source(str(path), "calibration").identity == f"3 bytes of {path.stat().st_mtime_ns}"
    pinned = find_source(f"org/words@{'ab' * 20}", "calibration")
    assert pinned.identity == pinned.revision == "ab" * 20


@pytest.mark.parametrize("name", ["rows.jsonl", "lines.txt"])
@pytest.mark.parametrize("large", [False, True])
def test_windows_are_drawn_from_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, large: bool) -> None:
    if large:
        monkeypatch.setattr(reading, "WHOLE", 0)
        monkeypatch.setattr(reading, "PIECE", 200)
    path = numbered(tmp_path / name, 2000)
    drawn = numbers(path, 100, 0)
    assert len(set(drawn)) == 100
    assert min(drawn) < 200
    assert max(drawn) > 1800
    assert numbers(path, 100, 0) == drawn
    assert numbers(path, 100, 1) != drawn
    assert numbers(path, 100, None) == list(range(100))
    found = read_windows(str(path), "calibration", Letters(), LENGTH, 100, draw=7)
    count = int(found.drawn_from.split()[0].replace(",", ""))
    assert found.drawn_from == f"{count:,} windows, seed 7"
    assert 1900 <= count <= 2000  # the tails of pieces are dropped
    assert read_windows(str(path), "calibration", Letters(), LENGTH, 100).drawn_from == ""


def test_every_window_of_a_large_file_is_as_likely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 40 windows is drawn 10 in 40 times, and first as often as last."""
    monkeypatch.setattr(reading, "WHOLE", 0)
    monkeypatch.setattr(reading, "PIECE", 64)
    path = numbered(tmp_path / "lines.txt", 40)
    draws = [numbers(path, 10, seed) for seed in range(300)]
    times = torch.tensor([Counter(n for draw in draws for n in draw)[i] for i in range(40)])
    firsts = torch.tensor([Counter(n for draw in draws for n in draw[:5])[i] for i in range(40)])
    for found, chance in ((times, 10 / 40), (firsts, 5 / 40)):
        spread = (300 * chance * (1 - chance)) ** 0.5
        assert float((found - 300 * chance).abs().max()) < 4.5 * spread
    assert all(len(set(draw)) == 10 for draw in draws)


def test_memory_is_bounded_by_the_windows_and_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = []

    class Watched(Letters):
        def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
            longest.append(len(text))
            return super().__call__(text, verbose)

    monkeypatch.setattr(reading, "WHOLE", 0)
    monkeypatch.setattr(reading, "PIECE", 400)
    read_windows(str(numbered(tmp_path / "lines.txt", 1000)), "calibration", Watched(), LENGTH, 10, draw=0)
    assert max(longest) <= 408
    assert sum(longest) == 8000


def test_a_model_in_memory_says_which_text_it_was_calibrated_on() -> None:
    model, tokenizer = llmprune.load(BUNDLED / "llama")
    ask: dict[str, Any] = {"pattern": "2:4", "method": "magnitude", "calibration": "bundled-calibration", "tokenizer": tokenizer}
    report = llmprune.prune(model, **ask, samples=4, sequence_length=64, shuffle=True, seed=5)
    assert (report.calibration.dataset, report.calibration.split, report.calibration.windows) == ("bundled text", "calibration", 4)
    assert re.fullmatch(r"[\d,]+ windows, seed 5", report.calibration.drawn_from)
    ids_NL = torch.randint(3, 90, (12, 32), generator=torch.Generator().manual_seed(0))
    given = llmprune.prune(model, pattern="2:4", method="magnitude", calibration=ids_NL, samples=4, shuffle=True)
    assert (given.calibration.dataset, given.calibration.drawn_from) == ("given token ids", "12 windows, seed 0")
