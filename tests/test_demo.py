"""The page, over HTTP, from a server of its own: what it answers, what it refuses, how it stops."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from small_net import LABELS, small_artifact, small_images

from toolkit.errors import UserError

SERVER = """
import sys
from serve.session import Session
from serve import demo
path, *examples = sys.argv[1:]
demo.launch(Session(path, "cpu"), "127.0.0.1", 0, examples, started=lambda url: print(url, flush=True))
print("stopped")
"""


def _save(pixels: np.ndarray, format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_artifact(tmp_path_factory.mktemp("demo") / "student.onnx")


@pytest.fixture(scope="module")
def url(path: Path) -> Iterator[str]:
    """The address of a running page; ends it with SIGTERM, as a service manager would."""
    example = path.with_name("ramp.png")
    example.write_bytes(_save(small_images(1)[0].permute(1, 2, 0).numpy(), "PNG"))
    # In a process of its own: Gradio leaves sockets and event loops behind.
    command = [sys.executable, "-c", SERVER, str(path), str(example)]
    uploads = path.with_name("uploads")
    environment = os.environ | {"GRADIO_TEMP_DIR": str(uploads)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert address, server.communicate()[1]
        try:
            yield address
        finally:
            server.send_signal(signal.SIGTERM)
            rest, said = server.communicate(timeout=20)
    assert server.returncode == 0
    assert rest == "stopped\n"  # nothing else on stdout
    assert "Traceback" not in said
    assert not list(uploads.rglob("holiday.png"))  # what people upload is not kept


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url + "gradio_api/", timeout=30, trust_env=False) as client:
        yield client


def _upload(http: httpx.Client, data: bytes, name: str = "picture.png") -> str:
    path: str = http.post("upload", files={"files": (name, data)}).raise_for_status().json()[0]
    return path


def _classify(http: httpx.Client, picture: dict[str, object] | None) -> tuple[str, list[object] | str]:
    """The event that ends the call, and its data."""
    event = http.post("call/classify", json={"data": [picture]}).raise_for_status().json()["event_id"]
    lines = http.get(f"call/classify/{event}").raise_for_status().text.strip().split("\n")
    return lines[-2].removeprefix("event: "), json.loads(lines[-1].removeprefix("data: "))


def _file(path: str) -> dict[str, object]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def test_a_picture_gets_the_answer_of_the_session(http: httpx.Client, path: Path) -> None:
    from serve.session import Session

    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    expected = Session(path, "cpu").predict(pixels)
    event, data = _classify(http, _file(_upload(http, _save(pixels, "BMP"), "holiday.png")))
    assert event == "complete"
    answer, speed = data
    assert isinstance(answer, dict)
    assert [item["label"] for item in answer["confidences"]] == list(expected.labels)
    got = [item["confidence"] for item in answer["confidences"]]
    assert got == pytest.approx(expected.probabilities, abs=1e-5)
    assert len(got) == 5
    assert "ms" in str(speed)
    assert "CPUExecutionProvider" in str(speed)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hello", "not a PNG, JPEG, WebP, GIF or BMP image"),
        (_save(np.zeros((50, 50, 3), np.uint8), "TIFF"), "not a PNG, JPEG, WebP, GIF or BMP image"),
        (_save(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8), "PNG")[:3000], "cut short"),
        (b"", "empty"),
    ],
)
def test_an_unreadable_picture_gets_words(http: httpx.Client, data: bytes, message: str) -> None:
    event, answer = _classify(http, _file(_upload(http, data)))
    assert event == "complete"
    assert not answer[0]  # no old answer beside a new picture
    assert str(answer[1]).startswith("This picture ")
    assert message in str(answer[1])
    assert "/" not in str(answer[1])  # no path of the server


def test_only_uploads_are_read(http: httpx.Client, path: Path, tmp_path: Path) -> None:
    upload = _upload(http, _save(np.zeros((9, 9, 3), np.uint8), "PNG"))
    secret = tmp_path / "secret.png"
    secret.write_bytes(Path(upload).read_bytes())
    link = Path(upload).with_name("link.png")
    link.symlink_to(secret)
    elsewhere = [str(secret), str(path), f"{upload}/../../../{secret.name}", str(link), "ramp.png"]
    addresses = ["http://127.0.0.1:9/cat.png", "https://example.org/cat.png", "data:image/png;base64,AAAA"]
    for wrong in elsewhere + addresses:
        assert _classify(http, _file(wrong))[0] == "error", wrong
        direct = http.post("run/classify", json={"data": [_file(wrong)]})
        assert "Only an uploaded picture" in direct.text, wrong
    for odd in ({"url": "https://example.org/cat.png"}, {"path": None}, {"path": 3}):
        assert _classify(http, {**odd, "meta": {"_type": "gradio.FileData"}})[0] == "error", odd
    gone = str(Path(upload).with_name("gone.png"))
    assert "cannot be read" in str(_classify(http, _file(gone)))
    assert _classify(http, _file(upload))[0] == "complete"
    assert _classify(http, None) == ("complete", [{}, ""])


def test_uploads_have_a_limit(http: httpx.Client) -> None:
    assert http.post("upload", files={"files": ("big.png", bytes(33 * 2**20))}).status_code == 413


def test_the_page_says_what_the_model_is(http: httpx.Client, url: str) -> None:
    page = httpx.get(url, trust_env=False)
    assert page.status_code == 200
    config = httpx.get(url + "config", trust_env=False).json()
    text = json.dumps(config)
    for fact in ("small_net", "4,119", "93.75%", "ramps", "big_net", *LABELS, "CPUExecutionProvider"):
        assert fact in text, fact
    picture = next(item for item in config["components"] if item["type"] == "image")
    assert picture["props"]["sources"] == ["upload", "clipboard", "webcam"]
    assert "ramp.png" in text
    assert config["analytics_enabled"] is False
    assert "flag" not in text.lower()
    names = [item["api_name"] for item in config["dependencies"]]
    assert names.count("classify") == 1


def test_an_address_that_cannot_be_had(path: Path) -> None:
    from serve import demo
    from serve.session import Session

    session = Session(path, "cpu")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use: choose another with --port"):
            demo.launch(session, "127.0.0.1", port)
    with pytest.raises(UserError, match=r"cannot serve on no\.such\.host\.invalid, port 7860: "):
        demo.launch(session, "no.such.host.invalid")


@pytest.mark.browser
def test_the_page_in_a_browser(url: str, tmp_path: Path) -> None:
    """Upload, example and narrow screen, in the Chromium of Playwright or of the system."""
    playwright = pytest.importorskip("playwright.sync_api")
    picture = tmp_path / "picture.png"
    picture.write_bytes(_save(np.full((40, 40, 3), 90, np.uint8), "PNG"))
    with playwright.sync_playwright() as api:
        system = next((p for p in map(Path, ("/usr/bin/chromium", "/usr/bin/google-chrome")) if p.exists()), None)
        if system is None and not Path(api.chromium.executable_path).exists():
            pytest.skip("no Chromium here")
        browser = api.chromium.launch(executable_path=system, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        hosts: set[str] = set()
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(url)
        page.set_input_files("#picture input[type=file]", picture)
        page.wait_for_selector("#speed :text('CPUExecutionProvider')")
        assert page.locator("#answer .confidence-set").count() == 5
        page.click("[aria-label='Remove Image']")
        page.wait_for_selector("#speed :text('ms')", state="hidden")
        page.click(".gallery button")
        page.wait_for_selector("#speed :text('ms')")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert {host for host in hosts if host} == {url.split("/")[2]}  # nothing from elsewhere
        browser.close()
