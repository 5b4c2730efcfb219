"""A web server on loopback that knows more or less of HTTP. It serves one shard at every address; a cut one where the
address says `broken`."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from make_data import sample_members, tar_bytes

TAR = tar_bytes(sample_members(0, 12))


class Web(http.server.BaseHTTPRequestHandler):
    """`ranges` and `length`: whether the server knows them. `gate`: bodies are held back until it is open."""

    protocol_version = "HTTP/1.1"
    ranges = length = True
    truncate: int | None = None
    gate: threading.Event | None = None
    cut_once: ClassVar[list[str]] = []  # ranges of which only some bytes are sent, the first time
    requests: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        if self.gate is not None:
            self.gate.wait()
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        asked = self.headers.get("Range", "") if self.ranges else ""
        Web.requests.append(f"{self.command} {asked}".strip())
        data = whole = TAR if "broken" not in self.path else TAR[:3000]
        if asked:
            start, end = (int(n) for n in asked.removeprefix("bytes=").split("-"))
            data = whole[start : end + 1]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(whole)}")
        if self.length:
            self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        if with_body:
            cut = self.headers.get("Range") in self.cut_once
            self.wfile.write(data[: 1000 if cut else self.truncate])
            if cut:
                self.cut_once.remove(self.headers["Range"])
        self.close_connection = True

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serve(**changes: Any) -> Iterator[str]:
    handler = type("Changed", (Web,), changes)
    Web.requests.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/x.tar"
        finally:
            server.shutdown()
            thread.join()
