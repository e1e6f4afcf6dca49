"""Publishing a finished output on the Hub: checked first, private by default, in one commit, and resumable.

Nothing is written to an existing repository unless that is asked for. The token comes from `hf auth login` or the environment; it is
neither an argument nor part of anything that is printed or stored.

An interrupted upload is finished by the same command, for three reasons: large files are stored by their hash, so those that arrived are
not sent again; a marker in the output's folder, made before the repository, distinguishes an empty repository of this push from any other; and
a commit whose answer was lost is recognised by its content.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import validate_repo_id

from llmprune.checkpoint.companions import TEMPLATES, TOKENIZER, matches
from llmprune.checkpoint.files import UNHASHED, hash_file, to_json, write_whole
from llmprune.checkpoint.manifest import read_manifest
from llmprune.checkpoint.source import open_folder
from llmprune.errors import LlmpruneError, RequestError, StoppedError, first_line
from llmprune.publish.card import CARD, PLACE
from llmprune.results import Pushed

MARK = ".push.json"

OF_A_NEW_REPOSITORY = {".gitattributes"}  # what the Hub itself adds

# Files of an older model in the repository that would be loaded with, or instead of, the new one. Licences and other files are kept.
STALE = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx"),
    *("*.py", "adapter_config.json", "report.html", "config.json", "generation_config.json", *TOKENIZER),
)


def push(folder: Path | str, repo: str, *, public: bool = False, existing: bool = False, dry_run: bool = False) -> Pushed:
    """Publish the output of a run as a model repository, in one commit.

    repo: me/name, or a name under the user's account. public: else private. existing: the repository may exist; old weights are then removed
    in the same commit. dry_run: only say what would be done. Raises RequestError when it is refused, with nothing written, and StoppedError when
    it was interrupted and the same call resumes.
    """
    folder = Path(folder)
    files = finished_files(folder)
    flags = " --public" * public + " --existing" * existing
    again = f"llmprune push {shlex.quote(str(folder))} {repo}{flags} resumes; what has arrived is not sent again"
    with talking(repo, again, StoppedError):
        there = reach_if_possible(repo) if dry_run else reach(repo)
        content = {name: content_of(path, there.repo) for name, path in files.items()}
        found = plan(there, folder, content, public, existing)
        if not found.complete and not dry_run:
            found = send(there, found, content, folder / MARK)
        if found.complete:
            with suppress(OSError):  # a folder that cannot be written to has none
                (folder / MARK).unlink()
        return found


def plan(there: There, folder: Path, content: dict[str, bytes | Path], public: bool, existing: bool) -> Pushed:
    """What has to be done, if it may be. Nothing if the repository holds all of it; so a commit whose answer was lost is not made twice."""
    removed = tuple(sorted(name for name in there.files if name not in content and is_stale(name)))
    done = there.info is not None and not removed and holds(there.files, content)
    if done:
        check_visibility(there, public)
    else:
        begun = is_ours(folder / MARK, there.repo) and there.files.keys() <= OF_A_NEW_REPOSITORY
        check(there, public, existing or begun)
    sizes = {} if done else {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in content.items()}
    url = f"{there.api.endpoint}/{there.repo}"
    return Pushed(
        there.repo, url, public, there.info is None and not there.unseen, sizes, removed, left_out(folder, content), None, done, there.unseen
    )


def check_destination(repo: str, public: bool = False, existing: bool = False) -> None:
    """Refuse, before any work, what a push would refuse later: no token, a bad name, an existing repository. RequestError."""
    with talking(repo, "check the network, or omit --push and use llmprune push later", RequestError):
        check(reach(repo), public, existing)


class NoTokenError(RequestError):
    """Nobody is logged in."""


@dataclass(frozen=True)
class There:
    """What the Hub has under a name now; ``info`` is None where there is no such repository. unseen: why it was not looked up, if it was not."""

    api: HfApi
    repo: str
    info: ModelInfo | None
    files: dict[str, RepoFile]
    unseen: str = ""


def reach_if_possible(repo: str) -> There:
    """As ``reach``; without a token or a connection, a destination of which nothing is known but its name."""
    try:
        return reach(repo)
    except NoTokenError:
        unseen = "no Hub token"
    except HfHubHTTPError:
        raise
    except (HTTPError, OSError) as error:
        unseen = reason(error)
    return There(HfApi(), repo, None, {}, unseen)


def reach(repo: str) -> There:
    """Look at the destination with the token of the login or the environment. Raises RequestError without one, or for a bad name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RequestError(f"repository {repo!r}: {reason(error)}", "write me/name, of letters, digits, - _ .") from None
    token = get_token()
    if token is None:
        raise NoTokenError("no Hub token", "log in with `hf auth login`, or set HF_TOKEN; it is not an argument")
    api = HfApi(token=token)
    me = api.whoami()
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise RequestError(f"repository {repo!r}: the token may only read", "create one that may write, and `hf auth login` with it")
    full = repo if "/" in repo else f"{me['name']}/{repo}"
    try:
        info = api.model_info(full)
    except RepositoryNotFoundError:
        return There(api, full, None, {})
    return There(api, full, info, listing(api, full, info.sha))


def listing(api: HfApi, repo: str, revision: str | None) -> dict[str, RepoFile]:
    return {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True, revision=revision) if isinstance(entry, RepoFile)}


def check(there: There, public: bool, may_exist: bool) -> None:
    """An existing repository may be written to, and is as private as asked."""
    if there.info is None:
        return
    if not may_exist:
        raise RequestError(f"repository {there.repo}: exists already", "add --existing to replace the model in it, or choose another name")
    check_visibility(there, public)


def check_visibility(there: There, public: bool) -> None:
    """A push neither publishes by accident nor changes what others may see."""
    if there.info is not None and bool(there.info.private) == public:
        is_now, hint = ("private", "leave --public out") if public else ("public", "add --public if everyone may see it")
        raise RequestError(f"repository {there.repo}: is {is_now}", f"{hint}, or change it on the repository's page")


def send(there: There, asked: Pushed, content: dict[str, bytes | Path], mark: Path) -> Pushed:
    """Create the repository if there is none, upload, commit once, and check that all files are there."""
    api, repo = there.api, there.repo
    if there.info is None:
        with suppress(OSError):  # from a folder that cannot be written to, an interrupted push needs --existing to resume
            write_whole(mark, to_json({"repo": repo}))
        try:
            api.create_repo(repo, private=not asked.public)
        except HfHubHTTPError as error:
            if error.response.status_code == 409:  # made by someone else since the check
                mark.unlink(missing_ok=True)
                raise RequestError(f"repository {repo}: exists already", "add --existing, or choose another name") from None
            raise
        there = There(api, repo, api.model_info(repo), {})
        check_visibility(there, asked.public)  # an organisation may have its own rules
    operations: list[Any] = [CommitOperationDelete(name, is_folder=False) for name in asked.removed]
    operations += [CommitOperationAdd(name, str(c) if isinstance(c, Path) else c) for name, c in content.items()]
    assert there.info is not None
    # With the parent named, a commit made meanwhile makes this one fail instead of being overwritten.
    commit = api.create_commit(repo, operations, commit_message="Model pruned by llmprune", parent_commit=there.info.sha)
    if not holds(listing(api, repo, commit.oid), content):
        raise StoppedError(f"repository {repo}: does not hold all files after the commit", "look for a .gitignore in it")
    return replace(asked, commit=commit.oid, complete=True)


def holds(files: dict[str, RepoFile], content: dict[str, bytes | Path]) -> bool:
    """Whether every file is there with the same content."""
    return all(name in files and is_same(files[name], c) for name, c in content.items())


def is_same(remote: RepoFile, content: bytes | Path) -> bool:
    if remote.size != (len(content) if isinstance(content, bytes) else content.stat().st_size):
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == (hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else hash_file(content))
    data = content if isinstance(content, bytes) else content.read_bytes()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def content_of(path: Path, repo: str) -> bytes | Path:
    """What is sent for a file: its content; in the card, with the repository's name filled in."""
    return path.read_bytes().replace(PLACE.encode(), repo.encode()) if path.name == CARD else path


def is_stale(name: str) -> bool:
    return ("/" not in name or name.startswith(f"{TEMPLATES}/")) and matches(name, STALE)


def is_ours(mark: Path, repo: str) -> bool:
    """Whether a push of this folder has started to create that repository."""
    try:
        return json.loads(mark.read_bytes()) == {"repo": repo}
    except (OSError, ValueError):
        return False


def finished_files(folder: Path) -> dict[str, Path]:
    """The files of a finished output that are to be published, each as the run left it. Raises RequestError for anything else."""
    place = folder.resolve()
    if any(part.name.endswith(".partial") for part in (place, place.parent)):
        raise RequestError(f"{folder.name}: is unfinished", "repeat the command that started it, then push its output")
    hashes = read_manifest(folder).files
    missing = [name for name in hashes if not (folder / name).is_file()]
    if missing:
        raise RequestError(f"{folder.name}: {len(missing)} of {len(hashes)} files are missing, first {missing[0]!r}", "prune again")
    weights = open_folder(folder, folder.name).headers
    changed = [name for name in hashes if hash_file(folder / name) != hashes[name]] + [name for name in weights if name not in hashes]
    if changed:
        raise RequestError(f"{folder.name}: {len(changed)} files differ from what the run wrote, first {changed[0]!r}", "prune again")
    return {name: folder / name for name in [*hashes, *(name for name in UNHASHED if name not in hashes and (folder / name).is_file())]}


def left_out(folder: Path, files: Container[str]) -> tuple[str, ...]:
    """Files of the folder that are not published, since no run wrote them; hidden ones are not named."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return tuple(name for name in names if name not in files and not any(part.startswith(".") for part in name.split("/")))


@contextmanager
def talking(repo: str, hint: str, kind: type[LlmpruneError]) -> Iterator[None]:
    """Errors of the connection become one line of that kind; a refusal by the Hub is a RequestError."""
    try:
        yield
    except LlmpruneError:
        raise
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            hint = "`hf auth login` with a token that may write there"
            raise RequestError(f"repository {repo}: the Hub refuses: {reason(error)}", hint) from None
        raise kind(f"repository {repo}: {reason(error)}", hint) from None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # the client wraps failures of its threads, and answers that it cannot parse
        raise kind(f"repository {repo}: {reason(error.__cause__ or error)}", hint) from None


def reason(error: BaseException) -> str:
    """The first line of an error's message, preferably the server's, without the secrets of a signed address."""
    text = first_line(error)
    if isinstance(error, HfHubHTTPError) and error.server_message:
        text = f"HTTP {error.response.status_code}: {error.server_message.splitlines()[0]}"
    text = re.sub(r"\?\S+", "", text)
    token = get_token()
    return (text.replace(token, "***") if token else text)[:200]
