"""The page: Gradio on an engine."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import BoundedSemaphore, Thread
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI, Request, Response
from gradio import routes
from gradio.route_utils import FnIndexInferError
from gradio.utils import get_upload_folder
from numpy.typing import NDArray

from export.preprocess import fit
from serve import explain, views
from serve.api import MAX_IMAGES
from serve.decode import FORMATS_IN_WORDS, MAX_BYTES, read_image
from serve.engine import Answer, DeadlineExceeded, Engine
from serve.limits import refusal
from toolkit.errors import ImageError, UserError
from toolkit.machine import available_cores

HOUR = 3600  # seconds after which an upload is deleted, looked after once an hour
THRESHOLD = 60  # percent
SHOWN, SMALL = 288, 128  # pixels of the picture that shows where a model looked, and of one in the gallery
EMPTY = "The answer comes here. Drop a picture, paste one (Ctrl+V), take one with the camera, or try an example."
EMPTY_TABLE = (
    f"Drop or paste up to {MAX_IMAGES} pictures, of {MAX_BYTES // 2**20} MB together. Their answers come here, "
    "as a gallery and as a table that can be downloaded as CSV."
)
OURS = ("classify", "look", "several")  # functions of the page
ODD = "These are not a picture and its settings."
HERE = Path(__file__).parent


class _Page(gr.Blocks):
    """Blocks that take pictures from Gradio's upload folder only.

    Gradio itself would fetch a picture that is named by an address, and skips its check of paths where the page
    is mounted in another app.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        _check_files(inputs, Path(get_upload_folder()).resolve())
        if block_fn.api_name in OURS:  # and not Gradio's own, which load an example
            _check_kinds(inputs, block_fn.inputs)
            return inputs  # Gradio's own checks would refuse all of them for one name that begins with a dot
        try:
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)
        except Exception as error:  # say of a slider that got a picture
            raise gr.Error(ODD, print_exception=False) from error

    async def process_api(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().process_api(*args, **kwargs)
        except asyncio.CancelledError as error:  # its grace is over, and Gradio would write a traceback to the log
            raise gr.Error("The server stopped before the answer was there.", print_exception=False) from error


class _Functions(dict[int, Any]):
    """The page's functions by their numbers, which the page sends; others are missed as other names are."""

    def __missing__(self, number: int) -> Any:
        raise FnIndexInferError(f"no function {number}")


async def _no_function(request: Request, error: Exception) -> Response:
    return refusal(request.scope, 404, "not_found", "the page has no such function")


async def _no_charset(request: Request, error: Exception) -> Response:
    return refusal(request.scope, 400, "request", "the form's charset cannot be read")


def mount(
    app: FastAPI, engine: Engine, *, deadline: float, turns: BoundedSemaphore, examples: Sequence[Path] = ()
) -> None:
    """Put the page of ``engine`` at the root of ``app``, behind every route that is there.

    ``deadline`` is the seconds that an answer may take, ``turns`` what a thread holds while it decodes. ``examples``
    are image files to try, where none of those that ship with the page shows a class that the first artifact knows.
    """
    page = _build(engine, _drawn(engine) or examples, _Answers(engine, deadline, turns))
    # Not the threads of the whole process, which uploads and the API need too (40 would mean these).
    page.max_threads = min(4 * available_cores(), 39)
    page.default_config.fns = _Functions(page.fns)
    page.state_session_capacity = 16  # nothing depends on a visitor's last answers, which Gradio keeps
    gr.mount_gradio_app(
        app,
        page,
        "/",
        theme=_theme(),
        css_paths=HERE / "page.css",
        js=(HERE / "page.js").read_text(encoding="utf-8"),
        max_file_size=MAX_BYTES,
        footer_links=[],
        show_error=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
    )
    mounted: FastAPI = app.routes[-1].app  # type: ignore[attr-defined]
    # Else each such call writes a traceback to the log.
    mounted.add_exception_handler(FnIndexInferError, _no_function)
    mounted.add_exception_handler(UnicodeError, _no_charset)
    page.has_launched = True  # else Gradio does not check which files it gives out
    rows = [row for block in page.blocks.values() if isinstance(block, gr.Dataset) for row in block.samples]
    kept = {Path(row[0]["path"]) for row in rows}
    Thread(target=_tidy, args=(page, Path(get_upload_folder()), kept), name="tidy", daemon=True).start()


def _tidy(page: gr.Blocks, uploads: Path, kept: Collection[Path]) -> None:
    while True:
        time.sleep(HOUR)
        sweep(uploads, kept, HOUR)
        forget(page)
        with suppress(OSError):
            os.utime(uploads)  # tells other servers that this one lives


def forget(page: gr.Blocks) -> None:
    """Forget the names of uploads, which Gradio keeps for ever."""
    progress = getattr(routes, "file_upload_statuses", None)
    for owner, name in ((page, "upload_file_set"), (progress, "_signals"), (progress, "_statuses")):
        getattr(owner, name, set()).clear()


def sweep(uploads: Path, kept: Collection[Path], seconds: float) -> None:
    """Delete what is older than ``seconds``, but for ``kept``.

    Gradio's own way forgets what a client that went away had sent, and what a server that was killed had taken.
    """
    for folder, inside, names in os.walk(uploads, topdown=False):  # a folder comes after what is in it
        for path in (Path(folder, name) for name in (*names, *inside)):
            with suppress(OSError):  # not empty, or another process was faster
                if path not in kept and time.time() - path.lstat().st_mtime > seconds:
                    path.rmdir() if path.is_dir() else path.unlink()


class _Answers:
    """What the page's inputs become, as HTML; each within ``deadline`` seconds."""

    def __init__(self, engine: Engine, deadline: float, turns: BoundedSemaphore) -> None:
        self.engine, self.deadline, self.turns = engine, deadline, turns

    def _read(self, path: str, until: float) -> NDArray[np.uint8]:
        """A picture's pixels, once it is its turn. Raises ``DeadlineExceeded`` and ``ImageError``."""
        if not os.path.exists(path):  # noqa: PTH110  # also of a name that is none
            raise ImageError("this picture is no longer on the server: upload it again")
        if time.monotonic() >= until:
            raise DeadlineExceeded(f"its turn did not come within {self.deadline:g} s: give fewer or smaller pictures")
        if not self.turns.acquire(timeout=_left(until)):
            raise DeadlineExceeded("too many pictures wait: ask again in a moment")
        try:
            return read_image(path, "this picture")
        finally:
            self.turns.release()

    def classify(self, picture: dict[str, Any] | None, model: str, other: str, threshold: float) -> str:
        if picture is None:
            return views.hint(EMPTY)
        until = time.monotonic() + self.deadline
        try:
            pixels = self._read(picture["path"], until)
            # One after the other: at once each would take the other's cores, and their times would say nothing.
            opinions = [
                views.Opinion(name, self.engine.submit(pixels, name, _left(until)).result())
                for name in _chosen(model, other)
            ]
            return views.answers(opinions, threshold / 100)
        except UserError as error:
            return views.problem(str(error))

    def look(self, picture: dict[str, Any] | None, model: str, other: str, wanted: bool) -> str:
        if picture is None or not wanted:
            return ""
        until = time.monotonic() + self.deadline
        try:
            pixels = self._read(picture["path"], until)
            return "".join(_looked(self.engine, pixels, name, _left(until)) for name in _chosen(model, other))
        except UserError as error:
            return views.problem(str(error))

    def several(self, files: list[dict[str, Any]] | None, model: str, other: str, threshold: float) -> str:
        if not files:
            return views.hint(EMPTY_TABLE)
        if len(files) > MAX_IMAGES:
            return views.problem(f"at most {MAX_IMAGES} pictures are taken at once, and these are {len(files)}")
        chosen, until = _chosen(model, other), time.monotonic() + self.deadline

        def asked(file: dict[str, Any]) -> tuple[views.Row, dict[str, Future[Answer]]]:
            name = (file.get("orig_name") or Path(file["path"]).name).encode(errors="replace").decode()
            try:
                pixels = self._read(file["path"], until)
                answers = {one: self.engine.submit(pixels, one, _left(until)) for one in chosen}
                return views.Row(name, fit(pixels, SMALL)), answers
            except UserError as error:
                return views.Row(name, problem=str(error)), {}

        with ThreadPoolExecutor(available_cores()) as pool:
            queued = list(pool.map(asked, files))
        return views.several([_answered(*item) for item in queued], chosen, threshold / 100)

    def about(self) -> tuple[str, str]:
        """Title and cards: after a reload of the artifacts others."""
        return views.title(self.engine.metadata()), _cards(self.engine)


def _build(engine: Engine, examples: Sequence[Path], answers: _Answers) -> gr.Blocks:
    names = engine.names
    with _Page(title="What is in this picture?", analytics_enabled=False) as page:
        title = gr.HTML(views.title(engine.metadata()), elem_id="title")
        with gr.Tabs():
            with gr.Tab("One picture", elem_id="one"):
                # Two rows, so that on a phone the answer follows the picture.
                with gr.Row():
                    with gr.Column(scale=4, min_width=300):
                        picture = gr.Image(
                            label="Picture",
                            elem_id="picture",
                            sources=["upload", "clipboard", "webcam"],
                            type="filepath",
                            height=340,
                            buttons=[],
                            webcam_options=gr.WebcamOptions(mirror=False),
                            placeholder=f"Drop a picture here\nor click to choose one\n{FORMATS_IN_WORDS}",
                            alt_text="The picture that is classified",
                        )
                    with gr.Column(scale=5, min_width=300):
                        answer = gr.HTML(views.hint(EMPTY), elem_id="answer", container=True, padding=True)
                with gr.Row():
                    with gr.Column(scale=4, min_width=300):
                        if examples:
                            gr.Examples([[str(path)] for path in examples], picture, label="Or try one of these")
                    with gr.Column(scale=5, min_width=300):
                        wanted = gr.Checkbox(
                            label="Show where the model looked",
                            info="Covers the picture part by part and watches how the answer changes.",
                            elem_id="wanted",
                        )
                        looked = gr.HTML(elem_id="looked")
            with gr.Tab("Several", elem_id="several"):
                pictures = gr.File(
                    label="Pictures",
                    elem_id="pictures",
                    file_count="multiple",
                    file_types=["image"],
                    type="filepath",
                    height=160,
                )
                table = gr.HTML(views.hint(EMPTY_TABLE), elem_id="table")
            with gr.Tab("About", elem_id="about"):
                about = gr.HTML(_cards(engine), elem_id="cards")
        with gr.Row(elem_id="settings"):
            compared = len(names) > 1
            model = gr.Dropdown(names, value=names[0], label="Model", visible=compared, min_width=160)
            other = gr.Dropdown(
                [("nothing", ""), *((name, name) for name in names)],
                value=names[1] if compared else "",
                label="Compare with",
                visible=compared,
                min_width=160,
            )
            threshold = gr.Slider(0, 100, THRESHOLD, step=1, label='"I am not sure" below (%)', min_width=300)

        # Without Gradio's queue: no request depends on an earlier one, so that any of several processes can answer it.
        # Without preprocessing: Gradio would open the files with all of Pillow's formats and without our limits.
        now: dict[str, Any] = {
            "queue": False,
            "preprocess": False,
            "show_progress": "hidden",
            "trigger_mode": "always_last",
        }
        models = [model.change, other.change]  # in the API the functions have their own names
        gr.on([picture.change, *models], answers.classify, [picture, model, other, threshold], answer, **now)
        gr.on([picture.change, *models, wanted.change], answers.look, [picture, model, other, wanted], looked, **now)
        gr.on([pictures.change, *models], answers.several, [pictures, model, other, threshold], table, **now)
        threshold.change(None, threshold, js="(percent) => showSureness(percent / 100)")

        page.load(answers.about, None, [title, about], api_visibility="private", **now)
    return page


def _check_kinds(inputs: list[Any], fields: Sequence[gr.blocks.Block]) -> None:
    """Refuses what no page of ours sends from its ``fields``: the functions take it as it is."""
    if len(inputs) != len(fields) or not all(map(_fits, fields, inputs)):
        raise gr.Error(ODD, print_exception=False)
    if isinstance(inputs[0], list) and len(inputs[0]) > 10 * MAX_IMAGES:
        raise gr.Error(f"At most {MAX_IMAGES} pictures are taken at once.", print_exception=False)


def _fits(field: gr.blocks.Block, value: Any) -> bool:
    if isinstance(field, gr.Image):
        return value is None or _is_file(value)
    if isinstance(field, gr.File):
        return value is None or (isinstance(value, list) and all(map(_is_file, value)))
    if isinstance(field, gr.Slider):
        return isinstance(value, int | float) and 0 <= value <= 100
    return isinstance(value, bool if isinstance(field, gr.Checkbox) else str)


def _is_file(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("path"), str)
        and isinstance(value.get("orig_name", ""), str | None)
    )


def _left(until: float) -> float:
    """Seconds; below 0 when it is over."""
    return until - time.monotonic()


def _check_files(value: Any, folder: Path) -> None:
    """Refuses every path outside the upload folder, and every address, wherever ``value`` holds one."""
    waiting = [value]  # and no recursion, which a client could make too deep
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict) and not value.keys() & {"path", "url"}:
            waiting.extend(value.values())
        elif isinstance(value, dict):
            path, ours = value.get("path"), False
            with suppress(OSError, ValueError):  # too long a name, or characters that none has
                ours = isinstance(path, str) and Path(path).resolve().is_relative_to(folder)
            if not ours:
                raise gr.Error("This picture is not, or no longer, on the server: upload it.", print_exception=False)


def _chosen(model: str, other: str) -> list[str]:
    return [model] if other in ("", model) else [model, other]


def _answered(row: views.Row, asked: dict[str, Future[Answer]]) -> views.Row:
    try:
        return replace(row, opinions=tuple(views.Opinion(name, future.result()) for name, future in asked.items()))
    except UserError as error:
        return replace(row, problem=str(error))


def _looked(engine: Engine, pixels: NDArray[np.uint8], name: str, deadline: float) -> str:
    seen = fit(pixels, engine.metadata(name).image_size)
    asked = [engine.submit(image, name, deadline) for image in explain.covered(seen)]
    answers = [future.result() for future in asked]
    found = explain.attention(np.stack([answer.probabilities for answer in answers]), seen.shape[0])
    return views.looked(views.Opinion(name, answers[0]), seen, explain.overlay(fit(pixels, SHOWN), found.heat), found)


def _cards(engine: Engine) -> str:
    cards = "".join(views.card(name, engine.metadata(name), engine.provider(name)) for name in engine.names)
    return f'<div class="cards">{cards}</div>'


def _drawn(engine: Engine) -> list[Path]:
    """The pictures that ship with the page, where the first artifact knows what they show."""
    labels = engine.metadata().labels
    drawn = sorted((HERE / "examples").glob("*.png"))
    known = [path for path in drawn if path.stem in labels]
    return known and [*known, *(path for path in drawn if path.stem == "something_else")]


def _theme() -> gr.Theme:
    """Gradio's own theme with the fonts of the machine, and greys that can be read."""
    theme = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
    )
