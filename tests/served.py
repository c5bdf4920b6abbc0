"""A server of its own for tests: the command ``toolkit serve`` in a process, and what it says."""

import io
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

COMMAND = """
import sys
from serve import limits
{patch}
limits.HEAD_SECONDS, limits.BODY_SECONDS, limits.READ_SECONDS = 2.0, 5.0, 3.0  # 10, 60 and 60 in earnest
from toolkit.cli import main
sys.argv[0] = "toolkit"
main()
"""


@dataclass
class Served:
    """A running server; ``said`` is what it wrote to stderr, once it has ended."""

    url: str
    process: subprocess.Popen[str]
    said: str = ""
    artifact: Path = Path()

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **options)

    def connection(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", httpx.URL(self.url).port))

    def memory(self) -> int:
        """The most bytes that it held since ``forget_memory``."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) * 1024

    def forget_memory(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


@contextmanager
def serving(*arguments: object, ready: bool = True, patch: str = "") -> Iterator[Served]:
    """``toolkit serve`` on a free port, ended with SIGTERM; fails where that leaves a traceback or an exit code.

    ``patch`` is Python that the process runs before.
    """
    command = [
        sys.executable,
        "-c",
        COMMAND.format(patch=patch),
        "serve",
        "--port",
        "0",
        "--provider",
        "cpu",
        *map(str, arguments),
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://" in line, process.communicate()[1]
        server = Served(next(word for word in line.split() if word.startswith("http://")), process)
        try:
            if ready:
                wait_until_ready(server)
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                rest, server.said = process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    assert process.returncode == 0, server.said
    assert rest == ""
    assert "Traceback" not in server.said, server.said


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.01)


def wait_until_ready(server: Served) -> None:
    def ready() -> bool:
        with suppress(httpx.TransportError):
            return http.get("readyz").status_code == 200
        return False

    with server.client() as http:
        wait_until(ready, 120)


def encoded(pixels: np.ndarray | Image.Image, format: str = "PNG", **options: object) -> bytes:
    """An image, or uint8 ``[H,W,3]`` or ``[H,W]``, as the bytes of an image file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: Iterable[bytes]) -> bytes:
    """A PNG that declares this, whatever rows it has."""
    packer = zlib.compressobj()
    packed = b"".join([*map(packer.compress, rows), packer.flush()])
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")
