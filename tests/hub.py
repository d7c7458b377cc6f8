"""A hub on this machine: the endpoints of the Hugging Face hub that the program calls, over repositories in memory."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".bin")  # what the hub keeps by sha256 and not by git's hash


class Hub:
    """Repositories by kind and name; `requests` are the method, path and Authorization of every call.

    put("model", "org/m", {path: bytes}) makes a commit, which `main` then is.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.main: dict[tuple[str, str], str] = {}
        self.requests: list[tuple[str, str, str | None]] = []

    def put(self, kind: str, name: str, files: dict[str, bytes]) -> str:
        text = repr((kind, name, sorted(files.items())))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.repos.setdefault((kind, name), {})[commit] = files
        self.main[kind, name] = commit
        return commit

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silence."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        api = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            kind, name, what, revision, under = api.groups()
            commit, files = self._commit(kind, name, revision or "main")
            if commit is None:
                return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            if what in ("tree", "paths-info"):
                return self._json(self._tree(what, files, under))
            siblings = [{"rfilename": path, **_entry(data)} for path, data in sorted(files.items())]
            return self._json({"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []})
        if file:
            kind, name, revision, path = file.groups()
            commit, files = self._commit("dataset" if kind else "model", name, revision)
            if commit is None or path not in files:
                code = "EntryNotFound" if commit else "RepoNotFound"
                headers = {"X-Error-Code": code} | ({"X-Repo-Commit": commit} if commit else {})
                return self._json({"error": code}, 404, headers)
            return self._file(commit, path, files[path])
        return self._json({"error": "no such endpoint"}, 404)

    def _commit(self, kind: str, name: str, revision: str):
        commits = self.hub.repos.get((kind, name), {})
        commit = self.hub.main.get((kind, name)) if revision == "main" else revision
        return (commit, commits[commit]) if commit in commits else (None, {})

    def _tree(self, what: str, files: dict[str, bytes], under: str) -> list[dict]:
        if what == "paths-info":
            try:
                wanted = json.loads(self.body)["paths"]
            except ValueError:
                wanted = re.findall(r"paths=([^&]+)", unquote(self.body.decode()))
            wanted = [wanted] if isinstance(wanted, str) else wanted
        else:
            wanted = [path for path in files if path.startswith(under)]
        return [
            {"type": "file", "path": path, "oid": _entry(files[path])["blobId"]} | _entry(files[path])
            for path in wanted if path in files
        ]  # fmt: skip

    def _file(self, commit: str, path: str, data: bytes) -> None:
        large = path.endswith(LARGE)
        etag = hashlib.sha256(data).hexdigest() if large else git(data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))} if large else {}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status = 200
        if span:
            start, end = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"], status = f"bytes {start}-{end}/{len(data)}", 206
            data = data[start : end + 1]
        self._send(status, data, {"Content-Type": "application/octet-stream", **headers})

    def _json(self, value: object, status: int = 200, headers: dict | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(data: bytes) -> dict:
    """What the hub tells of a file: git's hash, and of a large one (here: with a zero byte) the sha256."""
    told = {"size": len(data), "blobId": git(data)}
    if b"\0" in data:
        told["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "oid": hashlib.sha256(data).hexdigest(),
                       "size": len(data), "pointerSize": 130}  # fmt: skip
    return told


def git(data: bytes) -> str:
    """Git's hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
