"""A server of OpenAI's protocol on this machine, whose replies a test chooses, bad ones too."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], Any]
"""From a request to its reply: a text; bytes, the body; a code and a body; a `Raw`."""


@dataclass(frozen=True)
class Raw:
    """A reply that may break the protocol."""

    body: bytes
    code: int = 200
    length: int | None = None
    """Content-Length that is claimed; None: the true one."""
    retry_after: str | None = None
    reset: bool = False
    """Whether the connection is closed without a word."""


def completion(text: Any, **changed: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 1, "completion_tokens": len(str(text or "").split()), "total_tokens": 2}
    made = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
    return made | {"usage": usage} | changed


def as_raw(found: Any) -> Raw:
    if isinstance(found, Raw):
        return found
    if isinstance(found, tuple):
        code, body = found
        return Raw(json.dumps(body).encode(), code)
    return Raw(found if isinstance(found, bytes) else json.dumps(completion(found)).encode())


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 1024

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no news."""


@contextmanager
def serving() -> Iterator[Callable[[Reply], str]]:
    """A function that starts a server and returns its URL; all end with the block."""
    started: list[Server] = []

    def start(reply: Reply) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def _send(self, raw: Raw) -> None:
                if raw.reset:
                    self.close_connection = True
                    return
                self.send_response(raw.code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw.body) if raw.length is None else raw.length))
                if raw.retry_after is not None:
                    self.send_header("Retry-After", raw.retry_after)
                self.end_headers()
                self.wfile.write(raw.body)
                self.close_connection = raw.length is not None

            def do_GET(self) -> None:
                model = {"id": "judge", "object": "model", "created": 0, "owned_by": "us"}
                self._send(Raw(json.dumps({"object": "list", "data": [model]}).encode()))

            def do_POST(self) -> None:
                self._send(as_raw(reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))))

        server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()
