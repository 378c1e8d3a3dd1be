"""The endpoints of the Hub on loopback: what each request is answered, by the Hub's rights."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from support.hub import LocalHub

LARGE = (".parquet", ".safetensors", ".png", ".mp4", ".bin")  # what goes to large file storage
WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
USERS = {WRITER: ("me", "write"), READER: ("me", "read"), STRANGER: ("stranger", "write")}
WHEN = "2026-01-01T00:00:00.000Z"


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def at(self, revision: str) -> Commit | None:
        """A commit by its hash, the newest one by the branch's name."""
        wanted = [c for c in self.commits if revision in ("main", "refs/heads/main", c.sha)]
        return wanted[-1] if wanted else None

    def commit(self, message: str, files: dict[str, bytes]) -> Commit:
        sha = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits.append(Commit(sha, message, files))
        return self.commits[-1]


class Refusal(Exception):
    """An answer with a status of 400 or more: `(status, message, X-Error-Code)`."""


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *_) -> None:
        pass

    def _handle(self) -> None:
        self.query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        path, self.status, self.sent = unquote(urlsplit(self.path).path), 0, 0
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            route = next((r for r in _ROUTES if self.command in r[0] and re.fullmatch(r[1], path)), None)
            if route is None:
                raise Refusal(404, f"no such endpoint: {self.command} {path}", "")
            route[2](self, *re.fullmatch(route[1], path).groups())
        except Refusal as refusal:
            status, message, code = refusal.args
            self.answer({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})
        finally:
            with self.hub.lock:
                self.hub.log.append((self.command, path, self.status, self.sent))

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.status, self.sent = status, 0 if self.command == "HEAD" else len(data)
        self.send_response(status)
        sizes = {"Content-Length": str(len(data)), "Content-Type": "application/json"}
        for name, value in (sizes | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer_file(self, data: bytes, headers: dict[str, str]) -> None:
        """A file, or the part of it that a Range header asks for."""
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(data, 200, headers)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        part = {"Content-Range": f"bytes {start}-{stop}/{len(data)}"}
        return self.answer(data[start : stop + 1], 206, headers | part)

    def user(self) -> tuple[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Refusal(401, "Invalid credentials in Authorization header", "")
        return USERS.get(token)

    def readable(self, kind: str, name: str) -> Repository:
        user, repository = self.user(), self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and (user is None or user[0] != name.split("/")[0])):
            raise Refusal(404 if user else 401, "Repository Not Found", "RepoNotFound")
        return repository

    def writable(self, kind: str, name: str) -> Repository:
        repository, user = self.readable(kind, name), self.user()
        if user is None or user[0] != name.split("/")[0] or user[1] != "write":
            raise Refusal(403, f"Forbidden: you don't have the rights to write to {name}", "")
        return repository

    def commit_of(self, kind: str, name: str, revision: str) -> Commit:
        commit = self.readable(kind, name).at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.", "")
        self.answer({"name": user[0], "type": "user", "orgs": [], "auth": {"accessToken": {"role": user[1]}}})

    def create(self) -> None:
        wanted, user = json.loads(self.body), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.", "")
        kind, owner = f"{wanted.get('type') or 'model'}s", wanted.get("organization") or user[0]
        name = f"{owner}/{wanted['name']}"
        if owner != user[0] or user[1] != "write":
            raise Refusal(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"', "")
        place = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.hub.repositories:
            return self.answer({"error": f"You already created this {kind[:-1]} repo", "url": place}, 409)
        repository = Repository(private=wanted.get("visibility") == "private" or wanted.get("private") is True)
        repository.commit("initial commit", {".gitattributes": b"*.parquet filter=lfs\n"})
        self.hub.repositories[kind, name] = repository
        return self.answer({"url": place, "name": name, "id": name})

    def auth_check(self, kind: str, name: str, write: str | None) -> None:
        (self.writable if write else self.readable)(kind, name)
        self.answer({})

    def info(self, kind: str, name: str, revision: str | None) -> None:
        commit = self.commit_of(kind, name, revision or "main")
        files = [{"rfilename": path, "size": len(self.bytes_of(data))} for path, data in commit.files.items()]
        found = {"id": name, "sha": commit.sha, "private": self.readable(kind, name).private, "siblings": files}
        self.answer(found | {"tags": [], "downloads": 0, "likes": 0, "lastModified": WHEN, "createdAt": WHEN})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repository = self.writable(kind, name)
        there = repository.at(revision).files
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            known = {"oid": self.known(there[file["path"]])} if file["path"] in there else {}
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        self.answer({"files": files})

    def batch(self, prefix: str | None, name: str) -> None:
        self.writable((prefix or "models/").rstrip("/"), name)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid = wanted["oid"]
            place = {"href": f"{self.hub.url}/lfs/{oid}"}
            actions = {} if oid in self.hub.large else {"actions": {"upload": place, "verify": place}}
            objects.append(wanted | actions)
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        self.hub.uploads += 1
        if self.hub.fail_uploads and self.hub.uploads >= self.hub.fail_uploads:
            self.close_connection = True  # without an answer
            return
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the upload is not what its hash says", "")
        self.hub.large[oid] = self.body
        self.answer({})

    def verify(self, oid: str) -> None:
        if len(self.hub.large[oid]) != json.loads(self.body)["size"]:
            raise Refusal(400, "the upload has another size", "")
        self.answer({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.writable(kind, name)
        files, message = dict(repository.at(revision).files), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = pointer(value["oid"], len(self.hub.large[value["oid"]]))
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"unknown operation {line['key']}", "")
        commit = repository.commit(message, files)
        place = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}/commit/{commit.sha}"
        self.answer({"success": True, "commitOid": commit.sha, "commitUrl": place, "hookOutput": ""})

    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        commit, below = self.commit_of(kind, name, revision), (folder or "").strip("/")
        inside = [path for path in commit.files if not below or path.startswith(f"{below}/")]
        if below and not inside:
            raise Refusal(404, f"{below} does not exist on {revision}", "EntryNotFound")
        start = len(below) + 1 if below else 0
        if self.query.get("recursive", "").lower() in ("true", "1"):
            folders = {parent for path in inside for parent in _parents(path) if len(parent) > start}
        else:
            folders = {path[: path.index("/", start)] for path in inside if "/" in path[start:]}
            inside = [path for path in inside if "/" not in path[start:]]
        found = [{"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
                 for path in sorted(folders)]  # fmt: skip
        self.answer(found + [self.entry(path, commit.files[path]) for path in inside])

    def resolve(self, prefix: str | None, name: str, revision: str, path: str) -> None:
        commit = self.commit_of((prefix or "models/").rstrip("/"), name, revision)
        if path not in commit.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.sha}
            return self.answer({"error": f"{path} does not exist"}, 404, headers)
        stored = commit.files[path]
        data, headers = self.bytes_of(stored), {"X-Repo-Commit": commit.sha, "ETag": f'"{self.oid(stored)}"'}
        if data is stored:
            return self.answer_file(data, headers)
        oid = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        return self.answer(b"", 302, headers | linked | {"Location": f"{self.hub.elsewhere}/lfs/{oid}"})

    def download(self, oid: str) -> None:
        data = self.hub.large[oid]
        if self.command == "GET" and self.hub.break_downloads:
            self.hub.break_downloads -= 1
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            return
        self.answer_file(data, {"ETag": f'"{oid}"'})

    def validate_card(self) -> None:
        card = json.loads(self.body)["content"]
        if not re.match(r"---\n(.*\n)+?---\n", card):
            raise Refusal(400, "the card has no metadata", "")
        self.answer({"errors": [], "warnings": []})

    def bytes_of(self, stored: bytes) -> bytes:
        pointer = re.match(rb"version https://git-lfs.*\noid sha256:(\w+)", stored)
        return self.hub.large[pointer[1].decode()] if pointer else stored

    def oid(self, stored: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    def known(self, stored: bytes) -> str:
        """By which a client sees that it need not send a file: sha256 of a large one, git's hash of any other."""
        data = self.bytes_of(stored)
        return self.oid(stored) if data is stored else hashlib.sha256(data).hexdigest()

    def entry(self, path: str, stored: bytes) -> dict[str, object]:
        data = self.bytes_of(stored)
        found = {"type": "file", "path": path, "oid": self.oid(stored), "size": len(data)}
        if data is not stored:
            large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": len(stored)}
            found["lfs"] = large
        return found


def pointer(oid: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


_API, _ID = r"/api/(models|datasets)/([^/]+/[^/]+)", r"(datasets/)?([^/]+/[^/]+)"
_REV = r"([^/]+|refs/[^/]+/[^/]+)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", HubHandler.whoami),
    ("POST", r"/api/repos/create", HubHandler.create),
    ("POST", r"/api/validate-yaml", HubHandler.validate_card),
    ("GET", rf"{_API}/auth-check(/write)?", HubHandler.auth_check),
    ("GET", rf"{_API}(?:/revision/{_REV})?", HubHandler.info),
    ("GET", rf"{_API}/tree/{_REV}(/.*)?", HubHandler.tree),
    ("POST", rf"{_API}/preupload/{_REV}", HubHandler.preupload),
    ("POST", rf"{_API}/commit/{_REV}", HubHandler.commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", HubHandler.batch),
    ("PUT", r"/lfs/(\w+)", HubHandler.upload),
    ("POST", r"/lfs/(\w+)", HubHandler.verify),
    ("GET HEAD", r"/lfs/(\w+)", HubHandler.download),
    ("GET HEAD", rf"/{_ID}/resolve/{_REV}/(.+)", HubHandler.resolve),
)
