"""A Hub on loopback: repositories with commits, private and gated ones, plain files, and faults on demand."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


def git_sha1(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@dataclasses.dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, files: Files, ref: str = "main") -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[digest] = files
        self.refs[ref] = digest
        return digest

    def files_at(self, revision: str) -> tuple[str, Files] | None:
        digest = self.refs.get(revision, revision)
        return (digest, self.commits[digest]) if digest in self.commits else None


@dataclasses.dataclass
class Reply:
    """An answer on its way out, which a fault may spoil."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    send: int | None = None  # bytes of the body before the connection is cut


@dataclasses.dataclass
class Fault:
    method: str
    path: str
    spoil: Callable[[Reply], None]
    times: int


class Hub:
    """`with Hub() as hub:` serves on `hub.url`; `hub.requests` lists (method, path, token, range)."""

    TOKEN = "hf_member"  # may read what is private or gated
    OUTSIDER = "hf_outsider"  # a valid account without access

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.files: Files = {}  # by path, for plain URLs
        self.moved: dict[str, str] = {}  # path -> URL
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str, str]] = []
        self.lock = threading.Lock()

    def repo(self, name: str, files: Files, **options: Any) -> Repo:
        self.repos[name] = Repo(**options)
        self.repos[name].commit(files)
        return self.repos[name]

    def fault(self, method: str, path: str, spoil: Callable[[Reply], None], times: int = 10**9) -> None:
        """Let `spoil` change the answers to requests whose method and path match, the first `times` of them."""
        self.faults.append(Fault(method, path, spoil, times))

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def answer(self) -> None:
                path = unquote(urlsplit(self.path).path)
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                reply = hub.route(path, token, self.headers)
                with hub.lock:
                    hub.requests.append((self.command, path, token, self.headers.get("Range") or ""))
                    for fault in hub.faults:
                        if fault.times and re.fullmatch(fault.method, self.command) and re.search(fault.path, path):
                            fault.times -= 1
                            fault.spoil(reply)
                            break
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(reply.body[: reply.send])
                    self.close_connection = reply.send is not None

            do_GET = do_HEAD = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    # ------------------------------------------------------------------------------------------------------- answers

    def route(self, path: str, token: str, headers: Any) -> Reply:
        if path in self.moved:
            return Reply(302, headers={"Location": self.moved[path]})
        if path in self.files:
            etag = f'"{hashlib.sha256(self.files[path]).hexdigest()}"'
            return self._part(self.files[path], {"ETag": etag}, headers)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], match[2], match[3], token, headers)
        return Reply(404)

    def _resolve(self, name: str, revision: str, filename: str, token: str, headers: Any) -> Reply:
        repo = self.repos.get(name)
        if repo is None or (repo.private and token != self.TOKEN):  # both look alike, as on the Hub
            return _error(404 if token else 401, "RepoNotFound")
        if repo.gated and token != self.TOKEN:
            return _error(403 if token == self.OUTSIDER else 401, "GatedRepo")
        found = repo.files_at(revision)
        if found is None:
            return _error(404, "RevisionNotFound")
        commit, files = found
        if filename not in files:
            return _error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        body = files[filename]
        is_large = not filename.endswith(".json")
        etag = hashlib.sha256(body).hexdigest() if is_large else git_sha1(body)
        stated = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if is_large:
            stated |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
        return self._part(body, stated, headers)

    def _part(self, body: bytes, stated: dict[str, str], headers: Any) -> Reply:
        match = re.fullmatch(r"bytes=(\d+)-", headers.get("Range") or "")
        if match and headers.get("If-Range") in (None, stated["ETag"]):
            start = int(match[1])
            stated |= {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            return Reply(206, body[start:], stated)
        return Reply(200, body, stated)


def _error(status: int, code: str, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status, b"{}", {"X-Error-Code": code, **(headers or {})})


# --------------------------------------------------------------------------------------------------------------- faults


def status(code: int) -> Callable[[Reply], None]:
    """Answer with this status instead."""

    def spoil(reply: Reply) -> None:
        reply.status, reply.body, reply.headers = code, b"{}", {}

    return spoil


def cut_at(count: int) -> Callable[[Reply], None]:
    """Break the connection after `count` bytes of the body."""

    def spoil(reply: Reply) -> None:
        reply.send = count

    return spoil


def corrupt(reply: Reply) -> None:
    """Flip a bit in the middle, length unchanged."""
    middle = len(reply.body) // 2
    reply.body = reply.body[:middle] + bytes([reply.body[middle] ^ 1]) + reply.body[middle + 1 :] if reply.body else b""


def shorten(reply: Reply) -> None:
    """Half of the body, with the length of that half stated honestly."""
    reply.body = reply.body[: len(reply.body) // 2]
