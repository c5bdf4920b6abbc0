"""The server process: its key, its workers, its reloads, and its end under load."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import httpx
import numpy as np
import pytest
import uvicorn
from conftest import Toolkit, refused
from served import Served, encoded, serving, wait_until, wait_until_ready
from small_net import changed, small_artifact, with_property, with_unknown_operator

from serve import api, demo
from serve import engine as engine_module
from serve import server as server_module
from serve.session import NoCudaError, Session

GOOD = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@contextmanager
def _load(server: Served, clients: int = 8) -> Iterator[Counter[object]]:
    """Ask for predictions all the while; counts statuses, and the kinds of broken connections."""
    seen: Counter[object] = Counter()
    stop = threading.Event()

    def ask() -> None:
        with server.client() as http:
            while not stop.is_set():
                try:
                    seen[http.post("v1/predict", content=GOOD).status_code] += 1
                except httpx.TransportError as error:
                    seen[type(error)] += 1
                    return

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: seen[200] >= 2 * clients)
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)


# The model waits for as long as there is a file ``held``, and says that it does.
HOLD = """
import time
from pathlib import Path
from serve.session import Session
held, run = Path({path!r}), Session.run
def wait(self, images):
    while held.exists():
        held.with_name("entered").touch()
        time.sleep(0.01)
    return run(self, images)
Session.run = wait
"""
# What still runs at the end is not waited for as long as it usually is.
BRIEFLY = "import serve.engine; serve.engine.CLOSE_SECONDS = 0.3"


def _refuses(server: Served) -> bool:
    with suppress(OSError):
        server.connection().close()
        return False
    return True


def test_uploads_are_deleted_in_time_and_what_was_asked_before_the_end_is_answered(path: Path, tmp_path: Path) -> None:
    artifact, held = shutil.copy(path, tmp_path / "student.onnx"), tmp_path / "held"
    (tmp_path / "student.examples").mkdir()
    (tmp_path / "student.examples/ramp.png").write_bytes(GOOD)
    with (
        serving(artifact, patch=HOLD.format(path=str(held)) + "import serve.demo; serve.demo.HOUR = 1") as server,
        server.client() as http,
        ThreadPoolExecutor() as pool,
        server.connection() as slow,
    ):
        (upload,) = http.post("gradio_api/upload", files={"files": ("cat.png", GOOD)}).json()
        wait_until(lambda: not Path(upload).exists())
        (example,) = set(re.findall(r'"path":"([^"]+ramp\.png)"', http.get("config").text))
        assert http.get(f"gradio_api/file={example}").content == GOOD  # which stays
        slow.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")  # one request, and half of the next
        assert slow.recv(4096).startswith(b"HTTP/1.1 200 ")
        slow.sendall(b"GET /readyz HTTP/1.1\r\nhost: x\r\nx-mo")
        held.touch()
        asked = pool.submit(httpx.post, f"{server.url}v1/predict", content=GOOD, timeout=30)
        wait_until((tmp_path / "entered").exists)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: _refuses(server))
        held.unlink()
        assert asked.result(30).status_code == 200
        assert server.process.wait(20) == 0


def test_a_batch_that_hangs_does_not_keep_the_server(path: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    with (
        serving(path, "--grace", 1, patch=HOLD.format(path=str(held)) + BRIEFLY) as server,
        server.client() as http,
        ThreadPoolExecutor() as pool,
    ):
        (upload,) = http.post("gradio_api/upload", files={"files": ("cat.png", GOOD)}).json()
        held.touch()
        page = {"data": [{"path": upload, "meta": {"_type": "gradio.FileData"}}, "student", "", 60]}
        shown = pool.submit(httpx.post, f"{server.url}gradio_api/run/classify", json=page, timeout=30)
        wait_until((tmp_path / "entered").exists)
        asked = pool.submit(httpx.post, f"{server.url}v1/predict", content=GOOD, timeout=30)
        wait_until(lambda: 'toolkit_queue_images{artifact="student"} 1.0' in http.get("metrics").text)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert 1 < time.monotonic() - began < 20  # the batch hangs for ever
        assert asked.result(5).status_code == 503
        assert "The server stopped" in shown.result(5).text
        assert not Path(upload).exists()


def test_a_signal_during_the_start_ends_it(path: Path) -> None:
    with serving(path, ready=False):
        pass


def test_what_a_killed_server_left_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    names = ("other", "toolkit-uploads-held", "toolkit-uploads-new", "toolkit-uploads-old")
    other, held, new, old = (tmp_path / name for name in names)
    for folder in (other, held, new, old):
        (folder / "sub").mkdir(parents=True)
    for folder in (other, held, old):
        os.utime(folder, (1, 1))
    with server_module._held(held), server_module._uploads():  # by a server on a machine that slept
        assert sorted({*tmp_path.iterdir()} - {Path(os.environ["GRADIO_TEMP_DIR"])}) == [other, held, new]
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)


def test_an_artifact_is_replaced_under_load_and_then_the_server_is_ended(tmp_path: Path) -> None:
    path = small_artifact(tmp_path / "student.onnx")
    newer = changed(path, with_property("model", '"newer_net"'))
    with serving(path, "--reload") as server, server.client() as http:

        def until(text: str) -> None:
            wait_until(lambda: text in http.get("metrics").text + http.get("v1/model").text)

        with _load(server) as seen:
            path.write_bytes(b"junk")
            until('toolkit_reloads_total{artifact="student",result="refused"} 1.0')
            assert '"model":"small_net"' in http.get("v1/model").text
            path.write_bytes(newer)
            until('"model":"newer_net"')
            assert seen.keys() == {200}
            assert http.get("readyz").status_code == 200
            http.close()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
        assert {kind for kind in seen if isinstance(kind, int)} <= {200, 503}  # and then the connections are gone
    assert "kept the old artifact student" in server.said


def _workers(server: Served) -> list[int]:
    parent = server.process.pid
    children = map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    found = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(found) == 2
    return found


def test_workers_share_port_key_and_metrics(path: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a key\n", encoding="utf-8-sig")  # as Windows may write it
    with serving(path, "--workers", 2, "--grace", 3, "--api-key-file", key) as server:
        wrong = ({}, {"headers": {"authorization": "Bearer another"}}, {"auth": ("x", "another")},
                 {"headers": {"authorization": "Basic %%%"}})  # fmt: skip
        for credentials in wrong:
            with server.client(**credentials) as http:
                for closed in ("v1/predict", "v1/model", "metrics", "docs", "", "gradio_api/upload"):
                    answer = http.post(closed, content=GOOD)
                    assert answer.status_code == 401, closed
                    assert answer.json()["error"] == "unauthorized"
                    scheme = "Bearer" if closed.startswith("v1") else "Basic"
                    assert answer.headers["www-authenticate"].startswith(scheme)
                assert http.get("healthz").status_code == http.get("readyz").status_code == 200
        with server.client(auth=("anybody", "a key")) as page:
            assert page.get("").status_code == 200
            (upload,) = page.post("gradio_api/upload", files={"files": ("cat.png", GOOD)}).json()
            assert Path(upload).is_file()
        for _ in range(10):  # connections of their own, so that both processes get some
            with server.client(headers={"authorization": "Bearer a key"}) as http:
                assert http.post("v1/predict", content=GOOD).status_code == 200
                metrics = http.get("metrics").text
        assert 'toolkit_batch_images_sum{artifact="student"} 10.0' in metrics
        assert 'toolkit_requests_total{path="/v1/predict",status="200"} 10.0' in metrics
        for worker in _workers(server):  # others take the places of those that die
            os.kill(worker, signal.SIGKILL)
        wait_until_ready(server)
        with server.client(headers={"authorization": "Bearer a key"}) as http:
            assert http.post("v1/predict", content=GOOD).status_code == 200
            assert 'toolkit_batch_images_sum{artifact="student"} 11.0' in http.get("metrics").text
        late = server.connection()
        late.sendall(b"POST /v1/predict HTTP/1.1\r\nauthorization: Bearer a key\r\ncontent-length: 9\r\n\r\nabc")
        time.sleep(0.3)
        server.process.send_signal(signal.SIGHUP)  # the terminal was closed
        wait_until(lambda: _refuses(server))
        assert server.process.poll() is None  # and nobody waits for an answer that cannot come
    with late:  # its grace was over before its body was there
        assert late.recv(4096).startswith(b"HTTP/1.1 503 ")
    assert not Path(upload).exists()


def test_workers_end_with_a_supervisor_that_was_killed(path: Path) -> None:
    ended = []
    with suppress(AssertionError), serving(path, "--workers", 2) as server:  # its exit code is not 0
        server.process.kill()
        wait_until(lambda: _refuses(server))
        ended.append(server)
    assert ended


class _Worker:
    """A process of uvicorn's, as its supervisor sees it."""

    pid = 1

    def __init__(self, *_: object) -> None:
        self.exitcode: int | None = None
        self.process = SimpleNamespace(is_alive=lambda: self.exitcode is None, join=lambda timeout: time.sleep(0))
        self.parent_conn = SimpleNamespace(send=lambda _: None, poll=lambda: False)

    def nothing(self) -> None:
        pass

    start = join = terminate = nothing

    def kill(self) -> None:
        self.exitcode = -signal.SIGKILL


def test_a_worker_that_cannot_start_ends_all_only_before_one_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvicorn.supervisors.multiprocess.SIGNALS", {})
    monkeypatch.setattr(server_module, "Process", _Worker)
    monkeypatch.setattr(server_module.metrics, "forget", lambda pid: None)
    for up in (False, True):
        monkeypatch.setattr(server_module, "PAUSE", 10.0)
        monkeypatch.setattr(server_module, "SILENCE", 60)
        told: list[str] = []
        taken, tell = Pipe(duplex=False)
        config = uvicorn.Config("none", workers=2)
        with taken, tell, socket.socket() as listener:
            supervisor = server_module._Supervisor(config, listener, taken, told.append)
            supervisor.processes = first, second = [_Worker(), _Worker()]
            supervisor.keep_subprocess_alive()
            if up:
                tell.send("CPU")
                tell.send("CPU")
                supervisor.keep_subprocess_alive()
            second.exitcode = server_module.STARTUP_FAILURE  # say as its artifact is junk by now
            supervisor.keep_subprocess_alive()
            assert told == ["CPU"] * up
            assert supervisor.failed == supervisor.should_exit.is_set() == (not up)
            assert supervisor.processes == [first, second]  # tried again in a while
            monkeypatch.setattr(server_module, "PAUSE", 0.0)
            supervisor.keep_subprocess_alive()
            assert (supervisor.processes[1] is second) == (not up)
            monkeypatch.setattr(server_module, "SILENCE", 0.0)  # it lives, and says nothing
            supervisor.keep_subprocess_alive()
            assert (supervisor.processes[0] is first) == (not up)
            supervisor.terminate_all()
            assert listener.fileno() == -1
            supervisor.join_all()  # though they hang
            assert {process.exitcode for process in supervisor.processes} == {-signal.SIGKILL}


def test_a_worker_that_answers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvicorn.supervisors.multiprocess.SIGNALS", {})
    monkeypatch.setattr(server_module, "Process", _Worker)
    monkeypatch.setattr(server_module.metrics, "forget", lambda pid: None)
    monkeypatch.setattr(server_module, "SILENCE", 60)
    taken, tell = Pipe(duplex=False)
    with taken, tell, socket.socket() as listener:
        supervisor = server_module._Supervisor(uvicorn.Config("none", workers=1), listener, taken, lambda _: None)
        supervisor.processes = (worker,) = [_Worker()]
        tell.send("CPU")
        supervisor.keep_subprocess_alive()
        for pong in (True, False):  # the second time it hangs
            heard = []
            worker.parent_conn.recv = lambda heard=heard: heard.append(1)
            worker.parent_conn.poll = lambda pong=pong: pong
            supervisor._asked[worker] -= 61
            supervisor.keep_subprocess_alive()
            assert (supervisor.processes == [worker], heard) == (pong, [1] * pong)


def test_workers_that_cannot_start(path: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(changed(path, with_unknown_operator))
    start = "from toolkit.cli import main; main()"
    command = [sys.executable, "-c", start, "serve", tmp_path / "bad.onnx", "--port", "0", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "ONNX Runtime cannot run" in done.stderr
    assert done.stderr.endswith("error: a worker could not start: see the error above\n")


def test_what_cannot_be_served(toolkit: Toolkit, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_cuda() -> None:
        raise NoCudaError("none")

    def known(host: str, *arguments: object, **options: object) -> object:
        """Asks no name server."""
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return asked(host, *arguments, **options)

    asked = socket.getaddrinfo
    monkeypatch.setattr("serve.session.need_cuda", no_cuda)
    monkeypatch.setattr(socket, "getaddrinfo", known)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "junk.onnx").write_text("junk")
    for arguments, message in (
        ([path, "--api-key-file", tmp_path / "none"], "cannot read the key in"),
        ([path, "--api-key-file", tmp_path / "empty"], "holds no key"),
        ([path, path], "two artifacts have the name 'student'"),
        ([tmp_path / "junk.onnx", "--workers", 2], "is not an ONNX file"),
        ([path, "--provider", "cuda", "--workers", 2], "the provider cuda is not available: none"),
        ([path, "--host", "no.such.host.invalid"], "cannot serve on no.such.host.invalid, port 7860"),
        ([path, "--host", "0..0.0.0"], "cannot serve on 0..0.0.0, port 7860"),
    ):
        refused(toolkit("serve", "--provider", "cpu", *arguments), message)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "empty"))
    refused(toolkit("serve", "--provider", "cpu", path, "--port", 0), "no folder can be made in", "empty")


@pytest.mark.parametrize(
    ("host", "with_key", "warned"),
    [("0.0.0.0", False, True), ("0.0.0.0", True, False), ("127.0.0.1", False, False), ("::1", False, False)],
)
def test_a_public_server_without_a_key_says_so(
    toolkit: Toolkit,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    with_key: bool,
    warned: bool,
) -> None:
    monkeypatch.setattr("serve.server.run", lambda settings, started: None)
    (tmp_path / "key").write_text("a key")
    result = toolkit("serve", path, "--host", host, *(["--api-key-file", tmp_path / "key"] if with_key else []))
    assert (f"anybody who reaches {host} may use this server" in result.stderr) == warned


@pytest.fixture
def asked(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> Callable[..., server_module.Settings]:
    """What ``toolkit serve`` makes of its arguments. Nothing is served."""
    taken: list[server_module.Settings] = []
    monkeypatch.setattr(server_module, "run", lambda settings, started: taken.append(settings))

    def ask(*arguments: object) -> server_module.Settings:
        assert toolkit("serve", *arguments).exit_code == 0
        return taken.pop()

    return ask


def test_the_flags_reach_what_they_are_for(
    asked: Callable[..., server_module.Settings], path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    key.write_text("a key\nand more")
    assert asked(path) == server_module.Settings({"student": path})
    settings = asked(
        path, "--host", "0.0.0.0", "--port", 99, "--provider", "cpu", "--max-batch", 4, "--max-queue", 77, "--deadline",
        2.5, "--grace", 3, "--workers", 2, "--tf32", "--reload", "--api-key-file", key,
    )  # fmt: skip
    assert (settings.host, settings.port, settings.workers) == ("0.0.0.0", 99, 2)
    assert server_module._config(settings, lambda *_: None).timeout_graceful_shutdown == 3

    opened: list[tuple[object, ...]] = []
    monkeypatch.setattr(engine_module, "Session", lambda *given: opened.append(given) or Session(*given))
    monkeypatch.setattr(server_module, "available_cores", lambda: 6)
    for part in ("hand_back_freed_memory", "gc"):  # of the whole process
        monkeypatch.setattr(server_module, part, MagicMock())
    monkeypatch.setattr(api, "build", lambda engine, **given: given)
    monkeypatch.setattr(demo, "mount", lambda app, engine, **given: given)
    monkeypatch.setattr(server_module.decode, "turns", lambda processes: f"for {processes} processes")
    with server_module._engine(settings) as engine:
        assert opened == [(path, "cpu", 3, True)]  # the workers share the cores
        assert engine.max_queue == 77
        assert engine._model(None).max_batch == 4
        built = server_module._app(settings, engine)
        assert (built["deadline"], built["key"], built["reload"]) == (2.5, "a key", True)
        assert built["page"](None)["deadline"] == 2.5
        assert built["page"](None)["turns"] == built["turns"] == "for 2 processes"


def test_which_pictures_the_page_gives_to_everybody(
    asked: Callable[..., server_module.Settings], path: Path, tmp_path: Path
) -> None:
    """The first test images of a run, until their folder is deleted; and no others that happen to lie there."""
    exported, alone = tmp_path / "run/export/student.onnx", tmp_path / "out/a.onnx"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").touch()
    in_run, beside, other = exported.parent / "examples", alone.with_suffix(".examples"), alone.parent / "examples"
    for folder in (in_run, beside, other):
        folder.mkdir(parents=True)
        (folder / "00-cat.png").touch()
    for artifact, folder in ((exported, in_run), (alone, beside)):
        shutil.copy(path, artifact)
        assert asked(artifact, f"other={path}").examples == (folder / "00-cat.png",)  # the first artifact's
        shutil.rmtree(folder)
        assert asked(artifact).examples == ()


# What Windows does not have; and a prediction before the server starts.
NO_UNIX = """
import contextlib, os
sys.modules.update(fcntl=None, resource=None, uvloop=None)
del os.sched_getaffinity, os.sysconf
from toolkit.cli import app
with contextlib.redirect_stdout(sys.stderr):
    app(["predict", "--artifact", {path!r}, {image!r}], standalone_mode=False)
"""


def test_predict_and_serve_need_nothing_of_unix(path: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(GOOD)
    with serving(path, patch=NO_UNIX.format(path=str(path), image=str(image))) as server, server.client() as http:
        (answer,) = http.post("v1/predict", content=GOOD).json()["images"]
    assert server.said.startswith(f"{image}: {answer['classes'][0]['label']} ")
