"""Serving over HTTP, on the cores of this machine: the server against a bare loop, Gradio and LitServe.

All sides decode the same PNG and run the same artifact through the same ``Session``. The bare loop does nothing
else, in batches as large as the server's: what HTTP costs is its distance to ours. The plain ``gr.Interface`` is
asked as its own client asks (an upload, a call, a stream with the answer); LitServe takes base64 in JSON, as its
documentation does, in batches of the same size. The load generator runs on the same cores and takes turns with
all sides, so that what else the machine does meets all of them. CPU time is that of the server's processes
alone, so that the load generator does not count.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
import uvloop
from load import Connection, Load, get, post, run
from PIL import Image

from export import artifact
from export.preprocess import fit
from serve.decode import decode
from serve.engine import MAX_BATCH
from serve.session import Session

PEERS = Path(__file__).with_name("serving_peers.py")


@dataclass(frozen=True)
class Side:
    """A running server and how it is asked."""

    url: str
    process: int
    ask: Callable[[Connection, int], Awaitable[None]]

    def cpu(self) -> float:
        """Seconds of CPU that the server and its processes have used."""
        table = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
            table[int(path.parent.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
        family, ticks = {self.process}, 0
        while grown := {process for process, (parent, _) in table.items() if parent in family} - family:
            family |= grown
        for process in family & table.keys():
            ticks += table[process][1]
        return ticks / os.sysconf("SC_CLK_TCK")

    def load(self, clients: int, seconds: float) -> tuple[Load, float]:
        """What the load saw, and the CPU seconds that each of its requests took."""
        before = self.cpu()
        load = uvloop.run(run(self.url, self.ask, clients, seconds))
        if load.errors:
            raise RuntimeError(f"{len(load.errors)} requests failed: {load.errors[0]}")
        return load, (self.cpu() - before) / len(load.seconds)


def bare(path: Path, image: bytes, batch: int, seconds: float) -> tuple[float, float]:
    """Seconds and CPU seconds an image of a loop that decodes and runs."""
    session = Session(path, "cpu")
    size, count = session.metadata.image_size, 0
    began, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        session.run(np.stack([fit(decode(image), size) for _ in range(batch)]))
        count += batch
    return (time.perf_counter() - began) / count, (time.process_time() - cpu) / count


@contextmanager
def server(command: list[str], port: int, path: str, **environment: str) -> Iterator[int]:
    """The id of a process that answers ``path`` with 200 by now."""
    url = f"http://127.0.0.1:{port}/"
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, start_new_session=True, env=os.environ | environment
    ) as process:
        try:
            end = time.monotonic() + 120
            while not uvloop.run(answers(url, path)):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{' '.join(command)} does not start")
                time.sleep(0.2)
            yield process.pid
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # LitServe leaves processes behind


async def answers(url: str, path: str) -> bool:
    try:
        connection = await Connection.to(url)
        return (await connection.ask(get(path)))[0] == 200
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _asks(request: bytes) -> Callable[[Connection, int], Awaitable[None]]:
    async def ask(connection: Connection, number: int) -> None:
        status, body = await connection.ask(request)
        if status != 200:
            raise RuntimeError(f"{status}: {body[:200]!r}")

    return ask


def _asks_gradio(image: bytes) -> Callable[[Connection, int], Awaitable[None]]:
    form = b'--b\r\ncontent-disposition: form-data; name="files"; filename="a.png"\r\ncontent-type: image/png\r\n\r\n'
    upload = post("/gradio_api/upload", form + image + b"\r\n--b--\r\n", "multipart/form-data; boundary=b")

    async def ask(connection: Connection, number: int) -> None:
        _, body = await connection.ask(upload)
        file = {"path": json.loads(body)[0], "meta": {"_type": "gradio.FileData"}}
        call = json.dumps({"data": [file]}).encode()
        _, body = await connection.ask(post("/gradio_api/call/predict", call, "application/json"))
        _, body = await connection.ask(get(f"/gradio_api/call/predict/{json.loads(body)['event_id']}"))
        if b"event: complete" not in body:
            raise RuntimeError(repr(body[:200]))

    return ask


@contextmanager
def sides(path: Path, image: bytes) -> Iterator[dict[str, Side]]:
    """The three servers, started one after the other and left running."""
    encoded = json.dumps({"image": base64.b64encode(image).decode()}).encode()
    ours, gradio, litserve = free_port(), free_port(), free_port()
    python = sys.executable
    starts = {
        "toolkit": (
            [python, "-m", "toolkit", "serve", str(path), "--port", str(ours), "--provider", "cpu"],
            (ours, "/readyz"),
            _asks(post("/v1/predict", image)),
        ),
        "gr.Interface": (
            [python, str(PEERS), "gradio", str(path), str(gradio)],
            (gradio, "/config"),
            _asks_gradio(image),
        ),
        "LitServe": (
            [python, str(PEERS), "litserve", str(path), str(litserve), str(MAX_BATCH)],
            (litserve, "/health"),
            _asks(post("/predict", encoded, "application/json")),
        ),
    }
    with ExitStack() as stack:
        yield {
            name: Side(f"http://127.0.0.1:{port}/", stack.enter_context(server(command, port, ready)), ask)
            for name, (command, (port, ready), ask) in starts.items()
        }


def measure(path: Path, clients: int, seconds: float, rounds: int) -> None:
    size = artifact.read(path).image_size
    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
    image = file.getvalue()
    rates: dict[str, list[float]] = {name: [] for name in ("bare loop", "toolkit", "gr.Interface", "LitServe")}
    cost: dict[str, list[float]] = {name: [] for name in rates}
    alone: dict[str, list[float]] = {name: [] for name in rates}
    last: list[float] = []
    with sides(path, image) as servers:
        for side in servers.values():
            side.load(clients, min(seconds, 2.0))  # warm
        for _ in range(rounds):
            each, cpu = bare(path, image, MAX_BATCH, seconds)
            rates["bare loop"].append(1 / each)
            cost["bare loop"].append(cpu)
            alone["bare loop"].append(bare(path, image, 1, min(seconds, 2.0))[0])
            for name, side in servers.items():
                load, cpu = side.load(clients, seconds)
                rates[name].append(load.rate)
                cost[name].append(cpu)
                alone[name].append(statistics.median(side.load(1, min(seconds, 2.0))[0].seconds))
                if name == "toolkit":
                    last.append(float(np.quantile(load.seconds, 0.99)))

    print(f"\n{path}: {clients} clients, PNG of {len(image):,} bytes, medians of {rounds} rounds of {seconds:g} s")
    print(f"{'side':<13} {'images/s':>9} {'ours to it':>11} {'CPU us/image':>13} {'one client, ms':>15}")
    for name in rates:
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["toolkit"], rates[name], strict=True))
        print(
            f"{name:<13} {statistics.median(rates[name]):>9,.0f} {ratio:>11.2f} "
            f"{1e6 * statistics.median(cost[name]):>13,.0f} {1e3 * statistics.median(alone[name]):>15.2f}"
        )
    over = [b - a for a, b in zip(alone["bare loop"], alone["toolkit"], strict=True)]
    added = [b - a for a, b in zip(cost["bare loop"], cost["toolkit"], strict=True)]
    print(f"the server adds {1e6 * statistics.median(added):,.0f} CPU us to each request under load")
    print(f"p99 under load: {1e3 * statistics.median(last):.0f} ms")
    print(f"one client waits {1e3 * statistics.median(over):.2f} ms over the bare call")


def main(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifacts to serve, one after the other.")],
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 64,
    seconds: Annotated[float, typer.Option(min=0.5, help="Seconds of load a side and round.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are counted.")] = 5,
) -> None:
    """Print images a second, CPU time an image and one client's latency of all sides."""
    for path in artifacts:
        measure(path, clients, seconds, rounds)
    print("bars: 4 gr.Interface, 1.3 LitServe, fp32 tpsnet 0.85 of the bare loop, one client 2.0 ms over the bare call")


if __name__ == "__main__":
    typer.run(main)
