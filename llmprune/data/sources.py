"""Text for calibration and evaluation, opened by ``datasets``: the bundled corpus, well-known sets, Hub ids, .txt, .jsonl, .parquet."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.checkpoint.files import hash_file
from llmprune.errors import RequestError, first_line

COMMIT = re.compile("[0-9a-f]{40}")
BUNDLED = Path(__file__).parent / "bundled"
HASHED = 1 << 30  # bytes; a larger file is known by its size and time
ANSWERS = 4  # seconds in which the Hub is to answer
BUFFER = 10_000  # rows of a stream among which the next one is drawn
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Known:
    """How a well-known data set is read, by the papers' conventions."""

    repo: str
    config: str | None
    joined_by: str
    splits: dict[str, str]  # purpose -> split
    files: dict[str, str] | None = None  # purpose -> the one file that is read
    documents: int | None = None  # for evaluation


KNOWN = {
    "wikitext2": Known("Salesforce/wikitext", "wikitext-2-raw-v1", "\n\n", {"calibration": "train", "evaluation": "test"}),
    "c4": Known(
        "allenai/c4",
        None,
        " ",
        {"calibration": "train", "evaluation": "validation"},
        {"calibration": "en/c4-train.00000-of-01024.json.gz", "evaluation": "en/c4-validation.00000-of-00008.json.gz"},
        documents=1100,
    ),
}
BUNDLED_NAMES = {"bundled-calibration": "calibration.txt", "bundled-evaluation": "evaluation.txt"}


@dataclass(frozen=True)
class TextSource:
    """Where a text is: found, but not opened."""

    dataset: str  # as it is shown
    split: str
    builder: str  # of ``datasets``, or a repository on the Hub
    joined_by: str
    file: Path | None = None  # a local one
    config: str | None = None
    part: str | None = None  # the one file of a repository that is read
    revision: str | None = None  # of a repository: a commit, where the Hub says which
    documents: int | None = None  # the first so many rows are all

    @property
    def identity(self) -> str | None:
        """What changes with the content: a file's sha256 (of a very large one its size and time), or a commit; None where the Hub does not say."""
        if self.file is None:
            return self.revision if self.revision and COMMIT.fullmatch(self.revision) else None
        state = self.file.stat()
        return f"sha256 {hash_file(self.file)}" if state.st_size <= HASHED else f"{state.st_size} bytes of {state.st_mtime_ns}"


@dataclass(frozen=True)
class Text:
    """A text and its origin. ``complete`` is False when a large source was read in part."""

    text: str
    dataset: str
    split: str
    complete: bool = True


def find_source(spec: str, purpose: str) -> TextSource:
    """What ``spec`` names. ``purpose`` is "calibration" or "evaluation"; it picks the split. Raises RequestError when it does not exist."""
    if spec in BUNDLED_NAMES:
        path = BUNDLED / BUNDLED_NAMES[spec]
        return TextSource("bundled text", path.stem, "text", "", path)
    name, _, revision = spec.partition("@")
    path = Path(spec).expanduser()
    if path.suffix.lower() in BUILDERS or path.is_file() or (path.is_dir() and name not in KNOWN):
        return _find_file(path)
    known = KNOWN.get(name)
    if known is None:
        repo, _, config = name.partition(":")
        if repo.count("/") != 1:
            names = ", ".join([*KNOWN, *BUNDLED_NAMES])
            raise RequestError(
                f"data {spec!r}: no such file and no known data set",
                f"give a .txt, .jsonl or .parquet file, {names}, or org/name[:config][@revision]",
            )
        known = Known(repo, config or None, "\n\n", {"calibration": "train", "evaluation": "test"})
    part = known.files[purpose] if known.files else None
    limit = known.documents if purpose == "evaluation" else None
    at = resolved(known.repo, revision or None)
    return TextSource(spec, known.splits[purpose], known.repo, known.joined_by, None, known.config, part, at, limit)


def _find_file(path: Path) -> TextSource:
    builder = BUILDERS.get(path.suffix.lower())
    if path.is_dir():
        raise RequestError(f"{path.name}: is a folder", f"give a file, one of {', '.join(BUILDERS)}")
    if builder is None:
        raise RequestError(f"{path.name}: unknown format {path.suffix or '(no suffix)'}", f"give one of {', '.join(BUILDERS)}")
    if not path.is_file():
        raise RequestError(f"{path.name}: no such file", "check the path")
    if not path.stat().st_size:
        raise RequestError(f"{path.name}: the file is empty", "give a text")
    return TextSource(path.name, "all", builder, "" if builder == "text" else "\n\n", path)


def resolved(repo: str, revision: str | None) -> str | None:
    """The commit that a revision of a data set stands for now; as it was asked for, where the Hub knows none.

    Raises RequestError where the Hub cannot be reached: ``datasets`` would try again for half a minute.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    if revision and COMMIT.fullmatch(revision):
        return revision
    try:
        return HfApi().dataset_info(repo, revision=revision, expand=["sha"], timeout=ANSWERS).sha or revision
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):  # said better when it is opened
        return revision
    except (HTTPError, OSError) as error:
        hint = "check your network, or give a file of yours: .txt, .jsonl or .parquet"
        raise RequestError(f"data set {repo!r}: the Hub cannot be reached ({first_line(error)[:120]})", hint) from None


def read_text(source: TextSource, characters: int | None = None, draw: int | None = None) -> Text:
    """The text of a source. Files of plain text are read whole; of row sources, rows are joined until there are ``characters`` (None: all of them).
    draw: a seed, by which the rows of a stream are shuffled in a buffer.

    Raises RequestError when it cannot be read, is empty, or has no text column.
    """
    most = None if source.builder == "text" or source.documents else characters
    parts: list[str] = []
    size, complete = 0, True
    for text in rows_of(source, draw):
        parts.append(text)
        size += len(text)
        if (most is not None and size >= most) or len(parts) == source.documents:
            complete = source.documents is not None
            break
    text = without_nul(source.joined_by.join(parts), source.dataset)
    if not text.strip():
        raise RequestError(f"{source.dataset}: holds no text", "give a text")
    return Text(text, source.dataset, source.split, complete)


def pieces(source: TextSource, characters: int) -> Iterator[Text]:
    """The text of a file in pieces of at least so many characters, cut between rows, or between lines of plain text. Raises RequestError."""
    parts: list[str] = []
    size = 0
    for text in rows_of(source, whole=False):
        parts.append(text)
        size += len(text)
        if size >= characters:
            yield Text(without_nul(source.joined_by.join(parts), source.dataset), source.dataset, source.split)
            parts, size = [], 0
    yield Text(without_nul(source.joined_by.join(parts), source.dataset), source.dataset, source.split)


def without_nul(text: str, name: str) -> str:
    if "\0" in text:
        raise RequestError(f"{name}: holds NUL characters, so it is not text", "give UTF-8 text")
    return text


def rows(source: TextSource, draw: int | None = None, buffer: int = BUFFER) -> Iterator[dict[str, Any]]:
    """The rows of a source as they are, streamed. draw: a seed, by which they are shuffled in a buffer.

    Raises RequestError when it cannot be opened or read.
    """
    try:
        yield from _rows(source, draw, buffer)
    except (UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"{source.dataset}: cannot be read ({str(error)[:100]})", "give UTF-8 text") from None


def rows_of(source: TextSource, draw: int | None = None, whole: bool = True) -> Iterator[str]:
    """The text of each row, streamed: nothing is copied into a cache. whole: plain text is one row, else a row a line."""
    options: dict[str, Any] = (
        {"encoding": "utf-8-sig", "keep_linebreaks": True, "sample_by": "document" if whole else "line"} if source.builder == "text" else {}
    )
    return _texts(_rows(source, None if source.file else draw, **options), source.dataset)


def _rows(source: TextSource, draw: int | None, buffer: int = BUFFER, **options: Any) -> Any:
    if source.file is None:
        found = _open(source.builder, source.config, source.split, source.part, revision=source.revision)
    else:
        found = _open(source.builder, None, "train", glob.escape(str(source.file)), **options)
    return found if draw is None else found.shuffle(seed=draw, buffer_size=buffer)


def _open(builder: str, config: str | None, split: str, file: str | None, **options: Any) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    files = {"data_files": {split: file}} if file else {}
    try:
        return load_dataset(builder, config, split=split, streaming=True, **files, **options)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError) as error:
        raise RequestError(f"data set {builder!r}: {first_line(error)[:160]}", "check the name, the split and your network") from None


def _texts(rows: Any, name: str) -> Iterator[str]:
    """One column of all rows: that of the first row."""
    column = ""
    try:
        for number, row in enumerate(rows, 1):
            column = column or column_of(row, name)
            if not isinstance(row.get(column), str):
                raise RequestError(f"{name}, row {number}: {column!r} holds no text", "leave such rows out")
            yield row[column]
    except (UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"{name}: cannot be read as text ({str(error)[:100]})", "give UTF-8 text") from None


def column_of(row: dict[str, Any], name: str) -> str:
    """The column of text: ``text``, or the only one of strings. Raises RequestError when there is none."""
    columns = [k for k, v in row.items() if isinstance(v, str)]
    if "text" in row or len(columns) == 1:
        return "text" if "text" in row else columns[0]
    raise RequestError(f"{name}: no column 'text' among {', '.join(row)}", "name the text column 'text'")
