"""A hub of one repository on this machine, which answers as the Hugging Face Hub does and keeps what it is asked."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest


class Asked(NamedTuple):
    path: str
    authorization: str | None
    body: bytes


class Hub:
    """The repository `me/mine`.

    Attributes:
        asked: Every request.
        private: Whether the repository is; one that is made anew is what the request says.
        refused: Ends of the paths of what is answered with 403.
    """

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.private: bool | None = None
        self.refused: tuple[str, ...] = ()

    def answer(self, asked: Asked, endpoint: str) -> Any:
        if asked.path == "/api/repos/create":
            if self.private is None:
                self.private = json.loads(asked.body)["visibility"] == "private"
            return {"url": f"{endpoint}/me/mine"}
        if asked.path == "/api/models/me/mine":
            return {"id": "me/mine", "private": self.private, "siblings": []}
        if asked.path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(asked.body)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
        if asked.path.endswith("/commit/main"):
            return {"commitUrl": f"{endpoint}/me/mine/commit/0", "commitOid": "0" * 40, "pullRequestUrl": None}
        return {}

    @property
    def uploaded(self) -> dict[str, bytes]:
        """Content of the files in the commit, by path."""
        (commit,) = [asked.body for asked in self.asked if asked.path.endswith("/commit/main")]
        lines = [json.loads(line) for line in commit.splitlines()]
        return {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }


@contextlib.contextmanager
def serve_hub(monkeypatch: pytest.MonkeyPatch, token: str) -> Iterator[Hub]:
    """Serves a hub, to which this process is logged in, within the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            asked = Asked(path, self.headers.get("Authorization"), body)
            hub.asked.append(asked)
            refused = path.endswith(hub.refused) if hub.refused else False
            answer = {"error": "You have no\nwrite access"} if refused else hub.answer(asked, endpoint)
            content = json.dumps(answer).encode()
            self.send_response(403 if refused else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", token)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
