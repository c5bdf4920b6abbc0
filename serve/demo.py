"""The demo: a Gradio page on a session."""

from __future__ import annotations

import errno
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from serve.decode import FORMATS_IN_WORDS, read_image
from serve.session import Session
from toolkit.errors import ImageError, UserError

MAX_UPLOAD = "32mb"
HOUR = 3600  # seconds after which an upload is deleted

CSS = """
.gradio-container { max-width: 1060px !important; margin: 0 auto !important; }
#title h1 { margin: .6em 0 .1em; font-size: 1.7rem; }
#title p { margin: 0 0 .4em; color: var(--body-text-color-subdued); }
#speed { color: var(--body-text-color-subdued); font-size: .95rem; min-height: 1.6em; }
#picture .image-frame, #picture .image-frame img { width: 100%; height: 100%; object-fit: contain; }
#answer { min-height: 282px; }
#about table { width: 100%; border-collapse: collapse; margin: 0; }
#about table, #about tbody, #about tr { border: 0 !important; }
#about th, #about td { padding: .4em .2em; border: 0; text-align: left; vertical-align: top; }
#about tr + tr > * { border-top: 1px solid var(--border-color-primary); }
#about th { width: 9.5em; font-weight: 500; color: var(--body-text-color-subdued); }
"""


class _Page(gr.Blocks):
    """Blocks that take pictures from Gradio's upload folder only.

    Gradio itself would fetch a picture that is named by an address, and skips its check of paths where the page
    is mounted in another app.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        for value in inputs:
            if isinstance(value, dict):
                _uploaded(value)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def build(session: Session, examples: Sequence[Path | str] = ()) -> gr.Blocks:
    """The page of ``session``; ``examples`` are image files to try. ``launch`` or mount what comes back."""

    def classify(picture: dict[str, Any] | None) -> tuple[dict[str, float] | None, str]:
        path = _uploaded(picture)
        if path is None:
            return None, ""
        try:
            image = read_image(path, "This picture")
        except ImageError as error:
            gr.Warning(str(error))
            return None, str(error)  # an old answer must not stay beside a new picture
        prediction = session.predict(image)
        scores = dict(zip(prediction.labels, prediction.probabilities, strict=True))
        return scores, f"**{prediction.milliseconds:.1f} ms** on {session.provider}"

    with _Page(
        title=f"{session.metadata.model}: image classification",
        analytics_enabled=False,
        delete_cache=(HOUR, HOUR),
    ) as page:
        gr.Markdown(_title(session), elem_id="title")
        # Two rows, so that on a phone the answer follows the picture.
        with gr.Row():
            with gr.Column(min_width=300):
                picture = gr.Image(
                    label="Picture",
                    elem_id="picture",
                    sources=["upload", "clipboard", "webcam"],
                    type="filepath",
                    height=320,
                    buttons=[],
                    webcam_options=gr.WebcamOptions(mirror=False),
                )
            with gr.Column(min_width=300):
                answer = gr.Label(label="Answer", num_top_classes=5, elem_id="answer")
                speed = gr.Markdown(elem_id="speed")
        with gr.Row():
            if examples:
                with gr.Column(min_width=300):
                    gr.Examples([[str(path)] for path in examples], picture, label="Or try one of these")
            with gr.Column(min_width=300), gr.Accordion("About this model"):
                gr.HTML(_about(session), elem_id="about")
        # Without preprocessing: Gradio would open the file with all of Pillow's formats and without our limits.
        picture.change(
            classify, picture, [answer, speed], preprocess=False, api_name="classify", show_progress="hidden"
        )
    return page


def launch(
    session: Session,
    host: str = "127.0.0.1",
    port: int = 7860,
    examples: Sequence[Path | str] = (),
    started: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve the page until SIGINT or SIGTERM; ``started`` gets the address once it answers.

    Port 0 takes a free one. Call it from the main thread. Raises ``UserError`` where the port is in use.
    """
    port = _claim(host, port)
    stop = threading.Event()
    previous = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    page = build(session, examples)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=CSS,
            max_file_size=MAX_UPLOAD,
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
            inline=False,
            share=False,
            show_error=False,
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
        )
        started(url)
        stop.wait()
    finally:
        page.close(verbose=False)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _uploaded(picture: Any) -> Path | None:
    """The path of an uploaded picture, None where there is none; refuses every other path and address."""
    if picture is None:
        return None
    path = picture.get("path") if isinstance(picture, dict) else None
    folder = Path(get_upload_folder()).resolve()
    if not isinstance(path, str) or not Path(path).resolve().is_relative_to(folder):
        raise gr.Error("Only an uploaded picture is read, no other path and no address.", print_exception=False)
    return Path(path)


def _claim(host: str, port: int) -> int:
    """``port``, or a free one for 0. Raises ``UserError`` where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} on {host} is in use: choose another with --port") from error
        raise UserError(f"cannot serve on {host}, port {port}: {error.strerror or error}") from error


def _title(session: Session) -> str:
    about = session.metadata
    names = ", ".join(about.labels[:10]) + (", ..." if len(about.labels) > 10 else "")
    return (
        f"# What is in this picture?\n\nDrop a picture, paste one, or take one: {escape(about.model)} "
        f"tells which of {len(about.labels)} classes it shows ({escape(names)}). {FORMATS_IN_WORDS}."
    )


def _about(session: Session) -> str:
    about = session.metadata
    rows = {
        "Model": about.model,
        "Parameters": f"{about.parameters:,}",
        "Test accuracy": "not measured" if about.accuracy is None else f"{about.accuracy:.2%}",
        "Calibration error": "" if about.ece is None else f"{about.ece:.2%}",
        "Data set": about.dataset,
        "Teacher": about.teacher or "none",
        "Labels": ", ".join(about.labels),
        "Input": f"{about.image_size} x {about.image_size} pixels, the central square of the picture",
        "Runs on": f"{session.provider} (ONNX Runtime), {about.precision}",
    }
    cells = "".join(f"<tr><th>{name}</th><td>{escape(value)}</td></tr>" for name, value in rows.items() if value)
    return f"<table>{cells}</table>"
