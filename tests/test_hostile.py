"""What must not happen: hostile requests to a running server, which still answers a good one after each."""

import asyncio
import io
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import repeat
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from served import Served, encoded, png

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
GOOD = encoded(PIXELS)
JPEG = encoded(PIXELS, "JPEG")
MB = 2**20


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    """A client; after the test the server must answer a good image as ever."""
    with server.client() as client:
        yield client
        assert client.post("v1/predict", content=GOOD).status_code == 200


def _clean(answer: httpx.Response) -> None:
    """An error in our words: no path, no trace, no address in memory."""
    said = answer.json()
    assert said.keys() == {"error", "message"}
    for leak in ("/", "\\", "0x", "Traceback", "PIL", "line "):
        assert leak not in said["message"], said


def test_a_decompression_bomb_is_refused_at_once(server: Served, http: httpx.Client) -> None:
    bomb = png(13_000, 13_000, 8, 2, repeat(bytes(1 + 3 * 13_000), 13_000))
    assert len(bomb) < 1e6
    assert http.post("v1/predict", content=GOOD).status_code == 200
    server.forget_memory()
    before = server.memory()
    for _ in range(3):
        answer = http.post("v1/predict", content=bomb)
        assert answer.status_code == 413
        assert answer.json()["error"] == "image_size"
        assert "at most 50 megapixels" in answer.json()["message"]
    assert server.memory() - before < 50 * MB


def test_damaged_jpegs(http: httpx.Client) -> None:
    """With flipped bits, and every tenth cut."""
    random = np.random.default_rng(0)
    statuses = set()
    for number in range(1000):
        data = np.frombuffer(JPEG, np.uint8).copy()
        for place in random.integers(0, 8 * len(data), random.integers(1, 20)):
            data[place // 8] ^= 1 << (place % 8)
        answer = http.post("v1/predict", content=data.tobytes())
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 413, 415), answer.text
        if answer.status_code != 200:
            _clean(answer)
        if number % 10 == 0:
            cut = http.post("v1/predict", content=JPEG[: random.integers(0, len(JPEG) - 2)])
            assert cut.status_code in (400, 415)
            _clean(cut)
    assert {200, 400} <= statuses


def test_16_bits_and_inks_are_pictures(http: httpx.Client) -> None:
    deep, grey = PIXELS[..., 0].astype(np.uint16) * 257, PIXELS[..., 0]
    answers = [http.post("v1/predict", content=encoded(pixels)).json()["images"] for pixels in (deep, grey)]
    assert answers[0] == answers[1]
    inks = io.BytesIO()
    Image.fromarray(PIXELS).convert("CMYK").save(inks, "JPEG")
    assert http.post("v1/predict", content=inks.getvalue()).status_code == 200


@pytest.mark.parametrize(("height", "width"), [(1, 60_000), (60_000, 1)])
def test_thin_pictures_are_pictures(http: httpx.Client, height: int, width: int) -> None:
    picture = encoded(np.zeros((height, width, 3), np.uint8))
    assert http.post("v1/predict", content=picture).status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"<!doctype html><html><script>alert(1)</script></html>",
        encoded(PIXELS, "ICO"),
        encoded(PIXELS, "TIFF"),
        b"%PDF-1.7\n",
    ],
)
def test_what_is_no_picture(http: httpx.Client, data: bytes) -> None:
    for answer in (
        http.post("v1/predict", content=data, headers={"content-type": "image/png"}),
        http.post("v1/predict", params={"top_k": 1}, content=data),
        http.post("v1/predict", files={"image": ("cat.png", data)}),
    ):
        assert answer.status_code == 415
        _clean(answer)


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "../../etc/passwd", "..\\..\\x", "\u2603" * 90, "a\0b.png", ""])
def test_names_mean_nothing(http: httpx.Client, name: str) -> None:
    """Neither for the format (a GIF named .png) nor for any path."""
    files = {"image": (name or "cat.png", encoded(PIXELS, "GIF"), "image/png")}
    answer = http.post("v1/predict", files=files)
    assert answer.status_code == 200, answer.text
    assert "etc" not in answer.text


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "../../../etc/passwd", "/etc/passwd", "a/../../b.png"])
def test_uploads_stay_in_their_folder(server: Served, http: httpx.Client, name: str) -> None:
    (path,) = http.post("gradio_api/upload", files={"files": (name, GOOD)}).raise_for_status().json()
    uploads, place = server.artifact.parent / "uploads", Path(path)
    assert place.read_bytes() == GOOD
    assert place == place.resolve()
    assert place.is_relative_to(uploads)
    assert len(place.relative_to(uploads).parts) == 3  # the server's folder, the content's, the file


def _chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // MB):
        yield bytes(MB)


def test_large_bodies(server: Served, http: httpx.Client) -> None:
    server.forget_memory()
    before = server.memory()
    for path in ("v1/predict", "v1/predict?top_k=1"):
        for content in (bytes(30 * MB), _chunks(120 * MB)):  # with its length, and chunked
            answer = http.post(path, content=content)
            assert answer.status_code == 413
            assert answer.json()["error"] == "too_large"
            assert answer.json()["message"].startswith("a request has at most 20 MB: ")
    assert server.memory() - before < 100 * MB
    for path in ("v1/model", "gradio_api/run/classify", "nothing"):
        assert http.post(path, json={"data": "data:image/png;base64," + "A" * 2 * MB}).status_code == 413
    assert http.post("v1/predict", content=iter([GOOD[:100], GOOD[100:]])).status_code == 200  # chunked, and small


def test_many_uploads_at_once_do_not_fill_the_memory(server: Served, http: httpx.Client) -> None:
    """60 clients who each send 19 MB and never end: 512 MB are held, the others are refused."""
    server.forget_memory()
    before, refused = server.memory(), _refused(http, "busy")
    head = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (20 * MB)
    clients = [server.connection() for _ in range(60)]
    try:
        for client in clients:
            client.settimeout(5)
            client.sendall(head)
        for client in clients:
            try:
                client.sendall(bytes(19 * MB))
            except OSError:  # refused, and closed
                continue
        assert server.memory() - before < 900 * MB
        assert _refused(http, "busy") > refused
    finally:
        for client in clients:
            client.close()


KEPT = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


def test_slow_clients_are_let_go(server: Served, http: httpx.Client) -> None:
    """A header now and then, a body that never comes, or nothing at all; others are served meanwhile."""
    before = _refused(http, "request_timeout")
    starts = [
        b"",
        KEPT,
        b"GET /healthz HTTP/1.1\r\n",
        b"POST /v1/predict HTTP/1.1\r\ncontent-length: 1000\r\n\r\nabc",
        b"POST /v1/predict?top_k=1 HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n",
    ]
    clients, began = [], time.monotonic()
    for start in starts:
        client = server.connection()
        client.settimeout(0.05)
        client.sendall(start)
        clients.append(client)
    clients[1].settimeout(5)
    answered = b""
    while b'"ok"' not in answered:
        answered += clients[1].recv(4096)
    clients[1].sendall(b"\r\n")
    clients[1].settimeout(0.05)
    trickling = clients[2]
    told, bodies = [], clients[3:]
    end = time.monotonic() + 15
    while clients and time.monotonic() < end:
        assert http.post("v1/predict", content=GOOD).status_code == 200
        for client in list(clients):
            try:
                if client is trickling:
                    client.sendall(b"x-more: 1\r\n")
                if answer := client.recv(4096):
                    told.append(answer)
                    assert client not in bodies or time.monotonic() - began > 4.5  # they have longer
                    continue
            except TimeoutError:
                continue
            except OSError:
                pass
            client.close()
            clients.remove(client)
    assert not clients
    assert len(told) == len(starts)
    assert all(answer.startswith(b"HTTP/1.1 408 ") and b'"request_timeout"' in answer for answer in told)
    assert _refused(http, "request_timeout") == before + len(starts)


def test_a_client_that_does_not_read_is_let_go(server: Served, http: httpx.Client) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", httpx.URL(server.url).port))
        client.sendall(2000 * b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n")
        end = time.monotonic() + 15
        with suppress(ConnectionError):
            while True:
                client.sendall(b"\r\n")
                assert time.monotonic() < end
                time.sleep(0.1)


def test_an_upload_that_its_client_breaks_off_is_no_error_of_ours(server: Served, http: httpx.Client) -> None:
    before = _refused(http, "internal")
    for path in ("/v1/predict", "/v1/predict?top_k=1", "/gradio_api/upload"):
        with server.connection() as client:
            kind = "multipart/form-data; boundary=x" if "upload" in path else "image/png"
            client.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n".encode())
            client.sendall(b"content-length: 999\r\n\r\n--x\r\n")
            time.sleep(0.2)
    time.sleep(0.3)
    assert _refused(http, "internal") == before


def _refused(http: httpx.Client, reason: str) -> float:
    counted = re.search(rf'toolkit_rejects_total{{reason="{reason}"}} (\S+)', http.get("metrics").text)
    return float(counted[1]) if counted else 0.0


CHUNKED = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


def test_endless_headers_and_other_protocols(server: Served, http: httpx.Client) -> None:
    for data, status in (
        (b"GET / HTTP/1.1\r\n" + b"x-more: 0123456789\r\n" * 10_000, b"431"),
        (b"GET / HTTP/1.1\r\nx: " + b"x" * 200_000, b"431"),
        (CHUNKED + b"1\r\na\r\n0\r\n" + b"x-more: 0123456789\r\n" * 100_000, b"431"),  # behind a body
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
        (b"GET /\xff HTTP/1.1\r\n\r\n", b"400"),
        (b"POST /v1/predict HTTP/1.1\r\ncontent-length: " + b"0" * 5000 + b"\r\n\r\n", b"400"),
        (b"POST /v1/predict HTTP/1.1\r\ncontent-length: -1\r\n\r\n", b"400"),
        (b"POST /v1/predict HTTP/1.1\r\ncontent-length: 9999999999999999999999\r\n\r\n", b"400"),
    ):
        with server.connection() as client:
            client.settimeout(5)
            with suppress(OSError):  # the server may answer and close before it has everything
                client.sendall(data)
            assert client.recv(4096).startswith(b"HTTP/1.1 " + status), data[:60]


def test_500_connections_at_once(server: Served, http: httpx.Client) -> None:
    split = httpx.URL(server.url)
    request = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(GOOD)

    async def client() -> bytes:
        reader, writer = await asyncio.open_connection(split.host, split.port)
        writer.write(request + GOOD)
        answer = await reader.read()
        writer.close()
        return answer

    async def crowd() -> list[bytes]:
        return await asyncio.gather(*(client() for _ in range(500)))

    answers = asyncio.run(crowd())
    good = [answer for answer in answers if answer.startswith(b"HTTP/1.1 200 ")]
    full = [answer for answer in answers if answer.startswith(b"HTTP/1.1 429 ") and b"retry-after: 1" in answer]
    assert len(good) + len(full) == 500
    assert len(good) >= 256
