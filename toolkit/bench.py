"""The stage ``bench``, speed fairly: all take turns in one process, with the same threads, on the same images."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime as ort
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch import nn

from export import onnx_export
from export.artifact import Metadata
from serve.session import CPU, CUDA, Session
from toolkit.choices import Provider
from toolkit.classifier import TestTimeAugmentation
from toolkit.compute import without_tf32
from toolkit.errors import DeviceError, RunError, UserError, in_line
from toolkit.learner import RECOMPILED
from toolkit.machine import available_cores
from toolkit.progress import say
from toolkit.report import COLOURS, INK, MARKERS, as_image, plain_axes
from toolkit.run import Run, load_run

TURN_SECONDS = 0.2  # of one contestant before the next; a single call may take longer
WARM_CALLS = 3
PEAK_SIDE, PEAK_SIDE_GPU = 1536, 8192  # of the square matrices whose product is the peak
PEAK_ROUNDS = 10


@dataclass(frozen=True)
class Contestant:
    """``run`` takes uint8 images ``[N,S,S,3]``; ``operations`` are those of one image, 2 a multiply-accumulate."""

    name: str
    precision: str
    gpu: bool
    run: Callable[[np.ndarray], object]
    operations: int | None


@dataclass(frozen=True)
class Row:
    """One contestant at one batch size. ``peak``: operations a second of a large matrix product, where it ran."""

    name: str
    precision: str
    batch: int
    calls: int
    p50_ms: float
    p99_ms: float
    images_per_second: float
    operations_per_second: float | None
    peak: float


def bench(
    paths: Sequence[Path],
    providers: Sequence[Provider] = ("auto",),
    batches: Sequence[int] = (1, 8, 64, 256),
    rounds: int = 10,
    threads: int | None = None,
    compiled: bool = True,
) -> tuple[list[Row], int]:
    """Time artifacts on providers, and the PyTorch models of the runs that they lie in; the rows and the threads.

    All see the same random images. Raises ``UserError`` for artifacts of different image sizes.
    """
    threads = threads or available_cores()
    with pinned(threads):
        sessions: dict[tuple[Path, str], Session] = {}
        first: dict[Path, Session] = {}
        for path in dict.fromkeys(paths):
            for provider in providers:
                session = Session(path, provider, threads)
                sessions.setdefault((path, session.provider), session)  # auto may be one of the others
                first.setdefault(path, session)
        sizes = {session.metadata.image_size for session in sessions.values()}
        if len(sizes) > 1:
            raise UserError(f"the artifacts take images of different sizes: {', '.join(map(str, sorted(sizes)))}")
        contestants = _pytorch(first, compiled)
        stems = [path.stem for path in first]
        for (path, _), session in sessions.items():
            about = session.metadata
            where = session.provider.removesuffix("ExecutionProvider")
            name = f"{path.stem if stems.count(path.stem) == 1 else path} {about.precision} on {where}"
            contestants.append(
                Contestant(name, about.precision, session.provider != CPU, session.run, _operations(about))
            )
            if session.provider == CUDA:
                contestants += _bound(path, name, session)
        return race(contestants, sizes.pop(), batches, rounds), threads


def race(contestants: Sequence[Contestant], size: int, batches: Sequence[int], rounds: int) -> list[Row]:
    """Time all contestants at each batch size, on random images of this size."""
    rng = np.random.default_rng(0)
    peaks = {key: peak(*key) for key in {(one.precision, one.gpu) for one in contestants}}
    rows = []
    for batch in batches:
        images = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        times = alternate([partial(one.run, images) for one in contestants], rounds)
        for one, seconds in zip(contestants, times, strict=True):
            median = statistics.median(seconds)
            rows.append(
                Row(
                    name=one.name,
                    precision=one.precision,
                    batch=batch,
                    calls=len(seconds),
                    p50_ms=1000 * median,
                    p99_ms=1000 * float(np.percentile(seconds, 99)),
                    images_per_second=batch / median,
                    operations_per_second=one.operations and one.operations * batch / median,
                    peak=peaks[one.precision, one.gpu],
                )
            )
    return rows


def alternate(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of single calls, a list for each. In each round all take a turn, in the opposite order of the last."""
    for call in calls:
        for _ in range(WARM_CALLS):
            call()
    seconds: list[list[float]] = [[] for _ in calls]
    order = list(zip(calls, seconds, strict=True))
    for _ in range(rounds):
        for call, own in order:
            ends = time.perf_counter() + TURN_SECONDS
            while True:
                began = time.perf_counter()
                call()
                now = time.perf_counter()
                own.append(now - began)
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


def _bound(path: Path, name: str, session: Session) -> Iterator[Contestant]:
    """The session with inputs and outputs bound to memory on the GPU, and with its kernels recorded as one graph."""
    recorded = None
    try:
        recorded = Session(path, "cuda", session.threads, cuda_graph=True)
    except DeviceError as error:  # most often a graph with nodes on the CPU
        say(f"a CUDA graph is left out for {path}: {error}")
    for way, one in (("bound", session), ("CUDA graph", recorded)):
        if one is not None:
            run = _by_batch(one)
            yield Contestant(f"{name}, {way}", one.metadata.precision, True, run, _operations(one.metadata))


def _by_batch(session: Session) -> Callable[[np.ndarray], object]:
    bound = cache(session.bound)
    return lambda images: bound(len(images))(images)


def _operations(about: Metadata) -> int | None:
    """Of one image; a multiply-accumulate is two."""
    return about.macs and 2 * about.macs * about.views


def _pytorch(sessions: dict[Path, Session], compiled: bool) -> list[Contestant]:
    """The models of the runs that the artifacts lie in, each once: eager in both layouts, and compiled."""
    models: dict[tuple[Path, int], tuple[Run, nn.Module, Session]] = {}
    for path, session in sessions.items():
        try:
            run = Run.of(path)
            if run is None:
                raise RunError("it does not lie in a run directory")
            models[run.path, session.metadata.views] = run, load_run(run)[0], session
        except UserError as error:  # it may be training, or without its weights
            say(f"PyTorch is left out for {path}: {error}")
    contestants = []
    for run, model, session in models.values():
        about, device = session.metadata, torch.device("cpu" if session.provider == CPU else "cuda")
        if about.views > 1:
            model = TestTimeAugmentation(model, "flip" if about.views == 2 else "flip_and_shift")
        gpu = device.type == "cuda"
        plain = onnx_export.deployed(model, about).to(device)
        channels_last = onnx_export.deployed(model, about).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        ways: dict[str, Callable[..., Any]] = {"eager": plain, "eager, channels_last": channels_last}
        if compiled:
            try:
                ways["compiled"] = _compiled(plain, about, device)
            except Exception as error:  # whatever the compiler throws; most often there is no C++ compiler
                say(f"torch.compile is left out: {in_line(error, 200)}")
        name = about.model if len(models) == 1 else f"{about.model} of {run.path.name}"
        name += f", {about.views} views," if about.views > 1 else ""
        for way, module in ways.items():
            run_module = partial(_call, module, device)
            contestants.append(Contestant(f"{name} PyTorch {way}", "fp32", gpu, run_module, _operations(about)))
    return contestants


def _compiled(module: nn.Module, about: Metadata, device: torch.device) -> Callable[..., Any]:
    """The module compiled; for each batch size anew, as it is first seen."""
    say("torch.compile takes up to a minute for each batch size (--no-compile leaves it out)")
    torch._dynamo.config.recompile_limit = RECOMPILED
    compiled = torch.compile(module, dynamic=False)
    _call(compiled, device, np.zeros((1, about.image_size, about.image_size, 3), np.uint8))
    return compiled


def _call(module: Callable[..., Any], device: torch.device, images: np.ndarray) -> list[np.ndarray]:
    with torch.inference_mode(), without_tf32():
        return [output.cpu().numpy() for output in module(torch.from_numpy(images).to(device))]


def peak(precision: str, gpu: bool) -> float:
    """Operations a second of the fastest of several large matrix products in this precision.

    On the CPU the product is ONNX Runtime's own, as PyTorch's (by MKL) reaches half of it on AMD; fp16 is computed in
    fp32 there.
    """
    side = PEAK_SIDE_GPU if gpu else PEAK_SIDE
    if gpu:
        kind = {"int8": torch.int8, "fp16": torch.float16}.get(precision, torch.float32)
        a, b = ((100 * torch.rand(side, side, device="cuda") - 50).to(kind) for _ in range(2))  # zeros take less power

        def multiply() -> object:
            product = torch._int_mm(a, b.t()) if kind == torch.int8 else a @ b
            torch.cuda.synchronize()
            return product
    else:
        types = ("uint8", "int8", "int32") if precision == "int8" else ("float", "float", "float")
        left, right, result = (f"{name}[{side}, {side}]" for name in types)
        text = f"""<ir_version: 10, opset_import: ["" : 20]>
        product ({left} a, {right} b) => ({result} c)
        {{ c = {"MatMulInteger" if precision == "int8" else "MatMul"} (a, b) }}"""
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(onnx.parser.parse_model(text).SerializeToString(), options, providers=[CPU])
        kinds = (np.uint8, np.int8) if precision == "int8" else (np.float32, np.float32)
        matrices = {name: np.ones((side, side), each) for name, each in zip("ab", kinds, strict=True)}

        def multiply() -> object:
            return session.run(None, matrices)

    return 2 * side**3 / min(alternate([multiply], PEAK_ROUNDS)[0])


def table(rows: Sequence[Row]) -> str:
    """Text, one line a row; the last column is what each is to the first contestant at its batch size."""
    first = {row.batch: row for row in reversed(rows)}
    wide = max(len(row.name) for row in rows)
    lines = [
        f"{'':<{wide}} {'batch':>5} {'p50 ms':>9} {'p99 ms':>9} {'images/s':>10} {'GOP/s':>8} {'peak':>8} {'of it':>6} "
        f"{'speed':>6}"
    ]
    for row in rows:
        done = "" if row.operations_per_second is None else f"{row.operations_per_second / 1e9:,.0f}"
        share = "" if row.operations_per_second is None else f"{row.operations_per_second / row.peak:.0%}"
        lines.append(
            f"{row.name:<{wide}} {row.batch:>5} {row.p50_ms:>9.2f} {row.p99_ms:>9.2f} {row.images_per_second:>10,.0f} "
            f"{done:>8} {row.peak / 1e9:>8,.0f} {share:>6} "
            f"{row.images_per_second / first[row.batch].images_per_second:>6.2f}"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row]) -> bytes:
    """A PNG: latency and images a second over the batch size."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    latency, rate = figure.subplots(1, 2)
    for name, colour, marker in zip(dict.fromkeys(row.name for row in rows), cycle(COLOURS), cycle(MARKERS)):
        own = [row for row in rows if row.name == name]
        batches, medians = [row.batch for row in own], [row.p50_ms for row in own]
        latency.plot(batches, medians, color=colour, marker=marker)
        latency.fill_between(batches, medians, [row.p99_ms for row in own], color=colour, alpha=0.15)
        rate.plot(batches, [row.images_per_second for row in own], color=colour, marker=marker, label=name)
    ticks = sorted({row.batch for row in rows})
    for axes, heading in ((latency, "Milliseconds, median to 99th percentile"), (rate, "Images a second")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # plain numbers, also of a range within one power of ten
        axes.yaxis.set_minor_formatter(LogFormatter())
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("batch size", color=INK)
        plain_axes(axes, heading)
    figure.legend(*rate.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, labelcolor=INK)
    return as_image(figure)


def document(rows: Sequence[Row], threads: int) -> dict[str, Any]:
    """The rows, ready for JSON."""
    return {
        "threads": threads,
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
        "rows": [*map(asdict, rows)],
    }
