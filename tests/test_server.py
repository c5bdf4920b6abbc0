"""The server process: its key, its workers, its reloads, and its end under load."""

import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from conftest import Toolkit
from served import Served, encoded, serving
from small_net import small_artifact

GOOD = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_artifact(tmp_path_factory.mktemp("server") / "student.onnx")


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
        while seen[200] < 2 * clients:
            time.sleep(0.01)
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)


def test_an_artifact_is_replaced_under_load_and_then_the_server_is_ended(tmp_path: Path) -> None:
    path = small_artifact(tmp_path / "student.onnx")
    proto = onnx.load(path)
    next(item for item in proto.metadata_props if item.key == "model").value = '"newer_net"'
    with serving(path, "--reload") as server, server.client() as http:

        def until(text: str) -> None:
            end = time.monotonic() + 30
            while text not in http.get("metrics").text + http.get("v1/model").text:
                assert time.monotonic() < end, http.get("metrics").text
                time.sleep(0.1)

        with _load(server) as seen:
            path.write_bytes(b"junk")
            until('toolkit_reloads_total{artifact="student",result="refused"} 1.0')
            assert '"model":"small_net"' in http.get("v1/model").text
            path.write_bytes(proto.SerializeToString())
            until('"model":"newer_net"')
            assert seen.keys() == {200}
            assert http.get("readyz").status_code == 200
            http.close()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
        # What was asked is answered; only then are the connections gone.
        assert seen.keys() <= {200, httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError}
    assert "kept the old artifact student" in server.said


def test_workers_share_port_key_and_metrics(path: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a key\n")
    with serving(path, "--workers", 2, "--grace", 1, "--api-key-file", key) as server:
        for credentials in ({}, {"headers": {"authorization": "Bearer another"}}, {"auth": ("x", "another")}):
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
        late = socket.create_connection(("127.0.0.1", httpx.URL(server.url).port))
        late.sendall(b"POST /v1/predict HTTP/1.1\r\nauthorization: Bearer a key\r\ncontent-length: 9\r\n\r\nabc")
        time.sleep(0.3)
    with late:  # its grace was over before its body was there
        assert late.recv(4096).startswith(b"HTTP/1.1 503 ")
    assert not Path(upload).exists()
    assert server.said == "Cancel 1 running task(s), timeout graceful shutdown exceeded\n"


def test_what_cannot_be_served(toolkit: Toolkit, path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "junk.onnx").write_text("junk")
    for arguments, message in (
        ([path, "--api-key-file", tmp_path / "none"], "cannot read the key in"),
        ([path, "--api-key-file", tmp_path / "empty"], "holds no key"),
        ([path, path], "two artifacts have the name 'student'"),
        ([tmp_path / "junk.onnx", "--workers", 2], "is not an ONNX file"),
        ([path, "--host", "no.such.host.invalid"], "cannot serve on no.such.host.invalid, port 7860"),
    ):
        result = toolkit("serve", "--provider", "cpu", *arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert result.stdout == ""


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
