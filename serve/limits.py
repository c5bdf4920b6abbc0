"""What a client may cost: bytes, seconds, and whether it may ask at all."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import time
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serve.decode import MAX_BYTES
from serve.metrics import Metrics

UPLOAD = "/gradio_api/upload"
UPLOADS = ("/v1/predict", UPLOAD)  # where a body may have MAX_BYTES
MAX_OTHER_BYTES = 2**20
MAX_UPLOADED_BYTES = 4 * 2**30  # to the page in one hour: they lie on disk for up to two
MAX_HELD_BYTES = 512 * 2**20  # of all requests that are being read or answered
MAX_HEAD_BYTES = 64 * 2**10
FILE_NAME = b"filename"  # in a form once for each file
HEAD_SECONDS, BODY_SECONDS = 10.0, 60.0  # for a client to send its headers, and its body
READ_SECONDS = 60.0  # for a client to take what waits for it
METRICS = "metrics"  # in the state of the app
OPEN_PATHS = ("/healthz", "/readyz")  # no key needed
# What the page uses of Gradio's. The rest would cost or tell too much: a queue without bound, streams without end,
# recordings that ffmpeg converts, links that are files here, others' addresses, which it would fetch for anybody.
GRADIO, FILE, RUN, PROGRESS = "/gradio_api/", "/gradio_api/file=", "/gradio_api/run/", "/gradio_api/upload_progress"
MAX_QUERY = 200  # bytes, of an upload and its progress: Gradio keeps its name
FILE_BYTES = 8192  # that any upload takes on disk: a folder and a file
PATHS = ("/v1/predict", "/v1/model", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json")


def refusal(scope: Scope, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error as the API tells it: ``code`` for programs, ``message`` for people. It is counted under ``code``."""
    scope["refused"] = code
    body = json.dumps({"error": code, "message": message})
    return Response(body, status, headers, "application/json")


class Limits:
    """Around the whole app: the key, the size of bodies, and what is counted of each request.

    ``key`` is what a client must show, as a bearer token or as the password of HTTP Basic (which browsers ask
    for); None lets everybody in.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, key: str | None = None) -> None:
        self._app, self._metrics, self._key = app, metrics, key
        self._held = 0
        self._uploaded, self._hour = 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, held, tail = time.perf_counter(), 0, 0, b""
        path = scope["path"]
        limit = MAX_BYTES if path in UPLOADS else MAX_OTHER_BYTES

        async def counted() -> Message:
            nonlocal held, tail
            message = await receive()
            if size := len(body := message.get("body", b"")):
                held += size
                self._held += size
                if held > limit:
                    scope["refused"] = "too_large"
                    raise HTTPException(413, _too_large(limit))
                if self._held > MAX_HELD_BYTES:
                    scope["refused"] = "busy"
                    raise HTTPException(503, "too many uploads at once", {"Retry-After": "1"})
                if path == UPLOAD:
                    body = tail + body.lower()
                    tail = body[1 - len(FILE_NAME) :]  # which may come in two parts
                    if not self._may_upload(size + FILE_BYTES * body.count(FILE_NAME)):
                        scope["refused"] = "busy"
                        left = 3600 - int(time.monotonic() % 3600)
                        raise HTTPException(503, "no more uploads to the page in this hour", {"Retry-After": str(left)})
            return message

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await (self._refused(scope, limit) or self._app)(scope, counted, seen)
        except ClientDisconnect:
            status = 0  # whatever was sent to nobody
        except asyncio.CancelledError:  # the server stops, and its grace is over
            if not status:
                message = "the server stopped before the answer was there"
                await refusal(scope, 503, "stopping", message, {"Retry-After": "1"})(scope, receive, seen)
        finally:
            self._held -= held
            if status:  # else the client is gone, or the protocol has refused the rest of the body
                self._metrics.request(path if path in PATHS else "page", status, time.perf_counter() - began)
            if status >= 400:
                self._metrics.reject(scope.get("refused") or str(status))

    def _refused(self, scope: Scope, limit: int) -> Response | None:
        """The answer to a request that need not be read."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._key is not None and scope["path"] not in OPEN_PATHS and not self._may(headers):
            scheme = "Bearer" if scope["path"].startswith("/v1/") else 'Basic realm="key as password"'
            return refusal(
                scope,
                401,
                "unauthorized",
                "a key is required: send it as Authorization: Bearer KEY",
                {"WWW-Authenticate": scheme},
            )
        if not _is_ours(scope["path"], scope["query_string"]):
            return refusal(scope, 404, "not_found", "this endpoint of Gradio's is not offered: use POST /v1/predict")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length.lstrip(b"0")[:20] or b"0") > limit:  # Python reads no number of any length
            return refusal(scope, 413, "too_large", _too_large(limit))
        return None

    def _may_upload(self, size: int) -> bool:
        """Counts the ``size`` of what comes, in bytes on disk."""
        hour = int(time.monotonic() // 3600)
        if hour != self._hour:
            self._uploaded, self._hour = 0, hour
        self._uploaded += size
        return self._uploaded <= MAX_UPLOADED_BYTES

    def _may(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"basic":
            try:
                shown = base64.b64decode(shown, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        assert self._key is not None
        return hmac.compare_digest(shown.strip(), self._key.encode())


def _is_ours(path: str, query: bytes) -> bool:
    """Whether the API or the page uses that address."""
    if path in (UPLOAD, PROGRESS):
        return len(query) <= MAX_QUERY
    if path.startswith(FILE):
        return ":/" not in path
    return path.startswith(RUN) or not path.startswith(GRADIO)


def _too_large(limit: int) -> str:
    return f"a request has at most {limit // 2**20} MB: send fewer or smaller pictures at once"


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which waits for no client without end and keeps no endless headers."""

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _running: RequestResponseCycle | None = None
    _arriving = False  # whether a message has begun and is not complete
    _bodied = False  # whether the bytes at hand held some of its body
    _head = 0  # its bytes so far that are no body: the headers, and then trailers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._forget_reader()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn tells only the last of several requests
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        self._bodied = False
        super().data_received(data)
        answered = self.cycle is None or self.cycle.response_complete
        if answered and not self._arriving and self._timer is None and self.timeout_keep_alive_task is None:
            self._arm(HEAD_SECONDS)  # an empty line ends uvicorn's own wait for the next request
        if self._arriving and not self._bodied:
            self._head += len(data)
            if self._head > MAX_HEAD_BYTES:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the headers are too long")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._arriving, self._head = True, 0
        self._arm(HEAD_SECONDS)

    def on_headers_complete(self) -> None:
        self._head = 0
        self._arm(BODY_SECONDS)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._bodied = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._arriving = False
        self._disarm()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._forget_reader()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._await_reader()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._await_reader()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, "this is not HTTP/1.1")

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _await_reader(self) -> None:
        """A closing connection stays, too, until its client has taken all of its answers."""
        if self._unread is None:
            self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def _forget_reader(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _late(self) -> None:
        self._refuse(HTTPStatus.REQUEST_TIMEOUT, "the request took too long to arrive")

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        if self.transport.is_closing():
            return
        metrics: Metrics = self.app_state[METRICS]
        metrics.reject(status.name.lower())
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = json.dumps({"error": status.name.lower(), "message": message})
            self.transport.write(
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode()
            )
        self.transport.close()
        self._await_reader()
