"""Minutes of mixed load on one server: good pictures must all be answered, hostile ones refused, memory stays flat.

Good: PNG, JPEG and WebP of 32 to 1,600 pixels through the API, and the page's upload and call. Hostile, one request
in three: a decompression bomb, JPEGs that are cut, no picture at all, wrong parameters, a body that is too large,
a client that goes away. Resident memory is read each second; the figure of a minute is its median.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path
from threading import Event, Thread
from typing import Annotated

import numpy as np
import typer
import uvloop
from load import Connection, post, run
from PIL import Image
from serving import answers, free_port, server

MB = 2**20
TURNS = 3  # one request in so many is hostile
HEAD = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
CUT = HEAD % 99_999  # of a client that goes away before it has sent so much
GOOD, REFUSED = (200,), (400, 413, 415, 422)


def picture(random: np.random.Generator, size: int, kind: str) -> bytes:
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    file = BytesIO()
    coarse.resize((size, size), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def good_requests(random: np.random.Generator) -> list[bytes]:
    sizes = [32] * 24 + [224] * 6 + [1600]
    kinds = ("PNG", "JPEG", "WEBP")
    return [post("/v1/predict", picture(random, size, kinds[i % 3])) for i, size in enumerate(sizes)]


def hostile_requests(random: np.random.Generator) -> list[bytes]:
    jpeg = picture(random, 224, "JPEG")
    bomb = BytesIO()
    Image.new("1", (13_000, 13_000)).save(bomb, "PNG")
    bodies = [bomb.getvalue(), b"", b"<svg/>", b"GIF89a" + bytes(100)]
    bodies += [jpeg[: random.integers(3, len(jpeg) // 2)] for _ in range(20)]
    requests = [post("/v1/predict", body) for body in bodies]
    requests.append(post("/v1/predict?top_k=0", jpeg))
    requests.append(post("/v1/predict", b"no form", "multipart/form-data; boundary=b"))
    requests.append(HEAD % (30 * MB))
    requests.append(CUT + jpeg[:5000])
    return requests


async def page(connection: Connection, image: bytes) -> None:
    """What the page does with a picture."""
    form = b'--b\r\ncontent-disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + image + b"\r\n--b--\r\n"
    status, body = await connection.ask(post("/gradio_api/upload", form, "multipart/form-data; boundary=b"))
    file = {"path": json.loads(body)[0], "meta": {"_type": "gradio.FileData"}} if status == 200 else None
    call = json.dumps({"data": [file, "served", "", 60]}).encode()
    status, body = await connection.ask(post("/gradio_api/run/classify", call, "application/json"))
    if status != 200 or b"bars" not in body:
        raise RuntimeError(f"page: {status} {body[:200]!r}")


def asks(url: str, statuses: Counter[int], seconds: list[float]) -> Callable[[Connection, int], Awaitable[None]]:
    """Good and hostile requests in turn; ``seconds`` gets those of the API's good ones."""
    random = np.random.default_rng(0)
    good, hostile, small = good_requests(random), hostile_requests(random), picture(random, 200, "PNG")

    async def ask(connection: Connection, number: int) -> None:
        if number % TURNS == 0:
            request = hostile[number // TURNS % len(hostile)]
            other = await Connection.to(url)  # which the server may close
            try:
                if request.startswith(CUT):
                    other.send(request)
                    return
                status, body = await other.ask(request)
            except ConnectionError:
                return
            finally:
                other.close()
            statuses[status] += 1
            if status not in REFUSED:
                raise RuntimeError(f"hostile: {status} {body[:200]!r}")
        elif number % 100 == 1:
            await page(connection, small)
        else:
            began = time.perf_counter()
            status, body = await connection.ask(good[number % len(good)])
            seconds.append(time.perf_counter() - began)
            statuses[status] += 1
            if status not in GOOD:
                raise RuntimeError(f"good: {status} {body[:200]!r}")

    return ask


def main(
    artifact: Annotated[Path, typer.Argument(help="Artifact to serve.")],
    minutes: Annotated[int, typer.Option(min=2, help="Minutes of load.")] = 10,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 16,
) -> None:
    """Print requests, errors, latency and memory; exit code 1 where the bars are missed."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "toolkit", "serve", f"served={artifact}", "--port", str(port), "--provider", "cpu"]
    statuses: Counter[int] = Counter()
    seconds: list[float] = []
    memory: list[list[float]] = [[] for _ in range(minutes)]
    over = Event()
    with tempfile.TemporaryDirectory() as uploads, server(command, port, "/readyz", GRADIO_TEMP_DIR=uploads) as process:
        began = time.monotonic()

        def watch() -> None:
            while not over.wait(1) and (minute := int(time.monotonic() - began) // 60) < minutes:
                text = Path(f"/proc/{process}/status").read_text()
                memory[minute].append(int(text.split("VmRSS:")[1].split()[0]) / 1024)

        watcher = Thread(target=watch)
        watcher.start()
        load = uvloop.run(run(url, asks(url, statuses, seconds), clients, 60.0 * minutes))
        over.set()
        watcher.join()
        ready = uvloop.run(answers(url, "/readyz"))
    medians = [statistics.median(minute) for minute in memory]
    grown = max(medians[1:]) / medians[1] - 1
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    print(f"{minutes} minutes, {clients} clients: {len(load.seconds):,} requests well answered, {len(load.errors)} not")
    print("answers: " + ", ".join(f"{status}: {count:,}" for status, count in sorted(statuses.items())))
    print(f"good pictures through the API: {len(seconds):,}, p50 {1e3 * p50:.0f} ms, p99 {1e3 * p99:.0f} ms")
    print("memory, MB, median of each minute: " + " ".join(f"{median:.0f}" for median in medians))
    print(f"grown after the first minute by {grown:.1%} (bar 5%); ready at the end: {ready}")
    for error in load.errors[:5]:
        print(error)
    if load.errors or grown > 0.05 or not ready:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
