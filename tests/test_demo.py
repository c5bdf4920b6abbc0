"""The page: what it tells of answers, over HTTP and as HTML, and which files it reads."""

import base64
import csv
import io
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from threading import BoundedSemaphore
from types import SimpleNamespace

import gradio
import httpx
import numpy as np
import pytest
from gradio.route_utils import FileUploadProgress
from PIL import Image
from served import Served, encoded
from small_net import LABELS, SIZE, small_metadata

from export.artifact import Metadata
from serve import demo, explain, views
from serve.engine import Answer, DeadlineExceeded
from serve.session import Session

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
JSON = {"content-type": "application/json"}
Json = dict[str, object]


# --- over HTTP ---------------------------------------------------------------------------------------------


def _upload(http: httpx.Client, data: bytes, name: str = "picture.png") -> str:
    path: str = http.post("gradio_api/upload", files={"files": (name, data)}).raise_for_status().json()[0]
    return path


def _file(path: str) -> Json:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def _call(http: httpx.Client, function: str, *data: object) -> str:
    answer = http.post(f"gradio_api/run/{function}", json={"data": data})
    assert answer.status_code == 200, answer.text
    (html,) = answer.json()["data"]
    return str(html)


def _number(http: httpx.Client, function: str) -> int:
    (found,) = (item["id"] for item in http.get("config").json()["dependencies"] if item["api_name"] == function)
    return int(found)


def test_a_picture_gets_the_answer_of_the_session(http: httpx.Client, path: Path) -> None:
    expected = Session(path, "cpu").predict(PIXELS)
    picture = _file(_upload(http, encoded(PIXELS, "BMP"), "holiday.png"))
    html = _call(http, "classify", picture, "student", "", 0)
    assert re.findall(r'<th scope="row"><div>(\w+)</div></th>', html) == list(expected.labels)
    shares = [float(percent) / 100 for percent in re.findall(r'width:([\d.]+)%"', html)]
    assert shares == pytest.approx(expected.probabilities, abs=1e-4)
    assert re.search(r"<b>[\d.]+ ms</b> on CPUExecutionProvider, confidence not calibrated", html)
    assert "agree" not in html
    both = _call(http, "classify", _file(_upload(http, encoded(PIXELS))), "student", "copy", 0)
    assert f"Both put <b>{expected.labels[0]}</b> first. Their probabilities overlap by 100%." in both
    assert both.count("<article") == 2
    percent = 100 * max(expected.probabilities)
    for threshold, unsure in ((percent - 1, False), (percent + 1, True)):
        for function, pictures in (("classify", picture), ("several", [picture])):
            assert (' class="unsure"' in _call(http, function, pictures, "student", "", threshold)) == unsure


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hello", "not a PNG"),
        (encoded(PIXELS, "TIFF"), "not a PNG"),
        (encoded(PIXELS)[:3000], "cut short"),
        (b"", "empty"),
    ],
)
def test_an_unreadable_picture_gets_one_line(http: httpx.Client, data: bytes, message: str) -> None:
    picture = _file(_upload(http, data))
    html = _call(http, "classify", picture, "student", "", 60)
    assert html.startswith('<p class="problem" role="alert">This picture ')
    assert message in html
    assert "/" not in html.removesuffix("</p>")  # no path of the server
    assert message in _call(http, "look", picture, "student", "", True)
    good = _file(_upload(http, encoded(PIXELS)))
    several = _call(http, "several", [picture, good], "student", "", 60)
    assert "2 pictures; 1 has no answer." in several
    assert message in several


def test_wrong_parameters_get_one_line(http: httpx.Client) -> None:
    picture = _file(_upload(http, encoded(PIXELS)))
    assert "No artifact &#x27;nobody&#x27; is served" in _call(http, "classify", picture, "nobody", "", 60)
    assert "At most 64 pictures" in _call(http, "several", [picture] * 65, "student", "", 60)


def test_a_name_spoils_no_other_picture(http: httpx.Client) -> None:
    """Gradio refuses some names. macOS puts a file ._NAME, which is no picture, beside each NAME on foreign disks."""
    uploads = [(b"\0\5\x16\7", "._cat.png"), (encoded(PIXELS), ".cat.png"), (encoded(PIXELS), "cat..png")]
    pictures = [{**_file(_upload(http, data, name)), "orig_name": name} for data, name in uploads]
    assert [Path(str(picture["path"])).name for picture in pictures] == [name for _, name in uploads]
    html = _call(http, "several", pictures, "student", "", 60)
    assert "3 pictures; 1 has no answer." in html
    assert "._cat.png: no answer" in html
    assert "This picture is not a PNG" in _call(http, "classify", pictures[0], "student", "", 60)
    for picture in pictures[1:]:
        assert "<article" in _call(http, "classify", picture, "student", "", 60)


def test_where_a_model_looked_is_shown_if_it_is_asked_for(http: httpx.Client) -> None:
    picture = _file(_upload(http, encoded(PIXELS)))
    assert _call(http, "look", picture, "student", "", False) == ""
    for other, count in (("", 1), ("copy", 2)):
        html = _call(http, "look", picture, "student", other, True)
        shown = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", html)]
        assert [image.size for image in shown] == [(SIZE, SIZE), (demo.SHOWN, demo.SHOWN)] * count


def test_only_uploads_are_read(server: Served, http: httpx.Client, tmp_path: Path) -> None:
    upload = _upload(http, encoded(PIXELS))
    secret = tmp_path / "secret.png"
    secret.write_bytes(Path(upload).read_bytes())
    link = Path(upload).with_name("link.png")
    link.symlink_to(secret)
    elsewhere = [str(secret), str(server.artifact), f"{upload}/../../../{secret.name}", str(link), "ramp.png"]
    addresses = ["http://127.0.0.1:9/cat.png", "https://example.org/cat.png", "data:image/png;base64,AAAA"]
    odd = [{"url": "https://example.org/cat.png"}, {"path": None}, {"path": 3}]
    for wrong in [_file(name) for name in elsewhere + addresses] + odd:
        for function, picture in (("classify", wrong), ("look", wrong), ("several", [_file(upload), wrong])):
            answer = http.post(f"gradio_api/run/{function}", json={"data": [picture, "student", "", 1]})
            assert answer.status_code == 500
            assert "This picture is not, or no longer, on the server" in answer.text, wrong
    for other in ("call/classify", "queue/join", "api/classify", "process_recording", "component_server"):  # Gradio's
        assert http.post(f"gradio_api/{other}", json={"data": [_file(upload), "student", "", 1]}).status_code == 404
    for address in ("http://127.0.0.1:9/cat.png", "https://example.org/cat.png", "https:/example.org/cat.png"):
        refused = http.get(f"gradio_api/file={address}")
        assert (refused.status_code, refused.json()["error"]) == (404, "not_found")
    assert http.get("gradio_api/file/http://127.0.0.1:9/cat.png").status_code == 404
    for other in ("dev/reload", "heartbeat/x", "custom_component/x/server/component/x.js", "startup-events", "runs"):
        assert http.get(f"gradio_api/{other}").status_code == 404
    assert http.get(f"gradio_api/upload_progress?upload_id={'x' * 300}").status_code == 404
    form = {"files": ("a.png", b"")}
    assert http.post(f"gradio_api/upload?upload_id={'x' * 300}", files=form).json()["error"] == "not_found"
    picture = _file(upload)
    for function, data in (
        ("classify", [None]),
        ("classify", ["x", "student", "", 60]),
        ("classify", [{}, "student", "", 60]),
        ("classify", [[picture], "student", "", 60]),
        ("classify", [picture, [], "", 60]),
        *(("classify", [picture, "student", "", threshold]) for threshold in (None, "abc", -1, 10**400)),
        ("look", [picture, "student", "", 60]),
        ("several", [picture, "student", "", 60]),
        ("several", [[None], "student", "", 60]),
        ("several", [[{**picture, "orig_name": {}}], "student", "", 60]),
    ):
        odd_call = http.post(f"gradio_api/run/{function}", json={"data": data})
        assert "not a picture and its settings" in odd_call.text, data  # and no traceback in the log
    odd_call = http.post("gradio_api/run/classify", json={"data": [_file(upload + "\0"), "student", "", 60]})
    assert "This picture is not, or no longer, on the server" in odd_call.text
    deep: list[object] = []
    for _ in range(900):
        deep = [deep]
    assert http.post("gradio_api/run/classify", json={"data": deep}).status_code == 500
    for function, body in (("nope", {"data": []}), ("predict", {"data": [], "fn_index": 99})):
        refused = http.post(f"gradio_api/run/{function}", json=body)
        assert (refused.status_code, refused.json()["error"]) == (404, "not_found")
    by_number = {"data": [picture, "student", "", 60], "fn_index": _number(http, "classify"), "session_hash": "x"}
    assert http.post("gradio_api/run/predict", json=by_number).status_code == 200  # as the page itself asks
    nameless = json.dumps({"data": [[{**picture, "orig_name": "\ud800"}], "student", "", 60]})  # half a character
    assert http.post("gradio_api/run/several", content=nameless, headers=JSON).status_code == 200
    for gone in (str(Path(upload).with_name("gone.png")), upload + "x" * 5000, str(Path(upload).parent)):
        html = _call(http, "classify", _file(gone), "student", "", 60)
        assert "This picture is no longer on the server" in html or "This picture cannot be read: " in html
    assert http.get(f"gradio_api/file={secret}").status_code in (403, 404)
    assert "comes here" in _call(http, "classify", None, "student", "", 60)


def test_old_uploads_are_deleted(tmp_path: Path) -> None:
    old, new, example = (tmp_path / name / "cat.png" for name in ("a", "b", "c"))
    for file in (old, new, example):
        file.parent.mkdir()
        file.write_bytes(b"png")
    link = tmp_path / "link"
    link.symlink_to(new)
    for path in (old, old.parent, example, example.parent, link):
        os.utime(path, (1, 1), follow_symlinks=False)
    demo.sweep(tmp_path, {example}, 3600)
    assert {*tmp_path.rglob("*")} == {old.parent, new, new.parent, example, example.parent}
    os.utime(old.parent, (1, 1))
    demo.sweep(tmp_path, {example}, 3600)
    assert not old.parent.exists()


def test_names_of_uploads_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = FileUploadProgress()
    monkeypatch.setattr(demo.routes, "file_upload_statuses", progress)
    page = SimpleNamespace(upload_file_set={"cat.png"})
    progress.track("x")
    demo.forget(page)
    assert not page.upload_file_set
    assert not progress._signals
    assert not progress._statuses
    monkeypatch.delattr(demo.routes, "file_upload_statuses")  # another Gradio
    demo.forget(page)


@pytest.mark.parametrize(
    ("labels", "drawn"), [(("ship", "cat", "frog"), ["frog.png", "ship.png", "something_else.png"]), (LABELS, [])]
)
def test_own_pictures_are_given_out_only_where_none_is_drawn(
    labels: tuple[str, ...], drawn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[str] = []
    monkeypatch.setattr(
        demo, "_build", lambda _, examples, *__: offered.extend(path.name for path in examples) or 1 / 0
    )
    engine = SimpleNamespace(metadata=lambda: small_metadata().model_copy(update={"labels": labels}))
    with pytest.raises(ZeroDivisionError):
        demo.mount(None, engine, deadline=1, turns=BoundedSemaphore(), examples=[Path("own.png")])
    assert offered == (drawn or ["own.png"])


def test_nothing_is_decoded_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "read_image", lambda *_: pytest.fail("decoded"))
    answers, turns = demo._Answers(None, 10, BoundedSemaphore()), BoundedSemaphore()
    with pytest.raises(DeadlineExceeded, match="its turn did not come within 10 s: give fewer or smaller"):
        answers._read(__file__, time.monotonic() - 1)
    answers.turns = turns
    turns.acquire()
    with pytest.raises(DeadlineExceeded, match="too many pictures wait"):
        answers._read(__file__, time.monotonic() + 0.01)


def test_the_page_says_what_the_models_are(http: httpx.Client) -> None:
    assert http.get("").status_code == 200
    config = http.get("config").json()
    picture = next(item for item in config["components"] if item["type"] == "image")
    assert picture["props"]["sources"] == ["upload", "clipboard", "webcam"]
    assert config["analytics_enabled"] is False
    assert config["connect_heartbeat"] is False  # which we refuse
    assert not any(item["queue"] for item in config["dependencies"])
    text = str(config)
    for fact in ("small_net", "4,119", "93.75%", "ramps", "big_net", *LABELS, "CPUExecutionProvider", "ramp.png"):
        assert fact in text, fact


def test_the_page_tells_no_paths_but_those_of_uploads(server: Served, http: httpx.Client) -> None:
    home = server.artifact.parent
    uploads = f"{home}/uploads/toolkit-uploads-"
    for told in (http.get("config").text, http.get("").text):
        assert uploads in told
        rest = told.replace(uploads, "")
        for folder in (home, Path(demo.__file__).parents[1], Path(gradio.__file__).parents[1]):
            assert str(folder) not in rest


# --- as HTML -----------------------------------------------------------------------------------------------


def _opinion(name: str, logits: list[float], **about: object) -> views.Opinion:
    metadata: Metadata = small_metadata().model_copy(update={"labels": ("cat", "<dog>", "eel"), **about})
    values = np.array(logits, np.float32)
    shares = np.exp(values) / np.exp(values).sum()
    return views.Opinion(name, Answer(metadata, "CPUExecutionProvider", shares, 1.25))


def test_the_page_says_whether_confidence_is_calibrated() -> None:
    raw = _opinion("raw", [2, 0, 0])
    fitted = _opinion("fitted", [4, 0, 0], temperature=0.5)
    html = views.answers([raw, fitted], 0.9)
    assert html.count("confidence not calibrated") == 1
    assert html.count("confidence calibrated") == 1
    assert html.count('class="unsure"') == 1  # 79% is below 90%, 96% is not
    assert "calibrated here, with temperature 0.50" in views.card("fitted", fitted.answer.metadata, "CPU")
    six = _opinion("six", [2, 0, 0], accuracy=0.9, views=6).answer.metadata
    assert "<td>90.00%, as the mean over 6 views of each picture</td>" in views.card("six", six, "CPU")


def test_two_artifacts_that_differ() -> None:
    html = views.answers([_opinion("one", [9, 0, 0]), _opinion("<two>", [0, 9, 0])], 0.5)
    assert "one puts <b>cat</b> first and &lt;two&gt; puts <b>&lt;dog&gt;</b> first" in html
    assert "overlap by under 1%" in html
    assert "over 99%" in html  # and not 100%


def test_several_pictures_download_as_csv() -> None:
    small = np.zeros((8, 8, 3), np.uint8)
    same = views.Row("a, b.png", small, (_opinion("one", [2, 0, 0]), _opinion("two", [9, 0, 0])))
    other = replace(same, file="=cmd()", opinions=(_opinion("one", [2, 0, 0]), _opinion("two", [0, 9, 0])))
    html = views.several([same, other, views.Row("<c>", problem="this picture is empty")], ["one", "two"], 0.9)
    assert "3 pictures; one and two agree on 1 of 2; 1 has no answer." in html
    assert html.count('<tr class="differ">') == 1
    assert "<c>" not in html
    content = base64.b64decode(html.split("base64,")[1].split('"')[0]).decode("utf-8-sig")
    table = list(csv.reader(io.StringIO(content)))
    fields = [f"{name} {field}" for name in ("one", "two") for field in ("answer", "confidence", "milliseconds")]
    assert table[0] == ["file", *fields, "problem"]
    assert table[1] == ["a, b.png", "cat", "0.7870", "1.2", "cat", "0.9998", "1.2", ""]
    assert table[2][0] == "'=cmd()"  # a spreadsheet must not run it
    assert table[3] == ["<c>", *[""] * 6, "this picture is empty"]


# --- where a model looked ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, SIZE, 32, 33])
def test_a_model_that_looks_into_a_corner_is_found_out(size: int) -> None:
    image = np.full((size, size, 3), 40, np.uint8)
    corner = np.s_[: size // 4, size - size // 4 :]
    image[corner] = 250
    copies = explain.covered(image)
    assert copies.shape == (1 + explain.STEPS**2, size, size, 3)
    assert (copies[0] == image).all()
    bright = copies[(slice(None), *corner)].mean((1, 2, 3)) / 255
    found = explain.attention(np.stack([bright, 1 - bright], 1).astype(np.float32), size)
    assert found.heat.shape == (size, size)
    assert found.heat[corner].min() > 2 * found.heat[size // 2 :, : size // 2].max()
    assert found.before == pytest.approx(250 / 255)
    assert found.after < 0.5
    shown = explain.overlay(np.asarray(Image.fromarray(image).resize((96, 96))), found.heat)
    assert shown.shape == (96, 96, 3)
    assert shown.dtype == np.uint8
    warm = shown[..., 0].astype(int) - shown[..., 2]
    assert warm[:24, 72:].mean() > warm[48:, :48].mean() + 10


@pytest.mark.parametrize(
    ("after", "said"),
    [(0.2, "Covering the bright part takes cat from 90% to 20%."), (0.85, "cat stays at 85% or more.")],
)
def test_what_is_said_of_where_a_model_looked(after: float, said: str) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    attention = explain.Attention(np.zeros((8, 8), np.float32), 0.9, after)
    assert said in views.looked(_opinion("one", [2, 0, 0]), pixels, pixels, attention)


def test_a_model_that_looks_nowhere_leaves_all_dark() -> None:
    found = explain.attention(np.full((50, 3), 1 / 3, np.float32), 32)
    assert found.heat.max() == 0
