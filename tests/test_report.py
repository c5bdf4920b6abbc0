"""The numbers against independent computations, the pictures and the page against what they must hold."""

import csv
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from sklearn import metrics as sk

from toolkit import report
from toolkit.errors import DivergedError


def softmax(logits):
    powers = np.exp(np.float64(logits) - np.float64(logits).max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def names(k):
    return [f"class {i}" for i in range(k)]


def history(epochs, val=True, sizes=(128,)):
    return [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "train_loss": 2.0 / epoch,
            "train_top1": 1 - 0.6 / epoch,
            "val_loss": 2.1 / epoch if val else None,
            "val_top1": 1 - 0.7 / epoch if val else None,
            "lr": 0.1 / epoch,
            "batch_size": sizes[min(epoch, len(sizes)) - 1],
        }
        for epoch in range(1, epochs + 1)
    ]


def write(folder, k=10, n=60, epochs=3, val=True, classes=None):
    rng = np.random.default_rng(k)
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(n, k)) + 3 * np.eye(k)[labels]
    classes = classes or names(k)
    metrics = report.measure(logits, labels, classes, logits + rng.normal(size=(n, k)))
    images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    facts = {"model": "resnet9 | student", "parameters": "2,000,000"}
    report.write(
        folder,
        "A student",
        metrics,
        history(epochs, val),
        images.__getitem__,
        labels,
        softmax(logits),
        classes,
        facts,
        "Conv2d: 5",
    )
    return metrics


@settings(max_examples=60)
@given(
    n=st.integers(1, 120),
    k=st.integers(2, 100),
    scale=st.floats(0.1, 4),  # beyond, scikit-learn clips probabilities
    seed=st.integers(0, 2**32 - 1),
)
def test_measure_agrees_with_sklearn_and_scipy(n, k, scale, seed):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(n, k))).astype(np.float32)
    teacher = (scale * rng.normal(size=(n, k)) + logits).astype(np.float32)
    labels = rng.integers(0, k, n)
    got = report.measure(logits, labels, names(k), teacher)

    p, q, answers = softmax(logits), softmax(teacher), logits.argmax(1)
    ids = range(k)
    assert got["n"] == n
    assert got["top1"] == pytest.approx(sk.accuracy_score(labels, answers))
    # not sklearn's log_loss, which lifts probabilities below 2e-16
    assert got["nll"] == pytest.approx(-np.log(p[np.arange(n), labels]).mean(), rel=1e-9)
    assert got["confusion"] == sk.confusion_matrix(labels, answers, labels=ids).tolist()
    if k > 5:
        assert got["top5"] == pytest.approx(sk.top_k_accuracy_score(labels, logits, k=5, labels=ids))
    else:
        assert "top5" not in got
    for i in ids:
        of_class = labels == i
        expected = (answers[of_class] == i).mean() if of_class.any() else None
        assert got["per_class"][f"class {i}"] == expected
    assert got["teacher_top1"] == pytest.approx(sk.accuracy_score(labels, teacher.argmax(1)))
    assert got["agreement"] == pytest.approx(np.mean(teacher.argmax(1) == answers))
    assert got["kl"] == pytest.approx(stats.entropy(q, p, axis=1).mean(), rel=1e-7, abs=1e-12)

    confidence, error = p.max(axis=1), 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            right = (answers == labels)[inside].mean()
            error += inside.mean() * abs(right - confidence[inside].mean())
    assert got["ece"] == pytest.approx(error, abs=1e-12)
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize(("right", "ece"), [(80, 0.0), (50, 0.3), (100, 0.2)])
def test_ece_of_known_calibration(right, ece):
    """100 answers given with 80% confidence: calibrated, over-confident and under-confident."""
    logits = np.tile(np.log([0.8, 0.2]), (100, 1))
    labels = np.arange(100) >= right
    assert report.measure(logits, labels, names(2))["ece"] == pytest.approx(ece, abs=1e-12)


def test_ece_does_not_let_bins_cancel():
    """Over-confident at 0.9 and as much under-confident at 0.6: the mean is calibrated, the bins are not."""
    logits = np.log(np.repeat([[0.9, 0.1], [0.6, 0.4]], 10, axis=0))
    labels = np.r_[np.arange(10) >= 7, np.arange(10) >= 8]
    assert report.measure(logits, labels, names(2))["ece"] == pytest.approx(0.2)


def test_extreme_logits_stay_finite():
    logits = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0]], dtype=np.float32)
    got = report.measure(logits, [0, 0], names(3), -logits)
    assert got["nll"] == pytest.approx(1e4)  # nothing lost on the right one, 2e4 on the wrong one
    assert got["kl"] == pytest.approx(2e4)
    assert got["ece"] == pytest.approx(0.5)
    json.dumps(got, allow_nan=False)


def test_of_equal_logits_the_first_class_wins_everywhere():
    got = report.measure(np.zeros((7, 7)), np.arange(7), names(7), np.zeros((7, 7)))
    assert got["top1"] == pytest.approx(1 / 7)
    assert got["top5"] == pytest.approx(5 / 7)
    assert got["agreement"] == 1
    assert got["kl"] == 0
    assert got["nll"] == pytest.approx(np.log(7))


def test_logits_that_are_not_finite_are_the_users_to_know():
    logits = np.zeros((3, 2))
    logits[1, 0] = np.nan
    with pytest.raises(DivergedError, match="the model answers 1 of 3 images with NaN"):
        report.measure(logits, [0, 1, 0], names(2))
    with pytest.raises(DivergedError, match="the teacher answers 1 of 3"):
        report.measure(np.zeros((3, 2)), [0, 1, 0], names(2), logits)


@pytest.mark.parametrize(
    ("k", "n", "epochs", "val"),
    [(10, 60, 3, True), (100, 400, 40, False), (2, 1, 1, True), (10, 60, 0, True)],
)
def test_the_page_shows_pictures_that_exist(tmp_path, k, n, epochs, val):
    metrics = write(tmp_path, k, n, epochs, val)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[.+?\]\((.+?)\)", page)
    assert shown == ["curves.png", "schedule.png"] * bool(epochs) + ["confusion.png", "predictions.png"]
    for name in shown:
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 20  # not an empty sheet
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert f"{metrics['top1']:.2%}" in page
    assert r"| model | resnet9 \| student |" in page
    assert "Conv2d: 5" in page
    assert all(f"| class {i} |" in page for i in range(k))
    links = set(re.findall(r"\]\((.+?)\)", page))
    assert links | {"report.md"} == {path.name for path in tmp_path.iterdir()}  # nothing missing, nothing over


def test_history_as_csv():
    rows = list(csv.DictReader(io.StringIO(report.as_csv(history(3, val=False)).decode())))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["train_top1"]) for row in rows] == [row["train_top1"] for row in history(3)]
    assert {row["val_top1"] for row in rows} == {""}


def test_curves_hold_what_the_history_holds():
    loss, accuracy = report._curves(history(5)).axes
    assert [line.get_label() for line in loss.lines] == ["train", "val"]
    assert [line.get_label() for line in accuracy.lines] == ["train", "val"]
    assert list(accuracy.lines[1].get_ydata()) == [row["val_top1"] for row in history(5)]
    assert accuracy.yaxis.get_major_formatter()(0.5) == "50%"
    loss, accuracy = report._curves(history(1, val=False)).axes
    assert [line.get_label() for line in accuracy.lines] == ["train"]
    assert loss.lines[0].get_marker() == "o"  # a single epoch is a point, a line would not be seen


def test_the_schedule_shows_the_batch_size_where_it_changes():
    (rate,) = report._schedule(history(5)).axes
    assert list(rate.lines[0].get_ydata()) == [row["lr"] for row in history(5)]

    growing = history(5, sizes=(125, 125, 250, 1000))
    rate, batch = report._schedule(growing).axes
    assert list(rate.lines[0].get_ydata()) == [row["lr"] for row in growing]
    assert list(batch.lines[0].get_xdata()) == [1, 2, 3, 4, 5]
    assert list(batch.lines[0].get_ydata()) == [125, 125, 250, 1000, 1000]
    assert [label.get_text() for label in batch.get_yticklabels()] == ["125", "250", "1,000"]
    assert report.batch_sizes(growing) == "125 to 1,000"
    assert report.batch_sizes(history(5)) == "128"


def test_confusions_are_told_from_the_true_class_to_the_answer():
    counts = [[5, 3, 0], [0, 8, 1], [2, 0, 2]]
    assert report._class_rows({"confusion": counts}, ["ant", "bee", "cat"]) == [
        ("cat", "4", "50.00%", "ant (2)"),
        ("ant", "8", "62.50%", "bee (3)"),
        ("bee", "9", "88.89%", "cat (1)"),
    ]
    axes = report._confusion(np.array(counts), ["ant", "bee", "cat"]).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    cells = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert cells == {(row, column): str(n) for row, line in enumerate(counts) for column, n in enumerate(line) if n}
    right, wrong = (image.get_array() for image in axes.images)
    assert right.diagonal().tolist() == pytest.approx([5 / 8, 8 / 9, 2 / 4])
    assert (wrong[0, 1], wrong[1, 2], wrong[2, 0]) == pytest.approx((3 / 8, 1 / 9, 2 / 4))


def test_worst_mistakes_are_the_most_confident_ones():
    labels = np.zeros(5, dtype=int)
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.01, 0.99], [0.2, 0.8], [0.45, 0.55]])
    images = np.zeros((5, 8, 8, 3), dtype=np.uint8)
    texts = [
        text.get_text()
        for text in report._predictions(images.__getitem__, labels, probabilities, ["cat", "dog"]).axes[0].texts
    ]
    start = next(i for i, text in enumerate(texts) if text.startswith("Worst mistakes"))
    assert "4 wrong" in texts[start]
    assert texts[start + 1 :: 2] == ["✗ dog 99%", "✗ dog 80%", "✗ dog 60%", "✗ dog 55%"]
    assert texts[start + 2 :: 2] == ["true: cat"] * 4
    assert sorted(texts[1:start:2]) == ["✓ cat 90%", "✗ dog 55%", "✗ dog 60%", "✗ dog 80%", "✗ dog 99%"]


def test_names_that_look_like_markup(tmp_path):
    """A formula, a table's bar, HTML, a script that the font lacks, a long name: all are just names."""
    write(tmp_path, k=5, classes=["$x_$", "a|b", "<b>", "猫", "long " * 20])
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert r"| a\|b |" in page
    assert "| &lt;b> |" in page
    assert "| 猫 |" in page


def test_the_same_input_gives_the_same_bytes_and_a_rewrite_leaves_nothing_old(tmp_path):
    for name in "ab":
        write(tmp_path / name)
    first = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    write(tmp_path / "a", epochs=0)
    of_training = {"curves.png", "schedule.png", "history.csv"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == set(first) - of_training


def test_no_torch_and_no_global_pyplot():
    code = "import sys, toolkit.report; print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
