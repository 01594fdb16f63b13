"""Servers for Weights & Biases as they are on a bad day, on loopback, and one that works well enough."""

import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any, Literal

Kind = Literal["closed", "silent", "refuses", "dies", "works"]

API_KEY = "a" * 40


class Environment(dict[str, str]):
    """Variables for a process, and what it has asked the server that they name: path and content."""

    requests: list[tuple[str, Any]]


@contextlib.contextmanager
def wandb_server(kind: Kind) -> Iterator["Environment"]:
    """Starts a server and gives the environment in which wandb uses it.

    "closed": nobody listens; "silent": accepts and never answers; "refuses": answers everything by 500; "dies": works
    until the run is started, and from then on accepts nothing; "works".
    """
    if kind in ("closed", "silent"):
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen(100)
        port, stop, requests = listener.getsockname()[1], listener.close, []
    else:
        server = _Server(kind)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        port, stop, requests = server.server_address[1], server.stop, server.requests
    environment = Environment(WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_API_KEY=API_KEY, WANDB_MODE="online")
    environment.requests = requests
    try:
        yield environment
    finally:
        stop()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, kind: Kind) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kind = kind
        self.requests: list[tuple[str, Any]] = []

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Any  # a _Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        try:
            asked = json.loads(body or b"{}")
        except ValueError:
            asked = {}
        self.server.requests.append((self.path, asked))
        if self.server.kind == "refuses":
            self._answer(500, {})
        elif self.path == "/graphql":
            port = self.server.server_address[1]
            self._answer(200, {"data": _data(asked, f"http://127.0.0.1:{port}/upload/")})
            if self.server.kind == "dies" and "UpsertBucket" in asked.get("query", ""):
                self.close_connection = True
                threading.Thread(target=self.server.stop).start()
        else:
            self._answer(200, {})

    do_GET = do_PUT = do_POST

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def _data(asked: dict[str, Any], upload_url: str) -> dict[str, Any]:
    query, variables = asked.get("query", ""), asked.get("variables", {})
    if "UpsertBucket" in query:
        project = {"id": "p", "name": variables.get("project") or "p", "entity": {"id": "e", "name": "tester"}}
        bucket = {"id": "r", "name": variables.get("name"), "displayName": variables.get("displayName")}
        return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}
    if "CreateRunFiles" in query:
        files = [{"name": name, "uploadUrl": upload_url + name} for name in variables["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
    if "query ArtifactType(" in query:
        return {"project": {"artifact": None}}
    if "CreateArtifact(" in query or "CreateArtifact " in query:
        # As if that very content were there already: nothing is left to upload.
        return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s"}}}}
    if "viewer" in query:
        return {"viewer": {"id": "v", "entity": "tester", "username": "tester", "email": "", "flags": "{}"}}
    return {}
