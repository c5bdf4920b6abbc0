"""The HTTP API of a running server: what it answers, what it refuses and how it says so."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from served import Served, encoded, wait_until
from small_net import LABELS, small_images
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from serve import api, limits
from serve.api import build
from serve.decode import decode, turns
from serve.engine import DeadlineExceeded, Engine, QueueFull
from serve.limits import Limits
from serve.metrics import Metrics
from serve.session import Session
from toolkit.errors import ImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
PNG = encoded(PIXELS)


def _best(path: Path, pixels: np.ndarray, top_k: int) -> list[dict[str, object]]:
    prediction = Session(path, "cpu").predict(pixels, top_k)
    return [
        {"label": label, "probability": pytest.approx(probability, abs=1e-6)}
        for label, probability in zip(prediction.labels, prediction.probabilities, strict=True)
    ]


def test_an_image_gets_the_answer_of_the_session(http: httpx.Client, path: Path) -> None:
    answer = http.post("v1/predict", content=PNG)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    got = answer.json()
    assert got.pop("milliseconds") > 0
    assert got == {
        "model": "student",
        "provider": "CPUExecutionProvider",
        "calibrated": False,
        "images": [{"classes": _best(path, PIXELS, 5)}],
    }
    asked = http.post("v1/predict", params={"top_k": 2, "model": "copy"}, content=PNG).json()
    assert asked["model"] == "copy"
    assert asked["images"] == [{"classes": _best(path, PIXELS, 2)}]
    everything = http.post("v1/predict", params={"top_k": 1000}, content=PNG).json()
    assert len(everything["images"][0]["classes"]) == len(LABELS)


def test_several_images_are_answered_in_their_order(http: httpx.Client, path: Path) -> None:
    images = small_images(9).permute(0, 2, 3, 1).numpy()
    files = [("images", (f"{i}.png", encoded(image))) for i, image in enumerate(images)]
    got = http.post("v1/predict", params={"top_k": 1}, files=files).json()
    assert got["images"] == [{"classes": _best(path, image, 1)} for image in images]
    request = http.build_request("POST", "v1/predict", files=files)
    request.headers["content-type"] = request.headers["content-type"].replace("multipart/form", "Multipart/Form")
    assert len(http.send(request).json()["images"]) == 9


@pytest.mark.parametrize(
    ("request_", "status", "code", "message"),
    [
        ({"content": b""}, 400, "image_broken", "the image is empty"),
        ({"content": PNG[:9000]}, 400, "image_broken", "broken or cut short"),
        ({"content": b"hello"}, 415, "image_format", "not a PNG"),
        ({"json": {"image": "x"}}, 415, "image_format", "not a PNG"),
        ({"files": [("a", PNG), ("b", b"hello")]}, 415, "image_format", "image 2 is not a PNG"),
        ({"files": [("a", PNG)] * 65}, 413, "too_large", "at most 64 images are taken at once"),
        ({"data": {str(i): "b" for i in range(65)}, "files": {"a": PNG}}, 400, "request", "Too many fields"),
        ({"data": {"a": "b"}, "files": {}}, 415, "image_format", "not a PNG"),
        ({"files": {"a": (None, "b")}}, 400, "request", "the form holds no file"),
        ({"content": b"--", "headers": {"content-type": "multipart/form-data"}}, 400, "request", "boundary"),
        (
            {
                "content": b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n',
                "headers": {"content-type": "multipart/form-data; boundary=x; charset=undefined"},
            },
            400,
            "request",
            "charset",
        ),
        ({"content": PNG, "params": {"top_k": 0}}, 422, "parameters", "top_k"),
        ({"content": PNG, "params": {"top_k": "many"}}, 422, "parameters", "top_k"),
        ({"content": PNG, "params": {"model": "none"}}, 422, "parameters", "'student' or 'copy'"),
        ({"content": PNG, "params": {"topk": 2}}, 422, "parameters", "topk: "),
    ],
)
def test_what_is_wrong_is_said_in_json(
    http: httpx.Client, request_: dict[str, object], status: int, code: str, message: str
) -> None:
    answer = http.post("v1/predict", **request_)
    assert answer.status_code == status, answer.text
    said = answer.json()
    assert said["error"] == code
    assert message.lower() in said["message"].lower()
    assert said.keys() == {"error", "message"}


def test_other_methods_and_paths(http: httpx.Client) -> None:
    answer = http.get("v1/predict")
    assert (answer.status_code, answer.headers["allow"], answer.json()["error"]) == (405, "POST", "method")
    assert http.delete("v1/model").status_code == 405
    assert http.get("v1/model", params={"name": "copy"}).json()["error"] == "parameters"
    for nowhere in (http.get("v1/nothing"), http.post("v1/predict/", content=PNG)):
        assert (nowhere.status_code, nowhere.json()["error"]) == (404, "not_found")


def test_the_model_says_what_it_is(http: httpx.Client) -> None:
    got = http.get("v1/model", params={"model": "copy"}).json()
    assert got["name"] == "copy"
    assert got["names"] == ["student", "copy"]
    assert got["provider"] == "CPUExecutionProvider"
    assert got["metadata"]["labels"] == list(LABELS)
    assert got["metadata"]["accuracy"] == 0.9375


def test_health(http: httpx.Client) -> None:
    assert http.get("healthz").json() == {"status": "ok"}
    assert http.get("readyz").json() == {"status": "ok"}
    for path in ("healthz", "readyz", "metrics"):
        answer = http.head(path)  # as some load balancers ask
        assert (answer.status_code, answer.content) == (200, b"")
        assert http.post(path).headers["allow"] == "GET, HEAD"


def test_it_is_ready_after_the_warm_up_and_until_it_stops(path: Path) -> None:
    async def ask(app: ASGIApp) -> tuple[int, dict[str, str]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
            assert (await http.get("healthz")).status_code == 200
            answer = await http.get("readyz")
            return answer.status_code, answer.json()

    with Engine({"student": path}, "cpu") as engine:
        app = build(engine, deadline=10, turns=turns())
        assert asyncio.run(ask(app)) == (503, {"status": "warming up"})
        engine.warm_up()
        assert asyncio.run(ask(app)) == (200, {"status": "ok"})
    assert asyncio.run(ask(app)) == (503, {"status": "stopping"})


def test_metrics_count_what_happens(http: httpx.Client) -> None:
    def metrics() -> dict[str, float]:
        lines = http.get("metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = metrics()
    assert http.get("no/such/page").status_code == 404
    assert http.post("v1/predict", content=PNG).status_code == 200
    assert http.post("v1/predict", content=b"hello").status_code == 415
    after = metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('toolkit_requests_total{path="page",status="404"}') == 1  # not under any name that a client invents
    assert grown('toolkit_requests_total{path="/v1/predict",status="200"}') == 1
    assert grown('toolkit_requests_total{path="/v1/predict",status="415"}') == 1
    assert grown('toolkit_request_seconds_count{path="/v1/predict"}') == 2
    assert grown('toolkit_rejects_total{reason="image_format"}') == 1
    assert grown('toolkit_batch_images_sum{artifact="student"}') == 1
    assert after['toolkit_queue_images{artifact="student"}'] == 0
    assert after['toolkit_provider{artifact="student",provider="CPUExecutionProvider"}'] == 1


def test_docs_describe_the_api(http: httpx.Client) -> None:
    assert "openapi.json" in http.get("docs").text
    paths = http.get("openapi.json").json()["paths"]
    assert paths.keys() == {"/v1/predict", "/v1/model", "/healthz", "/readyz", "/metrics"}
    assert paths["/healthz"].keys() == {"get"}
    assert {item["name"] for item in paths["/v1/predict"]["post"]["parameters"]} == {"model", "top_k"}


def test_a_server_that_cannot_answer_in_time_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue, a deadline, a bug, an end: in this process, where the model can be held up."""
    held, entered, ran = threading.Event(), threading.Event(), []

    async def ask(app: ASGIApp, count: int) -> list[tuple[int, str, str | None]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
            answers = await asyncio.gather(*(http.post("v1/predict", content=PNG) for _ in range(count)))
        return [(a.status_code, a.json().get("error"), a.headers.get("retry-after")) for a in answers]

    with Engine({"student": path}, "cpu", max_queue=2) as engine:
        app, hasty = build(engine, deadline=10, turns=turns()), build(engine, deadline=0.6, turns=turns())
        assert asyncio.run(ask(app, 1)) == [(200, None, None)]
        with monkeypatch.context() as patch:
            patch.setattr(Session, "run", lambda *_: ran.append(entered.set()) or held.wait(30))
            assert asyncio.run(ask(hasty, 1)) == [(504, "deadline", None)]
            assert entered.wait(30)
            found = asyncio.run(ask(hasty, 4))
            assert sorted(found) == [(429, "queue_full", "1")] * 2 + [(504, "deadline", None)] * 2
            ran.clear()
            held.set()  # what the model gives now is no answer
            wait_until(lambda: not engine._model(None)._places)
            assert asyncio.run(ask(app, 1)) == [(500, "internal", None)]
            assert len(ran) == 1  # the two that waited were nobody's
        assert asyncio.run(ask(app, 1)) == [(200, None, None)]
    assert asyncio.run(ask(app, 1)) == [(503, "stopping", "1")]


def test_what_nobody_waits_for_is_not_decoded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, decoded = threading.Event(), []

    def depth() -> str:
        (line,) = (line for line in engine.metrics.text().splitlines() if line.startswith(b"toolkit_queue_images{"))
        return line.decode()

    def slow(data: bytes, called: str) -> np.ndarray:
        decoded.append(called)
        held.wait(30)
        return decode(data, called)

    async def ask(classifier: api.Classifier) -> None:
        with pytest.raises(api.TooMany, match="at most 8 images are taken at once, and these are 9"):
            await classifier([PNG] * 9, None)
        with pytest.raises(DeadlineExceeded):
            await classifier([PNG] * 8, None)
        assert sorted(decoded) == ["image 1", "image 2"]
        with pytest.raises(QueueFull, match="8 images wait already"):  # for nobody, but they hold their place
            await classifier([PNG], None)
        assert depth() == 'toolkit_queue_images{artifact="student"} 8.0'
        held.set()
        await emptied()
        classifier._deadline = 10.0
        with pytest.raises(ImageError):
            await classifier([b""], None)
        assert len(await classifier([PNG] * 8, None)) == 8
        assert len(decoded) == 2 + 1 + 8
        await emptied()

    async def ask_in_turns(classifier: api.Classifier) -> None:
        with pytest.raises(DeadlineExceeded):
            await classifier([PNG] * 8, None)
        held.set()
        await emptied()
        assert len(decoded) == 1

    async def emptied() -> None:
        async with asyncio.timeout(10):
            while depth() != 'toolkit_queue_images{artifact="student"} 0.0':
                await asyncio.sleep(0.01)

    monkeypatch.setattr(api, "available_cores", lambda: 2)
    monkeypatch.setattr(api, "decode", slow)
    with Engine({"student": path}, "cpu", max_queue=8) as engine:
        assert depth() == 'toolkit_queue_images{artifact="student"} 0.0'
        classifier = api.Classifier(engine, 0.5, turns())
        asyncio.run(ask(classifier))
        classifier.close()
        held.clear()
        decoded.clear()
        classifier = api.Classifier(engine, 0.5, threading.BoundedSemaphore(1))
        asyncio.run(ask_in_turns(classifier))
        classifier.close()


def test_uploads_to_the_page_have_a_limit_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts bytes, and what each file takes on disk, wherever the form is cut into parts."""
    monkeypatch.setattr(limits, "MAX_UPLOADED_BYTES", 100_000)
    app = Limits(Starlette(routes=[Route("/gradio_api/upload", _length, methods=["POST"])]), Metrics())

    async def upload(*parts: bytes) -> httpx.Response:
        async def body() -> AsyncIterator[bytes]:
            for part in parts:
                yield part

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
            return await http.post("gradio_api/upload", content=body())

    monkeypatch.setattr(limits.time, "monotonic", lambda: 7200.0)
    assert asyncio.run(upload(bytes(60_000))).text == "60000"
    assert asyncio.run(upload(b'filename="a" FileN', b'ame="b" filename', b'="c" file', b"name")).status_code == 200
    refused = asyncio.run(upload(b"filename"))
    assert (refused.status_code, refused.text) == (503, "no more uploads to the page in this hour")
    assert refused.headers["retry-after"] == "3600"
    monkeypatch.setattr(limits.time, "monotonic", lambda: 10_800.0)
    assert asyncio.run(upload(bytes(90_000))).status_code == 200


def test_bodies_that_fill_the_memory_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_HELD_BYTES", 100_000)
    app = Limits(Starlette(routes=[Route("/v1/predict", _length, methods=["POST"])]), Metrics())

    async def ask() -> None:
        rest, arrived = asyncio.Event(), asyncio.Semaphore(0)

        async def body() -> AsyncIterator[bytes]:
            yield bytes(40_000)
            arrived.release()
            await rest.wait()

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
            held = [asyncio.create_task(http.post("v1/predict", content=body())) for _ in range(2)]
            for _ in held:
                await arrived.acquire()
            refused = await http.post("v1/predict", content=bytes(40_000))
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.text == "too many uploads at once"
            rest.set()
            assert [answer.text for answer in await asyncio.gather(*held)] == ["40000"] * 2
            assert (await http.post("v1/predict", content=bytes(90_000))).text == "90000"

    asyncio.run(ask())


async def _length(request: Request) -> Response:
    return Response(str(len(await request.body())))


@pytest.fixture(scope="module")
def described(server: Served) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(server.url + "openapi.json")


FITTING, WRONG = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("method", "route", "mode"),
    [
        ("POST", "/v1/predict", FITTING),
        ("POST", "/v1/predict", WRONG),
        ("GET", "/v1/model", FITTING),
        ("GET", "/v1/model", WRONG),
        ("GET", "/healthz", FITTING),
        ("GET", "/readyz", FITTING),
        ("GET", "/metrics", FITTING),
    ],
)
def test_the_server_keeps_to_its_description(
    described: schemathesis.BaseSchema, method: str, route: str, mode: schemathesis.GenerationMode
) -> None:
    @given(described[route][method].as_strategy(generation_mode=mode))
    @settings(max_examples=20, suppress_health_check=list(HealthCheck))
    def holds(case: schemathesis.Case) -> None:
        # What fits the description of an image's bytes need not be an image.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    holds()


def test_answers_to_images_keep_to_the_description(described: schemathesis.BaseSchema, http: httpx.Client) -> None:
    """Random bytes, as above, are none."""
    predict = described["/v1/predict"]["POST"]
    for request in ({"content": PNG}, {"files": [("images", (f"{i}.png", PNG)) for i in range(2)]}):
        answer = http.post("v1/predict", **request)
        assert answer.status_code == 200
        answer.request.read()
        predict.validate_response(answer)
    other = httpx.Response(200, json=answer.json() | {"images": [{}]}, request=answer.request)
    other.elapsed = answer.elapsed
    assert not predict.is_valid_response(other)  # the description says more than "JSON"
