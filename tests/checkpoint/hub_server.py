"""A small Hugging Face Hub on the loopback interface: repositories, branches, uploads and commits, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """What the server holds, and how it is to fail.

    Attributes
    ----------
    url : str
    files : dict of str to dict of str to bytes
        Committed files by ``"repository@branch"``.
    private : dict of str to bool
        By repository.
    tokens : set of str
        The authorization headers that were received.
    paths : list of str
        The method and path of each request.
    fail_at : str
        A pattern of requests that are answered with `status`.
    ignored : str
        A pattern of files that the repository's .gitignore names.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    paths: list[str] = field(default_factory=list)
    fail_at: str = "nothing"
    status: int = 403
    ignored: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve a hub until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        hub, path = self.state, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.paths.append(f"{self.command} {path}")
        if not path.startswith("/objects/"):
            hub.tokens.add(self.headers.get("Authorization"))
        if fnmatch(hub.paths[-1], hub.fail_at):
            self._answer({"error": "not today"}, hub.status)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            new, main = (f"{found[1]}@{branch}" for branch in (found[2], "main"))
            exists = new in hub.files
            hub.files.setdefault(new, dict(hub.files[main]))
            self._answer({}, 409 if exists else 200)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            self._answer({"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            upload = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": upload})
        elif path.startswith("/objects/"):
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            hub.objects[oid] = body
            self._answer({})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self._commit(f"{found[1]}@{found[2]}", body)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            files = hub.files[f"{found[1]}@{found[2]}"]
            self._answer([{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in files.items()])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self._answer({"id": found[1], "private": hub.private[found[1]], "sha": "a" * 40})
        else:
            self._answer({"error": f"{path} is no endpoint of this server"}, 404)

    def _create(self, given: dict[str, Any]) -> None:
        hub, name = self.state, f"{given.get('organization') or 'me'}/{given['name']}"
        exists = name in hub.private
        hub.private.setdefault(name, given.get("visibility") == "private" or bool(given.get("private")))
        hub.files.setdefault(f"{name}@main", {})
        self._answer({"url": f"{hub.url}/{name}", "id": name}, 409 if exists else 200)

    def _mode(self, name: str) -> dict[str, Any]:
        mode = "lfs" if name.endswith(".safetensors") else "regular"
        return {"path": name, "uploadMode": mode, "shouldIgnore": fnmatch(name, self.state.ignored)}

    def _commit(self, branch: str, body: bytes) -> None:
        hub = self.state
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                hub.files[branch][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                hub.files[branch][value["path"]] = hub.objects[value["oid"]]
        self._answer({"commitUrl": f"{hub.url}/{branch.partition('@')[0]}/commit/{'a' * 40}", "commitOid": "a" * 40})

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
