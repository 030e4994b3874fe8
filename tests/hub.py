"""A Hub of model directories on loopback: what huggingface_hub asks of the real one to download a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

COMMIT = "c0ffee" * 6 + "beef"
REFUSALS = {"RepoNotFound": 401, "GatedRepo": 403, "RevisionNotFound": 404, "": 503}


class Hub:
    """models: directories by Hub id. refusals: error codes of the real Hub by id; "" for 503.

    cut: the id of a model whose weights never arrive whole. asked: requests so far.
    """

    def __init__(self, models: dict[str, Path], refusals: dict[str, str] | None = None) -> None:
        self.models, self.refusals, self.asked = models, refusals or {}, list[str]()
        self.cut: str | None = None

        class Handler(_Handler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Hub]:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.asked.append(f"{self.command} {path}")
        api = path.removeprefix("/api/models")
        repository = "/".join(api.split("/")[1:3])
        refusal = self.hub.refusals.get(repository, None if repository in self.hub.models else "RepoNotFound")
        root = self.hub.models.get(repository, Path())
        if refusal is not None:
            self._answer(REFUSALS[refusal], b"{}", {"X-Error-Code": refusal} if refusal else {})
        elif api.startswith(f"/{repository}/tree/"):
            files = [file for file in sorted(root.rglob("*")) if file.is_file()]
            tree = [
                {"type": "file", "path": str(file.relative_to(root)), "size": file.stat().st_size, "oid": _digest(file)}
                for file in files
            ]
            self._answer(200, json.dumps(tree).encode())
        elif api != path:  # /api/models/ID/revision/REVISION
            self._answer(200, json.dumps({"id": repository, "sha": COMMIT}).encode())
        else:  # /ID/resolve/REVISION/FILE
            file = root / path.split("/", 5)[5]
            is_cut = repository == self.hub.cut and file.suffix == ".safetensors"
            headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT}
            self._answer(200, file.read_bytes(), headers, 100 if is_cut else None)

    def _answer(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, num_sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:num_sent])
            self.close_connection = num_sent is not None

    def log_message(self, *_: object) -> None:
        pass
