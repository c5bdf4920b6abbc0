"""What a search shows: the best trials, val top-1 over the fields, all of it as JSON. No torch, no Ray here."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from toolkit.progress import console, say
from toolkit.report import BLUE, FAINT, INK, VERMILLION, as_accuracy, plain_axes, short_name
from toolkit.space import Domain
from toolkit.trials import Search

SHOWN = 10  # rows of the table that is printed
WIDTH = 160  # of that table in a file


def document(search: Search) -> dict[str, Any]:
    """The search as JSON."""
    best = search.best()
    counts = {status: search.count(status) for status in ("finished", "stopped", "failed")}
    return {
        "output": str(search.output),
        **counts,
        "best": best and best.row(),
        "recipe": str(search.output / "best.yaml"),
        "trials": [trial.row() for trial in search.trials],
    }


def show(search: Search) -> None:
    """The best trials as a table, on stderr."""
    ranked = search.ranked()
    table = Table(title=f"the best {min(SHOWN, len(ranked))} of {len(search.trials)} trials, on val", box=SIMPLE_HEAD)
    for heading in ("trial", "status", "val top-1", "epochs", "parameters"):
        table.add_column(heading, justify="left" if heading == "status" else "right", no_wrap=True)
    for path in search.plan.space.fields:
        table.add_column(path.replace(".", ".\n"), justify="right")
    for trial in ranked[:SHOWN]:
        values = [str(value) for value in trial.values.values()]
        result = (f"{trial.val_top1:.2%}", str(trial.epochs), f"{trial.parameters:,}")
        table.add_row(str(trial.number), trial.status, *result, *values)
    Console(stderr=True, width=None if console.is_terminal else WIDTH, markup=False).print(table)
    if failed := search.count("failed"):
        say(f"{failed} of {len(search.trials)} trials failed: see the column error of {search.output / 'trials.csv'}")


def scatter(search: Search) -> Figure:
    """Val top-1 over each field that is searched."""
    fields = search.plan.space.fields
    best = search.best()
    others = sorted(search.ranked()[1:], key=lambda trial: trial.number)
    kinds = [
        ("finished", [t for t in others if t.status == "finished"], {"color": BLUE, "marker": "o", "alpha": 0.7}),
        ("given up early", [t for t in others if t.status == "stopped"], {"color": FAINT, "marker": "x", "alpha": 0.7}),
        ("best", [best] if best else [], {"color": VERMILLION, "marker": "*", "s": 160, "zorder": 3}),
    ]
    columns = min(3, len(fields))
    rows = -(-len(fields) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes in panels[len(fields) :]:
        axes.set_axis_off()
    for index, (axes, (path, domain)) in enumerate(zip(panels, fields.items(), strict=False)):
        for label, trials, style in kinds:
            if trials:
                places = [_place(domain, trial.values[path]) for trial in trials]
                axes.scatter(places, [trial.val_top1 for trial in trials], label=label, **style)
        _field_axis(axes, domain)
        plain_axes(axes, path)
        if index % columns == 0:
            axes.set_ylabel("val top-1", color=INK)
    as_accuracy(panels[0])
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False, labelcolor=INK
    )
    return figure


def _place(domain: Domain, value: Any) -> float:
    return domain.choices.index(value) if domain.choices is not None else value


def _label(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return short_name(text, 18)


def _field_axis(axes: Axes, domain: Domain) -> None:
    if domain.log_range is not None:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if domain.choices is not None:
        labels = [_label(choice) for choice in domain.choices]
        turned = sum(map(len, labels)) > 36
        axes.set_xticks(range(len(labels)), labels, rotation=90 if turned else 0, fontsize=8 if turned else 10)
        axes.set_xlim(-0.5, len(labels) - 0.5)


def heatmap(search: Search) -> Figure:
    """Val top-1 over the two fields of a grid."""
    (across, over), (down, under) = ((path, domain.grid()) for path, domain in search.plan.space.fields.items())
    found = {json.dumps([t.values[down], t.values[across]]): t for t in search.trials}
    cells = [[found.get(json.dumps([y, x])) for x in over] for y in under]
    ranked = search.ranked()
    values = np.ma.masked_invalid(
        [[t.val_top1 if t is not None and t in ranked else np.nan for t in row] for row in cells]
    )
    low, high = float(values.min()), float(values.max())
    figure = Figure(figsize=(2.6 + 0.95 * len(over), 1.6 + 0.6 * len(under)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="Blues", norm=Normalize(low - 1e-9, high + 1e-9), aspect="auto", origin="lower")
    axes.set_xticks(range(len(over)), [_label(value) for value in over], color=INK)
    axes.set_yticks(range(len(under)), [_label(value) for value in under], color=INK)
    axes.set_xlabel(across, fontweight="bold", color=INK)
    axes.set_ylabel(down, fontweight="bold", color=INK)
    axes.tick_params(length=2, color=FAINT)
    axes.spines[:].set_color(FAINT)
    for y, row in enumerate(cells):
        for x, trial in enumerate(row):
            if trial is None or trial.val_top1 is None or trial not in ranked:
                axes.text(x, y, "–" if trial is None else trial.status, ha="center", va="center", color=FAINT)
                continue
            dark = trial.val_top1 > low + 0.6 * (high - low)
            mark = "" if trial.status == "finished" else "*"
            text = f"{100 * trial.val_top1:.1f}{mark}"
            axes.text(x, y, text, ha="center", va="center", color="white" if dark and high > low else INK)
    axes.set_title("Val top-1 (%)", loc="left", fontsize=12, fontweight="bold", color=INK)
    if any(trial is not None and trial.status == "stopped" for row in cells for trial in row):
        axes.set_title("* given up early", loc="right", fontsize=9, color=INK)
    bar = figure.colorbar(image, ax=axes, pad=0.02, format=PercentFormatter(1))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    return figure
