"""A loopback proxy in front of an HTTP server, which spoils answers as networks and servers do."""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from unittest import mock
from urllib.parse import urlsplit

Spoiled = Literal["500", "slow", "cut", "lost", "unconditional"]
_HOP = ("connection", "transfer-encoding", "content-length", "keep-alive")


@contextmanager
def proxy(target: str, plan: Callable[[int], Spoiled | None], *, slow_s: float = 2.0) -> Iterator[str]:
    """A block in which a proxy of a server runs; its URL.

    Args:
        plan: what happens to the request of a number, from 0. 500: refused with that status, and not done. slow: done,
            and answered after `slow_s`. cut: done, and half of the answer is sent. lost: done, and not answered.
            unconditional: done as if it had no conditions.
    """
    lock, numbers = threading.Lock(), iter(range(10**9))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            with lock:
                spoiled = plan(next(numbers))
            body = self._body()
            if spoiled == "500":
                self._answer(500, [], b"<Error><Code>InternalError</Code><Message>planned</Message></Error>")
                return
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            if spoiled == "unconditional":
                headers = {name: value for name, value in headers.items() if not name.lower().startswith("if-")}
            connection = http.client.HTTPConnection(urlsplit(target).netloc, timeout=30)
            connection.request(self.command, self.path, body=body, headers=headers)
            answer = connection.getresponse()
            data = answer.read()
            length = answer.headers.get("content-length")
            connection.close()
            if spoiled == "slow":
                time.sleep(slow_s)
            if spoiled == "lost":
                self.close_connection = True
                return
            fields = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP]
            self._answer(answer.status, fields, data, length=length, cut=spoiled == "cut")

        def _body(self) -> bytes:
            if self.headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("content-length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _answer(
            self,
            status: int,
            fields: list[tuple[str, str]],
            data: bytes,
            *,
            length: str | None = None,
            cut: bool = False,
        ) -> None:
            self.send_response_only(status)
            for name, value in fields:
                self.send_header(name, value)
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = self.close_connection or cut

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def behind(plan: Callable[[int], Spoiled | None], *, slow_s: float = 2.0) -> Iterator[list[Spoiled]]:
    """A block in which the S3 of AWS_ENDPOINT_URL is reached through such a proxy; what it has spoiled so far."""
    import s3fs

    spoiled: list[Spoiled] = []

    def noted(number: int) -> Spoiled | None:
        found = plan(number)
        spoiled.extend([found] if found else [])
        return found

    with (
        proxy(os.environ["AWS_ENDPOINT_URL"], noted, slow_s=slow_s) as url,
        mock.patch.dict(os.environ, AWS_ENDPOINT_URL=url),
    ):
        s3fs.S3FileSystem.clear_instance_cache()  # they remember the endpoint
        try:
            yield spoiled
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
