"""Where data are: the bundled text, well-known data sets, Hub ids, local files and folders, mixtures of them. They are found here, and not opened."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmprune.checkpoint.files import hash_file
from llmprune.data.specs import is_path, mixture
from llmprune.errors import RequestError, first_line

COMMIT = re.compile("[0-9a-f]{40}")
BUNDLED = Path(__file__).parent / "bundled"
HASHED = 1 << 30  # bytes; a larger file is known by its size and time
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".xz", ".zst")
FORMATS = ".txt, .jsonl, .json, .csv (also .gz, .xz, .zst of them), .parquet"
ANSWERS = 4  # seconds in which the Hub is to answer
GIVEN = "given"  # the builder of what is in memory
STORED, STORED_SPLITS = "state.json", "dataset_dict.json"  # of what ``save_to_disk`` writes


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
    """Where texts or dialogues are. files: local ones; of a folder, all of them in order. given: rows in memory, instead. column: the only one that
    is read. parts: of a mixture, (share, source).
    """

    dataset: str  # as it is shown
    split: str
    builder: str  # of ``datasets``, or a repository on the Hub
    joined_by: str
    files: tuple[Path, ...] = ()
    config: str | None = None
    part: str | None = None  # the one file of a repository that is read
    revision: str | None = None  # of a repository: a commit, where the Hub says which
    documents: int | None = None  # the first so many rows are all
    column: str | None = None
    given: Iterable[dict[str, Any]] | None = field(default=None, compare=False)
    parts: tuple[tuple[float, TextSource], ...] = ()

    @property
    def plain(self) -> bool:
        """Files of text, which have no rows."""
        return self.builder == "text"

    @property
    def bytes(self) -> int:
        """Of local files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def identity(self) -> str | None:
        """What changes with the content: sha256 of the files (of a very large one its size and time), or a commit; None where it is not known."""
        if self.parts:
            every = [part.identity for _, part in self.parts]
            return None if None in every else "; ".join(str(one) for one in every)
        if not self.files:
            return self.revision if self.revision and COMMIT.fullmatch(self.revision) else None
        if len(self.files) == 1:
            return _state_of(self.files[0])
        return f"sha256 {hashlib.sha256(repr([(file.name, _state_of(file)) for file in self.files]).encode()).hexdigest()}"


def _state_of(file: Path) -> str:
    state = file.stat()
    return f"sha256 {hash_file(file)}" if state.st_size <= HASHED else f"{state.st_size} bytes of {state.st_mtime_ns}"


def find_source(spec: str, purpose: str, column: str | None = None, split: str | None = None) -> TextSource:
    """What ``spec`` names. purpose: "calibration" or "evaluation"; it picks the split unless one is given. column: of texts or of messages.

    Raises RequestError when it does not exist, or has no columns or splits to choose from.
    """
    shares = mixture(spec)
    found = [_find_one(name, purpose, split) for name, _ in shares] or [_find_one(spec, purpose, split)]
    if split is not None and all(source.split != split for source in found):
        raise RequestError(f"split {split!r} of {found[0].dataset}, which has no splits to choose from", "omit the split")
    if column is not None and all(source.plain for source in found):
        raise RequestError(f"column {column!r} of {found[0].dataset}, which is plain text", "omit the column")
    found = [source if source.plain else replace(source, column=column) for source in found]
    if not shares:
        return found[0]
    parts = tuple((share, source) for (_, share), source in zip(shares, found, strict=True))
    said = " + ".join(f"{share:g} {source.dataset}" for share, source in parts)
    return TextSource(said, " + ".join(source.split for source in found), "mixture", "", parts=parts)


def _find_one(spec: str, purpose: str, split: str | None) -> TextSource:
    if spec in BUNDLED_NAMES:
        path = BUNDLED / BUNDLED_NAMES[spec]
        return TextSource("bundled text", path.stem, "text", "", (path,))
    name, _, revision = spec.partition("@")
    path = Path(spec).expanduser()
    if is_path(spec) and path.is_dir() and name not in KNOWN:
        return _find_folder(path, purpose, split)
    if builder_of(path) or (is_path(spec) and path.is_file()):
        return _find_file(path)
    known = KNOWN.get(name)
    if known is None:
        repo, _, config = name.partition(":")
        if repo.count("/") != 1:
            names = ", ".join([*KNOWN, *BUNDLED_NAMES])
            raise RequestError(
                f"data {spec[:80]!r}: no such file and no known data set",
                f"give a file ({FORMATS}), a folder of them, {names}, or org/name[:config][@revision]; in Python also a list of texts",
            )
        known = Known(repo, config or None, "\n\n", {"calibration": "train", "evaluation": "test"})
    elif split is not None and known.files:
        if split not in known.splits.values():
            raise RequestError(f"{name}: is read from its splits {', '.join(known.splits.values())}, not from {split!r}", "choose one of them")
        purpose = next(one for one, own in known.splits.items() if own == split)
    part = known.files[purpose] if known.files else None
    limit = known.documents if purpose == "evaluation" else None
    at = resolved(known.repo, revision or None)
    return TextSource(spec, split or known.splits[purpose], known.repo, known.joined_by, (), known.config, part, at, limit)


def builder_of(path: Path) -> str | None:
    """What reads a file, by its suffixes; None for an unknown format."""
    packed = path.suffix.lower() in COMPRESSED
    builder = BUILDERS.get((Path(path.stem) if packed else path).suffix.lower())
    return None if packed and builder == "parquet" else builder


def _find_file(path: Path) -> TextSource:
    builder = builder_of(path)
    if builder is None:
        raise RequestError(f"{path.name}: unknown format {''.join(path.suffixes[-2:]) or '(no suffix)'}", f"give one of {FORMATS}")
    if not (is_path(str(path)) and path.is_file()):
        raise RequestError(f"{path.name}: no such file", "check the path")
    if not path.stat().st_size:
        raise RequestError(f"{path.name}: the file is empty", "give a text")
    return TextSource(path.name, "all", builder, "" if builder == "text" else "\n\n", (path,))


def _find_folder(path: Path, purpose: str, split: str | None) -> TextSource:
    """What ``save_to_disk`` has written, or all files of one format, in the order of their names."""
    if (path / STORED_SPLITS).is_file():
        chosen = _chosen(_listed(path / STORED_SPLITS, "splits"), purpose, split, path)
        return replace(_find_folder(path / chosen, purpose, None), dataset=path.name, split=chosen)
    if (path / STORED).is_file():
        builder, found = "arrow", [path / entry["filename"] for entry in _listed(path / STORED, "_data_files")]
        split = None
    else:
        builder, found, split = _files_in(path, purpose, split)
    files = tuple(file for file in found if file.is_file() and file.stat().st_size)
    if not files:
        raise RequestError(f"{path.name}: its files are empty, or missing", "give a text")
    return TextSource(path.name, split or "all", builder, "\n\n", files)


def _files_in(path: Path, purpose: str, split: str | None) -> tuple[str, list[Path], str | None]:
    """(builder, files, split) of a folder. It has splits where the names of its files say more than one of them, by the rule of ``datasets``."""
    every = [file for file in sorted(path.rglob("*")) if file.is_file() and builder_of(file) and not _hidden(file.relative_to(path))]
    builders = sorted({str(builder_of(file)) for file in every})
    if len(builders) != 1:
        said = f"holds files of several formats ({', '.join(builders)})" if builders else "is a folder without data"
        raise RequestError(f"{path.name}: {said}", f"give a folder with files of one format: {FORMATS}")
    splits = {file: _split_in(file.relative_to(path)) for file in every}
    if len({*splits.values()} - {None}) < 2:
        return builders[0], every, None
    outside = [file.name for file, own in splits.items() if own is None]
    if outside:
        raise RequestError(f"{path.name}: has splits, and files of none: {', '.join(outside[:3])}", "move them to another folder")
    chosen = _chosen(sorted({str(own) for own in splits.values()}), purpose, split, path)
    return builders[0], [file for file, own in splits.items() if own == chosen], chosen


def _split_in(path: Path) -> str | None:
    """The split that a path names, such as data/train-00000.jsonl."""
    from datasets.data_files import SPLIT_KEYWORDS

    for split, words in SPLIT_KEYWORDS.items():
        if re.search(rf"(?:^|[-._ 0-9/])(?:{'|'.join(words)})(?:[-._ 0-9/]|$)", path.as_posix()):
            return str(split)
    return None


def _chosen(have: list[str], purpose: str, split: str | None, path: Path) -> str:
    """The split of a purpose, or the one that is asked for."""
    wanted = [split] if split else {"calibration": ["train"], "evaluation": ["test", "validation"]}[purpose]
    found = next((one for one in wanted if one in have), None)
    if found is None:
        raise RequestError(f"{path.name}: has no split {wanted[0]!r}", f"choose one of its splits by --split: {', '.join(have)}")
    return found


def _hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def _listed(path: Path, key: str) -> list[Any]:
    """A list in a JSON file that ``save_to_disk`` has written. Raises RequestError for another content."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, list) or not found:
        raise RequestError(f"{path.parent.name}/{path.name}: lists no {key}", "store the data set again with save_to_disk")
    return found


def resolved(repo: str, revision: str | None) -> str | None:
    """The commit that a revision of a data set stands for now; as it was asked for, where the Hub cannot be reached or knows none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    if revision and COMMIT.fullmatch(revision):
        return revision
    try:
        return HfApi().dataset_info(repo, revision=revision, expand=["sha"], timeout=ANSWERS).sha or revision
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError):  # said better when it is opened
        return revision


def check_hub(repo: str) -> None:
    """Raises RequestError where the Hub cannot be reached: ``datasets`` would try again for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(repo, expand=["sha"], timeout=ANSWERS)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):  # said better when it is opened
        return
    except (HTTPError, OSError) as error:
        hint = "check your network, or give files of your own: --calibration PATH"
        raise RequestError(f"data set {repo!r}: the Hub cannot be reached ({first_line(error)[:120]})", hint) from None
