"""The HTTP API on an engine."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import BoundedSemaphore, Thread
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from export.artifact import Metadata
from serve.decode import FORMATS, FORMATS_IN_WORDS, MAX_BYTES, decode
from serve.engine import Answer, Closed, DeadlineExceeded, Engine, QueueFull, join
from serve.limits import METRICS, Limits, refusal
from serve.metrics import Metrics
from toolkit import __version__
from toolkit.errors import ImageError, ImageFormatError, ImageSizeError, UserError
from toolkit.machine import available_cores

TOP_K = 5
MAX_IMAGES = 64  # in one request
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"}
RETRY = {"Retry-After": "1"}  # seconds


class TooMany(UserError):
    """More images in one request than are taken at once."""


# What went wrong, to status and code.
REFUSALS: dict[type[UserError], tuple[int, str]] = {
    ImageFormatError: (415, "image_format"),
    ImageSizeError: (413, "image_size"),
    ImageError: (400, "image_broken"),
    QueueFull: (429, "queue_full"),
    TooMany: (413, "too_large"),
    DeadlineExceeded: (504, "deadline"),
    Closed: (503, "stopping"),
}
CODES = {400: "request", 401: "unauthorized", 404: "not_found", 405: "method", 413: "too_large", 503: "busy"}

logger = logging.getLogger(__name__)


class Scored(BaseModel):
    label: str
    probability: float = Field(ge=0, le=1)


class Classified(BaseModel):
    """One image: its most probable classes, best first."""

    classes: list[Scored]


class Classification(BaseModel):
    """The images in the order in which they were sent."""

    model: str = Field(description="name of the artifact that answered")
    provider: str = Field(description="ONNX Runtime's execution provider")
    calibrated: bool = Field(description="whether the probabilities were calibrated on validation images")
    milliseconds: float = Field(description="from the whole body to the answer: decoding, waiting and the model")
    images: list[Classified]


class Model(BaseModel):
    """What a served artifact says of itself."""

    name: str
    names: list[str] = Field(description="all artifacts that are served; the first is the default")
    provider: str
    metadata: Metadata


class State(BaseModel):
    status: Literal["ok", "warming up", "stopping"]


class Error(BaseModel):
    error: str = Field(description="what went wrong, for programs")
    message: str = Field(description="what went wrong, for people")


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error} for status in statuses}


def _warm_up(engine: Engine) -> None:
    try:
        engine.warm_up()
    except Exception:  # of ONNX Runtime, say of too large a batch; the server is never ready then
        logger.exception("the warm-up failed: the server answers, but is not ready")


def build(
    engine: Engine,
    *,
    deadline: float,
    turns: BoundedSemaphore,
    key: str | None = None,
    reload: bool = False,
    page: Callable[[FastAPI], object] = lambda app: None,
) -> ASGIApp:
    """The whole app on ``engine``, which it warms up when it starts and closes when it stops.

    ``deadline`` is the seconds that a request may take once its body is there, ``turns`` what a thread holds while
    it decodes, ``key`` what clients must show. ``page`` mounts the page at ``/``.
    """
    classify = Classifier(engine, deadline, turns)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # else each broken form writes a line to the log

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Metrics]]:
        if reload:
            engine.watch()
        engine.start("warm-up", partial(_warm_up, engine))
        yield {METRICS: engine.metrics}  # for the protocol, which refuses what never comes here
        await asyncio.to_thread(engine.close)
        classify.close()

    app = FastAPI(
        title="Image classification",
        version=__version__,
        description=f"Takes {FORMATS_IN_WORDS}; tells the most probable classes.",
        lifespan=lifespan,
        redoc_url=None,
    )
    names = tuple(engine.names)

    # Not an annotation that is read before the names are known: hence no postponed annotations in this module.
    class Chosen(BaseModel):
        model_config = ConfigDict(extra="forbid")  # a misspelt one would be taken for none
        model: Literal[names] | None = Field(None, description="artifact to ask; else the first")  # type: ignore[valid-type]

    class Asked(Chosen):
        top_k: int = Field(TOP_K, ge=1, le=1000, description="classes an image; fewer where there are fewer")

    async def answer(images: Sequence[bytes], name: str | None, top_k: int) -> Response:
        began = time.perf_counter()
        answers = await classify(images, name)
        content = {
            "model": name or names[0],
            "provider": answers[0].provider,
            "calibrated": answers[0].calibrated,
            "milliseconds": (time.perf_counter() - began) * 1000,
            "images": [
                {"classes": [{"label": label, "probability": p} for label, p in answer.best(top_k)]}
                for answer in answers
            ],
        }
        return Response(to_json(content), media_type="application/json")

    @app.post(
        "/v1/predict",
        response_model=Classification,
        responses=_errors(400, 401, 413, 415, 422, 429, 503, 504),
        openapi_extra={"requestBody": {"required": True, "content": _bodies()}},
    )
    async def predict(request: Request, asked: Annotated[Asked, Query()]) -> Response:
        """Classify an image (the body is its bytes) or several (multipart/form-data, each part a file)."""
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            images = await _files(request)
        else:
            images = [await request.body()]
        return await answer(images, asked.model, asked.top_k)

    @app.get("/v1/model", responses=_errors(401, 422))
    async def model(chosen: Annotated[Chosen, Query()]) -> Model:
        """What the model is: labels, input, accuracy, provenance."""
        name = chosen.model or names[0]
        return Model(name=name, names=[*names], provider=engine.provider(name), metadata=engine.metadata(name))

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> State:
        """Whether the process lives."""
        return State(status="ok")

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses={503: {"model": State}})
    async def readyz(response: Response) -> State:
        """Whether requests should come here: after the warm-up, until it stops."""
        if engine.ready:
            return State(status="ok")
        response.status_code = 503
        return State(status="stopping" if engine.closed else "warming up")

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", response_class=PlainTextResponse, responses=_errors(401))
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return PlainTextResponse(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for kind in REFUSALS:
        app.add_exception_handler(kind, _refuse_user_error)
    app.add_exception_handler(RequestValidationError, _refuse_parameters)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(Exception, _refuse_bug)
    taken: dict[str, set[str]] = {}
    for route in app.routes:
        if isinstance(route, Route):
            taken.setdefault(route.path, set()).update(route.methods or ())
    for path, methods in taken.items():
        # The page answers every path that is not taken: a wrong method must not go there.
        app.add_route(path, _wrong_method(methods), sorted(METHODS - methods), include_in_schema=False)
    app.add_route("/v1/{rest:path}", _nowhere, sorted(METHODS), include_in_schema=False)
    page(app)

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        """The plain case of ``predict``, one image and no parameters, past the cost of FastAPI's general one."""
        if scope["type"] != "http" or not _is_plain(scope):
            await app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await answer([await request.body()], None, TOP_K)
        except UserError as error:
            response = await _refuse_user_error(request, error)
        except HTTPException as error:
            response = await _refuse_http(request, error)
        except ClientDisconnect:
            raise
        except Exception:
            logger.exception("a prediction failed")
            response = await _refuse_bug(request)
        await response(scope, receive, send)

    return Limits(front, engine.metrics, key)


@dataclass(slots=True, eq=False)
class _Job:
    """One image on its way: ``called`` in messages, for the artifact ``name``, worth an answer ``until`` that time."""

    data: bytes
    called: str
    name: str | None
    until: float  # by the loop's clock
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Answer]


class Classifier:
    """Images to answers for the event loop: decoded in a pool of threads, then queued in the engine.

    An image has its place in the engine's queue from the start.
    """

    def __init__(self, engine: Engine, deadline: float, turns: BoundedSemaphore) -> None:
        self._engine, self._deadline, self._turns = engine, deadline, turns
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._pool = [Thread(target=self._work, name="decode", daemon=True) for _ in range(available_cores())]
        for thread in self._pool:
            thread.start()

    async def __call__(self, images: Sequence[bytes], name: str | None) -> list[Answer]:
        """The answers in the order of ``images``. Raises ``ImageError`` and what ``Engine.submit`` raises."""
        most = self._engine.max_queue
        if len(images) > most:
            raise TooMany(f"at most {most} images are taken at once, and these are {len(images)}")
        self._engine.reserve(len(images), name)  # before any work is put into them
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[Answer]] = [loop.create_future() for _ in images]
        timer = loop.call_later(self._deadline, self._expire, answers)
        until = loop.time() + self._deadline
        jobs = [
            _Job(data, "the image" if len(images) == 1 else f"image {index + 1}", name, until, loop, answer)
            for index, (data, answer) in enumerate(zip(images, answers, strict=True))
        ]
        try:
            for job in jobs:
                self._jobs.put(job)
            return [await answers[0]] if len(answers) == 1 else await asyncio.gather(*answers)
        finally:
            for job in jobs:  # those whose turn has not come are nobody's now
                job.data = b""
            timer.cancel()

    def close(self) -> None:
        """End once nothing waits, or leave what does not end soon."""
        for _ in self._pool:
            self._jobs.put(None)
        join(self._pool)

    def _work(self) -> None:
        # ThreadPoolExecutor would make a future of its own for each image, which costs as much as a small decode.
        while job := self._jobs.get():
            self._queue(job)

    def _expire(self, answers: Sequence[asyncio.Future[Answer]]) -> None:
        error = DeadlineExceeded(f"the answer did not come within {self._deadline:g} seconds")
        for answer in answers:
            _settle(answer, None, error)

    def _queue(self, job: _Job) -> None:
        """Runs in the pool. One future and two changes of thread an image are all that it takes."""
        loop = job.loop
        try:
            with self._turns:
                if job.answer.done():  # past its deadline, or the client is gone
                    self._engine.release(job.name)
                    return
                pixels = decode(job.data, job.called)
            queued = self._engine.submit(pixels, job.name, job.until - loop.time(), reserved=True)
        except Exception as error:
            self._engine.release(job.name)
            _tell(loop, _settle, job.answer, None, error)
        else:
            queued.add_done_callback(lambda done: _tell(loop, _pass_on, done, job.answer))


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: object) -> None:
    with suppress(RuntimeError):  # the loop is closed: the server has stopped
        loop.call_soon_threadsafe(call, *arguments)


def _pass_on(done: Future[Answer], answer: asyncio.Future[Answer]) -> None:
    error = done.exception()
    _settle(answer, None if error else done.result(), error)


def _settle(answer: asyncio.Future[Answer], result: Answer | None, error: BaseException | None) -> None:
    if answer.done():  # past its deadline, or the client is gone
        return
    if error is not None:
        answer.set_exception(error)
    elif result is not None:
        answer.set_result(result)


def _is_plain(scope: Scope) -> bool:
    if scope["path"] != "/v1/predict" or scope["method"] != "POST" or scope["query_string"]:
        return False
    return not any(
        name == b"content-type" and value.lower().startswith(b"multipart/") for name, value in scope["headers"]
    )


async def _files(request: Request) -> list[bytes]:
    """The files of a form, in their order."""
    try:
        form = await request.form(max_files=MAX_IMAGES, max_fields=MAX_IMAGES)
    except HTTPException as error:
        if "Too many files" in error.detail:  # Starlette tells what is wrong by its words alone
            raise TooMany(f"at most {MAX_IMAGES} images are taken at once") from error
        raise
    except UnicodeError as error:  # Starlette reads names by whatever codec a form says
        raise HTTPException(400, "the form's charset cannot be read") from error
    try:
        images = [await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)]
    finally:
        await form.close()
    if not images:
        raise HTTPException(400, "the form holds no file: send each image as one (curl -F images=@FILE)")
    return images


def _bodies() -> dict[str, Any]:
    """The bodies of a prediction, as OpenAPI describes them."""
    binary = {"type": "string", "format": "binary"}
    several = {"type": "array", "items": binary, "minItems": 1, "maxItems": MAX_IMAGES}
    form = {"type": "object", "properties": {"images": several}, "required": ["images"]}
    return {
        "multipart/form-data": {"schema": form},
        **{f"image/{kind.lower()}": {"schema": {**binary, "maxLength": MAX_BYTES}} for kind in FORMATS},
        "application/octet-stream": {"schema": {**binary, "maxLength": MAX_BYTES}},
    }


async def _nowhere(request: Request) -> Response:
    raise HTTPException(404, "no such address")


def _wrong_method(methods: Collection[str]) -> Callable[[Request], Awaitable[Response]]:
    right = ", ".join(sorted(methods))

    async def refuse(request: Request) -> Response:
        raise HTTPException(405, f"this path takes {right}", {"Allow": right})

    return refuse


async def _refuse_user_error(request: Request, error: Exception) -> Response:
    status, code = next(found for kind, found in REFUSALS.items() if isinstance(error, kind))
    return refusal(request.scope, status, code, str(error), RETRY if status in (429, 503) else None)


async def _refuse_parameters(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in error.errors()]
    return refusal(request.scope, 422, "parameters", "; ".join(found))


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "http")
    return refusal(request.scope, error.status_code, code, str(error.detail), dict(error.headers or {}))


async def _refuse_bug(request: Request, _: Exception | None = None) -> Response:
    return refusal(request.scope, 500, "internal", "the server failed; its log says why")
