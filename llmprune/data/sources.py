"""Text for calibration and evaluation, opened by ``datasets``: the bundled corpus, well-known sets, Hub ids, .txt, .jsonl, .parquet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.errors import RequestError, first_line

BUNDLED = Path(__file__).parent / "bundled"
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Known:
    """How a well-known data set is read: the papers' conventions."""

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
class Text:
    """A text and where it is from. ``complete`` is False when a large source was read in part."""

    text: str
    dataset: str
    split: str
    complete: bool = True


def read_text(spec: str, purpose: str, characters: int | None, seed: int) -> Text:
    """The text that ``spec`` names. ``purpose`` is "calibration" or "evaluation"; it picks the split.

    Files of plain text are read whole; of row sources, rows are joined until ``characters`` are there (None: all of them).
    Raises RequestError when it cannot be had, is empty, or has no text column.
    """
    if spec in BUNDLED_NAMES:
        path = BUNDLED / BUNDLED_NAMES[spec]
        return Text(_plain(path), "bundled text", path.stem)
    path = Path(spec).expanduser()
    if path.suffix in BUILDERS or path.exists():
        return _file(path, characters)
    name, _, revision = spec.partition("@")
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
    split = known.splits[purpose]
    rows = _open(known.repo, known.config, split, known.files[purpose] if known.files else None, revision=revision or None)
    limit = known.documents if purpose == "evaluation" else None
    text, complete = _join(rows, known.joined_by, characters if limit is None else None, limit, spec)
    return Text(text, spec, split, complete or limit is not None)


def _file(path: Path, characters: int | None) -> Text:
    builder = BUILDERS.get(path.suffix)
    if builder is None:
        raise RequestError(f"{path.name}: cannot tell what {path.suffix or 'a file without suffix'} holds", f"give one of {', '.join(BUILDERS)}")
    if not path.is_file():
        raise RequestError(f"{path.name}: no such file", "check the path")
    if not path.stat().st_size:
        raise RequestError(f"{path.name}: the file is empty", "give a text")
    if builder == "text":
        return Text(_plain(path), path.name, "all")
    rows = _open(builder, None, "train", str(path))
    text, complete = _join(rows, "\n\n", characters, None, path.name)
    return Text(text, path.name, "all", complete)


def _plain(path: Path) -> str:
    rows = _open("text", None, "train", str(path), sample_by="document")
    return _join(rows, "", None, None, path.name)[0]


def _open(builder: str, config: str | None, split: str, file: str | None, **options: Any) -> Any:
    """Rows of a data set, streamed: nothing is copied into a cache."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    files = {"data_files": {split: file}} if file else {}
    try:
        return load_dataset(builder, config, split=split, streaming=True, **files, **options)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError) as error:
        raise RequestError(f"data set {builder!r}: {first_line(error)[:160]}", "check the name, the split and your network") from None


def _join(rows: Any, joined_by: str, characters: int | None, documents: int | None, name: str) -> tuple[str, bool]:
    parts: list[str] = []
    size = 0
    complete = True
    try:
        for row in rows:
            parts.append(_text_of(row, name))
            size += len(parts[-1])
            if (characters is not None and size >= characters) or (documents is not None and len(parts) >= documents):
                complete = False
                break
    except (UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"{name}: cannot be read as text ({str(error)[:100]})", "give UTF-8 text") from None
    text = joined_by.join(parts)
    if not text.strip():
        raise RequestError(f"{name}: holds no text", "give a text")
    if "\0" in text:
        raise RequestError(f"{name}: holds NUL characters, so it is no text", "give UTF-8 text")
    return text, complete


def _text_of(row: dict[str, Any], name: str) -> str:
    if isinstance(row.get("text"), str):
        return row["text"]
    columns = [k for k, v in row.items() if isinstance(v, str)]
    if len(columns) == 1:
        return row[columns[0]]
    raise RequestError(f"{name}: no column 'text' among {', '.join(row)}", "name the text column 'text'")
