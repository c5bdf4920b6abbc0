"""The server process: a port, an engine behind it, and a clean end; or several such processes behind one port."""

from __future__ import annotations

import errno
import gc
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe, parent_process
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import Process

from export import artifact
from serve import decode, metrics
from serve.engine import MAX_BATCH, MAX_QUEUE, Engine, join
from serve.limits import Protocol
from serve.session import check_provider
from toolkit.choices import Provider
from toolkit.errors import UserError
from toolkit.machine import available_cores, hand_back_freed_memory

BACKLOG = 1024  # connections that wait to be accepted
MAX_FILES = 65_536
SILENCE = 60  # seconds in which a worker must answer; it does not while it starts
MARGIN = 5.0  # seconds after its grace in which a worker must end
PAUSE = 10.0  # seconds before a worker whose artifact cannot be had any more is tried again
UPLOADS, FOLDER = "GRADIO_TEMP_DIR", "toolkit-uploads-"
OLD = 2 * 3600  # seconds; a server that runs touches its folder each hour


@dataclass(frozen=True)
class Settings:
    """What decides how a server runs."""

    artifacts: dict[str, Path]  # by name; the first is the default
    host: str = "127.0.0.1"
    port: int = 7860  # 0 takes a free one
    provider: Provider = "auto"
    max_batch: int = MAX_BATCH  # images that run together
    max_queue: int = MAX_QUEUE  # images that may wait
    deadline: float = 10.0  # seconds that a request may take
    grace: int = 10  # seconds that running requests have after SIGTERM
    workers: int = 1  # processes
    tf32: bool = False  # whether CUDA may round to 10 bits of mantissa
    reload: bool = False  # whether to take artifacts that change on disk
    key: str | None = None  # what clients must show
    examples: tuple[Path, ...] = ()  # images to try on the page

    @property
    def private(self) -> bool:
        """Whether only this machine, or those who have the key, can use the server."""
        return self.key is not None or self.host == "localhost" or self.host.startswith("127.") or self.host == "::1"


def read_key(path: Path) -> str:
    """The key in a file, of which the first line counts. Raises ``UserError``."""
    try:
        key = path.read_text(encoding="utf-8-sig").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the key in {path}: {getattr(error, 'strerror', None) or 'not text'}") from error
    if not key:
        raise UserError(f"{path} holds no key: its first line must be one")
    return key


def run(settings: Settings, started: Callable[[str, str], None] = lambda url, where: None) -> None:
    """Serve until SIGINT or SIGTERM; ``started`` gets the address, which answers from then on, and what runs.

    Call it from the main thread. Raises ``UserError`` for a port or an artifact that cannot be had. Where a batch
    does not end, the process does.
    """
    _allow_many_connections()
    with _listen(settings.host, settings.port) as listener:
        address, port = listener.getsockname()[:2]
        url = f"http://{f'[{address}]' if ':' in address else address}:{port}/"
        if settings.workers > 1:
            check_provider(settings.provider)  # what is wrong is said once
            for path in settings.artifacts.values():
                artifact.read(path)
            _run_workers(settings, listener, lambda provider: started(url, f"{provider}, {settings.workers} processes"))
            return
        previous = {number: signal.signal(number, _leave) for number in _ends()}
        before = threading.enumerate()
        try:
            engine = _engine(settings)
            with _uploads():
                started(url, engine.provider())
                server = uvicorn.Server(_config(settings, _app(settings, engine)))
                for number in previous:  # uvicorn raises it again once it is done, for whoever held it before
                    signal.signal(number, server.handle_exit)
                server.run([listener])
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        # Python would wait for the page's calls, and take ONNX Runtime apart while it runs.
        own = [thread for thread in threading.enumerate() if not (thread.daemon or thread in before)]
        join(own)
        if not engine.ended or any(thread.is_alive() for thread in own):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


@contextmanager
def _own(prefix: str, parent: Path | None) -> Iterator[str]:
    """A folder of this server's own, gone at its end; those of servers that were killed go with time."""
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        own = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"no folder can be made in {parent or 'the temporary folder'}: {error}") from error
    for left in Path(own.name).parent.glob(f"{prefix}*"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > OLD:
                with _held(left):
                    shutil.rmtree(left)
    with own as folder, _held(Path(folder)):
        yield folder


@contextmanager
def _uploads() -> Iterator[None]:
    """The folder of the page's uploads; ``GRADIO_TEMP_DIR`` says where."""
    parent = os.environ.get(UPLOADS)
    with _own(FOLDER, Path(parent).resolve() if parent else None) as folder:
        os.environ[UPLOADS] = folder
        try:
            yield
        finally:
            if parent is None:
                del os.environ[UPLOADS]
            else:
                os.environ[UPLOADS] = parent


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep the folder from other servers, where that can be done; ``BlockingIOError`` where one of them does."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _run_workers(settings: Settings, listener: socket.socket, started: Callable[[str], None]) -> None:
    # Not beside the uploads: a process that maps a file of counters dies where the disk is full.
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with _uploads(), _own("toolkit-metrics-", memory) as folder:
        os.environ[metrics.SHARED] = folder
        # Workers end by the very signal that they obeyed: locks of Gradio's are then cleaned up after them, aloud.
        os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
        up, tell = Pipe(duplex=False)
        worker = partial(_worker, settings, tell, secrets.token_bytes())
        supervisor = _Supervisor(_config(settings, worker), listener, up, started)
        try:
            supervisor.run()
        except BaseException:  # say as the address cannot be printed
            supervisor.terminate_all()
            supervisor.join_all()
            raise
        del os.environ[metrics.SHARED], os.environ["PYTHONWARNINGS"]
    if supervisor.failed:
        raise UserError("a worker could not start: see the error above")


class _Supervisor(Multiprocess):
    """uvicorn's, which puts a new process in the place of one that died, but waits for none of them.

    ``up`` gives the provider of each worker that comes up; ``started`` gets the first one's. A worker that ends
    before ends all.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        up: Connection,
        started: Callable[[str], None],
    ) -> None:
        hangup = getattr(signal, "SIGHUP", None)
        ends = _ends()
        super().__init__(config, [listener])
        if hangup is not None and hangup not in ends:
            signal.signal(hangup, signal.SIG_IGN)
        self._up, self._started = up, started
        self._asked: dict[Process, float] = {}  # when, for the answer that is awaited
        self._any_up = self.failed = False

    def keep_subprocess_alive(self) -> None:
        if self.should_exit.is_set():
            return
        while self._up.poll():
            provider: str = self._up.recv()
            if not self._any_up:
                self._started(provider)
            self._any_up = True
        for index, process in enumerate(self.processes):
            if self._lives(process):
                continue
            if self.signal_queue:  # what may have ended it, too
                return
            if not self._any_up:
                self.failed = True
                self.should_exit.set()
                return
            if process.exitcode == STARTUP_FAILURE and time.monotonic() - self._asked.get(process, 0) < PAUSE:
                continue
            process.kill()
            process.join()
            self._asked.pop(process, None)
            if process.pid is not None:
                metrics.forget(process.pid)  # its share of the gauges
            self.processes[index] = Process(self.config, self.sockets)
            self.processes[index].start()

    def _lives(self, process: Process) -> bool:
        """Whether it runs, and has answered within ``SILENCE``."""
        if not process.process.is_alive():
            return False
        if process not in self._asked or process.parent_conn.poll():
            if process in self._asked:
                process.parent_conn.recv()
            process.parent_conn.send(b"ping")
            self._asked[process] = time.monotonic()
        return time.monotonic() - self._asked[process] < SILENCE

    def handle_hup(self) -> None:
        """The terminal was closed: uvicorn's would start all anew, without one."""
        self.should_exit.set()

    def terminate_all(self) -> None:
        for listener in self.sockets:  # else it takes connections as long as a worker has something to do
            listener.close()
        super().terminate_all()

    def join_all(self) -> None:
        """uvicorn's waits without end, say for a device that hangs."""
        end = time.monotonic() + MARGIN + (self.config.timeout_graceful_shutdown or 0)
        for process in self.processes:
            process.process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()


def _worker(settings: Settings, up: Connection, seed: bytes) -> ASGIApp:
    """The app of one of several processes."""
    from gradio import processing_utils

    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    processing_utils.hash_seed = seed  # by which Gradio names what it copies, above all examples: all share them
    try:
        engine = _engine(settings)
        app = _app(settings, engine)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(STARTUP_FAILURE)
    up.send(engine.provider())
    return app


def _end_with_parent() -> None:
    """A supervisor that was killed cannot end its workers."""
    if (parent := parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _engine(settings: Settings) -> Engine:
    return Engine(
        settings.artifacts,
        settings.provider,
        threads=max(1, available_cores() // settings.workers),
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        tf32=settings.tf32,
    )


def _app(settings: Settings, engine: Engine) -> ASGIApp:
    from serve import api, demo  # heavy, and the parent of several processes needs neither

    hand_back_freed_memory()
    turns = decode.turns(settings.workers)
    app = api.build(
        engine,
        deadline=settings.deadline,
        turns=turns,
        key=settings.key,
        reload=settings.reload,
        page=lambda app: demo.mount(app, engine, deadline=settings.deadline, turns=turns, examples=settings.examples),
    )
    # What stays until the end need not be looked through again: each time would hold up all requests for 0.2 s.
    gc.collect()
    gc.freeze()
    return app


def _config(settings: Settings, app: ASGIApp | Callable[[], ASGIApp]) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        factory=settings.workers > 1,
        workers=settings.workers,
        http=Protocol,
        ws="none",
        lifespan="on",
        backlog=BACKLOG,
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=settings.grace,
    )


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ``UserError`` where it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # From here on clients wait, and are not turned away.
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # the latter of a name with an empty part, or too long a one
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(f"port {port} on {host} is in use: choose another with --port") from error
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot serve on {host}, port {port}: {why}") from error


def _allow_many_connections() -> None:
    """Each takes a file descriptor, and the usual limit is 1,024."""
    with suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _ends() -> list[signal.Signals]:
    """The signals that end a server; a terminal that is closed sends one too, which nohup lets it ignore."""
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    closed = [] if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN else [hangup]
    return [signal.SIGINT, signal.SIGTERM, *closed]


def _leave(number: int, frame: object) -> None:
    """What a signal does as long as nothing is served."""
    sys.exit(0)
