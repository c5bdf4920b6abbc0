"""``toolkit compare``: the statistics against straightforward computations, and a small real comparison."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Chain, Toolkit, refused
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from toolkit import compare, engine
from toolkit.catalogue import build, mac_count
from toolkit.compare import Comparison, Plan, Result, make_plan
from toolkit.compare_report import Difference, differences, figure, holm, paired, show, summarise, tables, told
from toolkit.recipe import resolve
from toolkit.run import Run, load_tensors, save_tensors

counts = st.integers(0, 1000)


# --- statistics --------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(counts, counts), min_size=2, max_size=12).filter(lambda x: len({a - b for a, b in x}) > 1))
def test_a_paired_difference_is_student_s_t_of_the_differences(right: list[tuple[int, int]]) -> None:
    ours, theirs = np.array(right).T / 1000
    each = ours - theirs
    n, mean, error = len(each), each.mean(), each.std(ddof=1) / math.sqrt(len(each))
    found = paired(ours, theirs)
    assert found.mean == pytest.approx(mean)
    reach = stats.t.ppf(0.975, n - 1) * error
    assert found.interval == pytest.approx((mean - reach, mean + reach), abs=1e-12)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(mean) / error, n - 1))
    # The interval and the test are one: zero is outside exactly where p is below 5%.
    low, high = found.interval
    assert (low > 0 or high < 0) == (found.p < 0.05)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_s_p_values_reject_as_his_procedure_does(p: list[float], level: float) -> None:
    rejected = set()
    for step, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[index] * (len(p) - step) > level:
            break
        rejected.add(index)
    assert {index for index, value in enumerate(holm(p)) if value <= level} == rejected


def test_of_methods_that_are_all_alike_one_in_twenty_comparisons_finds_a_difference() -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        accuracy = 0.9 + 0.002 * rng.standard_normal((5, 4))  # the baseline and four methods, four seeds
        found = differences(dict(zip("abcde", accuracy.tolist(), strict=True)), "a")
        wrong += any(one.told_apart for one in found.values())
    assert 0 < wrong < 0.08 * 200  # without the correction it would be 13%


def test_seeds_without_spread_say_nothing() -> None:
    for ours, theirs in (([0.9], [0.8]), ([0.9, 0.8], [0.8, 0.7]), ([0.9, 0.8], [0.9, 0.8])):
        found = paired(ours, theirs)
        assert (found.interval, found.p, found.told_apart) == (None, None, False)
    assert differences({"a": [0.8], "b": [0.9]}, "a")["b"] == Difference(pytest.approx(0.1), None, None)


@pytest.mark.parametrize(
    ("difference", "n", "words"),
    [
        (Difference(0.02, (0.01, 0.03), 0.01, 0.03), 3, "better than x"),
        (Difference(-0.02, (-0.03, -0.01), 0.01, 0.03), 3, "worse than x"),
        (Difference(0.02, (-0.01, 0.05), 0.2, 0.6), 3, "cannot be told apart from x"),
        (
            Difference(0.02, (0.01, 0.03), 0.03, 0.09),
            3,
            "cannot be told apart from x: its own interval excludes zero, but not with Holm's correction for 4 ",
        ),
        (Difference(0.02, None, None), 1, "cannot be told apart from x by one seed"),
        (Difference(0.0, None, None), 3, "cannot be told apart from x: all seeds differ by the same, "),
    ],
)
def test_what_is_said(difference: Difference, n: int, words: str) -> None:
    assert told(difference, "x", n, 4).startswith(words)


def made(top1: dict[str, list[float]], val: dict[str, float]) -> Comparison:
    """A comparison with these results, not run."""
    base = resolve("digits", "distill")
    plan = Plan(dict.fromkeys(top1, base), range(len(next(iter(top1.values())))), Path("nowhere"))
    results = [
        Result(method, seed, "run", val[method], top1[method][seed], 0.9, 0.1, 0.02, 9.0, 1.0, 10**12, 10**11)
        for method, seed in plan.runs
    ]
    return Comparison(plan, results, {})


def test_val_chooses_the_best_and_test_only_reports_it() -> None:
    top1 = {"baseline": [0.80, 0.81, 0.80], "dkd": [0.90, 0.91, 0.92], "dist": [0.93, 0.94, 0.951]}
    rows = {row.method: row for row in summarise(made(top1, {"baseline": 0.8, "dkd": 0.9, "dist": 0.85}))}
    assert rows["dkd"].verdict == "better than the baseline; best on val"
    assert rows["dist"].verdict == "better than the baseline; better than dkd"
    # Each pair is told about once, and corrected for within one family.
    assert (rows["baseline"].verdict, rows["baseline"].from_best) == ("", None)
    assert rows["dist"].from_best.p_holm == rows["dist"].from_best.p == paired(top1["dist"], top1["dkd"]).p
    assert rows["dist"].mean["top1"] == pytest.approx(np.mean(top1["dist"]))
    assert rows["dist"].deviation["top1"] == pytest.approx(np.std(top1["dist"], ddof=1))
    tied = summarise(made(top1, dict.fromkeys(top1, 0.9)))
    assert tied[0].verdict == "best on val"  # of equals the baseline


def test_the_table_of_accuracies() -> None:
    top1 = {"baseline": [0.80, 0.81, 0.82], "dkd": [0.90, 0.91, 0.93], "dist": [0.80, 0.82, 0.82]}
    found = differences(top1, "baseline")
    (heading, rows), _ = tables(summarise(made(top1, {"baseline": 0.7, "dkd": 0.75, "dist": 0.6}))).values()
    assert heading == ["method", "val", "test", "test less baseline", "95% interval", "p (Holm)"]
    low, high = (f"{100 * end:+.2f}" for end in found["dkd"].interval)
    p_holm = f"{found['dkd'].p_holm:.3f}"
    assert rows[0] == ["baseline", "70.00 ± 0.00", "81.00 ± 1.00", "", "", ""]
    assert rows[1] == [
        "dkd",
        "75.00 ± 0.00",
        "91.33 ± 1.53",
        "+10.33",
        f"{low} to {high}",
        p_holm,
    ]
    assert p_holm != f"{found['dkd'].p:.3f}"


def test_what_cannot_be_counted_is_no_number() -> None:
    comparison = made({"baseline": [0.8], "dkd": [0.9]}, {"baseline": 0.8, "dkd": 0.9})
    results = [replace(one, teacher_flops=0 if one.method == "baseline" else None) for one in comparison.results]
    rows = summarise(replace(comparison, results=results))
    assert [row.mean["teacher_flops"] for row in rows] == [0, None]
    *_, (_, costs) = tables(rows).values()
    assert [line[-2:] for line in costs] == [["1.0 T", "–"], ["1.0 T", "–"]]


def test_names_that_look_like_markup(capsys: pytest.CaptureFixture[str]) -> None:
    top1 = {"baseline": [0.80, 0.81], "dkd[beta=2]": [0.90, 0.92]}
    show(made(top1, dict.fromkeys(top1, 0.8)))
    assert capsys.readouterr().out.count("dkd[beta=2]") == 3


def test_the_figure_shows_every_seed_and_every_interval() -> None:
    top1 = {"baseline": [0.80, 0.81], "dkd": [0.90, 0.92], "dist": [0.81, 0.82]}
    accuracy, difference = figure(made(top1, dict.fromkeys(top1, 0.8))).axes
    dots = [list(line.get_xdata()) for line in accuracy.lines if line.get_marker() == "o"]
    assert dots == [pytest.approx([100 * value for value in values]) for values in top1.values()]
    (bar,) = (line for line in difference.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 2
              and line.get_marker() == "None" and line.get_ydata()[0] == 1)  # fmt: skip
    low, high = paired(top1["dkd"], top1["baseline"]).interval
    assert list(bar.get_xdata()) == pytest.approx([100 * low, 100 * high])
    assert [tick.get_text() for tick in accuracy.get_yticklabels()] == list(top1)


def test_operations_are_those_of_the_images_that_were_seen() -> None:
    model = build("resnet9", "student", 10, widths=[8, 8, 8])

    def counted(**settings: object) -> tuple[float, float]:
        """In units of a student's step of one whole image, and of one answer of the teacher."""
        recipe = resolve("digits", "distill", {"epochs": 4, **settings})
        grown = [10 * 100, 10 * 100, 5 * 200, 5 * 200]  # images an epoch, by steps and batch size
        rows = [{"epoch": 1, "step": 10, "batch_size": 100}, {"epoch": 2, "step": 20, "batch_size": 100},
                {"epoch": 3, "step": 25, "batch_size": 200}, {"epoch": 4, "step": 30, "batch_size": 200}]  # fmt: skip
        assert sum(grown) == 4000
        student, teacher = compare.flops(recipe, rows, 1050, lambda side: mac_count(model, side), 7)
        unknown = compare.flops(recipe, rows, 1050, lambda side: mac_count(model, side), None)
        assert unknown == (student, None if teacher else 0)
        return student / (6 * mac_count(model, 32)), teacher / (2 * 7)

    assert counted() == (4000, 4000)
    assert counted(cached_epochs=2) == (4000, 2 * 1050)  # also of the samples that no step sees
    assert counted(cached_epochs=9) == (4000, 4 * 1050)
    assert counted(**{"loss.kd_weight": 0}) == (4000, 0)
    assert counted(**{"optimizer.sam_radius": 0.05}) == (8000, 8000)
    smaller = mac_count(model, 16) / mac_count(model, 32)
    first, whole = counted(**{"progressive.start": 16, "progressive.over": 0.25})
    assert (first, whole) == (pytest.approx(1000 * smaller + 3000), 4000)


# --- the command -------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("no_pictures")
SMALL = ("--recipe", "digits", "--device", "cpu", "--set", "student.widths=[8,8,8]", "--batch-size", 256,
         "--set", "schedule.warmup_epochs=0")  # fmt: skip


def states(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}


def test_a_comparison_from_the_first_interruption_to_more_seeds(
    toolkit: Toolkit, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("hot.yaml").write_text("loss.temperature: 8\nloss.label_smoothing: 0.1\n")
    command = ("compare", "soft_targets", "hot.yaml", *SMALL, "--epochs", 2, "-o", "out", "--set", "cached_epochs=1")

    shown = engine.Display.epoch

    def stop(self: engine.Display, row: dict) -> None:
        shown(self, row)
        if Path("out/hot-0").exists():
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Display, "epoch", stop)
        stopped = toolkit(*command, "--seeds", 1)
    assert stopped.exit_code == 1
    assert "3 runs in out; about 0:" in stopped.stderr
    assert "stopped in out/hot-0, all of it is saved; the same `toolkit compare` goes on" in stopped.stderr
    assert not Path("out/results.json").exists()
    assert len(before := states(Path("out"))) == 2

    once = toolkit(*command, "--seeds", 1)
    assert once.exit_code == 0, once.output
    assert "3 runs in out, 2 finished before" in once.stderr
    assert "hot: cannot be told apart from the baseline by one seed" in once.stdout
    assert before.items() < states(Path("out")).items()  # finished runs are kept

    twice = toolkit(*command, "--seeds", 2, "--json")
    assert twice.exit_code == 0, twice.output
    found = json.loads(twice.stdout)
    assert found.pop("report") == "out/report.md"
    assert found == json.loads(Path("out/results.json").read_text())
    assert (found["teacher"], found["teacher_checkpoint"]) == ("resnet9_wide", str(chain.teacher))
    assert [(run["method"], run["seed"]) for run in found["runs"]] == [
        (method, seed) for seed in (0, 1) for method in ("baseline", "soft_targets", "hot")
    ]
    for run in found["runs"]:
        recipe = Run(Path(run["run"])).recipe
        assert (recipe.seed, recipe.epochs, recipe.distils) == (run["seed"], 2, run["method"] != "baseline")
        # The first of two methods with the same views fills the cache, and both cost its pass.
        assert (run["teacher_seconds"] > 0) == (run["teacher_flops"] > 0) == recipe.distils
    last = found["runs"][-1]
    measured = json.loads(toolkit("validate", last["run"], "--json").stdout)
    for key in ("top1", "ece", "agreement", "kl"):
        assert last[key] == pytest.approx(measured[key])
    assert last["val_top1"] == Run(Path(last["run"])).summary()["val_top1"]
    soft, hot = ([r for r in found["runs"] if r["method"] == name] for name in ("soft_targets", "hot"))
    assert [r["teacher_seconds"] for r in soft] == [r["teacher_seconds"] for r in hot]
    passes = [Run(Path(one[0]["run"])).summary()["teacher_seconds"] for one in (soft, hot)]
    assert soft[0]["teacher_seconds"] == pytest.approx(sum(passes))  # of this seed alone
    row = next(row for row in found["methods"] if row["method"] == "hot")
    assert row["changes"] == [
        "cached_epochs: 0 -> 1",  # without a teacher there is no reason to repeat views
        "loss.ce_weight: 1.0 -> 0.1",
        "loss.kd_weight: 0.0 -> 0.9",
        "loss.label_smoothing: 0.0 -> 0.1",
        "loss.temperature: 4.0 -> 8.0",
    ]
    baseline = [r["top1"] for r in found["runs"] if r["method"] == "baseline"]
    assert row["from_baseline"]["mean"] == pytest.approx(np.mean([r["top1"] for r in hot]) - np.mean(baseline))
    page = Path("out/report.md").read_text(encoding="utf-8")
    assert f"{100 * row['from_baseline']['mean']:+.2f}" in page
    assert "![Test top-1 and difference from the baseline, by seed](differences.png)" in page
    assert Path("out/differences.png").read_bytes().startswith(b"\x89PNG")

    newer = Path(shutil.copytree(chain.teacher, "runs/newer"))
    tensors, header = load_tensors(newer / "checkpoints/best.safetensors")
    other = {name: 2 * value if name == "network.head.weight" else value for name, value in tensors.items()}
    save_tensors(newer / "checkpoints/best.safetensors", other, header)
    os.utime(newer / "recipe.yaml")  # by which runs are new
    again = toolkit(*command, "--seeds", 2)  # all learn from the teacher that the first had
    assert again.exit_code == 0, again.output
    assert "6 runs in out, 6 finished before" in again.stderr

    Path("hot.yaml").write_text("loss.temperature: 9\n")
    refused(toolkit(*command), "out/hot-0 holds another run; differing: loss.label_smoothing: 0.1 -> 0.0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("soft_target", "there is no method 'soft_target', and it is no YAML file; did you mean 'soft_targets'?"),
        ("none.yaml", "cannot read the method none.yaml: No such file"),
        ("soft_targets soft_targets", "two methods are called soft_targets: each needs a name of its own"),
        ("baseline.yaml", "two methods are called baseline"),
        ("copied.yaml", "copied.yaml sets augment.plain_copy, which all methods share"),
        ("longer.yaml", "longer.yaml sets epochs, which all methods share: it may set loss, augment, cached_epochs"),
        ("faster.yaml", "faster.yaml sets optimizer.lr, which all methods share"),
        ("typo.yaml", "typo.yaml: the recipe is wrong:\n  loss.temprature: there is no such field; did you mean"),
        ("soft_targets --set loss.kd_weight=0", "the recipe digits does not distil: give --set loss.kd_weight="),
        ("soft_targets --recipe rao-tpsnet", "the recipe rao-tpsnet names no teacher: give one by --teacher NAME"),
        (
            "soft_targets --recipe cifar10-gpu",
            "minutes (=16) gives each run a length of its own: give --epochs N",
        ),
        ("soft_targets --budget 100000", "too many"),
        ("soft_targets --set early_stop.patience=3", "early_stop.patience gives each run steps of its own"),
        ("soft_targets --set batch_growth.patience=3", "batch_growth.patience gives each run steps of its own"),
        ("soft_targets --set start_from=teacher", "start_from=teacher gives the methods weights that the baseline"),
        ("soft_targets", "there is no trained resnet9_wide for digits under runs/"),
    ],
)
def test_bad_input(toolkit: Toolkit, nowhere: Path, arguments: str, message: str) -> None:
    Path("longer.yaml").write_text("epochs: 99\n")
    Path("faster.yaml").write_text("optimizer: {lr: 0.9}\n")
    Path("copied.yaml").write_text("augment.plain_copy: true\n")
    Path("typo.yaml").write_text("loss.temprature: 2\n")
    Path("baseline.yaml").write_text("loss.temperature: 2\n")
    recipe = () if "--recipe" in arguments else ("--recipe", "digits")
    refused(toolkit("compare", *arguments.split(), *recipe), message)
    assert {path.suffix for path in nowhere.iterdir()} == {".yaml"}  # nothing was made


def test_a_method_that_cannot_run_is_told_before_any_run(toolkit: Toolkit, chain: Chain) -> None:
    Path("typo.yaml").write_text("loss.methods: {fitnets: {layers: [[network.stage.1, network.stages.1]]}}\n")
    result = toolkit("compare", "soft_targets", "typo.yaml", *SMALL, "--epochs", 2, "-o", "out")
    refused(result, "typo: loss.methods.fitnets.layers: the student has no module 'network.stage.1'")
    blind = toolkit("compare", "soft_targets", *SMALL, "--epochs", 2, "-o", "out", "--set", "data.val_size=0")
    refused(blind, "without a val split the test images would choose the best method: set data.val_size above 0")
    assert not Path("out").exists()


def test_a_method_s_section_leaves_its_other_fields(nowhere: Path) -> None:
    Path("cool.yaml").write_text("loss: {temperature: 2, methods: {dkd: {beta: 3}}}\naugment: {mixup: 1}\n")
    plan = make_plan(["cool.yaml"], "digits", {"probe": True}, 1)
    assert not plan.recipe("cool", 1).probe  # all compute in the same precision
    cool, plain = plan.methods["cool"], resolve("digits", "distill")
    assert cool.loss == plain.loss.model_copy(update={"temperature": 2, "methods": cool.loss.methods})
    assert cool.loss.methods["dkd"].model_dump()["beta"] == 3
    assert cool.augment == plain.augment.model_copy(update={"mixup": 1})


def test_the_default_folder_is_that_of_the_recipe(nowhere: Path) -> None:
    def output(*methods: str, seeds: int = 2, **overrides: object) -> Path:
        return make_plan(methods, "digits", overrides, seeds).output

    first = output("soft_targets")
    assert first.parent == Path("runs")
    assert output("soft_targets", "dkd", seeds=5) == first  # which then goes on
    assert output("soft_targets", epochs=3) != first
