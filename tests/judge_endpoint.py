"""A real HTTP server on this machine that speaks the OpenAI protocol as a test scripts it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Endpoint:
    """`url`, the request bodies in the order of arrival, and their Authorization headers."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    authorization: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def questions(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


Reply = str | None | int | bytes | float
"""Text of the completion, None for a refusal without content, an HTTP status, a raw body, or
seconds to fall silent for."""


@contextmanager
def serve(script: Callable[[str], Reply]) -> Iterator[Endpoint]:
    """`script` is given the question of each request."""
    endpoint = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                endpoint.requests.append(body)
                endpoint.authorization.append(self.headers["Authorization"])
                endpoint.at_once += 1
                endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
            try:
                self._reply(script(body["messages"][0]["content"]))
            finally:
                with endpoint.lock:
                    endpoint.at_once -= 1

        def _reply(self, reply: Reply) -> None:
            status, content = 200, b""
            if isinstance(reply, float):
                time.sleep(reply)
            elif isinstance(reply, int):
                status, content = reply, b'{"error": "scripted"}'
            elif isinstance(reply, bytes):
                content = reply
            else:
                message = {"role": "assistant", "content": reply}
                content = json.dumps({"choices": [{"message": message}]}).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except ConnectionError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
