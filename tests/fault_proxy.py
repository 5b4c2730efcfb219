"""A proxy on loopback that spoils HTTP requests by rule, so that a real client meets real faults.

It passes on what it is not told to spoil, byte for byte, with the `Host` header as it was: signatures stay valid.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

CHUNK_BYTES = 64 << 10


class Fault(StrEnum):
    SLOW_DOWN = "slow_down"  # answer 503 SlowDown, forward nothing
    RESET_BEFORE = "reset_before"  # cut the connection, forward nothing
    RESET_AFTER = "reset_after"  # forward, and cut the connection when the answer comes: nobody learns of it
    CUT_DOWNLOAD = "cut_download"  # cut the connection in the middle of the answer's body
    CUT_UPLOAD = "cut_upload"  # cut both connections in the middle of the request's body
    CORRUPT = "corrupt"  # flip a byte in the middle of the answer's body
    DELAY = "delay"  # forward after `seconds`
    HANG = "hang"  # never answer


@dataclass
class Rule:
    """Spoil requests of this method whose path matches: not the first `skip`, then each `every`-th, `times` in all."""

    fault: Fault
    method: str
    path: str
    times: int = 1
    skip: int = 0
    every: int = 1
    seconds: float = 0.0
    seen: int = field(default=0, init=False)
    fired: int = field(default=0, init=False)

    def fires(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path):
            return False
        self.seen += 1
        due = self.seen > self.skip and (self.seen - self.skip - 1) % self.every == 0 and self.fired < self.times
        self.fired += due
        return due


class FaultProxy:
    """Listens on `port` while it is started; forwards to a port of this machine."""

    def __init__(self, upstream_port: int, rules: Sequence[Rule]) -> None:
        self._upstream_port, self.rules = upstream_port, list(rules)
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="fault-proxy", daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(60)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: requests one after another, each on a new connection to the server behind."""
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # one of the two sides went away, so does the other; or the proxy is stopped
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await Head.read(reader)
        method, path, _ = head.first.split(" ", 2)
        rule = next((rule for rule in self.rules if rule.fires(method, path)), None)
        fault = rule.fault if rule else None
        if rule and fault is Fault.DELAY:
            await asyncio.sleep(rule.seconds)
        elif fault is Fault.HANG:
            await self._stop.wait()
            return False
        elif fault is Fault.RESET_BEFORE:
            return _cut(writer)
        elif fault is Fault.SLOW_DOWN:
            return await _slow_down(head, reader, writer)
        return await self._forward(head, method, fault, reader, writer)

    async def _forward(
        self, head: Head, method: str, fault: Fault | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        answers, up = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        sending = asyncio.create_task(_send(head, reader, up, writer, cut=fault is Fault.CUT_UPLOAD))
        try:
            answer = await Head.read(answers)
            while answer.status == "100":
                writer.write(answer.raw)
                answer = await Head.read(answers)
            await sending
            if fault is Fault.RESET_AFTER:
                return _cut(writer)
            return await _answer(answer, method, fault, answers, writer)
        finally:
            sending.cancel()
            up.close()


@dataclass(frozen=True)
class Head:
    """The first line and the headers of a request or an answer; `raw` as they came."""

    raw: bytes
    first: str
    headers: dict[str, str]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Head:
        raw = await reader.readuntil(b"\r\n\r\n")
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return cls(raw, first, {name.strip().lower(): value.strip() for name, _, value in pairs})

    @property
    def status(self) -> str:
        return self.first.split(" ")[1]

    @property
    def length(self) -> int:
        return int(self.headers.get("content-length", 0))

    async def body(self, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        """As it is on the wire: a chunked one stays chunked."""
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            async for piece in _chunked(reader):
                yield piece
            return
        missing = self.length
        while missing:
            piece = await reader.read(min(missing, CHUNK_BYTES))
            if not piece:
                raise ConnectionResetError
            missing -= len(piece)
            yield piece


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        line = await reader.readline()
        yield line
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        yield await reader.readexactly(size + 2)
    while line not in (b"\r\n", b""):
        line = await reader.readline()
        yield line


async def _send(
    head: Head, reader: asyncio.StreamReader, up: asyncio.StreamWriter, writer: asyncio.StreamWriter, *, cut: bool
) -> None:
    up.write(head.raw)
    async for piece in head.body(reader):
        if cut:
            up.write(piece[: len(piece) // 2])
            await up.drain()
            _cut(up)
            _cut(writer)
            return
        up.write(piece)
        await up.drain()


async def _answer(
    answer: Head, method: str, fault: Fault | None, answers: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    writer.write(answer.raw)
    if method != "HEAD" and answer.status not in ("204", "304"):
        half, passed = answer.length // 2, 0
        async for piece in answer.body(answers):
            if fault is Fault.CUT_DOWNLOAD:
                writer.write(piece[: min(half, len(piece) // 2)])
                await writer.drain()
                return _cut(writer)
            at = half - passed  # the same byte each time, however the pieces come
            if fault is Fault.CORRUPT and 0 <= at < len(piece):
                piece = piece[:at] + bytes([piece[at] ^ 0x55]) + piece[at + 1 :]
            passed += len(piece)
            writer.write(piece)
            await writer.drain()
    return answer.headers.get("connection", "").lower() != "close"


async def _slow_down(head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    if "expect" not in head.headers:  # else the client waits for a word before it sends the body
        async for _ in head.body(reader):
            pass
    body = (
        b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    )
    writer.write(
        b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    await writer.drain()
    return False


def _cut(writer: asyncio.StreamWriter) -> bool:
    """By a reset, as a machine that goes down does; a mere close might pass for an end."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


@contextmanager
def fault_proxy(upstream_port: int, rules: Sequence[Rule]) -> Iterator[FaultProxy]:
    proxy = FaultProxy(upstream_port, rules)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
