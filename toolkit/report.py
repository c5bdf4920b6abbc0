"""What a classifier is worth: numbers, pictures and a Markdown page that shows both. No torch here."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax

from toolkit.errors import DivergedError
from toolkit.files import write_bytes, write_text

Pictures = Callable[[NDArray[np.int64]], NDArray[np.uint8]]  # indices [n] to images [n,H,W,3]
ECE_BINS = 15
DPI = 120
COLUMNS, SAMPLE_ROWS, MISTAKE_ROWS = 10, 3, 2  # of predictions.png
COUNTED_CLASSES = 25  # up to here a cell of the confusion matrix has room for its count
LABELLED_CLASSES = 100  # beyond, only every second, third, ... class is named

# Okabe and Ito's colours: told apart by every kind of colour vision.
BLUE, VERMILLION, GREEN, INK, FAINT, GRID = "#0072B2", "#D55E00", "#009E73", "#222222", "#777777", "#E4E4E4"
# Of many curves: without black and yellow, which a dark or a light background would swallow.
COLOURS = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#9A6324")
MARKERS = "osD^vPX*"  # a second way to tell them apart
SPLITS = {"train": (BLUE, "o"), "val": (VERMILLION, "s")}

NUMBERS = {
    "n": ("test images", "{:,}"),
    "top1": ("top-1 accuracy", "{:.2%}"),
    "top5": ("top-5 accuracy", "{:.2%}"),
    "tta_top1": ("top-1 accuracy with test-time augmentation", "{:.2%}"),
    "nll": ("negative log-likelihood (nats)", "{:.4f}"),
    "ece": (f"expected calibration error ({ECE_BINS} bins)", "{:.2%}"),
    "teacher_top1": ("teacher's top-1 accuracy", "{:.2%}"),
    "agreement": ("agreement with the teacher", "{:.2%}"),
    "kl": ("KL(teacher ‖ student) (nats)", "{:.4f}"),
}


def measure(
    logits: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    teacher_logits: ArrayLike | None = None,
) -> dict[str, Any]:
    """Everything that is measured on a set of images, ready for JSON.

    ``logits`` and ``teacher_logits`` are ``[N,K]``, ``labels`` ``[N]`` in 0..K-1, ``classes`` the K names.
    Returns ``n``, ``top1``, ``top5`` (where K > 5), ``nll`` (nats), ``ece``, ``per_class`` (name to accuracy,
    None for a class without images), ``confusion`` (``[K][K]`` counts, rows true, columns predicted), and
    with a teacher ``teacher_top1``, ``agreement`` (share of images with the same answer) and ``kl``, the mean
    KL(teacher || student) at temperature 1. Accuracies, agreement and ``ece`` are fractions 0..1. Of equal
    logits the first class wins. Raises ``DivergedError`` for logits that are not finite.
    """
    student = _logits(logits, "the model")
    true = np.asarray(labels).astype(np.int64)
    count, k = student.shape
    log_p = log_softmax(student, axis=1)
    predicted = student.argmax(axis=1)
    correct = predicted == true
    confusion = np.bincount(true * k + predicted, minlength=k * k).reshape(k, k)
    per_class = [float(row[i] / row.sum()) if row.sum() else None for i, row in enumerate(confusion)]
    result: dict[str, Any] = {"n": count, "top1": float(correct.mean())}
    if k > 5:
        best = np.argsort(-student, axis=1, kind="stable")[:, :5]
        result["top5"] = float((best == true[:, None]).any(axis=1).mean())
    result["nll"] = float(-log_p[np.arange(count), true].mean())
    result["ece"] = _ece(np.exp(log_p.max(axis=1)), correct)
    if teacher_logits is not None:
        teacher = _logits(teacher_logits, "the teacher")
        answers = teacher.argmax(axis=1)
        log_q = log_softmax(teacher, axis=1)
        result["teacher_top1"] = float((answers == true).mean())
        result["agreement"] = float((answers == predicted).mean())
        # Never log(softmax): a probability that underflows would make 0 * inf of a finite difference.
        result["kl"] = max(0.0, float((np.exp(log_q) * (log_q - log_p)).sum(axis=1).mean()))
    result["per_class"] = dict(zip(classes, per_class, strict=True))
    result["confusion"] = confusion.tolist()
    return result


def _logits(values: ArrayLike, whose: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    broken = int((~np.isfinite(array)).any(axis=1).sum())
    if broken:
        raise DivergedError(f"{whose} answers {broken} of {len(array)} images with NaN or infinite logits")
    return array


def _ece(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """Expected calibration error over bins of equal width, (0, 1/15] to (14/15, 1] (Guo et al. 2017)."""
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def write(
    folder: Path,
    title: str,
    metrics: dict[str, Any],
    history: Sequence[Mapping[str, Any]],
    images: Pictures,
    labels: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    facts: Mapping[str, str],
    layer_table: str | None = None,
) -> None:
    """Write the report of a model into ``folder``, which is made where it is missing.

    ``metrics`` is what ``measure`` returned, ``history`` one mapping an epoch as in ``metrics.jsonl`` (empty where
    there was no training), ``images`` gives the test images of some indices, uint8 ``[n,H,W,3]``, ``labels`` ``[N]``
    and ``probabilities`` ``[N,K]`` theirs, ``facts`` what the head of the page says about the run, and
    ``layer_table`` torchinfo's text. Files: ``metrics.json``, ``confusion.png``, ``predictions.png``, ``report.md``,
    and with a history ``curves.png``, ``schedule.png`` and ``history.csv``. The same input gives the same bytes; each
    file is replaced whole, the page last.
    """
    write_bytes(folder / "metrics.json", _json(metrics))
    if history:
        write_bytes(folder / "history.csv", as_csv(history))
        write_bytes(folder / "curves.png", as_image(_curves(history)))
        write_bytes(folder / "schedule.png", as_image(_schedule(history)))
    else:  # a report of an earlier run in this folder must not lend its curves to this one
        for name in ("history.csv", "curves.png", "schedule.png"):
            (folder / name).unlink(missing_ok=True)
    write_bytes(folder / "confusion.png", as_image(_confusion(np.asarray(metrics["confusion"]), classes)))
    grid = _predictions(images, np.asarray(labels), np.asarray(probabilities), classes)
    write_bytes(folder / "predictions.png", as_image(grid))
    write_text(folder / "report.md", _page(title, metrics, history, classes, facts, layer_table))


# Files


def _json(metrics: Mapping[str, Any]) -> bytes:
    """One line a key, so that the confusion matrix does not take K * K lines."""
    lines = (
        f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False, ensure_ascii=False)}"
        for key, value in metrics.items()
    )
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_image(figure: Figure, kind: Literal["png", "svg"] = "png") -> bytes:
    """The file of a figure, the same bytes each time; an SVG has no background of its own."""
    buffer = io.BytesIO()
    unstable = {"png": "Software", "svg": "Date"}[kind]
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "toolkit"}):
        # A name in a script that the font lacks is drawn as boxes; the page's tables have it right.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        figure.savefig(
            buffer,
            format=kind,
            dpi=DPI,
            bbox_inches="tight",
            pad_inches=0.15,
            transparent=kind == "svg",
            metadata={unstable: None},
        )
    return buffer.getvalue()


# Pictures


def short_name(text: str, length: int) -> str:
    """A class's or a run's name that fits into a figure; a dollar sign would start a formula."""
    short = text if len(text) <= length else text[: length - 1] + "…"
    return short.replace("$", r"\$")


def points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """``(epoch, value)`` of the epochs that have one: val is not measured after every epoch."""
    return [(row["epoch"], row[key]) for row in history if row.get(key) is not None]


def batch_sizes(history: Sequence[Mapping[str, Any]]) -> str:
    """``128``, or ``125 to 1,000`` where it grew."""
    return " to ".join(f"{size:,}" for size in dict.fromkeys((history[0]["batch_size"], history[-1]["batch_size"])))


def dress(axes: Axes, heading: str, ink: str = INK, grid: str = GRID) -> None:
    """What all curves over epochs have in common."""
    plain_axes(axes, heading, ink, grid)
    axes.set_xlabel("epoch", color=ink)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def plain_axes(
    axes: Axes, heading: str, ink: str = INK, grid: str = GRID, grid_axis: Literal["both", "x", "y"] = "both"
) -> None:
    """What all axes have in common: a heading, faint lines, no frame."""
    axes.set_title(heading, loc="left", fontsize=12, fontweight="bold", color=ink)
    axes.grid(axis=grid_axis, color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=FAINT, labelcolor=ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def as_accuracy(axes: Axes) -> None:
    """A vertical axis of fractions, shown as percentages."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 1.02))  # beyond 100%: room for the marker of a point there
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def from_zero(axes: Axes) -> None:
    """A vertical axis that starts at 0, where nothing lies below."""
    if axes.dataLim.ymin >= 0:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1.05 * axes.dataLim.ymax))


def _plot(
    axes: Axes, values: list[tuple[int, float]], colour: str, marker: str, label: str, drawstyle: str = "default"
) -> None:
    if not values:
        return
    # A curve of few epochs, or of one, is its points.
    shape = marker if len(values) <= 30 else ""
    axes.plot(
        *zip(*values, strict=True),
        color=colour,
        linewidth=1.8,
        label=label,
        marker=shape,
        markersize=4,
        drawstyle=drawstyle,
    )


def _curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for split, (colour, marker) in SPLITS.items():
        _plot(loss, points(history, f"{split}_loss"), colour, marker, split)
        _plot(accuracy, points(history, f"{split}_top1"), colour, marker, split)
    dress(loss, "Loss")
    dress(accuracy, "Top-1 accuracy")
    from_zero(loss)
    as_accuracy(accuracy)
    for axes, corner in ((loss, "upper right"), (accuracy, "lower right")):
        if axes.lines:
            axes.legend(loc=corner, frameon=False, labelcolor=INK)
    val = points(history, "val_top1")
    if val:
        epoch, best = max(val, key=lambda point: point[1])
        note = f"best val {best:.2%}, epoch {epoch}"
        accuracy.set_title(note, loc="right", fontsize=9, color=VERMILLION)
    return figure


def _schedule(history: Sequence[Mapping[str, Any]]) -> Figure:
    """The learning rate at the end of each epoch and, where it changes, the batch size of each epoch."""
    sizes = points(history, "batch_size")
    different = sorted({size for _, size in sizes})
    panels = 2 if len(different) > 1 else 1
    figure = Figure(figsize=(5.5 * panels, 4), layout="constrained")
    rate, *rest = figure.subplots(1, panels, squeeze=False)[0]
    _plot(rate, points(history, "lr"), INK, "o", "learning rate")
    dress(rate, "Learning rate")
    from_zero(rate)
    for batch in rest:
        # A batch size holds from the end of the epoch before to the end of its own.
        _plot(batch, sizes, BLUE, "o", "batch size", "steps-pre")
        dress(batch, "Batch size")
        batch.set_yscale("log", base=2)  # a batch grows by factors
        batch.set_yticks(different, [f"{size:,}" for size in different])
        batch.yaxis.set_minor_locator(NullLocator())
    return figure


def _confusion(counts: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Right answers blue, mistakes orange on a scale of their own: beside 95%, nobody sees 2%."""
    k = len(classes)
    side = 7.5 if k <= 12 else 10.5 if k <= COUNTED_CLASSES else 15
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    diagonal, sizes = np.eye(k, dtype=bool), counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(sizes, 1)
    mistakes = np.ma.masked_array(share, diagonal | (counts == 0))
    worst = float(mistakes.max()) if mistakes.count() else 0.01
    right = axes.imshow(np.ma.masked_array(share, ~diagonal | (sizes == 0)), cmap="Blues", norm=Normalize(0, 1))
    # The square root keeps single mistakes visible beside the most frequent one.
    wrong = axes.imshow(mistakes, cmap="Oranges", norm=PowerNorm(0.5, 0, worst))

    size = 10 if k <= 12 else 9 if k <= COUNTED_CLASSES else 7
    ticks = range(0, k, -(-k // LABELLED_CLASSES))
    names = [short_name(classes[i], 18) for i in ticks]
    axes.set_xticks(ticks, names, rotation=90 if k > 12 else 45, fontsize=size, color=INK)
    if k <= 12:
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, names, fontsize=size, color=INK)
    axes.tick_params(length=2, color=FAINT)
    axes.set_xlabel("predicted", fontsize=12, fontweight="bold", color=INK)
    axes.set_ylabel("true", fontsize=12, fontweight="bold", color=INK)
    axes.spines[:].set_color(FAINT)
    axes.set_xticks(np.arange(k + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(k + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=GRID, linewidth=0.8 if k <= COUNTED_CLASSES else 0.4)
    axes.tick_params(which="minor", length=0)
    if k <= COUNTED_CLASSES:
        for row, column in np.argwhere((counts > 0) | (diagonal & (sizes > 0))):
            dark = share[row, column] > (0.6 if row == column else 0.4 * worst)
            axes.text(
                column,
                row,
                f"{counts[row, column]}",
                ha="center",
                va="center",
                fontsize=size,
                color="white" if dark else INK,
            )
    bars = [(right, "right, of the class's images")]
    if mistakes.count():
        bars.append((wrong, "mistaken, of the class's images"))
    for mappable, label in bars:
        bar = figure.colorbar(mappable, ax=axes, shrink=0.6, aspect=30, pad=0.02, format=PercentFormatter(1))
        bar.set_label(label, color=INK)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    return figure


def _predictions(
    images: Pictures,
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    classes: Sequence[str],
) -> Figure:
    """A block of images drawn at random, and a block of the most confident mistakes."""
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    sample = np.random.default_rng(0).permutation(len(labels))[: COLUMNS * SAMPLE_ROWS]
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][: COLUMNS * MISTAKE_ROWS]
    blocks = [
        (f"{len(sample)} of {len(labels):,} test images, drawn at random", sample),
        (f"Worst mistakes: the most confident of {len(wrong):,} wrong answers", worst)
        if len(wrong)
        else (f"No mistakes among {len(labels):,} test images", worst),
    ]
    # One pair of axes in units of a cell's width: an image of 0.84, its two lines below, a gap. The cell in
    # inches makes an image 128 pixels wide, so that those of 32 pixels are enlarged evenly.
    side, row_height, heading = 0.84, 1.26, 0.4
    cell = 128 / DPI / side
    rows = sum(-(-len(chosen) // COLUMNS) for _, chosen in blocks)
    height = rows * row_height + len(blocks) * heading
    figure = Figure(figsize=(cell * COLUMNS, cell * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()

    top = 0.0
    for text, chosen in blocks:
        axes.text(0, top + 0.2, text, fontsize=12, fontweight="bold", color=INK, va="center")
        top += heading
        pictures = images(chosen)
        for place, index in enumerate(chosen):
            x, y = place % COLUMNS, top + place // COLUMNS * row_height
            right = predicted[index] == labels[index]
            mark, colour, line = ("✓", GREEN, "solid") if right else ("✗", VERMILLION, "dashed")
            axes.imshow(pictures[place], extent=(x, x + side, y + side, y))
            # Unclipped: at the edge of the axes half of the line would be lost.
            frame = Rectangle((x, y), side, side, fill=False, edgecolor=colour, linestyle=line, linewidth=2.2)
            axes.add_patch(frame).set_clip_on(False)
            answer = f"{mark} {short_name(classes[predicted[index]], 13)} {confidence[index]:.0%}"
            axes.text(x, y + side + 0.13, answer, fontsize=7.2, color=colour)
            truth = f"true: {short_name(classes[labels[index]], 15)}"
            axes.text(x, y + side + 0.26, truth, fontsize=7.2, color=INK)
        top += -(-len(chosen) // COLUMNS) * row_height
    axes.set(xlim=(0, COLUMNS), ylim=(height, 0), aspect="auto")
    return figure


# The page


def plain(text: str) -> str:
    """One line of text that Markdown takes for text, in a table too."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(plain, cells)) + " |"

    return "\n".join([line(head), "|" + " --- |" * len(head), *map(line, rows)])


def _class_rows(metrics: Mapping[str, Any], classes: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """The classes, weakest first: name, images, accuracy, what it is most often mistaken for."""
    counts = np.asarray(metrics["confusion"])
    sizes, mistakes = counts.sum(axis=1), counts - np.diag(counts.diagonal())
    accuracy = counts.diagonal() / np.maximum(sizes, 1)
    rows = []
    for i in np.lexsort((accuracy, sizes == 0)):
        other = int(mistakes[i].argmax())
        rows.append(
            (
                classes[i],
                f"{sizes[i]:,}",
                f"{accuracy[i]:.2%}" if sizes[i] else "–",
                f"{classes[other]} ({mistakes[i, other]})" if mistakes[i, other] else "–",
            )
        )
    return rows


def _page(
    title: str,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    facts: Mapping[str, str],
    layer_table: str | None,
) -> str:
    numbers = [(label, form.format(metrics[key])) for key, (label, form) in NUMBERS.items() if key in metrics]
    parts = [f"# {title}", table(("measured on the test images", "value"), numbers)]
    if facts:
        parts += ["## Facts", table(("what", "value"), facts.items())]
    if history:
        parts += [
            "## Training",
            "![Loss and accuracy by epoch](curves.png)",
            "![Learning rate by epoch, and batch size where it changes](schedule.png)",
            "Train figures are running means over augmented images, with the training loss; "
            + (
                "val figures are cross entropy and accuracy on plain images. "
                if points(history, "val_top1")
                else "there was no validation split. "
            )
            + "Every epoch is in [history.csv](history.csv).",
        ]
    parts += [
        "## Mistakes",
        "![Confusion matrix](confusion.png)",
        "![Test images with predicted and true labels, and the worst mistakes](predictions.png)",
        "## Classes, weakest first",
        table(("class", "images", "accuracy", "most often mistaken for"), _class_rows(metrics, classes)),
    ]
    if layer_table:
        parts += ["## Layers", f"```text\n{layer_table.rstrip()}\n```"]
    parts.append("All numbers: [metrics.json](metrics.json).")
    return "\n\n".join(parts) + "\n"
