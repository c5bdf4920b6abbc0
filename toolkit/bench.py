"""Speed, fairly: all contestants take turns in one process, with the same threads, on the same images."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime as ort
import torch
from matplotlib.figure import Figure

from toolkit.report import BLUE, FAINT, GREEN, GRID, INK, VERMILLION, as_image

TURN_SECONDS = 0.2  # of one contestant before the next; a single call may take longer
WARM_CALLS = 3
PEAK_SIDE = 1536  # of the square matrices whose product is the peak

Call = Callable[[], object]


def alternate(calls: Mapping[str, Call], rounds: int, turn_seconds: float = TURN_SECONDS) -> dict[str, list[float]]:
    """Seconds of single calls. In each round all take a turn, in the opposite order of the round before."""
    for call in calls.values():
        for _ in range(WARM_CALLS):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            ends = time.perf_counter() + turn_seconds
            while True:
                began = time.perf_counter()
                calls[name]()
                now = time.perf_counter()
                seconds[name].append(now - began)
                if now >= ends:
                    break
        order.reverse()
    return seconds


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keep this process, and the threads that it starts meanwhile, on as many cores as it has threads."""
    before = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(threads)
    if cores is not None:
        os.sched_setaffinity(0, sorted(cores)[:threads])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if cores is not None:
            os.sched_setaffinity(0, cores)


@dataclass(frozen=True)
class Contestant:
    """``run`` takes uint8 images ``[N,S,S,3]``; ``operations`` are those of one image, 2 a multiply-accumulate."""

    name: str
    provider: str
    precision: str
    run: Callable[[np.ndarray], object]
    operations: int | None


@dataclass(frozen=True)
class Row:
    """One contestant at one batch size. ``peak_share``: of the operations a second of a large matrix product."""

    name: str
    provider: str
    precision: str
    batch: int
    calls: int
    p50_ms: float
    p99_ms: float
    images_per_second: float
    operations_per_second: float | None
    peak_share: float | None


def race(contestants: Sequence[Contestant], size: int, batches: Sequence[int], rounds: int) -> list[Row]:
    """Time all contestants at each batch size, on random images of this size."""
    rng = np.random.default_rng(0)
    peaks = {key: peak(*key) for key in {(c.precision, c.provider) for c in contestants}}
    rows = []
    for batch in batches:
        images = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        seconds = alternate({one.name: partial(one.run, images) for one in contestants}, rounds)
        for one in contestants:
            median = statistics.median(seconds[one.name])
            rate = batch / median
            done = one.operations and one.operations * rate
            rows.append(
                Row(
                    name=one.name,
                    provider=one.provider,
                    precision=one.precision,
                    batch=batch,
                    calls=len(seconds[one.name]),
                    p50_ms=1000 * median,
                    p99_ms=1000 * float(np.percentile(seconds[one.name], 99)),
                    images_per_second=rate,
                    operations_per_second=done,
                    peak_share=done and done / peaks[one.precision, one.provider],
                )
            )
    return rows


def peak(precision: str, provider: str) -> float:
    """Operations a second of the fastest of several large matrix products in this precision, where this provider runs.

    On the CPU fp16 is computed in fp32, and INT8's product is ONNX Runtime's own.
    """
    side, operations = PEAK_SIDE, 2 * PEAK_SIDE**3
    gpu = not provider.startswith(("CPU", "cpu"))
    if precision == "int8" and not gpu:
        text = f"""<ir_version: 10, opset_import: ["" : 20]>
        product (uint8[{side}, {side}] a, int8[{side}, {side}] b) => (int32[{side}, {side}] c)
        {{ c = MatMulInteger (a, b) }}"""
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        model = onnx.parser.parse_model(text).SerializeToString()
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        matrices = {"a": np.ones((side, side), np.uint8), "b": np.ones((side, side), np.int8)}

        def multiply() -> object:
            return session.run(None, matrices)
    else:
        device = torch.device("cuda" if gpu else "cpu")
        kind = {"int8": torch.int8, "fp16": torch.float16 if gpu else torch.float32}.get(precision, torch.float32)
        a, b = (torch.ones(side, side, device=device).to(kind) for _ in range(2))

        def multiply() -> object:
            product = torch._int_mm(a, b) if kind == torch.int8 else a @ b
            if gpu:
                torch.cuda.synchronize()
            return product

    return operations / min(alternate({"product": multiply}, 3)["product"])


def table(rows: Sequence[Row]) -> str:
    """Text, one line a row; the last column is what each is to the first contestant at its batch size."""
    first = {row.batch: row for row in reversed(rows)}
    wide = max(len(row.name) for row in rows)
    lines = [
        f"{'':<{wide}} {'batch':>5} {'p50 ms':>9} {'p99 ms':>9} {'images/s':>10} {'GOP/s':>8} {'of peak':>7} "
        f"{'speed':>6}"
    ]
    for row in rows:
        done = "" if row.operations_per_second is None else f"{row.operations_per_second / 1e9:,.0f}"
        share = "" if row.peak_share is None else f"{row.peak_share:.0%}"
        lines.append(
            f"{row.name:<{wide}} {row.batch:>5} {row.p50_ms:>9.2f} {row.p99_ms:>9.2f} {row.images_per_second:>10,.0f} "
            f"{done:>8} {share:>7} {row.images_per_second / first[row.batch].images_per_second:>6.2f}"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row]) -> bytes:
    """A PNG: latency and images a second over the batch size."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    latency, rate = figure.subplots(1, 2)
    names = list(dict.fromkeys(row.name for row in rows))
    colours = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", INK, FAINT)
    for index, name in enumerate(names):
        own = [row for row in rows if row.name == name]
        batches = [row.batch for row in own]
        style: dict[str, Any] = {"color": colours[index % len(colours)], "marker": "osD^v<>P"[index % 8], "label": name}
        latency.plot(batches, [row.p50_ms for row in own], **style)
        latency.fill_between(
            batches, [row.p50_ms for row in own], [row.p99_ms for row in own], color=style["color"], alpha=0.15
        )
        rate.plot(batches, [row.images_per_second for row in own], **style)
    ticks = sorted({row.batch for row in rows})
    for axes, heading in ((latency, "Milliseconds, median to 99th percentile"), (rate, "Images a second")):
        axes.set_title(heading, loc="left", fontsize=12, fontweight="bold", color=INK)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("batch size", color=INK)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    rate.legend(frameon=False, fontsize=8, labelcolor=INK)
    return as_image(figure)


def document(rows: Sequence[Row], threads: int) -> dict[str, Any]:
    """The rows, ready for JSON."""
    return {
        "threads": threads,
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
        "rows": [*map(asdict, rows)],
    }
