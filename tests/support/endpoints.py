"""An endpoint of OpenAI's interface on this machine, which answers as a test wants, and remembers
what it was asked."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self) -> None:
        self._take(None)

    def do_POST(self) -> None:
        self._take(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _take(self, body: Any) -> None:
        self.server.asked.append((self.command, self.path, body))
        self.server.keys.append(self.headers["Authorization"])
        if self.command == "GET" and self.path.endswith("/models"):
            self.json(200, {"data": [{"id": name} for name in self.server.models]})
        else:
            self.server.answer(self)

    def json(self, status: int, value: Any) -> None:
        self.send(status, json.dumps(value).encode())

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def say(self, text: Any, **choice: Any) -> None:
        """A chat completion."""
        self.json(200, {"choices": [{"message": {"content": text}, **choice}]})

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: list[Any] = ["writer", "other"]
        self.asked: list[tuple[str, str, Any]] = []
        self.keys: list[str | None] = []
        self.answer: Answer = lambda handler: handler.say("A cat jumps.")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def prompts(self) -> list[str]:
        """The user's texts of the completions that were asked for."""
        bodies = [body for method, _, body in self.asked if method == "POST"]
        return [body["messages"][1]["content"][0]["text"] for body in bodies]


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()
