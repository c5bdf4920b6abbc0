"""``toolkit report``: runs side by side. The runs are written by hand; nothing is trained."""

import base64
import csv
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import Toolkit, refused

from toolkit import report, side_by_side
from toolkit.catalogue import build, mac_count, parameter_count
from toolkit.recipe import resolve
from toolkit.run import Run

DIGEST = "0123456789abcdef"


def make(path, epochs=3, sizes=(128,), val=True, test=None, kept=None, widths=(8, 8, 8), dataset="digits", **overrides):
    """A finished run of a small student; ``kept`` is the epoch whose weights are kept, the last one by default."""
    tree = {
        "data": {"dataset": dataset},
        "student": {"name": "resnet9", "widths": list(widths)},
        "epochs": epochs,
        "batch_size": sizes[0],
        "optimizer": {"lr": 0.25},
    }
    run = Run.start(path, resolve(tree | overrides, "distill"), resume=False)
    for epoch in range(1, epochs + 1):
        run.append(
            {
                "epoch": epoch,
                "step": 11 * epoch,
                "train_loss": 2 / epoch,
                "train_top1": 1 - 0.6 / epoch,
                "val_loss": 2.1 / epoch if val else None,
                "val_top1": 1 - 0.7 / epoch if val else None,
                "lr": 0.1,
                "batch_size": sizes[min(epoch, len(sizes)) - 1],
                "images_per_second": 100.0,
                "seconds": float(epoch),
            }
        )
    about = {"classes": list("0123456789"), "image_size": 32, "dataset": dataset, "dataset_digest": DIGEST + dataset}
    run.finish(about | {"epochs": epochs, "steps": 11 * epochs, "kept_epoch": kept or epochs})
    if test is not None:
        measured(run, test, DIGEST + dataset)
    return run


def measured(run, top1, digest):
    run.report.mkdir(exist_ok=True)
    (run.report / "metrics.json").write_text(json.dumps({"dataset_digest": digest, "top1": top1}))


@pytest.fixture
def two(nowhere: Path) -> Path:
    """``runs/one``, validated, with a growing batch and a claim, and ``runs/two`` without any of these."""
    make(
        Path("runs/one"),
        epochs=4,
        sizes=(125, 125, 1000),
        test=0.87654,
        kept=2,
        source="Anand, table 1",
        reported_top1=0.9356,
    )
    make(Path("runs/two"), val=False, widths=(8, 8, 16))
    return nowhere / "comparison"


def test_the_rows_are_what_the_runs_say(toolkit: Toolkit, two: Path) -> None:
    result = toolkit("report", "runs/one", "runs/two", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["left_out"] == []
    assert document["page"] == "comparison/comparison.html"
    one, other = document["runs"]
    model = build("resnet9", "student", 10, widths=[8, 8, 8])
    assert one == {
        "run": "one",
        "path": "runs/one",
        "model": "resnet9",
        "role": "student",
        "dataset": "digits",
        "parameters": parameter_count(model),
        "macs": mac_count(model, 32),
        "epochs": 4,
        "batch_size": 125,
        "final_batch_size": 1000,
        "peak_lr": 0.25,
        "train_top1": pytest.approx(0.7),  # of epoch 2, whose weights were kept
        "val_top1": pytest.approx(0.65),
        "test_top1": 0.87654,
        "seconds_per_epoch": 2.5,
        "reported_top1": 0.9356,
        "source": "Anand, table 1",
    }
    assert other["parameters"] == parameter_count(build("resnet9", "student", 10, widths=[8, 8, 16]))
    assert other["macs"] > one["macs"] > 1_000_000
    assert other["train_top1"] == pytest.approx(0.8)
    assert (other["val_top1"], other["test_top1"], other["reported_top1"]) == (None, None, None)

    with (two / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [{key: "" if value is None else str(value) for key, value in row.items()} for row in document["runs"]]
    assert rows == expected

    macs = f"{one['macs'] / 1e6:,.1f} M"
    cells = f"| one | resnet9 | {one['parameters']:,} | {macs} | 4 | 125 to 1,000 | 0.25 | 70.00% | 65.00% | 87.65% "
    page = (two / "comparison.md").read_text()
    assert cells + "| 93.56% | 2.5 |" in page
    assert "| 0.25 | 80.00% |  |  |  | 2.0 |" in page
    assert "two has no test top-1: it was not validated yet. `toolkit validate runs/two` measures it." in page
    assert "one has no test top-1" not in page
    assert "one: the reported top-1 is that of Anand, table 1." in page


class Reader(HTMLParser):
    """The texts of the table's cells, everything that a browser would load, and the kinds of elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.styles = ""
        self.open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [value or "" for key, value in attributes if key in ("src", "srcset", "href", "data")]
        self.open = tag if tag != "span" else self.open
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = "" if tag != "span" else self.open

    def handle_data(self, data: str) -> None:
        if self.open in ("th", "td"):
            self.cells[-1] += data
        if self.open == "style":
            self.styles += data


def test_the_html_page_is_one_file_and_escapes(toolkit: Toolkit, nowhere: Path) -> None:
    names = ["<b>&'\"", "$x_$ | `y`"]
    for name in names:
        make(Path("runs") / name, source="<script>alert(1)</script>", reported_top1=0.9)
    assert toolkit("report", *(f"runs/{name}" for name in names)).exit_code == 0
    text = Path("comparison/comparison.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert not {"script", "link", "b", "iframe", "object"} & page.tags
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    assert "http" not in text
    columns = len(side_by_side.COLUMNS)
    assert [page.cells[row * columns] for row in (1, 2)] == names
    assert len(page.loaded) == 4  # two figures, each light and dark
    for source in page.loaded:
        kind, _, content = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(content)).tag.endswith("svg")
    assert len(set(page.loaded)) == 4
    assert "prefers-color-scheme: dark" in page.styles
    assert 'name="viewport"' in text
    markdown = Path("comparison/comparison.md").read_text(encoding="utf-8")
    assert r"| $x_$ \| `y` |" in markdown
    assert "| &lt;b>&amp;'\" |" in markdown
    assert "<script>" not in markdown


def without_field(path: Path) -> None:
    summary = json.loads((path / "summary.json").read_text())
    del summary["kept_epoch"]
    (path / "summary.json").write_text(json.dumps(summary))


DAMAGE = {
    "never made": (shutil.rmtree, "runs/bad is not a run directory"),
    "recipe is no YAML": (lambda path: (path / "recipe.yaml").write_text("{"), "recipe.yaml is damaged"),
    "recipe is wrong": (lambda path: (path / "recipe.yaml").write_text("epochs: 0"), "epochs = 0"),
    "unfinished": (lambda path: (path / "summary.json").unlink(), "runs/bad is not finished"),
    "summary is no JSON": (lambda path: (path / "summary.json").write_text("{"), "bad/summary.json is damaged"),
    "summary lacks a field": (without_field, "bad/summary.json is damaged: kept_epoch: Field required"),
    "no metrics": (lambda path: (path / "metrics.jsonl").unlink(), "does not hold every epoch"),
    "a line of metrics is cut": (
        lambda path: (path / "metrics.jsonl").write_bytes((path / "metrics.jsonl").read_bytes()[:-9]),
        "does not hold every epoch",
    ),
    "metrics are noise": (lambda path: (path / "metrics.jsonl").write_bytes(b"\xff\xfe"), "metrics.jsonl is damaged: "),
    "metrics are of another kind": (
        lambda path: (path / "metrics.jsonl").write_text('{"epoch": 1}\n'),
        "bad/metrics.jsonl is damaged: step: Field required",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_that_is_not_whole_is_left_out_with_the_reason(nowhere: Path, damage: str) -> None:
    paths = [make(Path(f"runs/{name}")).path for name in ("good", "bad")]
    spoil, reason = DAMAGE[damage]
    spoil(paths[1])
    (entry,), left_out = side_by_side.gather(paths)
    assert entry.row.run == "good"
    assert reason in left_out["runs/bad"]
    assert "runs/bad" in left_out["runs/bad"]


def test_what_is_left_out_is_told(toolkit: Toolkit, nowhere: Path) -> None:
    make(Path("runs/good"))
    make(Path("runs/bad"))
    Path("runs/bad/summary.json").unlink()
    result = toolkit("report", "runs/bad", "runs/good", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [row["run"] for row in document["runs"]] == ["good"]
    (left_out,) = document["left_out"]
    assert left_out["run"] == "runs/bad"
    assert f"left out: {left_out['reason']}\n" in result.stderr
    assert report.plain(left_out["reason"]) in Path("comparison/comparison.md").read_text()
    assert "<h2>Left out</h2>" in Path("comparison/comparison.html").read_text()


def test_nothing_left_to_compare_is_an_error(toolkit: Toolkit, nowhere: Path) -> None:
    refused(toolkit("report"), "there is no finished and undamaged run under runs/")
    refused(toolkit("report", "runs/a", "runs/b"), "there is no finished and undamaged run among runs/a, runs/b")
    assert not any(nowhere.iterdir())


def test_without_runs_the_newest_finished_ones_are_taken(
    toolkit: Toolkit, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(report.COLOURS) + 1
    for age in range(count):
        run = make(Path(f"runs/{age}"))
        os.utime(run.path / "recipe.yaml", (1e9 - age, 1e9 - age))
    monkeypatch.setattr(side_by_side, "write", lambda folder, *_: folder / "comparison.html")  # figures, seconds
    result = toolkit("report", "--json")
    assert [row["run"] for row in json.loads(result.stdout)["runs"]] == [str(age) for age in range(count - 1)]
    assert f"comparing the newest {count - 1} of {count} finished runs under runs/" in result.stderr
    result = toolkit("report", *(f"runs/{age}" for age in range(count)), "--json")
    assert len(json.loads(result.stdout)["runs"]) == count  # those that are named are all taken


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda run: measured(run, 0.9, "others"), "it was validated on other images"),
        (lambda run: (run.report / "metrics.json").write_text("{"), "metrics.json is damaged"),
    ],
)
def test_a_measurement_that_is_not_the_runs_is_not_shown(nowhere: Path, spoil, why: str) -> None:
    run = make(Path("runs/one"), test=0.9)
    spoil(run)
    (entry,), _ = side_by_side.gather([run.path])
    assert entry.row.test_top1 is None
    assert any(why in note for note in side_by_side._notes([entry]))


def test_runs_of_the_same_name_are_told_apart_and_one_run_is_not_its_own_rival(nowhere: Path) -> None:
    paths = [make(Path(f"{root}/student")).path for root in "ab"]
    entries, _ = side_by_side.gather([*paths, paths[0].resolve(), Path("b/../a/student")])
    assert [entry.row.run for entry in entries] == ["b/../a/student", "b/student"]


def test_different_images_are_said(nowhere: Path) -> None:
    paths = [make(Path(f"runs/{name}"), dataset=name).path for name in ("digits", "cifar10")]
    entries, _ = side_by_side.gather(paths)
    assert any("saw different images" in note and "cifar10" in note for note in side_by_side._notes(entries))
    assert not any("saw different images" in note for note in side_by_side._notes(entries[:1]))


def test_the_curves_hold_the_histories_one_colour_a_run(two: Path) -> None:
    entries, _ = side_by_side.gather([Path("runs/one"), Path("runs/two")])
    figure = side_by_side._figure(entries, "top1", "light")
    (axes,) = figure.axes
    one_train, one_val, two_train = axes.lines  # runs/two has no val
    assert list(one_val.get_ydata()) == [row["val_top1"] for row in entries[0].history]
    assert list(two_train.get_ydata()) == [row["train_top1"] for row in entries[1].history]
    assert [line.get_linestyle() for line in axes.lines] == ["--", "-", "--"]
    assert one_train.get_color() == one_val.get_color() != two_train.get_color()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    assert len(set(side_by_side._colours(30))) == 30


def test_the_same_runs_give_the_same_bytes(two: Path, tmp_path: Path) -> None:
    entries, left_out = side_by_side.gather([Path("runs/one"), Path("runs/two"), Path("runs/none")])
    first, second = (side_by_side.write(tmp_path / name, entries, left_out).parent for name in "ab")
    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert files == {path.name: path.read_bytes() for path in second.iterdir()}
    assert set(files) == {"comparison.csv", "comparison.md", "comparison.html", "loss.png", "top1.png"}
