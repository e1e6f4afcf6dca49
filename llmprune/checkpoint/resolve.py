"""What ``--model`` names: an alias, a local folder, or a Hub id."""

from __future__ import annotations

import re
from pathlib import Path

from llmprune.checkpoint.aliases import ALIASES
from llmprune.checkpoint.companions import NOT_FETCHED
from llmprune.checkpoint.named_code import named_code
from llmprune.checkpoint.quantised import plain
from llmprune.checkpoint.source import Source, open_folder
from llmprune.errors import RequestError

BUNDLED = Path(__file__).parent.parent / "data" / "bundled"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_bundled(model: str) -> bool:
    return model in ALIASES and ALIASES[model] is None


def open_source(model: str, revision: str | None = None) -> Source:
    """Open what ``model`` names. A local folder takes precedence over a Hub id of the same name.

    Raises RequestError when nothing of that name can be found.
    """
    if is_bundled(model):
        return open_folder(BUNDLED / model, model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return plain(open_folder(folder, folder.resolve().name))
    if folder.is_file():
        if folder.suffix == ".gguf":
            raise RequestError(f"model {folder.name!r}: a GGUF file", "give its original checkpoint, or save what gguf_file=... loads")
        raise RequestError(f"model {folder.name!r}: a file, not a checkpoint's folder", "give the folder that it is in")
    target = ALIASES.get(model) or model
    if not HUB_ID.fullmatch(target):
        raise RequestError(f"model {model!r}: no such folder and no alias", f"aliases: {', '.join(ALIASES)}; or a Hub id such as org/name")
    return _download(target, revision)


def cached_source(repo: str, revision: str) -> Source | None:
    """A snapshot of a Hub model that is in the cache; None where it is not there, or not whole. Nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return plain(open_folder(folder, repo, folder.name))
    except (LocalEntryNotFoundError, HFValidationError, RequestError):
        return None


def _download(repo: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hint = "check the id and your network; gated models need `hf auth login`"
    try:
        folder = Path(snapshot_download(repo, revision=revision, ignore_patterns=list(NOT_FETCHED)))
        if any(not (folder / f"{name}.py").exists() for name in named_code(folder)):
            snapshot_download(repo, revision=folder.name, allow_patterns=["*.py"])  # to be copied, not run
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        first = str(error).strip().splitlines()[0]
        raise RequestError(f"model {repo!r}: not a local folder, and the Hub says: {first[:160]}", hint) from None
    except OSError as error:
        raise RequestError(f"model {repo!r}: not a local folder, and the Hub cannot be reached ({error})"[:300], hint) from None
    return plain(open_folder(folder, repo, folder.name))  # the snapshot folder is named after its commit
