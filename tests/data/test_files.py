"""Files of texts and dialogues: every format against what ``datasets`` itself reads, and every fault in one line."""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from llmprune.data.documents import form_of
from llmprune.data.sources import find_source
from llmprune.data.texts import Text, read_text
from llmprune.errors import RequestError

ROWS: list[dict[str, Any]] = [{"text": "one 1", "n": 1}, {"text": "zwei ä", "n": 2}, {"text": None, "n": 3}, {"text": "three", "n": 4}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
JOINED = "one 1\n\nzwei ä\n\nthree"
PLAIN = "one 1\nzwei ä\n\nthree\n"


def read(path: Path | str, purpose: str = "calibration", **how: str) -> Text:
    source = find_source(str(path), purpose, **how)
    return read_text(source, form_of(source))


def said(path: Path | str, **how: str) -> str:
    """The line that refuses a file."""
    with pytest.raises(RequestError) as refused:
        read(path, **how)
    assert refused.value.hint
    assert "\n" not in refused.value.message
    assert str(Path(path).parent) not in refused.value.message
    return refused.value.message


def packed(opener: Callable[..., Any], data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with opener(path, "wb") as file:
            file.write(data)

    return write


def plain(data: str | bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data.encode() if isinstance(data, str) else data)


def table(path: Path) -> None:
    pandas.DataFrame(ROWS).to_parquet(path)


def zstd(path: Path) -> None:
    packed(pytest.importorskip("zstandard", reason="zstandard is not installed").open, LINES.encode())(path)


CSV = pandas.DataFrame(ROWS).to_csv(index=False)
GOOD: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "a.txt": (plain(PLAIN), PLAIN, 0),
    "bom.txt": (plain(codecs.BOM_UTF8 + PLAIN.encode()), PLAIN, 0),
    "a.txt.gz": (packed(gzip.open, PLAIN.encode()), PLAIN, 0),
    "a.txt.xz": (packed(lzma.open, PLAIN.encode()), PLAIN, 0),
    "a.jsonl": (plain(LINES), JOINED, 1),
    "bom.jsonl": (plain(codecs.BOM_UTF8 + LINES.encode()), JOINED, 1),
    "blank.jsonl": (plain(LINES.replace("\n", "\n\n")), JOINED, 1),
    "a.jsonl.gz": (packed(gzip.open, LINES.encode()), JOINED, 1),
    "a.jsonl.xz": (packed(lzma.open, LINES.encode()), JOINED, 1),
    "a.JSONL": (plain(LINES), JOINED, 1),
    "a.json": (plain(json.dumps(ROWS, indent=1)), JOINED, 1),
    "a.json.gz": (packed(gzip.open, json.dumps(ROWS).encode()), JOINED, 1),
    "a.csv": (plain(CSV), JOINED, 1),
    "bom.csv": (plain(codecs.BOM_UTF8 + CSV.encode()), JOINED, 1),
    "a.csv.xz": (packed(lzma.open, CSV.encode()), JOINED, 1),
    "a.parquet": (table, JOINED, 1),
    "numbers.jsonl": (plain('{"text": 5}\n' + LINES + '{"text": ["a"]}\n'), JOINED, 3),
    "strings.json": (plain(json.dumps(["one 1", "zwei ä", "three"])), JOINED, 0),
    "[a]*?.jsonl": (plain(LINES), JOINED, 1),
    "a*0.5.txt": (plain(PLAIN), PLAIN, 0),
    "a,b.txt": (plain(PLAIN), PLAIN, 0),
    "a.jsonl.zst": (zstd, JOINED, 1),
}


@pytest.mark.parametrize("name", GOOD)
def test_formats(name: str, tmp_path: Path) -> None:
    write, text, skipped = GOOD[name]
    write(tmp_path / name)
    for beside in ("a1.jsonl", "a.txt0.5.txt", "ab.jsonl", "a"):
        (tmp_path / beside).write_text("another file")
    found = read(tmp_path / name)
    assert (found.text, found.skipped) == (text, skipped)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "broken.jsonl": (plain(LINES + '{"text": "fo\n' + LINES), "broken.jsonl: line 5: not JSON (Invalid control character at)"),
    "short.jsonl": (plain(LINES[:-9]), "short.jsonl: line 4: not JSON (Expecting property name enclosed in double quotes)"),
    "first.jsonl": (plain("text\n" + LINES), "first.jsonl: line 1: not JSON (Expecting value)"),
    "short.json": (plain(json.dumps(ROWS, indent=1)[:-20]), "short.json: line 15: not JSON (Unterminated string starting at)"),
    "latin.jsonl": (plain(LINES.encode() + b'{"text": "\xe4"}\n'), "latin.jsonl: line 5: not UTF-8"),
    "latin.txt": (plain(b"one\n\xe4\n"), "latin.txt: line 2: not UTF-8"),
    "latin.csv": (plain(b"text,n\nab,1\n\xe4,2\n"), "latin.csv: line 3: not UTF-8"),
    "short.jsonl.gz": (lambda path: path.write_bytes(gzip.compress(LINES.encode())[:-12]), "short.jsonl.gz: damaged after line "),
    "short.txt.xz": (lambda path: path.write_bytes(lzma.compress(PLAIN.encode())[:-12]), "short.txt.xz: damaged after line "),
    "plain.jsonl.gz": (plain(LINES), "plain.jsonl.gz: damaged after line 0"),
    "plain.jsonl.xz": (plain(LINES), "plain.jsonl.xz: damaged after line 0"),
    "wide.csv": (plain("text,n\nab,1\ncd,2,3,4\n"), "wide.csv: cannot be read (Error tokenizing data. C error: Expected 2 fields in line 3, saw 4"),
    "short.parquet": (lambda path: (table(path), path.write_bytes(path.read_bytes()[:-20])), "short.parquet: cannot be read (Parquet magic bytes"),
    "empty.jsonl": (plain(""), "empty.jsonl: the file is empty"),
    "head.csv": (plain("text,n\n"), "head.csv: has no rows"),
    "numbers.csv": (plain("text,n\n5,1\n6,2\n"), "numbers.csv: no text in its first rows, whose columns are text, n"),
    "null.jsonl": (plain('{"text": null}\n'), "null.jsonl: no text in its first rows, whose columns are text"),
    "two.jsonl": (plain('{"a": "x", "b": "y"}\n'), "two.jsonl: no column 'text' or 'messages' among a, b"),
    "nested.json": (plain(json.dumps({"data": ROWS})), "nested.json: no text in its first rows, whose columns are data"),
    "blank.txt": (plain(" \n \n"), "blank.txt: holds no text"),
    "nul.txt": (plain("one\0two"), "nul.txt: holds NUL characters"),
    "a.parquet.gz": (plain("x"), "a.parquet.gz: unknown format .parquet.gz"),
    "a.docx": (plain("x"), "a.docx: unknown format .docx"),
}


@pytest.mark.parametrize("name", BAD)
def test_faults(name: str, tmp_path: Path) -> None:
    write, message = BAD[name]
    write(tmp_path / name)
    assert said(tmp_path / name).startswith(message)


def test_a_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x", "text": "y", "n": 1}\n{"a": null, "text": "z", "n": 2}\n')
    found = read(path, column="a")
    assert (found.text, found.skipped) == ("x", 1)
    assert said(path, column="b") == "a.jsonl: has no column 'b'"
    assert said(path, column="n") == "a.jsonl: column 'n' holds no text"
    (tmp_path / "a.txt").write_text("x")
    assert said(tmp_path / "a.txt", column="a") == "column 'a' of a.txt, which is plain text"
    assert said(tmp_path / "a.txt", split="test") == "split 'test' of a.txt, which has no splits to choose from"


def test_a_folder_of_texts(tmp_path: Path) -> None:
    """All files in the order of their names, without hidden ones; what else is there is no data."""
    folder = tmp_path / "[texts]*"
    for name, text in {"b.txt": "two", "a.txt": "one", "deep/c.txt": "three", ".hidden.txt": "no", "notes.docx": "no", "d.txt": ""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    found = read(folder)
    assert (found.text, found.dataset, found.split) == ("one\n\ntwo\n\nthree", "[texts]*", "all")
    before = find_source(str(folder), "calibration").identity
    (folder / "deep" / "c.txt").write_text("four")
    assert find_source(str(folder), "calibration").identity != before
    (folder / "a.jsonl").write_text(LINES)
    assert said(folder) == "[texts]*: holds files of several formats (json, text)"
    (folder / "a.jsonl").unlink()
    (folder / "b.txt").write_bytes(b"\xe4")
    assert said(folder) == "[texts]*: b.txt, line 1: not UTF-8"


@pytest.mark.parametrize(
    "names", [("train.jsonl", "test.jsonl"), ("data/train-0.jsonl", "data/validation-0.jsonl"), ("train/x.jsonl", "eval/x.jsonl")]
)
def test_splits_of_a_folder_are_those_of_datasets(names: tuple[str, str], tmp_path: Path) -> None:
    for number, name in enumerate(names):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text(json.dumps({"text": f"of {number}"}) + "\n")
    theirs = load_dataset(str(tmp_path / "set"), streaming=True)
    splits = {split: next(iter(rows))["text"] for split, rows in theirs.items()}
    assert len(splits) == 2
    for split, text in splits.items():
        assert read(tmp_path / "set", split=str(split)).text == text
    assert read(tmp_path / "set").text == splits["train"]
    assert read(tmp_path / "set", "evaluation").text == next(text for split, text in splits.items() if split != "train")
    assert said(tmp_path / "set", split="dev") == "set: has no split 'dev'"
    (tmp_path / "set" / "more.jsonl").write_text(LINES)
    assert said(tmp_path / "set") == "set: has splits, and files of none: more.jsonl"


def test_what_save_to_disk_has_written(tmp_path: Path) -> None:
    whole = Dataset.from_list(ROWS)
    whole.select([0, 1]).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one").text == "\n\n".join(load_from_disk(tmp_path / "one")["text"])
    DatasetDict(train=whole.filter(lambda row: row["n"] > 1), test=whole.select([0])).save_to_disk(tmp_path / "two")
    found = read(tmp_path / "two")
    assert (found.text, found.skipped, found.dataset, found.split) == ("zwei ä\n\nthree", 1, "two", "train")
    assert read(tmp_path / "two", "evaluation").text == "one 1"
    assert read(tmp_path / "two", split="test").text == "one 1"
    assert said(tmp_path / "two", split="dev") == "two: has no split 'dev'"
    (tmp_path / "one" / "state.json").write_text("{")
    assert said(tmp_path / "one") == "one/state.json: lists no _data_files"
