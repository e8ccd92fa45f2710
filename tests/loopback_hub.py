"""A hub on this machine for the tests: the requests that ``huggingface_hub`` makes, answered as the Hugging Face hub does.

It has no client of its own. What it holds is read and changed by the real client, or directly through :class:`Hub`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_the_token_of_the_tests"
Files = dict[str, bytes]
Answer = tuple[int, dict[str, str], bytes] | None


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A model. ``commits``: files by commit. ``branches``: commits by branch. ``lfs``: which files are large."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], branch: str = "main", message: str = "") -> str:
        made = dict(files)
        said = json.dumps([branch, len(self.commits), {path: git_id(data) for path, data in sorted(made.items())}])
        sha = hashlib.sha1(said.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = made, sha
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


class Hub:
    """The content of the hub, and what was asked of it.

    ``large``: files of at least so many bytes are large files. ``part_bytes``: they are uploaded in parts of this size; 0
    for one part. ``before``: called with each request, in its thread; returns an answer (status, headers, body) instead of
    the usual one, or None.
    """

    def __init__(self, large: int = 1000, part_bytes: int = 0) -> None:
        self.large, self.part_bytes = large, part_bytes
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.sent_bytes = 0
        self.uploaded: list[str] = []
        self.before: Callable[[Request], tuple[int, dict[str, str], bytes] | None] = lambda request: None
        self.change: Callable[[Request, bytes], bytes] = lambda request, body: body
        self.ranges = True
        self.loses_commits = 0
        """How many commits are made without an answer that says so."""
        self.lock = threading.RLock()
        self.address = self.data_address = ""

    def add(self, name: str, files: Mapping[str, bytes], **more: bool) -> str:
        repo = self.repos.setdefault(name, Repo(**more))
        return repo.commit(files)

    def is_large(self, path: str, data: bytes) -> bool:
        return path.endswith((".safetensors", ".bin", ".pth")) or len(data) >= self.large

    def count(self, pattern: str, method: str | None = None) -> int:
        with self.lock:
            return sum(bool(re.search(pattern, r.path)) and method in (None, r.method) for r in self.requests)


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Runs the hub: one server for questions, and one for the bytes of large files, as the hub has them."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    hub.address, hub.data_address = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.asked = Request(self.command, url.path, self.headers.get("Range"), token)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self._chunks())
        with self.hub.lock:
            self.hub.requests.append(self.asked)
        instead = self.hub.before(self.asked)
        if instead is not None:
            self._send(instead[0], instead[1], instead[2])
            return
        if token is not None and token != TOKEN:
            self._error(401, "", "Invalid credentials in Authorization header")
            return
        for pattern, name in _ROUTES:
            found = re.fullmatch(pattern, url.path)
            if found:
                getattr(self, name)(*(unquote(each) if each is not None else None for each in found.groups()))
                return
        self._error(404, "", "no such page")

    def _chunks(self) -> Iterator[bytes]:
        while nbytes := int(self.rfile.readline(), 16):
            yield self.rfile.read(nbytes)
            self.rfile.readline()
        self.rfile.readline()

    # ------------------------------------------------------------------------------------------------------------- answers

    def _send(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            with self.hub.lock:
                self.hub.sent_bytes += len(body)
        if int(headers.get("Content-Length", len(body))) != len(body):
            self.close_connection = True

    def _json(self, data: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(200, {"Content-Type": "application/json", **(headers or {})}, json.dumps(data).encode())

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, headers, json.dumps({"error": message}).encode())

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.asked.token != TOKEN):
            self._error(404 if self.asked.token else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _files(self, name: str, revision: str) -> tuple[Repo, str, Files] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        sha = repo.at(revision)
        if sha is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, sha, repo.commits[sha]

    # ------------------------------------------------------------------------------------------------------------- reading

    def info(self, name: str, revision: str | None) -> None:
        found = self._files(name, revision or "main")
        if found:
            repo, sha, files = found
            siblings = [{"rfilename": path} for path in files]
            self._json(
                {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []},
                {"X-Repo-Commit": sha},
            )

    def tree(self, name: str, revision: str, _: str | None) -> None:
        found = self._files(name, revision)
        if not found:
            return
        entries: list[dict[str, Any]] = []
        for path, data in found[2].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
            if self.hub.is_large(path, data):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        folders = {path.rpartition("/")[0] for path in found[2] if "/" in path}
        entries += [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
        start = int(self.query.get("cursor", ["0"])[0])
        page = entries[start : start + 3]
        headers = {}
        if start + 3 < len(entries):
            headers["Link"] = (
                f'<{self.hub.address}{self.path.partition("?")[0]}?recursive=true&cursor={start + 3}>; rel="next"'
            )
        self._json(page, headers)

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self._files(name, revision)
        if not found:
            return
        repo, sha, files = found
        if repo.gated and self.asked.token != TOKEN:
            self._error(401, "GatedRepo", "Access to this model is restricted")
            return
        if path not in files:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        data = files[path]
        common = {"X-Repo-Commit": sha}
        if self.hub.is_large(path, data):
            digest = hashlib.sha256(data).hexdigest()
            with self.hub.lock:
                self.hub.objects[digest] = data
            common |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            route = f"{self.hub.address}/api/models/{name}/xet-read-token/{sha}"
            common |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}
            self._send(302, {**common, "Location": f"{self.hub.data_address}/data/{digest}?signature=1"})
            return
        self._bytes(data, {**common, "ETag": f'"{git_id(data)}"'})

    def data(self, digest: str) -> None:
        if self.asked.token is not None:  # as stores do that have signed addresses
            self._error(400, "", "Only one auth mechanism allowed")
            return
        self._bytes(self.hub.objects[digest], {"ETag": f'"{digest[:32]}"'})

    def _bytes(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.asked.range or "")
        if asked and self.hub.ranges:
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
            if start >= len(data):
                self._send(416, {"Content-Range": f"bytes */{len(data)}"})
                return
            body = self.hub.change(self.asked, data[start:stop])
            said = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}", "Content-Length": str(stop - start)}
            self._send(206, {**headers, **said}, body)
            return
        self._send(200, {**headers, "Content-Length": str(len(data))}, data)

    # ------------------------------------------------------------------------------------------------------------- writing

    def _may_write(self, name: str) -> Repo | None:
        repo = self._repo(name)
        if repo is not None and self.asked.token != TOKEN:
            self._error(403, "", "You need write access")
            return None
        return repo

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if self.asked.token != TOKEN:
            self._error(401, "", "Invalid username or password.")
        elif name in self.hub.repos:
            self._send(409, {}, json.dumps({"url": f"{self.hub.address}/{name}"}).encode())
        else:
            self.hub.repos[name] = Repo(private=bool(asked.get("private") or asked.get("visibility") == "private"))
            self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self._json({"url": f"{self.hub.address}/{name}"})

    def branch(self, name: str, branch: str) -> None:
        repo = self._may_write(name)
        if repo is None:
            return
        if branch in repo.branches:
            self._error(409, "", "Reference already exists")
            return
        asked = json.loads(self.body or b"{}")
        repo.branches[branch] = repo.branches[asked.get("startingPoint") or "main"]
        self._json({})

    def preupload(self, name: str, revision: str) -> None:
        if self._may_write(name) is None or self._files(name, revision) is None:
            return
        files = []
        for each in json.loads(self.body)["files"]:
            large = self.hub.is_large(each["path"], b"") or each["size"] >= self.hub.large
            mode = "lfs" if large else "regular"
            files.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        self._json({"files": files})

    def batch(self, name: str) -> None:
        if self._may_write(name) is None:
            return
        objects = []
        for each in json.loads(self.body)["objects"]:
            oid, size = each["oid"], each["size"]
            if oid in self.hub.objects:
                objects.append({"oid": oid, "size": size})
                continue
            step = self.hub.part_bytes
            header: dict[str, str] = {}
            href = f"{self.hub.data_address}/upload/{oid}/0"
            if step:
                header = {str(n + 1): f"{self.hub.data_address}/upload/{oid}/{n}" for n in range(-(-size // step))}
                header["chunk_size"] = str(step)
                href = f"{self.hub.address}/complete/{oid}"
            verify = {"href": f"{self.hub.address}/{name}.git/info/lfs/verify"}
            objects.append(
                {"oid": oid, "size": size, "actions": {"upload": {"href": href, "header": header}, "verify": verify}}
            )
        transfer = "multipart" if self.hub.part_bytes else "basic"
        self._json({"transfer": transfer, "objects": objects})

    def upload(self, oid: str, part: str) -> None:
        if self.hub.part_bytes:
            with self.hub.lock:
                self.hub.parts[oid, int(part)] = self.body
        elif hashlib.sha256(self.body).hexdigest() != oid:
            self._error(400, "", "the body has another digest")
            return
        else:
            self._keep(oid, self.body)
        self._send(200, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete(self, oid: str) -> None:
        asked = json.loads(self.body)["parts"]
        with self.hub.lock:
            data = b"".join(self.hub.parts[oid, each["partNumber"] - 1] for each in asked)
        if hashlib.sha256(data).hexdigest() != oid:
            self._error(400, "", "the parts have another digest")
            return
        self._keep(oid, data)
        self._json({})

    def _keep(self, oid: str, data: bytes) -> None:
        with self.hub.lock:
            self.hub.objects[oid] = data
            self.hub.uploaded.append(oid)

    def verify(self, name: str) -> None:
        asked = json.loads(self.body)
        there = len(self.hub.objects.get(asked["oid"], b"")) == asked["size"]
        self._json({}) if there else self._error(404, "", "no such object")

    def commit(self, name: str, revision: str) -> None:
        repo = self._may_write(name)
        found = None if repo is None else self._files(name, revision)
        if repo is None or found is None:
            return
        files, header = dict(found[2]), {}
        for line in self.body.splitlines():
            each = json.loads(line)
            value = each["value"]
            if each["key"] == "header":
                header = value
            elif each["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif each["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self._error(400, "", "a large file of the commit was not uploaded")
                    return
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif each["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif each["key"] == "deletedFolder":
                files = {path: data for path, data in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
        if header.get("parentCommit") not in (None, found[1]):
            self._error(412, "", "A commit has happened since. Please refresh and try again.")
            return
        sha = repo.commit(files, revision, header["summary"])
        if self.hub.loses_commits:
            self.hub.loses_commits -= 1
            self._error(504, "", "gateway timeout")
            return
        url = f"{self.hub.address}/{name}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None})

    def validate(self) -> None:
        text = json.loads(self.body)["content"]
        good = text.startswith("---\n") and "\n---\n" in text
        said = {"errors": [] if good else [{"message": "no keys"}], "warnings": []}
        self._send(200 if good else 400, {"Content-Type": "application/json"}, json.dumps(said).encode())

    def whoami(self) -> None:
        self._json({"name": "me", "type": "user", "orgs": []}) if self.asked.token else self._error(401, "", "no token")


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (rf"/api/models/{_NAME}(?:/revision/([^/]+))?", "info"),
    (rf"/api/models/{_NAME}/tree/([^/]+)(?:/(.+))?", "tree"),
    (rf"/api/models/{_NAME}/preupload/([^/]+)", "preupload"),
    (rf"/api/models/{_NAME}/commit/([^/]+)", "commit"),
    (rf"/api/models/{_NAME}/branch/([^/]+)", "branch"),
    (r"/api/repos/create", "create"),
    (r"/api/whoami-v2", "whoami"),
    (r"/api/validate-yaml", "validate"),
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "batch"),
    (rf"/{_NAME}\.git/info/lfs/verify", "verify"),
    (r"/data/([0-9a-f]+)", "data"),
    (r"/upload/([0-9a-f]+)/(\d+)", "upload"),
    (r"/complete/([0-9a-f]+)", "complete"),
]
