"""The engine: opened artifacts, each with a bounded queue and a thread that answers what waits, in batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.artifact import Metadata
from export.preprocess import fit
from serve.metrics import Metrics
from serve.session import CPU, CUDA, TENSORRT, Array, Session
from toolkit.choices import Provider
from toolkit.errors import ArtifactError, UnknownNameError, UserError

MAX_BATCH, MAX_QUEUE = 32, 256  # images
RELOAD_SECONDS = 1.0  # between two looks at the files
CLOSE_SECONDS = 2.0  # for what still runs at the end
ASKED: dict[str, Provider] = {CPU: "cpu", CUDA: "cuda", TENSORRT: "tensorrt"}  # what gives the same provider again

Stamp = tuple[int, int, int, int]

logger = logging.getLogger(__name__)


class QueueFull(UserError):
    """More images wait than the queue holds."""


class DeadlineExceeded(UserError):
    """The deadline passed before the image's turn came."""


class Closed(UserError):
    """The engine is stopping and takes nothing new."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an artifact says of one image; it carries the metadata of the very artifact that answered.

    ``probabilities`` are float32 ``[K]``, as ``Session.classify`` gives them; ``milliseconds`` run from ``submit`` to
    the answer: resizing, waiting and the model.
    """

    metadata: Metadata
    provider: str
    probabilities: Array
    milliseconds: float

    @property
    def calibrated(self) -> bool:
        """Whether a temperature that was fitted on validation images made the probabilities."""
        return self.metadata.temperature is not None

    def best(self, top_k: int = 5) -> list[tuple[str, float]]:
        """The ``top_k`` most probable labels with their probabilities, best first; fewer where there are fewer."""
        order = (-self.probabilities).argsort(kind="stable")[:top_k].tolist()
        labels, probabilities = self.metadata.labels, self.probabilities.tolist()
        return [(labels[i], probabilities[i]) for i in order]


def named(artifacts: Sequence[str]) -> dict[str, Path]:
    """Names to paths of what the command line gives: ``PATH``, named after its file, or ``NAME=PATH``.

    Raises ``UserError`` where two have the same name.
    """
    paths: dict[str, Path] = {}
    for item in artifacts:
        name, equals, path = item.partition("=")
        if not equals or Path(item).exists():
            name, path = Path(item).stem, item
        name = name.encode(errors="replace").decode()  # clients get it as UTF-8
        if name in paths:
            raise UserError(f"two artifacts have the name {name!r}: tell them apart with NAME={path}")
        paths[name] = Path(path)
    return paths


def join(threads: Sequence[threading.Thread]) -> None:
    """Wait until they end, but no more than ``CLOSE_SECONDS`` in all: a device that hangs never lets go of its own."""
    end = time.monotonic() + CLOSE_SECONDS
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))


class Engine:
    """Artifacts by name, ready to answer from any thread; the first is the default.

    Each has a queue of ``max_queue`` images and one worker thread, which takes what waits, up to ``max_batch``
    images, and never waits for more. Off the CPU a batch is filled up to the next power of two, so that the
    device sees a few fixed shapes. Opening raises what ``Session`` raises. Use it as a context manager, or
    ``close`` it.
    """

    def __init__(
        self,
        artifacts: Mapping[str, Path],
        provider: Provider = "auto",
        *,
        threads: int | None = None,
        max_batch: int = MAX_BATCH,
        max_queue: int = MAX_QUEUE,
        tf32: bool = False,
    ) -> None:
        self.max_queue = max_queue
        self.metrics = Metrics()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        stamps = {name: _stamp(path) for name, path in artifacts.items()}  # first: a file may change while it is opened
        sessions = {name: Session(path, provider, threads, tf32) for name, path in artifacts.items()}
        self._models = {
            name: _Model(name, artifacts[name], stamps[name], session, max_batch, max_queue, self.metrics)
            for name, session in sessions.items()
        }
        for name, model in self._models.items():
            self.start(f"model {name}", model.work)

    @property
    def closed(self) -> bool:
        return self._stop.is_set()

    @property
    def ended(self) -> bool:
        """Whether none of its threads runs any more."""
        return not any(thread.is_alive() for thread in self._threads)

    def start(self, name: str, work: Callable[[], object]) -> None:
        """Run ``work`` in a thread that ``close`` waits for."""
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    @property
    def names(self) -> list[str]:
        return list(self._models)

    def metadata(self, name: str | None = None) -> Metadata:
        """What the artifact says of itself now. Raises ``UnknownNameError``."""
        return self._model(name).session.metadata

    def provider(self, name: str | None = None) -> str:
        """The ONNX Runtime provider that runs the artifact. Raises ``UnknownNameError``."""
        return self._model(name).session.provider

    def reserve(self, count: int, name: str | None = None) -> None:
        """Hold places in the queue of an artifact for images that are not decoded yet.

        Each is for a ``submit``, or to be given back with ``release``. Raises as ``submit``.
        """
        self._model(name).reserve(count)

    def release(self, name: str | None = None) -> None:
        """Give one place back."""
        self._model(name).release(1)

    def submit(
        self,
        pixels: NDArray[np.uint8],
        name: str | None = None,
        deadline: float | None = None,
        *,
        reserved: bool = False,
    ) -> Future[Answer]:
        """Queue one image, uint8 ``[H,W,3]`` of any size, for the artifact ``name`` (else the first one).

        It is resized here, in the caller's thread. The future raises ``DeadlineExceeded`` where the image's turn
        comes later than ``deadline`` seconds from now, and ``Closed`` where the engine stops before. Raises
        ``QueueFull``, ``Closed`` and ``UnknownNameError`` at once. ``reserved`` tells that a place is held for it,
        which it takes unless it raises.
        """
        return self._model(name).submit(pixels, deadline, reserved)

    def warm_up(self) -> None:
        """Run every batch size that the device will see once."""
        for model in self._models.values():
            model.warm_up(model.session)

    @property
    def ready(self) -> bool:
        """Whether all artifacts are warmed up, and it is not stopping."""
        return not self.closed and all(model.warm for model in self._models.values())

    def watch(self, seconds: float = RELOAD_SECONDS) -> None:
        """From now on, take artifacts that change on disk; one that cannot run leaves the old one in place."""
        self.start("reload", lambda: self._watch(seconds))

    def close(self) -> None:
        """Take nothing new, refuse what still waits, and wait for the running batches, but not for long."""
        self._stop.set()
        for model in self._models.values():
            model.close()
        join(self._threads)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _model(self, name: str | None) -> _Model:
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise UnknownNameError(f"no artifact {name!r} is served: there is {', '.join(self._models)}")
        return self._models[name]

    def _watch(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            for model in self._models.values():
                model.reload()


@dataclass(slots=True)
class _Item:
    session: Session
    image: NDArray[np.uint8]
    began: float
    deadline: float | None
    future: Future[Answer]


class _Model:
    """One artifact: its session, its queue, its work. ``stamp`` is its file's from before it was opened."""

    def __init__(
        self,
        name: str,
        path: Path,
        stamp: Stamp | None,
        session: Session,
        max_batch: int,
        max_queue: int,
        metrics: Metrics,
    ) -> None:
        self.name, self.path, self.session = name, path, session
        self.max_batch, self.max_queue, self.metrics = max_batch, max_queue, metrics
        self._seen = stamp
        self._waiting: deque[_Item] = deque()
        self._places = 0  # taken: by what waits, and by what is still to be decoded
        self._changed = threading.Condition()
        self._open = True
        self.warm = False
        metrics.provider(name, session.provider)
        metrics.waiting(name, 0)  # so that it can be seen from the start

    def reserve(self, count: int) -> None:
        with self._changed:
            if not self._open:
                raise Closed("the server is stopping: ask again in a moment")
            if self._places + count > self.max_queue:
                raise QueueFull(f"{self._places} images wait already: ask again in a moment")
            self._places += count
            self.metrics.waiting(self.name, count)

    def release(self, count: int) -> None:
        with self._changed:
            self._places -= count
            self.metrics.waiting(self.name, -count)

    def submit(self, pixels: NDArray[np.uint8], deadline: float | None, reserved: bool) -> Future[Answer]:
        began = time.perf_counter()
        session = self.session  # a reload may change it, and the size of its images, at any moment
        until = None if deadline is None else began + deadline
        item = _Item(session, fit(pixels, session.metadata.image_size), began, until, Future())
        with self._changed:
            self.reserve(0 if reserved else 1)
            self._waiting.append(item)
            self._changed.notify()
        return item.future

    def warm_up(self, session: Session) -> None:
        size = session.metadata.image_size
        for count in self._sizes(session):
            session.run(np.zeros((count, size, size, 3), np.uint8))
        self.warm = True

    def reload(self) -> None:
        """Take the file if it is another one than last time, and passes the checks."""
        stamp = _stamp(self.path)
        if stamp is None or stamp == self._seen:
            return
        self._seen = stamp
        try:
            old = self.session
            session = Session(self.path, ASKED[old.provider], old.threads, old.tf32)
            _check(session, self.path)
            self.warm_up(session)
        except Exception as error:  # a bad file must not stop the server
            self.metrics.reload(self.name, "refused")
            logger.warning("kept the old artifact %s: %s", self.name, error)
            return
        self.session = session
        self.metrics.reload(self.name, "taken")
        logger.warning("took the new artifact %s: %s", self.name, self.path)

    def close(self) -> None:
        with self._changed:
            self._open = False
            left = list(self._waiting)
            self._waiting.clear()
            self.release(len(left))
            self._changed.notify()
        for item in left:
            if item.future.set_running_or_notify_cancel():
                item.future.set_exception(Closed("the server stopped before this image's turn came"))

    def work(self) -> None:
        """Answer what waits, until it is closed."""
        while self._answer_some():
            pass

    def _answer_some(self) -> bool:
        """Answer what waits; False once it is closed. While it waits it holds no image, and no session of the past."""
        items = self._take()
        now = time.perf_counter()
        live = []
        for item in items:
            if not item.future.set_running_or_notify_cancel():
                continue
            if item.deadline is not None and now > item.deadline:
                item.future.set_exception(DeadlineExceeded("the answer did not come within the deadline"))
            else:
                live.append(item)
        if live:
            self._answer(live)
        return bool(items)

    def _take(self) -> list[_Item]:
        """What waits for one and the same session, at most ``max_batch``; empty once the model is closed."""
        with self._changed:
            while not self._waiting and self._open:
                self._changed.wait()
            items: list[_Item] = []
            while self._waiting and len(items) < self.max_batch:
                if items and self._waiting[0].session is not items[0].session:
                    break
                items.append(self._waiting.popleft())
            self.release(len(items))
            return items

    def _answer(self, items: list[_Item]) -> None:
        session, count = items[0].session, len(items)
        try:
            size = session.metadata.image_size
            shape = next(n for n in self._sizes(session) if n >= count) if session.provider != CPU else count
            images = np.zeros((shape, size, size, 3), np.uint8)
            for index, item in enumerate(items):
                images[index] = item.image
            probabilities = session.classify(images)
        except Exception as error:  # the others' images must still be answered
            logger.exception("the artifact %s failed", self.name)
            for item in items:
                item.future.set_exception(error)
            return
        self.metrics.batch(self.name, count)
        now = time.perf_counter()
        for index, item in enumerate(items):
            item.future.set_result(
                Answer(session.metadata, session.provider, probabilities[index], (now - item.began) * 1000)
            )

    def _sizes(self, session: Session) -> Iterator[int]:
        """Batch sizes that are worth a warm-up: on a device, the only ones that it sees."""
        if session.provider == CPU:
            yield from sorted({1, self.max_batch})
            return
        size = 1
        while size < self.max_batch:
            yield size
            size *= 2
        yield self.max_batch


def _stamp(path: Path) -> Stamp | None:
    """What changes when a file does, or who may read it; None while there is none."""
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
    return None


def _check(session: Session, path: Path) -> None:
    """Whether an artifact that runs also makes sense. Raises ``ArtifactError``."""
    size = session.metadata.image_size
    noise = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), np.uint8)
    logits, probabilities = session.run(noise)
    if not np.isfinite(logits).all() or not np.allclose(probabilities.sum(1), 1, atol=1e-3):
        raise ArtifactError(f"{path} answers noise with numbers that are no probabilities")
