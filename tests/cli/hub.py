"""A stand-in for the Hub on the loopback interface: the client is the real one, and so are its requests.

It creates, takes and serves repositories with a history, keeps large files by their hash, checks tokens, and can fail any request in four ways.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import yaml

WAYS = ("500", "429", "dropped", "truncated")  # the first two refuse before anything is done; with the others only the answer is lost
LARGE = 100_000  # bytes of a file that is kept by its hash
PART = 1_500_000  # bytes of a part of an upload; larger files come in parts
INITIAL = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def commit_of(folder: Path) -> str:
    """A commit id for the present content of a repository that is a folder."""
    return commit_id({p.name: p.read_bytes() for p in folder.iterdir()})


def commit_id(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()


@dataclass
class Commit:
    id: str
    files: dict[str, bytes]
    message: str = ""


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str = "") -> Commit:
        """A new state of the whole repository."""
        self.commits.append(Commit(commit_id(files | ({".": str(len(self.commits)).encode()} if self.commits else {})), files, message))
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        return self.commits[-1] if revision == "main" else next((c for c in self.commits if c.id == revision), None)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files


@dataclass
class Hub:
    """What the server holds, and what was asked of it. ``fail_at`` is the number of the request, from 1, that fails in that ``way``; the
    following ones too if ``lasting``.
    """

    token: str = "hf_stand_in"
    role: str = "write"
    repositories: dict[str, Repository] = field(default_factory=dict)  # "models/org/name"
    blobs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    heard: list[bytes] = field(default_factory=list)  # all of every request but the header that carries the token
    writes: list[str] = field(default_factory=list)  # of the requests, those that changed something
    fail_at: int | None = None
    way: str = "500"
    lasting: bool = False
    asked: int = 0  # requests since ``fail`` or the beginning
    base: str = ""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def fail(self, at: int | None, way: str = "500", lasting: bool = False) -> None:
        self.asked, self.fail_at, self.way, self.lasting = 0, at, way, lasting

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.commit(files)
        return repository

    def fails_now(self) -> str | None:
        with self.lock:
            self.asked += 1
            at = self.fail_at
            return self.way if at is not None and (self.asked == at or (self.lasting and self.asked > at)) else None


@dataclass
class Refused(Exception):
    code: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def handle_request(self) -> None:
        address = urlparse(self.path)
        self.query, path = parse_qs(address.query), unquote(address.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.log.append(f"{self.command} {path}")
        others = [f"{name}: {value}" for name, value in self.headers.items() if name.lower() != "authorization"]
        self.hub.heard.append("\n".join([self.path, *others]).encode() + self.body)
        way = self.hub.fails_now()
        if way in ("500", "429"):
            return self.answer(int(way), {"error": "the stand-in fails"}, headers={"Retry-After": "0"} if way == "429" else {})
        try:
            with self.hub.lock:
                code, value, headers = self.route(path)
        except Refused as refused:
            code, value, headers = refused.code, {"error": refused.message}, {"X-Error-Message": refused.message} | refused.headers
        return self.answer(code, value, headers, way)

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def answer(self, code: int, value: Any, headers: dict[str, str], way: str | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        if way == "dropped":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.send_response(code)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data) + (10 if way == "truncated" else 0)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if way == "truncated" else data)
        self.close_connection = self.close_connection or way == "truncated"

    def route(self, path: str) -> tuple[int, Any, dict[str, str]]:
        for method, pattern, act in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                found = act(self, *match.groups())
                return found if isinstance(found, tuple) else (200, found, {})
        raise Refused(404, "unknown path")

    # what is asked

    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def writing(self, what: str) -> None:
        if not self.allowed():
            raise Refused(401, "Invalid username or password.")
        if self.hub.role == "read":
            raise Refused(403, "the token may not write")
        self.hub.writes.append(what)

    def repository(self, kind: str, name: str) -> Repository:
        found = self.hub.repositories.get(f"{kind}/{name}")
        if found is None or (found.private and not self.allowed()):
            raise Refused(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        return found

    def state(self, kind: str, name: str, revision: str) -> Commit:
        found = self.repository(kind, name).at(revision)
        if found is None:
            raise Refused(404, "Revision not found", {"X-Error-Code": "RevisionNotFound"})
        return found

    def whoami(self) -> Any:
        if not self.allowed():
            raise Refused(401, "Invalid username or password.")
        token = {"role": self.hub.role, "displayName": "a token"}
        return {"type": "user", "name": "me", "orgs": [{"name": "org"}], "auth": {"type": "access_token", "accessToken": token}}

    def validate(self) -> Any:
        errors = metadata_errors(json.loads(self.body)["content"])
        return (400 if errors else 200), {"errors": [{"message": e} for e in errors], "warnings": []}, {}

    def create(self) -> Any:
        asked = json.loads(self.body)
        name = f"models/{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repositories:
            raise Refused(409, "You already created this model repo")
        self.writing(f"create {name}")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.add(name, dict(INITIAL), private)
        short = name.removeprefix("models/")
        return {"url": f"{self.hub.base}/{short}", "name": short}

    def preupload(self, kind: str, name: str, revision: str) -> Any:
        files = self.state(kind, name, revision).files
        found = []
        for file in json.loads(self.body)["files"]:
            large, old = file["size"] >= LARGE or file["path"].endswith(".safetensors"), files.get(file["path"])
            oid = None if old is None else sha256(old) if large else git_hash(old)
            found.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        return {"files": found}

    def batch(self, name: str) -> Any:
        """Where to send what is not there yet."""
        self.repository("models", name)
        found = []
        for one in json.loads(self.body)["objects"]:
            href, count = f"{self.hub.base}/_large/{one['oid']}", -(-one["size"] // PART)
            parts = {str(i + 1): f"{href}/part/{i + 1}" for i in range(count)} | {"chunk_size": str(PART)}
            actions = {"upload": {"href": f"{href}/parts" if count > 1 else href, "header": parts if count > 1 else {}}}
            found.append({"oid": one["oid"], "size": one["size"]} | ({} if one["oid"] in self.hub.blobs else {"actions": actions}))
        return {"transfer": "basic", "objects": found}

    def large(self, oid: str) -> Any:
        if sha256(self.body) != oid:
            raise Refused(422, "another hash")
        self.hub.blobs[oid] = self.body
        self.hub.writes.append(f"large {oid}")
        return b""

    def part(self, oid: str, number: str) -> Any:
        self.hub.parts[oid, int(number)] = self.body
        self.hub.writes.append(f"part {number} of {oid}")
        return 200, b"", {"ETag": git_hash(self.body)}

    def whole(self, oid: str) -> Any:
        parts = json.loads(self.body)["parts"]
        self.body = b"".join(self.hub.parts[oid, part["partNumber"]] for part in parts)
        return self.large(oid)

    def commit(self, kind: str, name: str, revision: str) -> Any:
        repository, lines = self.repository(kind, name), [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", repository.commits[-1].id) != repository.commits[-1].id:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.writing(f"commit {kind}/{name}")
        made = repository.commit(files, header["summary"])
        return {"commitUrl": f"{self.hub.base}/{name}/commit/{made.id}", "commitOid": made.id, "pullRequestUrl": None}

    def tree(self, kind: str, name: str, revision: str, under: str | None) -> Any:
        return [entry(path, data) for path, data in self.state(kind, name, revision).files.items() if path.startswith(under or "")]

    def paths_info(self, kind: str, name: str, revision: str) -> Any:
        asked = parse_qs(self.body.decode()).get("paths") or (json.loads(self.body)["paths"] if self.body[:1] == b"{" else [])
        return [entry(path, data) for path, data in self.state(kind, name, revision).files.items() if path in asked]

    def info(self, kind: str, name: str, revision: str | None) -> Any:
        state, private = self.state(kind, name, revision or "main"), self.repository(kind, name).private
        siblings = [{"rfilename": path} for path in state.files]
        return {"id": name, "sha": state.id, "private": private, "tags": [], "siblings": siblings}

    def file(self, kind: str | None, name: str, revision: str, path: str) -> Any:
        state = self.state("datasets" if kind else "models", name, revision)
        if path not in state.files:
            raise Refused(404, "no such file", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": state.id})
        data = state.files[path]
        headers = {"ETag": f'"{sha256(data) if is_large(path, data) else git_hash(data)}"', "X-Repo-Commit": state.id, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start = int(wanted[1])
            part = data[start : int(wanted[2] or len(data) - 1) + 1]
            return 206, part, headers | {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"}
        return 200, data, headers


REPO = r"/api/(models|datasets)/([^/]+/[^/]+?)"
LARGE_FILE = r"/_large/([0-9a-f]{64})"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"{REPO}/preupload/([^/]+)", Handler.preupload),
    ("POST", f"{REPO}/commit/([^/]+)", Handler.commit),
    ("POST", f"{REPO}/paths-info/([^/]+)", Handler.paths_info),
    ("GET", f"{REPO}/tree/([^/]+)(?:/(.*))?", Handler.tree),
    ("GET", f"{REPO}(?:/revision/([^/]+))?", Handler.info),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", LARGE_FILE, Handler.large),
    ("PUT", rf"{LARGE_FILE}/part/(\d+)", Handler.part),
    ("POST", f"{LARGE_FILE}/parts", Handler.whole),
    ("GET HEAD", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.file),
]


def is_large(path: str, data: bytes) -> bool:
    return len(data) >= LARGE or path.endswith(".safetensors")


def entry(path: str, data: bytes) -> dict[str, Any]:
    large = {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 134}} if is_large(path, data) else {}
    return {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)} | large


def metadata_errors(text: str) -> list[str]:
    """What the Hub would have against the front matter of a card: the rules of its documentation that concern us."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if not match:
        return ["empty or missing yaml metadata"]
    data = yaml.safe_load(match[1])
    errors = [f"{key} must be a string" for key in ("license", "pipeline_tag", "base_model") if not isinstance(data.get(key, ""), str)]
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append("tags must be strings")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", data.get("base_model", "org/name")):
        errors.append("base_model must be a model id")
    if data.get("base_model_relation", "finetune") not in ("finetune", "adapter", "merge", "quantized"):
        errors.append("base_model_relation is unknown")
    if data.get("license") == "other" and not re.fullmatch(r"[a-z0-9.-]+", data.get("license_name", "")):
        errors.append("license other needs a license_name of small letters")
    for result in (result for index in data.get("model-index", []) for result in index["results"]):
        if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
            errors.append("a result without task or dataset")
        errors += ["a metric without type or value" for metric in result["metrics"] if not {"type", "value"} <= metric.keys()]
    return errors


@contextmanager
def stand_in(hub: Hub) -> Iterator[Hub]:
    """Serve it; ``hub.base`` is the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHandler", (Handler,), {"hub": hub}))
    hub.base = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serve(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """(base address, log of requests) of a server for ``{"models/org/name": folder, "datasets/org/name": folder}``."""
    hub = Hub()
    for name, folder in folders.items():
        hub.add(name, {p.name: p.read_bytes() for p in folder.iterdir()})
    with stand_in(hub):
        yield hub.base, hub.log
