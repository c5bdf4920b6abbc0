"""Finished runs side by side: one table and their curves, as Markdown, as one HTML file and as CSV.

Nothing is measured here: a run is what its directory says, and its parameters and multiply-accumulates are
counted on the meta device.
"""

from __future__ import annotations

import base64
import html
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pydantic import BaseModel, ValidationError

from toolkit import report
from toolkit.catalogue import info
from toolkit.errors import RunError, UserError, in_line
from toolkit.files import write_bytes, write_text
from toolkit.progress import say
from toolkit.run import RUNS, Run

MARKS = 10  # markers on a curve, at most about this many
THEMES = {"light": (report.INK, report.GRID), "dark": ("#E6E6E6", "#3A3F45")}  # ink and grid of a figure
Panel = Literal["loss", "top1"]
PANELS: dict[Panel, str] = {"loss": "Loss", "top1": "Top-1 accuracy"}

# The columns of the tables: heading and format.
COLUMNS = {
    "run": ("run", "{}"),
    "model": ("model", "{}"),
    "parameters": ("parameters", "{:,}"),
    "mega_macs": ("MACs", "{:,.1f} M"),
    "epochs": ("epochs", "{:,}"),
    "batch": ("batch", "{}"),
    "peak_lr": ("peak lr", "{:g}"),
    "train_top1": ("train top-1", "{:.2%}"),
    "val_top1": ("val top-1", "{:.2%}"),
    "test_top1": ("test top-1", "{:.2%}"),
    "reported_top1": ("reported top-1", "{:.2%}"),
    "seconds_per_epoch": ("seconds an epoch", "{:,.1f}"),
}


# --- reading -----------------------------------------------------------------------------------------------


class _Summary(BaseModel):
    """What is read of summary.json."""

    classes: list[str]
    image_size: int
    dataset: str
    dataset_digest: str
    steps: int
    kept_epoch: int


class _Epoch(BaseModel):
    """What is read of a line of metrics.jsonl."""

    epoch: int
    step: int
    train_loss: float
    train_top1: float
    val_loss: float | None
    val_top1: float | None
    batch_size: int
    seconds: float


class _Metrics(BaseModel):
    """What is read of report/metrics.json."""

    dataset_digest: str
    top1: float


@dataclass(frozen=True)
class Row:
    """What the table, the CSV and the JSON document say of a run.

    ``macs``: multiply-accumulates of one image. Accuracies are fractions, None where there is none; those of
    train and val are of the epoch whose weights were kept. ``batch_size`` is the first epoch's,
    ``final_batch_size`` the last one's. ``reported_top1`` and ``source``: what others reported of this recipe,
    and where.
    """

    run: str
    path: str
    model: str
    role: str
    dataset: str
    parameters: int
    macs: int
    epochs: int
    batch_size: int
    final_batch_size: int
    peak_lr: float
    train_top1: float
    val_top1: float | None
    test_top1: float | None
    seconds_per_epoch: float
    reported_top1: float | None
    source: str | None


@dataclass(frozen=True)
class Entry:
    """A run of the comparison. ``unmeasured`` says why ``row.test_top1`` is None."""

    row: Row
    dataset_digest: str
    history: list[dict[str, Any]]
    unmeasured: str


@dataclass(frozen=True)
class Compared:
    """Finished runs beside each other, and the HTML page that shows them."""

    rows: list[Row]
    left_out: dict[str, str]  # run directory to the reason, a whole sentence
    page: Path


def compare_runs(targets: Sequence[Path] | None, output: Path) -> Compared:
    """Write the comparison of these run directories into the folder ``output`` (see ``write``).

    Without targets the newest finished runs are taken, as many as there are distinct colours. Unfinished and
    damaged runs are left out and named; ``RunError`` where none is left.
    """
    paths = list(targets or [])
    if not targets:
        found = sorted(RUNS.glob("*/recipe.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
        paths = [path.parent for path in found]
    entries, left_out = gather(paths)
    for reason in left_out.values():
        say(f"left out: {reason}")
    if not entries:
        where = f"among {', '.join(map(str, paths))}" if targets else f"under {RUNS}/"
        raise RunError(f"there is no finished and undamaged run {where}: `toolkit pipeline` makes two to compare")
    if not targets:
        finished, entries = len(entries), entries[: len(report.COLOURS)]
        which = "all" if len(entries) == finished else "the newest"
        say(f"comparing {which} {len(entries)} of {finished} finished runs under {RUNS}/, newest first")
    page = write(output, entries, left_out)
    return Compared([entry.row for entry in entries], left_out, page)


def gather(paths: Iterable[Path]) -> tuple[list[Entry], dict[str, str]]:
    """The finished runs among the run directories, in their order, and the others, each with the reason."""
    distinct = list({path.resolve(): path for path in paths}.values())
    names = [path.resolve().name for path in distinct]
    if len(set(names)) < len(names):
        names = [str(path) for path in distinct]
    entries: list[Entry] = []
    left_out: dict[str, str] = {}
    for name, path in zip(names, distinct, strict=True):
        try:
            entries.append(_read(path, name))
        except UserError as error:
            reason = in_line(error)
            left_out[str(path)] = reason if str(path) in reason else f"{path}: {reason}"
    return entries, left_out


def _read(path: Path, name: str) -> Entry:
    with _reading(path / "recipe.yaml"):
        run = Run(path)
    with _reading(path / "summary.json"):
        summary = _Summary.model_validate(run.summary())
    with _reading(path / "metrics.jsonl"):
        history = [_Epoch.model_validate(row).model_dump() for row in run.history()]
        epochs = [row["epoch"] for row in history]
        if not epochs or epochs != [*range(1, len(epochs) + 1)] or history[-1]["step"] != summary.steps:
            raise ValueError("it does not hold every epoch of the run")
        if not 1 <= summary.kept_epoch <= len(epochs):
            raise ValueError(f"it does not hold epoch {summary.kept_epoch}, whose weights were kept")

    recipe, kept = run.recipe, history[summary.kept_epoch - 1]
    model, classes = recipe.model, len(summary.classes)
    counts = info(model.name, recipe.role, summary.image_size, classes, **model.arguments)
    test_top1, unmeasured = _test_top1(run, summary.dataset_digest)
    row = Row(
        run=name,
        path=str(path),
        model=model.name,
        role=recipe.role,
        dataset=summary.dataset,
        parameters=counts.parameters,
        macs=counts.macs,
        epochs=len(epochs),
        batch_size=history[0]["batch_size"],
        final_batch_size=history[-1]["batch_size"],
        peak_lr=recipe.optimizer.lr,
        train_top1=kept["train_top1"],
        val_top1=kept["val_top1"],
        test_top1=test_top1,
        seconds_per_epoch=sum(row["seconds"] for row in history) / len(epochs),
        reported_top1=recipe.reported_top1,
        source=recipe.source,
    )
    return Entry(row, summary.dataset_digest, history, unmeasured)


def _test_top1(run: Run, dataset_digest: str) -> tuple[float | None, str]:
    """The measured accuracy, or None and why there is none."""
    path = run.report / "metrics.json"
    if not path.is_file():
        return None, "it was not validated yet"
    try:
        with _reading(path):
            metrics = _Metrics.model_validate_json(path.read_bytes())
    except RunError as error:
        return None, str(error)
    if metrics.dataset_digest != dataset_digest:
        return None, "it was validated on other images than its own data set's"
    return metrics.top1, ""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A file that is not readable, UTF-8 or JSON, or lacks something, raises ``RunError``."""
    try:
        yield
    except (ValueError, OSError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise RunError(f"{path} is damaged: {reason}") from error


# --- writing -----------------------------------------------------------------------------------------------


def write(folder: Path, entries: Sequence[Entry], left_out: Mapping[str, str]) -> Path:
    """Write the comparison of at least one run into ``folder``; the HTML page.

    Files: ``comparison.csv``, ``loss.png``, ``top1.png``, ``comparison.md`` that shows them, and
    ``comparison.html`` that needs none of them. The same runs give the same bytes.
    """
    write_bytes(folder / "comparison.csv", report.as_csv([asdict(entry.row) for entry in entries]))
    for panel in PANELS:
        write_bytes(folder / f"{panel}.png", report.as_image(_figure(entries, panel, "light")))
    write_text(folder / "comparison.md", _markdown(entries, left_out))
    page = folder / "comparison.html"
    write_text(page, _html(entries, left_out))
    return page


def _colours(count: int) -> Sequence[str]:
    """One colour a run; more runs than there are good colours share out a rainbow."""
    if count <= len(report.COLOURS):
        return report.COLOURS[:count]
    return [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.05, 0.95, count))]


def _figure(entries: Sequence[Entry], panel: Panel, theme: str) -> Figure:
    """The curves of all runs: train dashed, val solid."""
    ink, grid = THEMES[theme]
    figure = Figure(figsize=(5.6, 3.4 + 0.22 * len(entries)), layout="constrained")
    axes = figure.subplots()
    keys = []
    for entry, colour, marker in zip(entries, _colours(len(entries)), cycle(report.MARKERS), strict=False):
        for split, style, fill in (("train", "dashed", "none"), ("val", "solid", colour)):
            values = report.points(entry.history, f"{split}_{panel}")
            if values:
                axes.plot(
                    *zip(*values, strict=True),
                    color=colour,
                    linestyle=style,
                    linewidth=1.5,
                    marker=marker,
                    markersize=4.5,
                    markerfacecolor=fill,
                    markevery=-(-len(values) // MARKS),
                )
        label = report.short_name(entry.row.run, 60)
        keys.append(Line2D([], [], color=colour, marker=marker, markersize=4.5, label=label))
    report.dress(axes, PANELS[panel], ink, grid)
    axes.set_title("dashed: train, solid: val", loc="right", fontsize=9, color=ink)
    if panel == "top1":
        report.as_accuracy(axes)
    else:
        report.from_zero(axes)
    figure.legend(handles=keys, loc="outside lower left", frameon=False, labelcolor=ink, fontsize=9)
    return figure


def _cells(entry: Entry) -> list[str]:
    values = asdict(entry.row) | {
        "mega_macs": entry.row.macs / 1e6,
        "batch": report.batch_sizes(entry.history),
    }
    return ["" if values[key] is None else form.format(values[key]) for key, (_, form) in COLUMNS.items()]


def _notes(entries: Sequence[Entry]) -> list[str]:
    """What a reader of the table must know; commands stand in backticks."""
    images: dict[str, list[str]] = {}
    for entry in entries:
        images.setdefault(f"{entry.row.dataset} ({entry.dataset_digest[:8]})", []).append(entry.row.run)
    if len(images) == 1:
        data = f"The data set is {entries[0].row.dataset}."
    else:
        which = "; ".join(f"{data}: {', '.join(runs)}" for data, runs in images.items())
        data = f"These runs saw different images, so their accuracies do not compare. {which}."
    notes = [
        data,
        "Train and val top-1 are of the epoch whose weights were kept; train top-1 is a running mean over augmented "
        "images. Seconds an epoch are a mean, on the machine that trained the run.",
        "Training losses do not compare: each is its run's own objective. Val losses do: cross entropy, plain images.",
    ]
    notes += [
        f"{entry.row.run} has no test top-1: {entry.unmeasured}. "
        f"`toolkit validate {shlex.quote(entry.row.path)}` measures it."
        for entry in entries
        if entry.unmeasured
    ]
    notes += [
        f"{entry.row.run}: the reported top-1 is that of {entry.row.source}."
        for entry in entries
        if entry.row.reported_top1 is not None and entry.row.source
    ]
    return notes


def _markdown(entries: Sequence[Entry], left_out: Mapping[str, str]) -> str:
    headings = [heading for heading, _ in COLUMNS.values()]
    parts = [
        "# Comparison of runs",
        report.table(headings, [_cells(entry) for entry in entries]),
        "\n".join(f"- {report.plain(note)}" for note in _notes(entries)),
        *(f"![{heading} by epoch]({panel}.png)" for panel, heading in PANELS.items()),
    ]
    if left_out:
        parts += ["## Left out", "\n".join(f"- {report.plain(reason)}" for reason in left_out.values())]
    return "\n\n".join(parts) + "\n"


STYLE = """
:root { color-scheme: light dark; --ink: #222; --faint: #666; --line: #ddd; --back: #fff; --band: #f5f6f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --faint: #a0a6ad; --line: #3a3f45; --back: #16191d; --band: #1e2227; }
}
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 88rem; background: var(--back); color: var(--ink);
       font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { color: var(--faint); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
th:first-child { position: sticky; left: 0; background: var(--back); }
tbody th { font-weight: 600; white-space: normal; min-width: 9rem; overflow-wrap: anywhere; }
tbody tr:hover > * { background: var(--band); }
.key { display: inline-block; width: .75em; height: .75em; margin-right: .5em; border-radius: 2px; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem;
          margin-top: 1.5rem; }
img { width: 100%; max-width: 44rem; height: auto; }
ul { padding-left: 1.2rem; color: var(--faint); font-size: .9rem; }
li { margin: .25rem 0; overflow-wrap: anywhere; }
code { color: var(--ink); }
"""


def _html(entries: Sequence[Entry], left_out: Mapping[str, str]) -> str:
    headings = (heading.replace("-", "\u2011") for heading, _ in COLUMNS.values())  # "top-1" stays on one line
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    rows = []
    for entry, colour in zip(entries, _colours(len(entries)), strict=True):
        run, *cells = map(html.escape, _cells(entry))
        key = f'<span class="key" style="background:{colour}"></span>'
        rows.append(f'<tr><th scope="row">{key}{run}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    parts = [
        "<h1>Comparison of runs</h1>",
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n' + "\n".join(rows),
        "</tbody>\n</table></div>",
        _html_list(_notes(entries)),
        '<div class="curves">',
        *(_picture(entries, panel) for panel in PANELS),
        "</div>",
    ]
    if left_out:
        parts += ["<h2>Left out</h2>", _html_list(left_out.values())]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Comparison of runs</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _html_list(lines: Iterable[str]) -> str:
    code = (re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(line)) for line in lines)
    return "<ul>\n" + "\n".join(f"<li>{line}</li>" for line in code) + "\n</ul>"


def _picture(entries: Sequence[Entry], panel: Panel) -> str:
    """A figure in both themes, inside the page; the reader's setting chooses."""
    light, dark = (
        "data:image/svg+xml;base64," + base64.b64encode(report.as_image(_figure(entries, panel, theme), "svg")).decode()
        for theme in ("light", "dark")
    )
    alternative = f"{PANELS[panel]} by epoch of the runs of the table: train dashed, val solid"
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{alternative}"></picture>'
    )
