"""A Hub on loopback: repositories with commits, private and gated ones, uploads, plain files, and faults on demand.

It answers what huggingface_hub asks for downloads, and for a commit: the check of the card, the repository, what is to
be uploaded how, large files through LFS, and the commit itself, on main or as a pull request.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Files = dict[str, bytes]

SMALL = (".json", ".md", ".yaml", ".csv", ".png", ".gitattributes")  # in git itself; all else goes through LFS
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "other")


def git_sha1(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@dataclasses.dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)

    messages: list[str] = dataclasses.field(default_factory=list)

    def commit(self, files: Files, ref: str = "main", message: str = "") -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.messages.append(message)
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
    drop: bool = False  # the connection is cut without an answer


@dataclasses.dataclass
class Fault:
    method: str
    path: str
    spoil: Callable[[Reply], None]
    times: int
    unheard: bool  # the request is not acted on


class Hub:
    """`with Hub() as hub:` serves on `hub.url`; `hub.requests` lists (method, path, token, range)."""

    TOKEN = "hf_member"  # may read what is private or gated
    READER = "hf_reader"  # the same, but may not write
    OUTSIDER = "hf_outsider"  # a valid account without access

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.files: Files = {}  # by path, for plain URLs
        self.moved: dict[str, str] = {}  # path -> URL
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str, str]] = []
        self.large: Files = {}  # by SHA-256
        self.lock = threading.Lock()

    def repo(self, name: str, files: Files, **options: Any) -> Repo:
        self.repos[name] = Repo(**options)
        self.repos[name].commit(files)
        return self.repos[name]

    def fault(
        self, method: str, path: str, spoil: Callable[[Reply], None], times: int = 10**9, unheard: bool = False
    ) -> None:
        """Let `spoil` change the answers to requests whose method and path match, the first `times` of them.

        Requests that go `unheard` change nothing on the Hub; else it is only the answer that goes wrong.
        """
        self.faults.append(Fault(method, path, spoil, times, unheard))

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are two writes: the second would wait for an answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def answer(self) -> None:
                url = urlsplit(self.path)
                path = unquote(url.path)
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                body = self.body()
                with hub.lock:
                    hub.requests.append((self.command, path, token, self.headers.get("Range") or ""))
                    fault = hub.fault_of(self.command, path)
                    if fault and fault.unheard:
                        reply = Reply()
                    elif self.command in ("POST", "PUT"):
                        reply = hub.write(self.command, path, parse_qs(url.query), token, body)
                    else:
                        reply = hub.route(path, token, self.headers)
                    if fault:
                        fault.spoil(reply)
                if reply.drop:
                    self.close_connection = True
                    return
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(reply.body[: reply.send])
                    self.close_connection = reply.send is not None

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)

            do_GET = do_HEAD = do_POST = do_PUT = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault_of(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    # ------------------------------------------------------------------------------------------------------- answers

    def route(self, path: str, token: str, headers: Any) -> Reply:
        if path in self.moved:
            return Reply(302, headers={"Location": self.moved[path]})
        if path in self.files:
            etag = f'"{hashlib.sha256(self.files[path]).hexdigest()}"'
            return self._part(self.files[path], {"ETag": etag}, headers)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], match[2], match[3], token, headers)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._info(match[1], match[2] or "main", token)
        return Reply(404)

    def _info(self, name: str, revision: str, token: str) -> Reply:
        if token not in ("", self.TOKEN, self.READER, self.OUTSIDER):
            return Reply(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        repo = self.repos.get(name)
        if repo is None or (repo.private and token not in (self.TOKEN, self.READER)):
            return _error(404 if token else 401, "RepoNotFound")
        found = repo.files_at(revision)
        if found is None:
            return _error(404, "RevisionNotFound")
        siblings: list[dict[str, Any]] = []
        for path, body in sorted(found[1].items()):
            siblings.append({"rfilename": path, "size": len(body), "blobId": git_sha1(body)})
            if not path.endswith(SMALL):
                digest = hashlib.sha256(body).hexdigest()
                siblings[-1]["lfs"] = {"sha256": digest, "size": len(body), "pointerSize": 130}
        return _json({"id": name, "sha": found[0], "private": repo.private, "siblings": siblings})

    def _resolve(self, name: str, revision: str, filename: str, token: str, headers: Any) -> Reply:
        repo = self.repos.get(name)
        members = (self.TOKEN, self.READER)
        if repo is None or (repo.private and token not in members):  # both look alike, as on the Hub
            return _error(404 if token else 401, "RepoNotFound")
        if repo.gated and token not in members:
            return _error(403 if token == self.OUTSIDER else 401, "GatedRepo")
        found = repo.files_at(revision)
        if found is None:
            return _error(404, "RevisionNotFound")
        commit, files = found
        if filename not in files:
            return _error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        body = files[filename]
        is_large = not filename.endswith(SMALL)
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

    # --------------------------------------------------------------------------------------------------------- writing

    def write(self, method: str, path: str, query: dict[str, list[str]], token: str, body: bytes) -> Reply:
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):  # storage: the URL is the permission
            if hashlib.sha256(body).hexdigest() != match[1]:
                return Reply(400)
            self.large[match[1]] = body
            return Reply()
        asked = json.loads(body.splitlines()[0]) if body else {}
        if path == "/api/validate-yaml":
            return self._check_card(asked["content"])
        if token not in (self.TOKEN, self.READER, self.OUTSIDER):
            return Reply(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if path == "/api/repos/create":
            return self._create(asked, token)
        if path == "/lfs-verify":
            return Reply(200 if len(self.large.get(asked["oid"], b"")) == asked["size"] else 422)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._may_write(match[1], token, proposing=True) or self._batch(asked)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/(.+)", path):
            refused = self._may_write(match[1], token, proposing="create_pr" in query)
            if refused:
                return refused
            repo = self.repos[match[1]]
            if match[2] == "preupload":
                return self._preupload(repo, match[3], asked)
            return self._commit(match[1], repo, match[3], body, proposing="create_pr" in query)
        return Reply(404)

    def _may_write(self, name: str, token: str, proposing: bool = False) -> Reply | None:
        repo = self.repos.get(name)
        if repo is None or (repo.private and token not in (self.TOKEN, self.READER)):
            return _error(404, "RepoNotFound")
        if token != self.TOKEN and not proposing:
            return Reply(403, b"{}", {"X-Error-Message": "You don't have the rights to write here"})
        return None

    def _check_card(self, content: str) -> Reply:
        front = yaml.safe_load(content.split("---")[1])
        if front.get("license", "other") not in LICENSES:
            message = '"license" must be one of [apache-2.0, mit, ...]'
            return _json({"errors": [{"message": message}], "warnings": []}, 400)
        return _json({"errors": [], "warnings": []})

    def _create(self, asked: dict[str, Any], token: str) -> Reply:
        if token != self.TOKEN:
            return Reply(403, b"{}", {"X-Error-Message": "You don't have the rights to create a model here"})
        name = f"{asked['organization']}/{asked['name']}"
        exists = name in self.repos
        if not exists:
            self.repo(name, {".gitattributes": b"*.safetensors filter=lfs\n"}).private = (
                asked.get("visibility") == "private"
            )
        return _json({"url": f"{self.url}/{name}"}, 409 if exists else 200)

    def _batch(self, asked: dict[str, Any]) -> Reply:
        objects: list[dict[str, Any]] = []
        for item in asked["objects"]:
            found = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.large:
                upload = {"href": f"{self.url}/lfs/{item['oid']}"}
                found["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/lfs-verify"}}
            objects.append(found)
        return _json({"transfer": "basic", "objects": objects})

    def _preupload(self, repo: Repo, revision: str, asked: dict[str, Any]) -> Reply:
        found = repo.files_at(revision)
        files = []
        for item in asked["files"]:
            is_large = not item["path"].endswith(SMALL)
            answer = {"path": item["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if found and item["path"] in found[1]:
                body = found[1][item["path"]]
                answer["oid"] = hashlib.sha256(body).hexdigest() if is_large else git_sha1(body)
            files.append(answer)
        return _json({"files": files})

    def _commit(self, name: str, repo: Repo, revision: str, body: bytes, proposing: bool) -> Reply:
        found = repo.files_at(revision)
        if found is None:
            return _error(404, "RevisionNotFound")
        head, files = found[0], dict(found[1])
        message = ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", head) != head:
                    return Reply(412, b"{}", {"X-Error-Message": "A commit has happened since"})
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    return Reply(400, b"{}", {"X-Error-Message": f"{value['path']} was never uploaded"})
                files[value["path"]] = self.large[value["oid"]]
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        commit = repo.commit(files, f"refs/pr/{number}" if proposing else revision, message)
        url = f"{self.url}/{name}"
        return _json(
            {
                "commitOid": commit,
                "commitUrl": f"{url}/commit/{commit}",
                "pullRequestUrl": f"{url}/discussions/{number}" if proposing else None,
            }
        )


def _json(value: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode())


def _error(status: int, code: str, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status, b"{}", {"X-Error-Code": code, **(headers or {})})


# --------------------------------------------------------------------------------------------------------------- faults


def status(code: int, **headers: str) -> Callable[[Reply], None]:
    """Answer with this status instead; `Retry_After="1"` is a header."""

    def spoil(reply: Reply) -> None:
        reply.status, reply.body = code, b"{}"
        reply.headers = {name.replace("_", "-"): value for name, value in headers.items()}

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


def drop(reply: Reply) -> None:
    """Break the connection without a word."""
    reply.drop = True
