"""A read-only stand-in for the Hub on the loopback interface: repositories are folders, the client is the real one."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def commit_of(folder: Path) -> str:
    """A commit id for the present content of a repository."""
    return hashlib.sha1(b"".join(p.name.encode() + p.read_bytes() for p in sorted(folder.iterdir()))).hexdigest()


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """(base address, log of requests) of a server for ``{"models/org/name": folder, "datasets/org/name": folder}``."""
    log: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, code: int, value: object = None, data: bytes | None = None, **headers: str) -> None:
            body = json.dumps(value).encode() if data is None else data
            self.send_response(code)
            for name, text in headers.items():
                self.send_header(name.replace("_", "-"), text)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def handle_request(self) -> None:
            path = unquote(urlparse(self.path).path)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            log.append(f"{self.command} {path}")
            if match := FILE.fullmatch(path):
                self.file("datasets" if match[1] else "models", match[2], match[4])
            elif match := API.fullmatch(path):
                self.api(match[1], match[2], match[3])
            else:
                self.answer(404, {"error": "unknown path"})

        do_GET = do_POST = do_HEAD = handle_request

        def repository(self, kind: str, name: str) -> Path | None:
            folder = repositories.get(f"{kind}/{name}")
            if folder is None:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return folder

        def api(self, kind: str, name: str, what: str | None) -> None:
            folder = self.repository(kind, name)
            if folder is None:
                return
            files = sorted(folder.iterdir())
            if what in ("tree", "paths-info"):
                self.answer(200, [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": commit_of(folder)} for p in files])
            else:
                names = [{"rfilename": p.name} for p in files]
                self.answer(200, {"id": name, "sha": commit_of(folder), "private": False, "tags": [], "siblings": names})

        def file(self, kind: str, name: str, file: str) -> None:
            folder = self.repository(kind, name)
            if folder is None:
                return
            commit = commit_of(folder)
            if not (folder / file).is_file():
                return self.answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            data = (folder / file).read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
                part = data[start : end + 1]
                return self.answer(206, data=part, **headers, Content_Range=f"bytes {start}-{start + len(part) - 1}/{len(data)}")
            return self.answer(200, data=data, **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
