"""What a comparison of methods shows: paired differences, what can be told apart, tables, a figure. No torch here."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy import stats

from toolkit.compare import BASELINE, Comparison, Result
from toolkit.files import write_bytes, write_text
from toolkit.report import BLUE, FAINT, GREEN, INK, VERMILLION, as_image, plain, plain_axes, short_name, table

CONFIDENCE = 0.95
MEASURES = [field.name for field in fields(Result)][3:]  # without method, seed and run
WIDTH = 120  # of the tables in a file


# --- statistics --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Test top-1 of one method less that of another, paired by seed; a fraction.

    ``interval``: the 95% confidence interval of the mean by Student's t, of this comparison alone. ``p``: of the
    paired t-test, two-sided. ``p_holm``: corrected for all comparisons with the same other method. The three are None
    where the seeds show no spread: there is one, or all differ by the same.
    """

    mean: float
    interval: tuple[float, float] | None
    p: float | None
    p_holm: float | None = None

    @property
    def told_apart(self) -> bool:
        return self.p_holm is not None and self.p_holm < 1 - CONFIDENCE


def differences(top1: Mapping[str, Sequence[float]], other: str) -> dict[str, Difference]:
    """Each method's difference from the ``other`` one. ``top1``: a value for each seed, in the same order for all."""
    found = {method: paired(values, top1[other]) for method, values in top1.items() if method != other}
    corrected = holm([1.0 if one.p is None else one.p for one in found.values()])
    return {
        method: one if one.p is None else replace(one, p_holm=p)
        for (method, one), p in zip(found.items(), corrected, strict=True)
    }


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """``ours`` less ``theirs``, seed by seed."""
    each = np.subtract(ours, theirs)
    mean = float(each.mean())
    if np.ptp(each) < 1e-12:  # fractions of the same images: they are equal, or differ by far more
        return Difference(mean, None, None)
    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(CONFIDENCE)
    return Difference(mean, (float(low), float(high)), float(test.pvalue))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down p-values: rejecting all below a level makes any error at most that probable."""
    order = np.argsort(p, kind="stable")
    steps = np.sort(p) * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()


@dataclass(frozen=True)
class Row:
    """A method. ``mean`` and ``deviation`` (of the sample; None for one seed) are of the fields of ``Result``.

    ``changes``: the recipe's fields in which it differs from the baseline, but for those of the teacher.
    """

    method: str
    n: int
    mean: dict[str, float | None]
    deviation: dict[str, float | None]
    from_baseline: Difference | None
    from_best: Difference | None
    verdict: str
    changes: list[str]


def summarise(comparison: Comparison) -> list[Row]:
    """A row for each method, the baseline first."""
    methods, n = comparison.plan.methods, len(comparison.plan.seeds)
    of = {method: [one for one in comparison.results if one.method == method] for method in methods}
    best = best_method(comparison)
    top1 = {method: [one.top1 for one in results] for method, results in of.items()}
    from_baseline = differences(top1, BASELINE)
    # The baseline's difference from the best one stands above: each pair is told about once, in one family of tests.
    rivals = {method: values for method, values in top1.items() if method != BASELINE}
    from_best = differences(rivals, best) if best != BASELINE else {}
    rows = []
    for method, results in of.items():
        values = {key: [getattr(one, key) for one in results] for key in MEASURES}
        verdict = []
        if method != BASELINE:
            verdict.append(told(from_baseline[method], "the baseline", n, len(from_baseline)))
        if method == best:
            verdict.append("best on val")
        elif method in from_best:
            verdict.append(told(from_best[method], best, n, len(from_best)))
        changes = comparison.plan.baseline.differences(comparison.plan.methods[method])
        rows.append(
            Row(
                method=method,
                n=n,
                mean={key: None if None in each else float(np.mean(each)) for key, each in values.items()},
                deviation={
                    key: None if None in each or n == 1 else float(np.std(each, ddof=1)) for key, each in values.items()
                },
                from_baseline=from_baseline.get(method),
                from_best=from_best.get(method),
                verdict="; ".join(verdict),
                changes=[change.replace(": None -> ", ": ") for change in changes if not change.startswith("teacher")],
            )
        )
    return rows


def best_method(comparison: Comparison) -> str:
    """The highest mean top-1 on val; of equals the first: the baseline costs least."""

    def merit(method: str) -> float:
        mine = [one for one in comparison.results if one.method == method]
        return float(np.mean([one.val_top1 for one in mine]))

    return max(comparison.plan.methods, key=merit)


def told(difference: Difference, whom: str, n: int, comparisons: int) -> str:
    """Whether a method can be told apart from another, in words."""
    if difference.told_apart:
        return f"{'better' if difference.mean > 0 else 'worse'} than {whom}"
    words = f"cannot be told apart from {whom}"
    if n == 1:
        return f"{words} by one seed"
    if difference.interval is None:
        return f"{words}: all seeds differ by the same, which leaves the spread unknown"
    low, high = difference.interval
    if low > 0 or high < 0:
        return f"{words}: its own interval excludes zero, but not with Holm's correction for {comparisons} comparisons"
    return words


# --- tables ------------------------------------------------------------------------------------------------


def _operations(row: Row, key: str) -> str:
    mean = row.mean[key]
    return EngFormatter(places=1)(mean) if mean else "–"


def _spread(row: Row, key: str, form: str, scale: float = 1) -> str:
    mean, deviation = row.mean[key], row.deviation[key]
    if mean is None:
        return "–"
    text = form.format(mean * scale)
    return text if deviation is None else f"{text} ± {form.format(deviation * scale)}"


def _difference(row: Row) -> list[str]:
    found = row.from_baseline
    if found is None:
        return ["", "", ""]
    if found.interval is None or found.p_holm is None:
        return [f"{100 * found.mean:+.2f}", "none", "none"]
    low, high = found.interval
    return [f"{100 * found.mean:+.2f}", f"{100 * low:+.2f} to {100 * high:+.2f}", f"{found.p_holm:.3f}"]


def tables(rows: Sequence[Row]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Title to headings and cells."""
    accuracy = [
        [row.method, _spread(row, "val_top1", "{:.2f}", 100), _spread(row, "top1", "{:.2f}", 100), *_difference(row)]
        for row in rows
    ]
    cost = [
        [
            row.method,
            _spread(row, "agreement", "{:.2f}", 100),
            _spread(row, "kl", "{:.3f}"),
            _spread(row, "ece", "{:.2f}", 100),
            _spread(row, "train_seconds", "{:,.1f}"),
            _spread(row, "teacher_seconds", "{:,.1f}") if row.mean["teacher_seconds"] else "–",
            _operations(row, "student_flops"),
            _operations(row, "teacher_flops"),
        ]
        for row in rows
    ]
    return {
        f"Top-1 in %, n = {rows[0].n}": (
            ["method", "val", "test", "test less baseline", "95% interval", "p (Holm)"],
            accuracy,
        ),
        f"Fidelity, calibration and cost of a run, n = {rows[0].n}": (
            ["method", "agreement %", "KL", "ECE %", "training s", "teacher's pass s", "FLOPs", "teacher's FLOPs"],
            cost,
        ),
    }


def show(comparison: Comparison) -> None:
    """The tables and the verdicts, on stdout."""
    rows = summarise(comparison)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False, emoji=False)
    for title, (headings, cells) in tables(rows).items():
        shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for heading in headings:
            shown.add_column(heading, justify="left" if heading == "method" else "right")
        for line in cells:
            shown.add_row(*line)
        console.print(shown)
    for row in rows:
        if row.verdict:
            console.print(f"{row.method}: {row.verdict}", soft_wrap=True)


# --- files -------------------------------------------------------------------------------------------------


def document(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON. Accuracies, agreement, ECE and differences are fractions."""
    return {
        **comparison.facts,
        "seeds": list(comparison.plan.seeds),
        "best": best_method(comparison),
        "confidence": CONFIDENCE,
        "methods": [asdict(row) for row in summarise(comparison)],
        "runs": [asdict(result) for result in comparison.results],
    }


def write(comparison: Comparison) -> Path:
    """Write ``results.json``, ``differences.png`` and ``report.md`` into the output directory; the page."""
    folder = comparison.plan.output
    write_text(folder / "results.json", json.dumps(document(comparison), indent=2) + "\n")
    write_bytes(folder / "differences.png", as_image(figure(comparison)))
    page = folder / "report.md"
    write_text(page, _page(comparison))
    return page


def _page(comparison: Comparison) -> str:
    facts, rows = comparison.facts, summarise(comparison)
    seeds = comparison.plan.seeds
    parts = [
        "# Comparison of methods",
        f"{facts['student']} ({facts['parameters']:,} parameters) on {facts['dataset']}, {facts['epochs']} epochs, "
        f"recipe {facts['recipe']}, seeds {', '.join(map(str, seeds))}, on {facts['device']} in {facts['precision']}. "
        f"The teacher of all is {facts['teacher']} ({facts['teacher_top1']:.2%} test top-1, "
        f"`{facts['teacher_checkpoint']}`). {facts['val_images']:,} val and {facts['test_images']:,} test images.",
    ]
    (first, accuracy), (second, cost) = tables(rows).items()
    parts += [
        f"## {first}",
        table(*accuracy),
        "\n".join(f"- **{plain(row.method)}**: {plain(row.verdict)}" for row in rows if row.verdict),
        "![Test top-1 and difference from the baseline, by seed](differences.png)",
        f"## {second}",
        table(*cost),
        "## Methods",
        "What differs from the baseline:",
        "\n".join(f"- **{plain(row.method)}**: {plain('; '.join(row.changes))}" for row in rows if row.changes),
        "## How to read this",
        "\n".join(f"- {note}" for note in _notes(comparison)),
    ]
    return "\n\n".join(parts) + "\n"


def _notes(comparison: Comparison) -> list[str]:
    return [
        f"± is the standard deviation over {len(comparison.plan.seeds)} seeds. A method is compared with the baseline "
        "of the same seed, which has the same first weights, order and views (where `cached_epochs` repeats a method's "
        "views, the baseline has new ones in every epoch). The interval is Student's t of these differences, of one "
        "comparison alone.",
        "Told apart is what has p < 0.05 in the paired t-test after Holm's correction for all comparisons with the "
        "same method. Decide on the number of seeds beforehand: adding some until a difference shows finds one by "
        "chance.",
        "The interval covers weights, order and views; it does not cover other test images or another teacher.",
        "The weights of a run and the best method are chosen on val; the test images are read when all runs are done.",
        "A method that is given by its name has the settings that the recipe gives it, else its paper's, beside the "
        "recipe's `ce_weight`, `kd_weight` and `temperature`, which all share; the papers of dkd, dist, "
        "attention_transfer and relational_kd have both weights at 1. A YAML file gives a method its own.",
        "Agreement is the share of test images that student and teacher answer alike. KL is KL(teacher ‖ student) in "
        "nats, at temperature 1.",
        "Training holds the teacher's forward passes where it runs in every step. The teacher's pass is the one that "
        "fills the cache of its logits (`cached_epochs`). The teacher's own training is in neither.",
        "FLOPs: two a multiply-accumulate, three forward passes for each image that the student learns from, one for "
        "each that the teacher answers; those of an ONNX file are not known. The loss, augmentation, optimizer and val "
        "are not counted.",
    ]


def figure(comparison: Comparison) -> Figure:
    """Test top-1 of each seed, and the differences from the baseline with their intervals; in points."""
    rows = summarise(comparison)
    found = Figure(figsize=(11, 1.6 + 0.5 * len(rows)), layout="constrained")
    accuracy, difference = found.subplots(1, 2, sharey=True)
    top1 = {row.method: [one.top1 for one in comparison.results if one.method == row.method] for row in rows}
    for place, row in enumerate(rows):
        seeds = np.array(top1[row.method])
        accuracy.plot(100 * seeds, [place] * len(seeds), "o", color=BLUE, alpha=0.45, markersize=6, markeredgewidth=0)
        accuracy.plot(100 * seeds.mean(), place, "|", color=INK, markersize=18, markeredgewidth=2)
        if row.from_baseline is None:
            continue
        each, colour = seeds - np.array(top1[BASELINE]), _colour(row.from_baseline)
        if row.from_baseline.interval is not None:
            ends = 100 * np.array(row.from_baseline.interval)
            difference.plot(ends, [place, place], color=colour, linewidth=2)
        difference.plot(100 * each, [place] * len(each), "o", color=colour, alpha=0.45, markersize=6, markeredgewidth=0)
        difference.plot(100 * each.mean(), place, "|", color=colour, markersize=18, markeredgewidth=2)
    difference.axvline(0, color=FAINT, linewidth=1)
    accuracy.set_yticks(range(len(rows)), [short_name(row.method, 30) for row in rows])
    accuracy.set_ylim(len(rows) - 0.5, -0.5)
    for axes, heading, note in (
        (accuracy, "Test top-1 (%)", "dots: seeds, line: mean"),
        (difference, "Less the baseline (points)", "with the 95% interval of each alone"),
    ):
        plain_axes(axes, heading, grid_axis="x")
        axes.set_title(note, loc="right", fontsize=9, color=INK)
    return found


def _colour(difference: Difference) -> str:
    if not difference.told_apart:
        return FAINT
    return GREEN if difference.mean > 0 else VERMILLION
