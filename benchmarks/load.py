"""A light HTTP/1.1 load generator: raw requests over kept connections, so that the server is what is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

SECONDS = 60.0  # that an answer may take


class Connection(asyncio.Protocol):
    """One kept connection; one request at a time."""

    @classmethod
    async def to(cls, url: str) -> Connection:
        split = urlsplit(url)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, split.hostname, split.port)
        return connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), bytes(self._body)))

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to a whole request, as ``post`` makes it."""
        self._answer = asyncio.get_running_loop().create_future()
        self._parser, self._body = httptools.HttpResponseParser(self), bytearray()
        if self._transport.is_closing():
            raise ConnectionResetError("the server closed the connection")
        self.send(request)
        return await asyncio.wait_for(self._answer, SECONDS)

    def send(self, data: bytes) -> None:
        self._transport.write(data)

    def close(self) -> None:
        self._transport.close()


def post(path: str, body: bytes, kind: str = "application/octet-stream") -> bytes:
    """The bytes of a POST."""
    head = f"POST {path} HTTP/1.1\r\nhost: server\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: server\r\n\r\n".encode()


@dataclass
class Load:
    """What a load saw: seconds of each request, the wall time of all, and what was not answered well."""

    seconds: list[float] = field(default_factory=list)
    wall: float = 0.0
    errors: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return len(self.seconds) / self.wall


async def run(url: str, ask: Callable[[Connection, int], Awaitable[None]], clients: int, seconds: float) -> Load:
    """Let ``clients`` ask for ``seconds``; ``ask(connection, number)`` makes one request and raises if it fails."""
    load = Load()
    began = time.perf_counter()
    number = 0

    async def client() -> None:
        nonlocal number
        connection = await Connection.to(url)
        while (start := time.perf_counter()) - began < seconds:
            number += 1
            try:
                await ask(connection, number)
                load.seconds.append(time.perf_counter() - start)
            except (RuntimeError, ConnectionError, TimeoutError) as error:
                load.errors.append(repr(error))
                connection.close()
                connection = await Connection.to(url)
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    load.wall = time.perf_counter() - began
    return load
