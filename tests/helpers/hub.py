"""A stand-in for the Hugging Face hub on 127.0.0.1: repositories in memory behind the requests that its library makes.

What it checks as the hub does: tokens and whose they are, the SHA-256 of what is uploaded, that a commit names only
large files that have arrived, and that a card's base model is an id.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

REGULAR = (".json", ".md", ".yaml", ".txt", ".gitattributes")


def git_oid(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    """A tree: content by path; large files are those whose content lies in the store."""

    files: dict[str, bytes]
    message: str = ""

    @property
    def oid(self) -> str:
        named = sorted((path, git_oid(content)) for path, content in self.files.items())
        return hashlib.sha1(json.dumps([named, self.message]).encode()).hexdigest()


@dataclass
class Repository:
    """Commits by branch, the newest last."""

    private: bool
    branches: dict[str, list[Commit]]
    pulls: list[Commit] = field(default_factory=list)

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for branch in self.branches.values() for commit in branch]
        return next((commit for commit in commits if commit.oid == revision), None)


@dataclass
class Trouble:
    """The answer to the next `times` requests that match: a status, or 0 to hang up in their midst."""

    method: str
    path: str
    status: int
    times: int = 1


@dataclass
class Hub:
    """The stand-in's state, and what it was asked.

    Attributes:
        owners: by token, whose repositories it may write to; "" may only read.
        store: large files that have arrived, by SHA-256.
        log: method and path of each request, in their order.
    """

    address: str = ""
    owners: dict[str, str] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)
    troubles: list[Trouble] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def asked(self, pattern: str) -> int:
        """How often."""
        return sum(1 for line in self.log if re.search(pattern, line))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repositories[repo_id].at(revision)
        assert commit is not None
        return commit.files


@contextmanager
def serve_hub(**state: Any) -> Iterator[Hub]:
    """A hub for as long as the block takes."""
    hub = Hub(**state)
    handler = type("Handler", (Answers,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


class Refused(Exception):
    """An answer that is none."""

    def __init__(self, status: int, message: str = "", code: str = "", commit: str = "") -> None:
        self.status, self.message, self.code, self.commit = status, message, code, commit


class Answers(BaseHTTPRequestHandler):
    """Takes requests apart, finds who answers them, and sends what they say."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.log.append(f"{self.command} {path}")
        try:
            self._stumble(path)
            for method, pattern, respond in ROUTES:
                if self.command in method.split() and (found := re.fullmatch(pattern, path)):
                    self.send(200, *respond(self, *found.groups()))
                    return
            raise Refused(404, f"the stand-in does not know {self.command} {path}")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message, "X-Error-Code": refused.code}
            headers |= {"X-Repo-Commit": refused.commit} if refused.commit else {}
            self.send(refused.status, json.dumps({"error": refused.message}).encode(), headers)
        except ConnectionAbortedError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _stumble(self, path: str) -> None:
        for trouble in self.hub.troubles:
            if trouble.times and trouble.method == self.command and re.search(trouble.path, path):
                trouble.times -= 1
                if not trouble.status:
                    raise ConnectionAbortedError
                raise Refused(trouble.status, "as the test asks for")

    def send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ---- who asks ------------------------------------------------------------------------------------------------

    def user(self) -> str | None:
        """Whose token it is; None without one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.hub.owners:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.owners[token]

    def readable(self, repo_id: str) -> Repository:
        user = self.user()
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != repo_id.split("/")[0]):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, repo_id: str) -> Repository:
        repository = self.readable(repo_id)
        if self.user() != repo_id.split("/")[0]:
            raise Refused(403, "you don't have the rights to write there")
        return repository

    def commit(self, repo_id: str, revision: str) -> Commit:
        commit = self.readable(repo_id).at(revision)
        if commit is None:
            raise Refused(404, "no such revision", "RevisionNotFound")
        return commit

    def json(self) -> Any:
        return json.loads(self.body)


def said(content: Any) -> tuple[bytes]:
    return (json.dumps(content).encode(),)


def whoami(request: Answers) -> tuple[bytes]:
    if (user := request.user()) is None:
        raise Refused(401, "Invalid credentials in Authorization header")
    return said({"name": user, "type": "user"})


def validate_yaml(request: Answers) -> tuple[bytes]:
    found = re.match(r"---\n(.*?)\n---", request.json()["content"], re.DOTALL)
    head = yaml.safe_load(found[1]) if found else {}
    if (base := head.get("base_model")) and not re.fullmatch(r"[\w-]+/[\w.-]+", base):
        message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        raise Refused(400, json.dumps({"errors": [{"message": message}]}))
    return said({"errors": [], "warnings": []})


def create(request: Answers) -> tuple[bytes]:
    wanted = request.json()
    owner, name = wanted["organization"], wanted["name"]
    if request.user() is None:
        raise Refused(401, "Invalid credentials in Authorization header")
    if request.user() != owner:
        raise Refused(403, f"you don't have the rights to create a model under the namespace {owner}")
    if f"{owner}/{name}" in request.hub.repositories:
        raise Refused(409, "you already created this model repo")
    first = Commit({".gitattributes": b"*.safetensors filter=lfs"}, "initial commit")
    private = wanted.get("visibility") == "private" or wanted.get("private") is True
    request.hub.repositories[f"{owner}/{name}"] = Repository(private, {"main": [first]})
    return said({"url": f"{request.hub.address}/{owner}/{name}"})


def info(request: Answers, repo_id: str, revision: str | None) -> tuple[bytes]:
    commit = request.commit(repo_id, revision or "main")
    siblings = [{"rfilename": path} for path in commit.files]
    repository = request.hub.repositories[repo_id]
    return said({"id": repo_id, "sha": commit.oid, "private": repository.private, "siblings": siblings, "tags": []})


def is_large(path: str) -> bool:
    return not path.endswith(REGULAR)


def tree(request: Answers, repo_id: str, revision: str) -> tuple[bytes]:
    entries = []
    for path, content in request.commit(repo_id, revision).files.items():
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if is_large(path):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 128}
        entries.append(entry)
    return said(entries)


def branch(request: Answers, repo_id: str, name: str) -> tuple[bytes]:
    repository = request.writable(repo_id)
    if name in repository.branches:
        raise Refused(409, "the branch is there already")
    repository.branches[name] = list(repository.branches["main"])
    return said({})


def preupload(request: Answers, repo_id: str, revision: str) -> tuple[bytes]:
    request.writable(repo_id)
    present = request.commit(repo_id, revision).files
    answers = []
    for file in request.json()["files"]:
        path, large = file["path"], is_large(file["path"])
        oid = None
        if path in present:
            oid = hashlib.sha256(present[path]).hexdigest() if large else git_oid(present[path])
        mode = "lfs" if large else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return said({"files": answers})


def batch(request: Answers, repo_id: str) -> tuple[bytes]:
    request.writable(repo_id)
    objects = []
    for wanted in request.json()["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in request.hub.store:
            place = f"{request.hub.address}/store/{wanted['oid']}"
            answer["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
        objects.append(answer)
    return said({"transfer": "basic", "objects": objects})


def receive(request: Answers, oid: str) -> tuple[bytes]:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, "the content is not what its hash says")
    request.hub.store[oid] = request.body
    return (b"",)


def verify(request: Answers, oid: str) -> tuple[bytes]:
    if len(request.hub.store.get(oid, b"")) != request.json()["size"]:
        raise Refused(404, "not here")
    return said({})


def commit(request: Answers, repo_id: str, revision: str) -> tuple[bytes]:
    repository = request.writable(repo_id)
    lines = [json.loads(line) for line in request.body.splitlines()]
    files = dict(request.commit(repo_id, revision).files)
    message = ""
    for line in lines:
        value = line["value"]
        if line["key"] == "header":
            message = value["summary"]
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in request.hub.store:
                raise Refused(400, f"{value['path']} has not arrived")
            files[value["path"]] = request.hub.store[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    made = Commit(files, message)
    answer = {"commitUrl": f"{request.hub.address}/{repo_id}/commit/{made.oid}", "commitOid": made.oid}
    if "create_pr" in request.query:
        repository.pulls.append(made)
        answer["pullRequestUrl"] = f"{request.hub.address}/{repo_id}/discussions/{len(repository.pulls)}"
    else:
        repository.branches[revision].append(made)
    return said(answer)


def resolve(request: Answers, repo_id: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
    found = request.commit(repo_id, revision)
    if path not in found.files:
        raise Refused(404, "no such file", "EntryNotFound", found.oid)
    content = found.files[path]
    etag = hashlib.sha256(content).hexdigest() if is_large(path) else git_oid(content)
    return content, {"X-Repo-Commit": found.oid, "ETag": f'"{etag}"'}


MODEL = r"/api/models/([\w.-]+/[\w.-]+)"
ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("GET HEAD", r"/?", lambda request: (b"",)),
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", r"/api/repos/create", create),
    ("GET", rf"{MODEL}(?:/revision/(.+))?", info),
    ("GET", rf"{MODEL}/tree/([^/]+)", tree),
    ("POST", rf"{MODEL}/branch/(.+)", branch),
    ("POST", rf"{MODEL}/preupload/(.+)", preupload),
    ("POST", rf"{MODEL}/commit/(.+)", commit),
    ("POST", r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", batch),
    ("PUT", r"/store/(\w+)", receive),
    ("POST", r"/store/(\w+)/verify", verify),
    ("GET HEAD", r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", resolve),
)
