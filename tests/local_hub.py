"""A Hugging Face hub on this machine: as much of its protocol as the clients ask for, over repositories in a directory.

`root/models/owner/name` and `root/datasets/owner/name` hold the files of the main branch. Whenever they are asked for,
what has changed becomes a commit, which stays.
"""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_local"
LARGE = (".safetensors", ".parquet")  # kept apart from git: the hub sends who asks for them to another host
KINDS = ("models", "datasets")


class RefusedError(Exception):
    """What the hub answers when it does not give: a status, and the code and message that it puts into headers."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class LocalHub:
    """The repositories, who may read them, and what was asked.

    Attributes:
        url: the endpoint.
        elsewhere: the same as another host, to the clients.
        root: the directory of repositories.
        gated: repositories that show themselves to all, and their files to nobody.
        private: repositories of which only the holder of `TOKEN` knows.
        asked: each request, as "METHOD /path".
    """

    def __init__(self, port: int, root: Path) -> None:
        self.url, self.elsewhere = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self.root = root
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.asked: list[str] = []
        self._lock = threading.Lock()

    def commit(self, kind: str, name: str) -> str:
        """Returns the newest commit of a repository, made now where a file has changed."""
        files = self.root / kind / name
        with self._lock:
            commit = sha1(json.dumps([name, *listed(files)]).encode()).hexdigest()
            if not self.files(kind, name, commit).is_dir():
                shutil.copytree(files, self.files(kind, name, commit))
        return commit

    def files(self, kind: str, name: str, commit: str) -> Path:
        """The directory that holds the files of a commit."""
        return self.root / "commits" / kind / name / commit


def listed(directory: Path) -> list[dict[str, Any]]:
    """Returns a repository's files and directories as the hub lists them."""
    entries: list[dict[str, Any]] = []
    for path in sorted(directory.rglob("*")):
        place = path.relative_to(directory).as_posix()
        if path.is_dir():
            entries.append({"type": "directory", "path": place, "oid": sha1(place.encode()).hexdigest(), "size": 0})
            continue
        size = path.stat().st_size
        entry: dict[str, Any] = {"type": "file", "path": place, "oid": blob_id(path), "size": size}
        if path.suffix in LARGE:
            entry["lfs"] = {"oid": large_id(path), "size": size, "pointerSize": 134}
        entries.append(entry)
    return entries


def blob_id(path: Path) -> str:
    """Git's name for a file's contents: the ETag of a small file."""
    content = path.read_bytes()
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


def large_id(path: Path) -> str:
    """The name and the ETag of a file that is kept apart from git."""
    return sha256(path.read_bytes()).hexdigest()


@contextmanager
def local_hub(root: Path) -> Iterator[LocalHub]:
    """Serves the repositories below `root` on a free port of 127.0.0.1."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.daemon_threads = True
    hub = LocalHub(server.server_port, root)
    server.RequestHandlerClass = partial(_Handler, hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: LocalHub, *connection: Any) -> None:
        self.hub = hub
        super().__init__(*connection)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.hub.asked.append(f"{self.command} {url.path}")
        parts = unquote(url.path).strip("/").split("/")
        try:
            if parts[0] == "api":
                self._send(200, json.dumps(self._api(parts[1:], url.query, content)).encode())
            elif parts[0] == "large":
                self._send(200, self.hub.root.joinpath(*parts[1:]).read_bytes())
            else:
                self._file(parts)
        except RefusedError as refused:
            self._send(refused.status, b"", {"X-Error-Code": refused.code, "X-Error-Message": str(refused)})

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _api(self, parts: list[str], query: str, content: bytes) -> Any:
        match parts:
            case [kind, *name, "revision", revision] if kind in KINDS:
                return self._info(kind, "/".join(name), revision)
            case [kind, owner, name, "tree", revision, *below] if kind in KINDS:
                return self._tree(kind, f"{owner}/{name}", revision, "/".join(below), "recursive=true" in query)
            case [kind, *name] if kind in KINDS and len(name) <= 2:
                return self._info(kind, "/".join(name), "main")
            case ["repos", "create"]:
                return self._create(json.loads(content))
            case ["validate-yaml"]:
                return {"errors": [], "warnings": []}
            case ["models", _, _, "preupload", "main"]:
                paths = [file["path"] for file in json.loads(content)["files"]]
                return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            case ["models", owner, name, "commit", "main"]:
                return self._commit(f"{owner}/{name}", [json.loads(line) for line in content.splitlines()])
        raise RefusedError(404, "", f"nothing at {self.path}")

    def _info(self, kind: str, name: str, revision: str) -> dict[str, Any]:
        commit, directory = self._found(kind, name, revision)
        files = [{"rfilename": entry["path"]} for entry in listed(directory) if entry["type"] == "file"]
        return {"id": name, "sha": commit, "siblings": files, "private": name in self.hub.private, "tags": []}

    def _tree(self, kind: str, name: str, revision: str, below: str, is_recursive: bool) -> list[dict[str, Any]]:
        _, directory = self._found(kind, name, revision)
        prefix = f"{below}/" if below else ""
        entries = [entry for entry in listed(directory) if entry["path"].startswith(prefix)]
        if below and not entries:
            raise RefusedError(404, "EntryNotFound", f"{below} does not exist on {revision}")
        return [entry for entry in entries if is_recursive or "/" not in entry["path"].removeprefix(prefix)]

    def _create(self, asked: dict[str, Any]) -> dict[str, str]:
        if not self._is_known_user():
            raise RefusedError(401, "", "Invalid username or password.")
        name = f"{asked['organization']}/{asked['name']}"
        (self.hub.root / "models" / name).mkdir(parents=True, exist_ok=True)
        if asked["visibility"] == "private":
            self.hub.private.add(name)
        return {"name": name, "url": f"{self.hub.url}/{name}"}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        for line in lines:
            if line["key"] == "file":
                path = self.hub.root / "models" / name / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        commit = self.hub.commit("models", name)
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"}

    def _file(self, parts: list[str]) -> None:
        kind = "datasets" if parts[0] == "datasets" else "models"
        match parts[kind == "datasets" :]:
            case [owner, name, "resolve", revision, *place]:
                commit, directory = self._found(kind, f"{owner}/{name}", revision)
            case _:
                raise RefusedError(404, "", f"nothing at {self.path}")
        if f"{owner}/{name}" in self.hub.gated:
            status = 403 if self._is_known_user() else 401
            raise RefusedError(status, "GatedRepo", f"Access to {owner}/{name} is restricted")
        path = directory.joinpath(*place)
        if not path.is_file():
            raise RefusedError(404, "EntryNotFound", f"{'/'.join(place)} does not exist on {revision}")
        reported = {"ETag": f'"{blob_id(path)}"', "X-Repo-Commit": commit}
        if path.suffix in LARGE:
            place_elsewhere = f"{self.hub.elsewhere}/large/{path.relative_to(self.hub.root)}"
            linked = {"X-Linked-ETag": f'"{large_id(path)}"', "X-Linked-Size": str(path.stat().st_size)}
            self._send(302, b"", reported | linked | {"Location": place_elsewhere})
        else:
            self._send(200, path.read_bytes(), reported)

    def _found(self, kind: str, name: str, revision: str) -> tuple[str, Path]:
        """Returns commit and files. To strangers, the hub says the same of what is private as of what is not there."""
        is_there = name.count("/") == 1 and (self.hub.root / kind / name).is_dir()
        if not self._is_known_user() and (not is_there or name in self.hub.private):
            raise RefusedError(401, "RepoNotFound", "Invalid username or password.")
        if not is_there:
            raise RefusedError(404, "RepoNotFound", "Repository not found")
        commit = self.hub.commit(kind, name) if revision == "main" else revision
        if not self.hub.files(kind, name, commit).is_dir():
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, self.hub.files(kind, name, commit)

    def _is_known_user(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
