"""A local hub: the part of the protocol that the client uses, with folders as repositories."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`repositories` maps ids to folders, `cards` ids to the data of their model cards. Those in
    `gated` list their files and refuse to give them. `cut` ends the transfer of a file after so
    many bytes. `asked` has every request: method, path, token."""

    def __init__(self):
        self.repositories: dict[str, Path] = {}
        self.cards: dict[str, dict] = {}
        self.gated: set[str] = set()
        self.cut: int | None = None
        self.asked: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.answer(self)

            def do_HEAD(self):
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> set[str]:
        """Files that were requested with GET."""
        return {
            path.split(f"/resolve/{SHA}/")[1]
            for method, path, _ in self.asked
            if method == "GET" and "/resolve/" in path
        }

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(request.path.partition("?")[0])
        self.asked.append((request.command, path, request.headers.get("Authorization")))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repository, rest = "/".join(parts[:2]), parts[2:]
        if repository not in self.repositories:
            return self.fail(request, 404, "RepoNotFound", "Repository not found")
        folder = self.repositories[repository]
        if path.startswith("/api/models") and rest[:1] == ["tree"]:
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            entries = [self.entry(folder, file) for file in files]
            return self.give(request, json.dumps(entries).encode())
        if path.startswith("/api/models"):
            if rest and rest[1] not in ("main", SHA):
                return self.fail(request, 404, "RevisionNotFound", "Invalid rev id")
            about = {
                "id": repository,
                "sha": SHA,
                "siblings": [],
                "tags": [],
                "cardData": self.cards.get(repository),
            }
            return self.give(request, json.dumps(about).encode())
        if repository in self.gated:
            return self.fail(request, 403, "GatedRepo", "Access to this model is restricted")
        return self.give(request, (folder / "/".join(rest[2:])).read_bytes(), file=True)

    def entry(self, folder: Path, file: Path) -> dict:
        return {
            "type": "file",
            "path": file.relative_to(folder).as_posix(),
            "size": file.stat().st_size,
            "oid": oid(file.read_bytes()),
        }

    def fail(self, request: BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", message)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def give(self, request: BaseHTTPRequestHandler, body: bytes, file: bool = False) -> None:
        start, name = 0, oid(body)
        span = request.headers.get("Range", "")
        if file and span:
            start = int(span.removeprefix("bytes=").split("-")[0])
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        request.send_header("ETag", f'"{name}"')
        request.send_header("X-Repo-Commit", SHA)
        request.send_header("Accept-Ranges", "bytes")
        request.end_headers()
        if request.command == "GET":
            cut = self.cut if file and self.cut is not None and len(body) > self.cut else None
            request.wfile.write(body[start:cut])
            if cut is not None:
                request.close_connection = True


def oid(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
