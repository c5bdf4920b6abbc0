"""The search over recipe fields: spaces, samples under constraints, trials, tables and figures; a real one on Ray."""

import contextlib
import csv
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from colour_net import colour_net
from conftest import Chain, Toolkit, refused
from PIL import Image

from toolkit import compute, teaching, tune, tune_report
from toolkit.catalogue import build, parameter_count
from toolkit.data import DataSet, Split, load
from toolkit.errors import RunError, SearchError, SpaceError, TeacherError
from toolkit.files import locked
from toolkit.machine import available_cores
from toolkit.recipe import Optimizer, resolve
from toolkit.run import Run, load_tensors, save_tensors
from toolkit.space import SPACES, Domain, Plan, make_plan, measure, read_space
from toolkit.trials import Search, Trial, read_trials, score

# A student of the digits without a teacher: a trial takes about a second.
TINY = {
    "recipe": "digits",
    "set": {
        "loss.kd_weight": 0,
        "epochs": 2,
        "schedule.warmup_epochs": 0,
        "batch_size": 256,
        "device": "cpu",
    },
    "fields": {
        "optimizer.lr": {"log_range": [0.01, 0.5], "points": 2},
        "student.widths": {"choices": [[8, 8, 8], [8, 16, 16]]},
    },
}


def tiny(**changes: object) -> dict:
    return {**TINY, **changes}


def plan(tree: dict, sampler: str = "random", scheduler: str = "none", trials: int | None = None, **given) -> Plan:
    return make_plan(tree, None, given, sampler, scheduler, trials)


def prepared(folder: Path, wanted: Plan) -> Search:
    search = Search(wanted, folder, 10)
    search.prepare()
    return search


def ended(search: Search, number: int, val_top1: float, status: str = "finished") -> Trial:
    trial = search.trials[number - 1]
    trial.status, trial.val_top1, trial.epochs, trial.seconds = status, val_top1, 2, 3.0
    return trial


# --- spaces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sampler"), [("tpsnet-random", "random"), ("resnet-large-grid", "grid")])
def test_shipped_spaces_are_whole(tmp_path: Path, name: str, sampler: str) -> None:
    wanted = plan(read_space(name), sampler, trials=2 if sampler == "random" else None)
    search = prepared(tmp_path, wanted)
    assert len(search.trials) == (2 if sampler == "random" else 20)
    for trial in search.trials:
        recipe = search.recipe(trial.values)
        model = build(recipe.model.name, "student", 10, **recipe.model.arguments)
        assert trial.parameters == parameter_count(model) < 5_000_000
    text = (SPACES / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert f"toolkit tune --space {name} --s" in text


def test_all_mistakes_come_at_once() -> None:
    tree = {
        "recipe": "digits",
        "stages": "train",
        "fields": {
            "optimizer.lrr": {"range": [0, 1]},
            "batch_size": {"choices": [64, 1]},
            "student.blocks": {"choices": [[1, 1]]},
            "optimizer.lr": {"log_range": [0, 0.1]},
            "optimizer.momentum": {"range": [0.9, 0.9]},
            "loss.temperature": {"choices": []},
            "epochs": {"choices": [1], "range": [1, 2]},
            "augment.cutout": {"rang": [0, 8]},
            "augment.rotation": {"choices": [0, 5], "points": 2},
            "data.val_size": {"choices": [0.1, 0.2]},
            "seed": {"choices": [1, 2]},
        },
        "constraints": {"params": "< 5", "macs": "few"},
    }
    with pytest.raises(SpaceError) as caught:
        plan(tree, seed=3)
    text = str(caught.value)
    for expected in (
        "stages: there is no such key; did you mean 'stage'?",
        "optimizer.lrr: there is no such field; did you mean 'lr'?",
        "batch_size = 1: input should be greater than or equal to 2",
        "student.blocks: resnet9 takes no such argument",
        "fields.optimizer.lr: log_range starts at 0",
        "fields.optimizer.momentum: the range from 0.9 to 0.9 is empty",
        "fields.loss.temperature.choices = []",
        "fields.epochs: takes one of choices, range and log_range, not choices and range",
        "fields.augment.rotation: points belongs to a range; choices are taken as they are",
        "fields.augment.cutout.rang: there is no such key; did you mean 'range'?",
        "data.val_size: decides what a trial is measured on",
        "seed: is searched, and given the value 3 too",
        "constraints.params: there is no such key; did you mean 'parameters'?",
        "constraints.macs: 'few' should be a comparison with a count",
    ):
        assert expected in text, expected
    assert text.startswith(f"the space is wrong in {len(text.splitlines()) - 1} places:")


@pytest.mark.parametrize(
    ("tree", "sampler", "trials", "message"),
    [
        ({"recipe": "digits"}, "random", None, "fields: is missing"),
        (tiny(fields={}), "random", None, "fields = {}"),
        (tiny(fields={"optimizer.lr": {"range": [0.1, 1]}}), "grid", None, "choices, or a range with points"),
        (tiny(), "grid", 3, "--trials 3: a grid has as many trials as points"),
        (tiny(stage="train", fields={"student.widths": {"choices": [[8]]}}), "random", None, "no such field"),
        (tiny(recipe="digit"), "random", None, "did you mean 'digits'"),
        (tiny(recipe=3), "random", None, "recipe.str = 3"),
        (tiny(set={"data.val_size": 0}), "random", None, "val selects among the trials"),
        (tiny(fields={"student.name": {"choices": ["resnet9", "tpsnat"]}}), "random", None, "did you mean 'tpsnet'"),
        (tiny(fields={"student.image_size": {"choices": [24, 32]}}), "random", None, "takes no such argument; the"),
        (tiny(set={"optimizer": {"lr": 0.1}}), "random", None, "optimizer.lr: is searched, and given the value 0.1"),
        *((tiny(fields={path: {"choices": [1, 2]}}), "random", None, f"{path}: decides what a trial is measured on")
          for path in ("data", "data.dataset", "data.split_seed", "data.group_by", "data.skip_leaks", "data.images")),
    ],
)  # fmt: skip
def test_mistakes_of_a_space(tree: dict, sampler: str, trials: int | None, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        plan(tree, sampler, trials=trials)


def test_fields_that_only_go_together_are_no_mistake(tmp_path: Path) -> None:
    """Momentum 0 is wrong with Nesterov's: the draws leave that pair out."""
    fields = {"optimizer.momentum": {"choices": [0, 0.9]}, "optimizer.nesterov": {"choices": [True, False]}}
    search = prepared(tmp_path, plan(tiny(fields=fields), "grid"))
    assert [(t.values["optimizer.momentum"], t.values["optimizer.nesterov"]) for t in search.trials] == [
        (0, False),
        (0.9, True),
        (0.9, False),
    ]
    assert search.left_out == 1


def test_an_argument_of_some_architectures_leaves_the_others_out(tmp_path: Path) -> None:
    fields = {"student.name": {"choices": ["resnet9", "tpsnet"]}, "student.base": {"choices": [4]}}
    search = prepared(tmp_path, plan(tiny(fields=fields), "grid"))
    assert ([trial.values["student.name"] for trial in search.trials], search.left_out) == (["tpsnet"], 1)


def test_fields_of_a_section_that_are_set_leave_the_others() -> None:
    fields = {"student.widths": {"choices": [[8, 8, 8]]}}
    found = plan(tiny(fields=fields, set={"optimizer": {"lr": 0.1}})).base.optimizer
    assert found == resolve("digits", "distill", {"optimizer.lr": 0.1}).optimizer
    assert found.momentum != Optimizer().momentum


# --- samples -----------------------------------------------------------------------------------------------


def test_draws_stay_in_their_domain() -> None:
    rng = np.random.default_rng(0)

    def draws(**domain: object) -> list:
        return [Domain.model_validate(domain).draw(rng) for _ in range(3000)]

    integers = draws(range=[2, 4])
    assert {type(value) for value in integers} == {int}
    assert all(900 < integers.count(value) < 1100 for value in (2, 3, 4))
    assert set(draws(log_range=[1, 4])) == {1, 2, 3, 4}
    assert np.mean(draws(range=[0.0, 1.0])) == pytest.approx(0.5, abs=0.02)
    logs = np.log10(draws(log_range=["1e-4", 1]))  # YAML reads 1e-4 as a string
    assert logs.min() >= -4
    assert logs.max() <= 0
    assert logs.mean() == pytest.approx(-2, abs=0.06)
    assert set(draws(choices=["1e-3", "cosine"])) == {0.001, "cosine"}


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        ({"choices": [[1, 1], "a"]}, [[1, 1], "a"]),
        ({"range": [0.0, 1.0], "points": 3}, [0, 0.5, 1]),
        ({"range": [1, 4], "points": 9}, [1, 2, 3, 4]),
        ({"log_range": [0.001, 0.1], "points": 5}, [0.001, 0.003162, 0.01, 0.03162, 0.1]),
        ({"range": [0.999, 0.9999], "points": 4}, [0.999, 0.9993, 0.9996, 0.9999]),
        ({"range": [0.9995, 0.99999], "points": 3}, [0.9995, 0.999745, 0.99999]),
        ({"range": [-1.0, 1.0], "points": 3}, [-1, 0, 1]),
    ],
)
def test_values_of_a_grid(domain: dict, values: list) -> None:
    assert Domain.model_validate(domain).grid() == values


WIDE = {"student.widths": {"choices": [[8, 8, 8], [16, 32, 64], [64, 256, 256]]}, "optimizer.lr": {"range": [0.1, 0.5]}}


def test_constraints_are_met_before_a_trial_starts(tmp_path: Path) -> None:
    tree = tiny(fields=WIDE, constraints={"parameters": "< 200_000", "macs": "> 5,000,000"})
    search = prepared(tmp_path, plan(tree, trials=12))
    assert {tuple(trial.values["student.widths"]) for trial in search.trials} == {(16, 32, 64)}
    for trial in search.trials:
        size = measure(search.recipe(trial.values), 10)
        assert (trial.parameters, trial.macs) == (size.parameters, size.macs)


def test_the_budget_of_a_student_is_a_constraint(tmp_path: Path) -> None:
    search = prepared(tmp_path, plan(tiny(fields=WIDE), trials=12, budget=100_000))
    assert all(trial.parameters < 100_000 for trial in search.trials)


def test_a_trials_values_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    few, many = (prepared(tmp_path, plan(tiny(fields=WIDE), trials=n)) for n in (3, 6))
    assert [t.values for t in few.trials] == [t.values for t in many.trials[:3]]
    other = prepared(tmp_path, plan(tiny(fields=WIDE), trials=3, seed=1))
    assert [t.values for t in few.trials] != [t.values for t in other.trials]


def test_no_values_come_twice_by_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"optimizer.lr": {"choices": [0.1, 0.2]}, "student.widths": WIDE["student.widths"]}
    some, whole = (prepared(tmp_path, plan(tiny(fields=fields), trials=n)) for n in (4, 6))
    assert len({str(trial.values) for trial in whole.trials}) == 6
    assert [trial.values for trial in some.trials] == [trial.values for trial in whole.trials[:4]]
    assert not capsys.readouterr().err
    more = prepared(tmp_path, plan(tiny(fields=fields), trials=9))
    assert (len(more.trials), more.total) == (6, 6)
    assert "the search has 6 trials, not 9: 1,000 more draws brought no values" in capsys.readouterr().err
    while more.next() is not None:
        pass


def test_a_grid_is_counted_before_it_is_built(tmp_path: Path) -> None:
    fields = {path: {"range": [0.1, 0.9], "points": 500} for path in ("optimizer.lr", "optimizer.momentum")}
    with pytest.raises(
        SearchError, match=r"has 250,000 points \(500 optimizer.lr x 500 optimizer.momentum\), more than"
    ):
        prepared(tmp_path, plan(tiny(fields=fields), "grid"))
    fields["optimizer.lr"]["points"] = 10**9
    with pytest.raises(SpaceError, match=r"fields\.optimizer\.lr\.points = 1000000000"):
        plan(tiny(fields=fields), "grid")


def test_constraints_that_nothing_meets(tmp_path: Path) -> None:
    tree = tiny(fields={"student.widths": WIDE["student.widths"]}, constraints={"parameters": "< 1000"})
    smallest = measure(resolve("digits", "distill", {"student.widths": [8, 8, 8]}), 10).parameters
    with pytest.raises(SearchError) as caught:
        prepared(tmp_path, plan(tree))
    for expected in ("none of 1,000 draws for trial 1", "parameters < 1,000", f"{smallest:,} parameters", "[8, 8, 8]"):
        assert expected in str(caught.value)
    with pytest.raises(SearchError, match="none of the 3 points of the grid meets parameters < 1,000"):
        prepared(tmp_path, plan(tree, "grid"))
    broken = tiny(fields={"student.widths": {"choices": ["wide", "wider"]}})
    with pytest.raises(SearchError, match=r"makes a valid recipe; the last: .*resnet9 cannot be built"):
        prepared(tmp_path, plan(broken))


def test_optuna_draws_under_constraints_and_learns(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra tune is not installed")
    wanted = plan(tiny(fields=WIDE, constraints={"parameters": "< 200000"}), "optuna", trials=30)
    search = prepared(tmp_path, wanted)
    while (trial := search.next()) is not None:
        assert trial.parameters < 200_000
        status = "stopped" if trial.number % 5 == 0 else "finished"
        search.sampler.learn(ended(search, trial.number, 1 - abs(trial.values["optimizer.lr"] - 0.2), status))
    rates = [trial.values["optimizer.lr"] for trial in search.trials]
    assert np.median(np.abs(np.array(rates[15:]) - 0.2)) < np.median(np.abs(np.array(rates[:10]) - 0.2))
    again = Search(wanted.model_copy(update={"trials": 40}), tmp_path, 10, search.trials)
    assert len(again.sampler.study.trials) == 30
    assert again.next().values not in [trial.values for trial in search.trials]


@pytest.mark.parametrize(("select", "expected"), [("best", 0.9), ("last", 0.7)])
def test_a_trial_is_worth_what_its_weights_are(select: str, expected: float) -> None:
    history = [{"val_top1": top1} for top1 in (0.5, 0.9, None, 0.7, None)]
    assert score(resolve("digits", "distill", {"select": select}), history) == expected
    assert score(resolve("digits", "distill"), history[2:3]) is None


# --- trials ------------------------------------------------------------------------------------------------


def run_all(search: Search) -> None:
    """The search without Ray: one trial after the other, in this process."""
    search.write()
    while (trial := search.next()) is not None:
        reports: list[dict] = []
        job = tune._job(search, trial, torch.get_num_threads(), 0)
        try:
            tune.train_trial(tune.Job.model_validate_json(job.model_dump_json()), reports.append)
        except Exception:
            search.ended(trial, failed=True)
        else:
            assert [report["epoch"] for report in reports] == [1, 2]
            search.ended(trial)


def test_a_failing_trial_is_a_row_and_the_best_is_a_recipe(toolkit: Toolkit, nowhere: Path) -> None:
    fields = {"augment.crop_padding": {"choices": [2, 40]}, "optimizer.lr": {"choices": [0.05, 0.2]}}
    tree = tiny(fields=fields, set={**TINY["set"], "student.widths": [8, 8, 8], "augment.padding_mode": "reflect"})
    search = prepared(Path("out"), plan(tree, "grid"))
    run_all(search)
    tune.finish(search)

    assert [trial.status for trial in search.trials] == ["finished", "finished", "failed", "failed"]
    rows = json.loads(Path("out/trials.json").read_text())
    assert [Trial(**row) for row in rows] == search.trials
    table = list(csv.DictReader(Path("out/trials.csv").read_text().splitlines()))
    assert [row["optimizer.lr"] for row in table] == ["0.05", "0.2", "0.05", "0.2"]
    assert "augment.crop_padding (=40)" in table[2]["error"]
    assert "Traceback" in Path("out/trials/0003.error.txt").read_text()
    for trial in search.trials[:2]:
        run = Run(search.path(trial))
        assert trial.val_top1 == run.summary()["val_top1"] == max(row["val_top1"] for row in run.history())
        assert trial.epochs == 2
        assert not run.report.exists()  # the test set is not touched

    best = search.best()
    assert best.val_top1 == max(float(row["val_top1"]) for row in table[:2])
    assert resolve("out/best.yaml", "distill").digest() == Run(search.path(best)).recipe.digest()
    for figure in ("scatter.png", "heatmap.png"):
        with Image.open(f"out/{figure}") as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 20
    result = toolkit("distill", "--recipe", "out/best.yaml", "--run-dir", search.path(best))
    assert "is finished already" in result.stderr


def test_an_interrupted_search_goes_on(nowhere: Path) -> None:
    wanted = plan(tiny(), "grid")
    search = prepared(Path("out"), wanted)
    ended(search, 1, 0.5)
    ended(search, 2, 0.4, "stopped")
    ended(search, 3, 0.3, "failed").error = "no memory"
    search.trials[3].status = "running"
    search.write()
    again = Search(wanted, Path("out"), 10, read_trials(Path("out")))
    again.prepare()
    assert [trial.status for trial in again.trials] == ["finished", "stopped", "planned", "planned"]
    assert [trial.number for trial in again.kept] == [1, 2]
    assert again.next().number == 3
    assert again.next().number == 4
    assert again.next() is None


def test_where_all_trials_fail(nowhere: Path) -> None:
    fields = {"augment.crop_padding": {"choices": [40, 50]}}
    tree = tiny(fields=fields, set={**TINY["set"], "augment.padding_mode": "reflect"})
    search = prepared(Path("out"), plan(tree, "grid"))
    run_all(search)
    with pytest.raises(SearchError, match=r"all 2 trials failed, the first by: augment\.crop_padding"):
        tune.finish(search)


def test_another_search_in_the_same_folder_is_refused(nowhere: Path) -> None:
    output = Path("out")
    wanted = plan(tiny(), trials=3)
    search = prepared(output, wanted)
    search.write()
    (output / "search.yaml").write_text(yaml.safe_dump(wanted.model_dump(mode="json")))
    assert tune.resumed(output, None, None) == wanted
    assert tune.resumed(output, plan(tiny(), trials=9), 9).trials == 9
    places = {"device": "cuda:7", "data.data_dir": "there", "seed": 3}
    moved = tune.resumed(output, wanted, None, places).base  # it goes on where one says now
    assert (moved.device, moved.data.data_dir, moved.seed) == ("cuda:7", Path("there"), wanted.base.seed)
    for other, difference in (
        (plan(tiny(), trials=3, seed=5), "seed: 0 -> 5"),
        (plan(tiny(), "random", "asha", 3), "scheduler: none -> asha"),
        (plan(tiny(fields=WIDE), trials=3), "optimizer.lr: "),
    ):
        with pytest.raises(SearchError, match=f"different search; differing: .*{difference}"):
            tune.resumed(output, other, None)
    with pytest.raises(SearchError, match="add --resume"):
        tune.tune(wanted, output)
    with locked(output, SearchError), pytest.raises(SearchError, match="another process"), locked(output, SearchError):
        pass


def test_a_poor_teacher_is_told_before_the_first_trial(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = chain.teacher / "checkpoints/best.safetensors"
    tensors, header = load_tensors(weights)
    save_tensors(weights, tensors | {"network.head.weight": torch.zeros_like(tensors["network.head.weight"])}, header)
    monkeypatch.setattr(tune, "_ray", lambda address: None)
    space = {"recipe": "digits", "fields": {"optimizer.lr": {"range": [0.1, 0.2]}}}
    wanted = make_plan(space, None, {"teacher.checkpoint": str(chain.teacher)}, "random", "none", 2)
    with pytest.raises(TeacherError, match="has nothing to teach"):
        tune.tune(wanted, Path("out"))
    assert not Path("out").exists()


def test_all_trials_learn_from_one_teacher_and_the_same_images(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {**TINY["set"], "student.widths": [8, 8, 8], "loss.ce_weight": 1}
    base = resolve("digits", "distill", given).model_dump(mode="json")
    wanted = plan({"recipe": base, "fields": {"loss.kd_weight": {"choices": [0, 0.9]}}}, "grid")
    assert not wanted.base.distils
    monkeypatch.setattr(tune, "_ray", lambda address: None)
    monkeypatch.setattr(tune, "cluster", lambda *_: contextlib.nullcontext(1))
    monkeypatch.setattr(tune, "_announce", lambda *_: None)
    monkeypatch.setattr(tune, "_run", lambda search, *_: run_all(search))
    search = tune.tune(wanted, Path("out"))
    teacher = chain.teacher / "checkpoints/best.safetensors"
    assert [trial.status for trial in search.trials] == ["finished"] * 2
    recipes = [Run(search.path(trial)).recipe for trial in search.trials]
    assert [recipe.distils for recipe in recipes] == [False, True]
    assert recipes[1].teacher.checkpoint == teacher
    assert yaml.safe_load(Path("out/search.yaml").read_text())["recipe"]["teacher"]["checkpoint"] == str(teacher)
    monkeypatch.setattr("toolkit.data.load", lambda config: replace(load(config), digest="of other images"))
    with pytest.raises(RunError, match=r"have changed since .*: choose another --output"):
        tune.tune(wanted, Path("out"), resume=True)


def test_a_search_goes_on_with_its_own_teacher_and_refuses_another(nowhere: Path) -> None:
    def learning(**teacher: object) -> Plan:
        return plan(tiny(), **{f"teacher.{key}": value for key, value in teacher.items()})

    Path("one/checkpoints").mkdir(parents=True)
    weights = "one/checkpoints/best.safetensors"  # what the search names once it has begun
    also = ["more.onnx", {"checkpoint": "three", "views": "flip"}]
    begun = learning(checkpoint=weights, classes="classes.yaml", also=also)
    Path("out").mkdir()
    Path("out/search.yaml").write_text(yaml.safe_dump(begun.model_dump(mode="json")))
    for same in ({}, {"checkpoint": "one"}, {"checkpoint": f"./{weights}", "classes": Path("classes.yaml").resolve()}):
        assert tune.resumed(Path("out"), learning(**same), None).base.teacher == begun.base.teacher
    for other in (
        {"checkpoint": "two"},
        {"classes": "others.yaml"},
        {"also": also[:1]},
        {"also": ["more.onnx", "three"]},
    ):
        with pytest.raises(SearchError, match=f"different search; differing: teacher.{next(iter(other))}: .* -> "):
            tune.resumed(Path("out"), learning(**other), None)
    named = [{}, {"checkpoint": "one"}, {"checkpoint": "two"}, {"classes": "others.yaml"}, {"also": also}]
    assert len({tune.default_output(learning(**teacher)) for teacher in named}) == len(named)
    assert tune.default_output(learning(checkpoint="one")) == tune.default_output(learning(checkpoint=weights))


def test_images_without_labels_get_the_teacher_s(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a search begins: here it goes on until there is no cluster."""
    random = np.random.default_rng(0)
    for i in range(30):
        Path("loose").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8)).save(f"loose/{i}.png")
    colour_net(Path("t.onnx"))
    given = {"data.dataset": "folder:loose", "data.unlabelled": True, "loss.ce_weight": 0, "loss.kd_weight": 1,
             "teacher.name": "t.onnx"}  # fmt: skip
    monkeypatch.setattr(tune, "_ray", lambda address: None)
    tree = tiny(recipe="own-images", set={"device": "cpu"}, fields={"optimizer.lr": {"range": [0.1, 0.5]}})
    with pytest.raises(SearchError, match="no Ray cluster answers there"):
        tune.tune(plan(tree, trials=2, **given), Path("out"), address="127.0.0.1:1")
    for path in ("teacher.name", "data.unlabelled"):
        others = {key: value for key, value in given.items() if key != path}
        with pytest.raises(SpaceError, match=f"{path}: decides what a trial is measured on"):
            plan(tiny(recipe="own-images", fields={path: {"choices": [given[path]]}}, set={}), **others)


@pytest.mark.parametrize(("device", "with_gpu"), [("auto", "auto"), ("cuda:7", "cuda"), ("cpu", "cpu")])
def test_a_trial_computes_on_the_gpu_that_ray_gives_it(tmp_path: Path, device: str, with_gpu: str) -> None:
    search = prepared(tmp_path, plan(tiny(set={**TINY["set"], "device": device, "probe": True}), trials=1))
    recipes = [tune._job(search, search.trials[0], 1, gpus).recipe for gpus in (0, 0.5)]
    assert [recipe["device"] for recipe in recipes] == ["cpu", with_gpu]
    assert not any(recipe["probe"] for recipe in recipes)  # all compute in the same precision


def test_a_trial_whose_process_died_has_failed(tmp_path: Path) -> None:
    search = prepared(tmp_path, plan(tiny(), trials=1))
    trial = search.next()
    Run.start(search.path(trial), search.recipe(trial.values), resume=False)
    search.ended(trial, failed=True)
    assert (trial.status, trial.error) == ("failed", "its process died (out of memory, or killed)")


def test_a_trial_whose_directory_is_not_here_has_failed(tmp_path: Path) -> None:
    """On another machine of a cluster, which does not share the folder."""
    search = prepared(tmp_path, plan(tiny(), trials=2))
    search.ended(search.next())
    assert search.trials[0].status == "failed"
    assert "must share this folder" in search.trials[0].error
    trial = search.next()
    Run.start(search.path(trial), search.recipe(trial.values), resume=False)
    search.ended(trial)
    assert trial.status == "stopped"


def test_the_rest_is_estimated_by_multiply_accumulates(tmp_path: Path) -> None:
    search = prepared(tmp_path, plan(tiny(fields=WIDE), trials=4))
    for trial, macs in zip(search.trials, (100, 100, 400, 200), strict=True):
        trial.macs = macs
    estimate = tune.Estimate(search, slots=2)
    assert estimate.left() is None
    estimate.rate = 5 / 100  # an epoch of the first trial took 5 seconds
    assert estimate.left() == pytest.approx(800 * 2 * 0.05 / 2)
    first = search.trials[0]
    estimate.started(first)
    estimate.began[first.number] = time.monotonic() - 26, 0, 0.0
    first.status, first.epochs, first.seconds = "finished", 2, 20.0  # and 6 seconds to start
    estimate.ended(first)
    estimate.ended(search.trials[1])  # its process died before it had started
    assert estimate.left() == pytest.approx((700 * 2 * 0.1 + 3 * 6) / 2, abs=0.1)


def test_the_first_estimate_counts_the_teacher_and_both_copies_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "seconds_an_image", lambda model, recipe, backward: 4.0 if backward else 1.0)
    monkeypatch.setattr(teaching, "load", lambda *_: (torch.nn.Identity(), None, None))
    split = Split(torch.zeros(30, 3, 32, 32, dtype=torch.uint8), torch.arange(30) % 10)
    data = DataSet("noise", tuple("0123456789"), split, split, split, (0.5,) * 3, (0.2,) * 3, "d")
    twice, alone = {"augment.plain_copy": True}, {"loss.kd_weight": 0, "loss.ce_weight": 1}
    for given, student, teacher in (
        ({}, 30 * 4, 30 * 10),
        (twice, 60 * 4, 60 * 10),
        (alone, 30 * 4, 0),
        ({"cached_epochs": 2}, 30 * 4, 30 * 2),
    ):
        recipe = resolve("digits", "distill", {"epochs": 10, "cached_epochs": 0} | given)
        rate, taught = tune._probe(recipe, data, 1)
        assert rate * measure(recipe, 10).macs == pytest.approx(student)
        assert taught == teacher


@pytest.mark.parametrize(("cached", "seconds"), [(0, 3 * 300), (2, 60)])
def test_the_grid_is_announced_with_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cached: int, seconds: float
) -> None:
    space = tiny(fields={"optimizer.lr": {"choices": [0.1, 0.2, 0.3]}})
    search = prepared(tmp_path, plan(space, "grid", cached_epochs=cached))
    monkeypatch.setattr(tune, "_probe", lambda *_: (0.0, 60.0 if cached else 300.0))
    told = []
    monkeypatch.setattr(tune, "clock", lambda left: told.append(left) or "soon")
    tune._announce(search, 1, None, 1)
    assert told == [seconds]

    def find_none(*_: object) -> None:
        raise TeacherError("no teacher")

    monkeypatch.setattr(tune, "_probe", find_none)
    tune._announce(search, 1, None, 1)
    assert "no estimate: no teacher" in capsys.readouterr().err


def test_asha_knows_the_trials_of_before(nowhere: Path) -> None:
    pytest.importorskip("ray.tune", reason="the extra tune is not installed", exc_type=ImportError)
    search = prepared(Path("out"), plan(tiny(), "random", "asha", 4))
    for trial in search.trials[:3]:
        Run.start(search.path(trial), search.recipe(trial.values), resume=False)
        rows = [{"epoch": 1, "val_top1": 0.5}, {"epoch": 2, "val_top1": 0.6}]
        (search.path(trial) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ended(search, trial.number, 0.6)
    search.write()
    scheduler = tune._asha(Search(search.plan, Path("out"), 10, read_trials(Path("out"))))
    for name, val_top1, action in (("better", 0.7, "CONTINUE"), ("worse", 0.3, "STOP")):
        trial = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)
        assert scheduler.on_trial_result(None, trial, {"epoch": 1, "val_top1": val_top1}) == action


def test_trials_whose_directories_were_removed_still_count(nowhere: Path) -> None:
    pytest.importorskip("ray.tune", reason="the extra tune is not installed", exc_type=ImportError)
    search = prepared(Path("out"), plan(tiny(), "random", "asha", 4))
    for number in (1, 2):
        ended(search, number, 0.5, "stopped").epochs = 1
    ended(search, 3, 0.8)
    search.write()
    again = Search(search.plan, Path("out"), 10, read_trials(Path("out")))
    worse = SimpleNamespace(trial_id="worse")
    scheduler = tune._asha(again)
    scheduler.on_trial_add(None, worse)
    assert scheduler.on_trial_result(None, worse, {"epoch": 1, "val_top1": 0.1}) == "STOP"
    tune.finish(again)
    best = resolve("out/best.yaml", "distill")
    assert best.differences(again.recipe(again.trials[2].values)) == []


# --- tables and figures -----------------------------------------------------------------------------------------------


def test_the_best_trials_are_shown_best_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = prepared(tmp_path, plan(tiny(fields=WIDE), trials=4))
    for number, top1, status in ((1, 0.5, "finished"), (2, 0.9, "finished"), (3, 0.95, "stopped"), (4, 0, "failed")):
        ended(search, number, top1, status)
    tune_report.show(search)
    title, *rest = capsys.readouterr().err.splitlines()
    assert title.strip() == "the best 3 of 4 trials, on val"
    rows = [line.split() for line in rest if "%" in line]
    assert [(row[0], row[2]) for row in rows] == [("2", "90.00%"), ("1", "50.00%"), ("3", "95.00%")]
    best = search.trials[1]
    widths, lr = (str(best.values[path]) for path in WIDE)
    assert rows[0] == ["2", "finished", "90.00%", "2", f"{best.parameters:,}", *widths.split(), lr]
    assert rest[-1].startswith("1 of 4 trials failed")


def test_scatter_has_a_panel_for_each_field(tmp_path: Path) -> None:
    fields = {**WIDE, "augment.cutout": {"range": [0, 8]}, "optimizer.weight_decay": {"log_range": [1e-5, 1e-2]}}
    search = prepared(tmp_path, plan(tiny(fields=fields), trials=5))
    for number, top1 in ((1, 0.5), (2, 0.9), (3, 0.7)):
        ended(search, number, top1)
    ended(search, 4, 0.3, "stopped")
    figure = tune_report.scatter(search)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}
    assert list(panels) == list(fields)
    assert panels["optimizer.weight_decay"].get_xscale() == "log"
    assert [tick.get_text() for tick in panels["student.widths"].get_xticklabels()] == [
        "[8, 8, 8]",
        "[16, 32, 64]",
        "[64, 256, 256]",
    ]
    drawn = {dots.get_label(): dots.get_offsets().tolist() for dots in panels["augment.cutout"].collections}
    sides = [trial.values["augment.cutout"] for trial in search.trials]
    assert drawn["best"] == [[sides[1], 0.9]]
    assert drawn["finished"] == [[sides[0], 0.5], [sides[2], 0.7]]
    assert drawn["given up early"] == [[sides[3], 0.3]]


def test_heatmap_has_a_cell_for_each_point(tmp_path: Path) -> None:
    fields = {"optimizer.lr": {"choices": [1, 0.1, 0.01]}, "optimizer.momentum": {"choices": [0.5, 0.9]}}
    search = prepared(tmp_path, plan(tiny(fields=fields), "grid"))
    for number in (1, 2, 3, 4):
        ended(search, number, 0.1 * number)
    ended(search, 4, 0.4, "stopped")
    ended(search, 6, 0.2, "failed")  # it had a result before it diverged
    axes = tune_report.heatmap(search).axes[0]
    cells = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert cells == {
        (0, 0): "10.0",
        (0, 1): "20.0",
        (1, 0): "30.0",
        (1, 1): "40.0*",
        (2, 0): "planned",
        (2, 1): "failed",
    }
    assert axes.get_xlabel() == "optimizer.lr"


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", ["", "--resume", "--output out", "--resume --output out --lr 3", "--space x --sampler some"]
)
def test_wrong_usage(toolkit: Toolkit, nowhere: Path, arguments: str) -> None:
    assert toolkit("tune", *arguments.split()).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--resume --output out", "out holds no search to go on with"),
        ("--space tpsnet-randon", "did you mean 'tpsnet-random'"),
        (
            "--space tpsnet-random --set distill.optimizer.lr=0.1",
            "distill.optimizer.lr: is searched by optimizer.lr, and given the value 0.1 too",
        ),
        ("--space tpsnet-random --lr 0.1", "optimizer.lr: is searched, and given the value 0.1 too"),
        ("--space tpsnet-random --device cuda --gpus-per-trial 0", "a trial gets no GPU"),
    ],
)
def test_what_cannot_begin_leaves_nothing(toolkit: Toolkit, nowhere: Path, arguments: str, message: str) -> None:
    refused(toolkit("tune", *arguments.split()), message)
    assert not any(nowhere.iterdir())


def test_without_ray_the_extra_is_named(toolkit: Toolkit, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("space.yaml").write_text(yaml.safe_dump(TINY))
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(toolkit("tune", "--space", "space.yaml"), "pip install -e '.[tune]'", lines=1)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SearchError, match=r"--sampler optuna needs Optuna.*\[tune\]"):
        Search(plan(TINY, "optuna"), Path("out"), 10)


def test_a_cluster_that_does_not_answer(toolkit: Toolkit, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("space.yaml").write_text(yaml.safe_dump(TINY))
    monkeypatch.setattr(tune, "_ray", lambda address: None)
    result = toolkit("tune", "--space", "space.yaml", "--output", "out", "--address", "127.0.0.1:1")
    refused(result, "--address 127.0.0.1:1: no Ray cluster answers there")
    assert not Path("out").exists()


# --- on Ray ------------------------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "toolkit", "tune", *map(str, arguments)]


@pytest.fixture
def ray(nowhere: Path) -> Path:
    """A working directory with a tiny space, where Ray is installed."""
    for module in ("ray", "pyarrow", "pandas"):
        pytest.importorskip(module, reason="the extra tune is not installed", exc_type=ImportError)
    Path("space.yaml").write_text(yaml.safe_dump(TINY))
    return nowhere


def test_a_search_on_ray(ray: Path) -> None:
    """In a process of its own, as Ray changes signal handlers and leaves threads behind.

    The base recipe's model is over the budget, and no point of the grid. Padding of 40 fails, which the other survives.
    """
    fields = {"augment.crop_padding": {"choices": [40, 1]}, "student.widths": {"choices": [[8, 8, 8]]}}
    tree = tiny(fields=fields, set={**TINY["set"], "augment.padding_mode": "reflect"})
    Path("space.yaml").write_text(yaml.safe_dump(tree))
    how = ("--sampler", "grid", "--scheduler", "asha", "--budget", 20_000)
    asked = command("--space", "space.yaml", *how, "--json", "--output", "out")
    result = subprocess.run(asked, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["finished"] + found["stopped"], found["failed"]) == (1, 1)
    failed, row = found["trials"]
    assert failed["error"].startswith("augment.crop_padding (=40)")
    assert f"trial 1 failed: {failed['error']}" in result.stderr
    assert found["best"]["val_top1"] == row["val_top1"]
    run = Run(Path("out") / row["run"])
    assert run.finished == (row["status"] == "finished")
    assert len(run.history()) == row["epochs_run"] == (2 if run.finished else 1)
    assert {path.name for path in Path("out").iterdir()} == {
        *("search.yaml", "trials.json", "trials.csv", "trials", "scatter.png", "heatmap.png", "best.yaml", ".lock")
    }
    assert "2 trials of 2 epochs in out, at most" in result.stderr
    grid = r"the grid: 2 augment.crop_padding x 1 student.widths.*; at most about \d+:\d\d, judged by"
    assert re.search(grid, result.stderr)
    assert "Warning" not in result.stderr


@pytest.mark.slow
def test_a_killed_search_goes_on(ray: Path) -> None:
    one_at_a_time = ("--cpus-per-trial", available_cores())
    asked = command("--space", "space.yaml", "--trials", 2, "--output", "out", "--set", "epochs=9", *one_at_a_time)
    second = Path("out/trials/0002")
    with subprocess.Popen(asked, stderr=subprocess.DEVNULL) as search:
        while not (second / "metrics.jsonl").is_file() or len(Run(second).history()) < 3:
            assert search.poll() is None
            time.sleep(0.1)
        search.send_signal(signal.SIGKILL)
    before = {trial.number: trial for trial in read_trials(Path("out"))}
    assert [trial.status for trial in before.values()] == ["finished", "running"]
    rows = Run(second).history()
    assert 3 <= len(rows) < 9
    result = subprocess.run(command("--output", "out", "--resume"), capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert "(1 done before)" in result.stderr
    after = {trial.number: trial for trial in read_trials(Path("out"))}
    assert [(trial.status, trial.epochs) for trial in after.values()] == [("finished", 9)] * 2
    assert after[1] == before[1]
    assert Run(second).history()[: len(rows)] == rows  # from its checkpoint, and not from the start
    assert [trial.values for trial in after.values()] == [trial.values for trial in before.values()]
