"""The whole chain through the command line, on the embedded digits."""

import hashlib
import json
import shlex
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Chain, Toolkit, refused
from PIL import Image

from export.artifact import read
from toolkit import compare, engine, external, stages, teaching, tune
from toolkit.data import DataSet, Split, load
from toolkit.recipe import Data, Teacher, resolve
from toolkit.run import Run, load_run

pytestmark = pytest.mark.usefixtures("no_pictures")
TINY = ("--set", "teacher.widths=[8, 16, 32]")


def test_the_pipeline_leaves_two_runs_a_report_and_an_artifact(pipeline: Chain) -> None:
    for run in (pipeline.folder / pipeline.teacher, pipeline.folder / pipeline.student):
        for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "summary.json"):
            assert (run / name).stat().st_size > 0
        assert {file.stem for file in (run / "checkpoints").iterdir()} == {"best", "last", "last-1"}
    assert (pipeline.folder / pipeline.artifact).stat().st_mode & 0o777 == 0o644  # also for a server of another user's
    made = {file.name for file in (pipeline.folder / pipeline.student).glob("*/*")}
    assert made >= {"report.md", "metrics.json", "curves.png", "confusion.png", "predictions.png"}
    assert made >= {"student.onnx", "parity.json", "examples"}
    assert f"next: toolkit serve {pipeline.artifact}" in pipeline.output
    report = (pipeline.folder / pipeline.student / "report/report.md").read_text()
    layers = report.partition("Layer (type")[2]
    total = f"Total params: {read(pipeline.folder / pipeline.artifact).parameters:,}\n"
    for words in ("Conv2d: ", "[1, 64, ", "Linear: ", "[1, 10]", total):
        assert words in layers


def test_the_pipeline_learns(pipeline: Chain) -> None:
    metrics = json.loads((pipeline.folder / pipeline.student / "report/metrics.json").read_text())
    assert metrics["top1"] > 0.6  # 0.1 by chance; after three epochs
    assert metrics["teacher_top1"] > 0.6
    assert metrics["agreement"] > 0.6


def test_each_command_takes_the_newest_and_says_which(toolkit: Toolkit, nowhere: Path) -> None:
    distil = ("distill", "--recipe", "digits", "--epochs", 2, *TINY)
    missing = toolkit(*distil)
    assert missing.exit_code == 1
    assert "--train-teacher" in missing.stderr
    assert not any(nowhere.iterdir())
    command = missing.stderr.partition("`toolkit ")[2].partition("`")[0]
    assert command == (
        "train --recipe digits --dataset digits --set 'teacher.widths=[8, 16, 32]' --teacher resnet9_wide"
    )

    trained = toolkit(*shlex.split(command), "--epochs", 2)
    assert trained.exit_code == 0, trained.output
    (teacher,) = Path("runs").iterdir()
    assert str(teacher) in trained.stdout

    distilled = toolkit(*distil)
    assert distilled.exit_code == 0, distilled.output
    assert f"from {teacher} " in distilled.stderr
    (student,) = Path("runs").glob("resnet9-from-resnet9_wide-*")
    assert str(student) in distilled.stdout


def test_other_commands_take_the_newest_too(toolkit: Toolkit, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    validated = toolkit("validate")
    assert validated.exit_code == 0, validated.output
    assert f"the newest student, {chain.student}" in validated.stderr
    assert "fidelity" in validated.stdout
    predicted = toolkit("predict", chain.example)
    assert predicted.exit_code == 0, predicted.output
    assert f"the newest artifact, {chain.artifact}" in predicted.stderr
    assert predicted.stdout.startswith(f"{chain.example}: ")
    inspected = toolkit("inspect", "--json")
    assert f"inspecting the newest artifact, {chain.artifact}" in inspected.stderr
    assert json.loads(inspected.stdout)["sha256"] == hashlib.sha256(chain.artifact.read_bytes()).hexdigest()
    monkeypatch.setattr("serve.server.run", lambda settings, started: started(len(settings.examples), "the CPU"))
    served = toolkit("serve")
    assert f"serving the newest artifact, {chain.artifact}" in served.stderr
    assert served.stdout == f"{chain.artifact} on the CPU: 8 (Ctrl-C stops)\n"  # with the run's own examples


def test_json_of_export(toolkit: Toolkit, chain: Chain, few_batches: None) -> None:
    before = (chain.folder / chain.artifact).read_bytes()
    result = toolkit("export", "--json")
    assert f"the newest student, {chain.student}" in result.stderr
    document = json.loads(result.stdout)
    assert document["artifact"] == str(chain.artifact)
    assert document["bytes"] == len(before)
    assert document["parity"]["ok"] is True
    assert Path(document["parity_report"]).is_file()
    assert chain.artifact.read_bytes() == before  # the same run exports to the same bytes


def test_json_of_predict_for_a_folder(toolkit: Toolkit, chain: Chain) -> None:
    images = sorted(chain.example.parent.iterdir())
    document = json.loads(toolkit("predict", chain.example.parent, "--top-k", 3, "--json").stdout)
    assert [entry["image"] for entry in document] == [str(image) for image in images]
    for entry in document:
        assert len(entry["labels"]) == 3
        assert entry["probabilities"] == sorted(entry["probabilities"], reverse=True)
    right = sum(entry["labels"][0] == image.stem[-1] for entry, image in zip(document, images, strict=True))
    assert right >= len(images) / 2
    Path("empty").mkdir()
    refused(toolkit("predict", "empty"), "no PNG, JPEG, WebP, GIF or BMP files in empty")


def test_json_of_doctor(toolkit: Toolkit, chain: Chain) -> None:
    document = json.loads(toolkit("doctor", "--json").stdout)
    assert document["facts"]["runs"] == "2 finished of 2 in ./runs"
    assert "CPUExecutionProvider" in document["facts"]["providers (ONNX Runtime)"]


def test_json_of_validate_is_the_same_for_run_and_artifact(toolkit: Toolkit, chain: Chain) -> None:
    torches = json.loads(toolkit("validate", chain.student, "--device", "cpu", "--json").stdout)
    assert torches.keys() >= {"top1", "top5", "nll", "ece", "per_class", "agreement", "kl", "teacher_top1"}
    assert torches["n"] == np.sum(torches["confusion"]) == 359
    artifacts = json.loads(toolkit("validate", chain.artifact, "--provider", "cpu", "--json").stdout)
    assert artifacts["provider"] == "CPUExecutionProvider"
    assert artifacts["top1"] == torches["top1"]
    assert artifacts["confusion"] == torches["confusion"]
    assert artifacts["nll"] == pytest.approx(torches["nll"], rel=1e-4)
    for key in ("agreement", "teacher_top1"):
        assert artifacts[key] == torches[key]
    assert artifacts["kl"] == pytest.approx(torches["kl"], rel=1e-4)
    assert artifacts.keys() == torches.keys()
    assert artifacts["report"] != torches["report"]  # one does not write over the other
    about = read(chain.artifact)
    assert (about.accuracy, list(about.labels)) == (torches["top1"], list(torches["per_class"]))


def test_views_are_a_figure_of_their_own(toolkit: Toolkit, chain: Chain) -> None:
    measure = ("validate", chain.student, "--device", "cpu", "--json")
    plain, views = (json.loads(toolkit(*measure, *more).stdout) for more in ((), ("--tta", "flip")))
    run = Run(chain.student)
    model, test = load_run(run)[0], load(run.recipe.data).test
    images = test.images.float() / 255
    with torch.inference_mode():
        answers = (model(images) + model(images.flip(3))).argmax(1)
    assert views.pop("tta_top1") == (answers == test.labels).double().mean().item() != plain["top1"]
    assert views.pop("tta_views") == "flip"
    assert views | {"seconds": 0} == plain | {"seconds": 0}


def test_validate_refuses_what_its_target_has_no_use_for(toolkit: Toolkit, chain: Chain) -> None:
    refused(toolkit("validate", chain.artifact, "--device", "cpu"), "--device is PyTorch's; ")
    refused(toolkit("validate", chain.student, "--provider", "cpu"), "--provider is ONNX Runtime's; ")


def test_the_program_of_the_docs_says_what_the_toolkit_says(
    chain: Chain, toolkit: Toolkit, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[1] / "docs/export.md").read_text()
    program = text.partition("```python\n")[2].partition("```")[0]
    shutil.copy(chain.artifact, "student.onnx")
    shutil.copy(chain.example, "ship.png")
    exec(compile(program, "docs/export.md", "exec"), {})
    label, probability = capsys.readouterr().out.split()
    (said,) = json.loads(toolkit("predict", "ship.png", "--json").stdout)
    assert label == said["labels"][0]
    assert float(probability) == pytest.approx(said["probabilities"][0], abs=1e-4)


def test_a_killed_run_goes_on_to_the_same_weights(
    toolkit: Toolkit, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--recipe digits --epochs 3 --image-size 16 --device cpu --set average_decay=0.9 --run-dir"
    arguments = ["train", *TINY, *options.split()]
    with monkeypatch.context() as patch:
        patch.setattr(engine.Display, "epoch", lambda *_: signal.raise_signal(signal.SIGTERM))
        stopped = toolkit(*arguments, "runs/killed")
    assert stopped.exit_code == 1
    assert "stopped in epoch 2 after step 1 of" in stopped.stderr
    assert not Run(Path("runs/killed")).finished

    refused(toolkit(*arguments, "runs/killed"), "--resume")

    resumed = toolkit(*shlex.split(stopped.stderr.partition("Go on with: toolkit ")[2]))
    assert resumed.exit_code == 0, resumed.output
    assert toolkit(*arguments, "runs/whole").exit_code == 0
    killed, whole = (Run(Path("runs", name)) for name in ("killed", "whole"))
    assert killed.checkpoint("best").read_bytes() == whole.checkpoint("best").read_bytes()
    assert [row["train_loss"] for row in killed.history()] == [row["train_loss"] for row in whole.history()]


def test_a_longer_run_is_not_shown_with_what_the_shorter_one_reached(toolkit: Toolkit, chain: Chain) -> None:
    longer = ("train", "--recipe", "digits", "--extend", "--epochs", 3)
    nameless = toolkit(*longer)
    assert nameless.exit_code == 2
    assert "--run-dir" in nameless.output  # a longer recipe has another directory, where it would begin anew
    assert toolkit("validate", chain.teacher).exit_code == 0
    result = toolkit(*longer, "--run-dir", chain.teacher)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(toolkit("report", chain.teacher, "--json").stdout)["runs"]
    assert (row["epochs"], row["test_top1"]) == (3, None)
    with Run(chain.teacher).lock():  # as a training that goes on
        assert "is being written by another process" in toolkit(*longer[:-1], 4, "--run-dir", chain.teacher).stderr
    assert Run(chain.teacher).recipe.epochs == 3


def test_train_teacher_and_baseline_and_a_written_recipe_again(toolkit: Toolkit, nowhere: Path) -> None:
    short = ("--recipe", "digits", "--epochs", 1, "--set", "schedule.warmup_epochs=1", "--set", "train.epochs=2")
    shared = ("--lr", 0.3, "--seed", 1, "--set", "data.val_size=0.2")
    result = toolkit("distill", *short, *shared, *TINY, "--train-teacher", "--baseline")
    assert result.exit_code == 0, result.output
    runs = {run.name.rsplit("-", 2)[0]: Run(run) for run in Path("runs").iterdir()}
    assert runs.keys() == {"resnet9_wide", "resnet9-from-resnet9_wide", "resnet9"}
    teacher, student, alone = runs["resnet9_wide"], runs["resnet9-from-resnet9_wide"], runs["resnet9"]
    usual = resolve("digits", "train")
    assert (teacher.recipe.epochs, teacher.recipe.seed, teacher.recipe.data.val_size) == (2, 1, 0.2)
    assert (teacher.recipe.optimizer, teacher.recipe.schedule) == (usual.optimizer, usual.schedule)  # not the student's
    assert student.recipe.optimizer.lr == alone.recipe.optimizer.lr == 0.3
    assert teacher.recipe.teacher is not None
    assert teacher.recipe.teacher.arguments == {"widths": [8, 16, 32]}
    assert student.recipe.epochs == alone.recipe.epochs == 1
    assert alone.recipe.loss.kd_weight == 0

    ours, theirs = (json.loads((run.report / "metrics.json").read_text())["top1"] for run in (student, alone))
    assert f"with the teacher {ours:.2%}, without {theirs:.2%}: {100 * (ours - theirs):+.2f} points" in result.stdout
    assert stages.newest_run().path == student.path  # the baseline is newer, but it is not the result

    (alone.path / "summary.json").unlink()  # as one that was interrupted, and is gone on with as its message says
    assert toolkit("distill", "--run-dir", alone.path, "--resume").exit_code == 0
    assert alone.finished
    assert stages.newest_run().path == student.path

    before = student.checkpoint("best").read_bytes()
    again = toolkit("distill", "--recipe", student.path / "recipe.yaml")
    assert again.exit_code == 0, again.output
    assert f"{student.path} is finished already" in again.stderr
    other = toolkit("distill", "--recipe", student.path / "recipe.yaml", "--run-dir", "elsewhere")
    assert other.exit_code == 0, other.output
    assert Run(Path("elsewhere")).checkpoint("best").read_bytes() == before == student.checkpoint("best").read_bytes()


def test_a_baseline_is_as_long_as_what_it_is_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "check", lambda wanted: None)
    monkeypatch.setattr(stages, "_fit", lambda wanted, *_, **__: wanted)
    wanted = resolve("cifar10-gpu", "distill", {"start_from": "runs/x"})
    assert wanted.minutes is not None
    taught: Any = SimpleNamespace(recipe=wanted.model_copy(update={"epochs": 7}))
    alone: Any = stages.train_baseline(wanted, taught, Path("alone"), resume=False)
    assert (alone.minutes, alone.epochs, alone.start_from) == (None, 7, Path("runs/x"))
    assert (alone.distils, alone.teacher, alone.cached_epochs) == (False, None, 0)


def test_a_run_is_measured_on_another_folder_that_is_too_small_to_hold_val_out(toolkit: Toolkit, chain: Chain) -> None:
    for number in range(30):
        folder = Path("photos", str(number % 10))
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (8 * number, 0, 0)).save(folder / f"{number}.png")
    result = toolkit("validate", chain.student, "--dataset", "folder:photos", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["n"] == 10


def test_two_teachers_are_an_ensemble(toolkit: Toolkit, chain: Chain) -> None:
    also = ("--set", f"teacher.also=[{chain.student}]", "--epochs", 1, "--set", "schedule.warmup_epochs=0")
    result = toolkit("distill", "--recipe", "digits", *also, "--run-dir", "runs/two")
    assert result.exit_code == 0, result.output
    assert f"from {chain.teacher} and {chain.student} on digits" in result.stderr
    alone, both = Run(chain.student).recipe.teacher, Run(Path("runs/two")).recipe.teacher
    assert alone is not None
    assert both is not None
    assert both.weights != alone.weights
    assert json.loads(toolkit("validate", "runs/two", "--json").stdout)["teacher_top1"] > 0.5
    missing = toolkit("distill", "--recipe", "digits", "--set", "teacher.also=[nowhere]")
    refused(missing, "no weights of a teacher at nowhere")


def test_a_student_teaches_another_of_its_kind_and_other_images_are_told(
    toolkit: Toolkit, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.data.load", lambda config: replace(load(config), digest="of other images"))
    taught = ("--teacher", "resnet9", "--teacher-checkpoint", chain.student, "--epochs", 1, "--run-dir", "second")
    result = toolkit("distill", "--recipe", "digits", *taught, "--set", "schedule.warmup_epochs=0")
    assert result.exit_code == 0, result.output
    weights = chain.student / "checkpoints/best.safetensors"
    assert f"warning: the images of digits have changed since {weights} was trained" in result.stderr
    assert f"distilling resnet9 from {chain.student} on digits" in result.stderr
    first, second = Run(chain.student).recipe, Run(Path("second")).recipe
    assert second.teacher is not None
    assert (second.teacher.name, second.teacher.arguments) == ("resnet9", first.student.arguments)


def test_the_test_images_are_read_when_all_is_trained(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[int] = []  # of the comparison's runs, at each look at a test image

    class Sealed:
        """A test split that notes who looks at it."""

        def __init__(self, split: Split) -> None:
            self._split = split

        def __len__(self) -> int:
            return len(self.labels)

        def __getattr__(self, name: str) -> object:
            finished.append(len(list(Path("out").glob("*/summary.json"))))
            return getattr(self._split, name)

    def sealed(config: Data) -> DataSet:
        data = load(config)
        return replace(data, test=Sealed(data.test))

    monkeypatch.setattr("toolkit.data.load", sealed)
    short = {"epochs": 1, "schedule.warmup_epochs": 0, "batch_size": 256, "student.widths": [8, 8, 8], "device": "cpu"}
    trial = {"recipe": resolve("digits", "distill", short).model_dump(mode="json"), "stage": "distill"}
    place = {"number": 1, "run": Path("trial"), "folder": Path(), "threads": 1, "data_dir": None}
    tune.train_trial(tune.Job.model_validate(trial | place), lambda _: None)
    assert Run(Path("trial")).finished
    assert Run(Path("trial")).recipe.distils
    assert finished == []
    compare.compare(compare.make_plan(["soft_targets"], "digits", short, 1, Path("out")))
    assert set(finished) == {2}


def test_teachers_look_at_the_views_that_they_are_given(chain: Chain) -> None:
    wanted, other = Run(chain.student).recipe, chain.teacher / "checkpoints/best.safetensors"
    assert wanted.teacher is not None

    def load(**fields: object) -> tuple[torch.nn.Module, Teacher]:
        teacher = Teacher.model_validate(wanted.teacher.model_dump() | {"weights": None} | fields)
        return teaching.load(wanted.model_copy(update={"teacher": teacher}), None)[:2]

    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        plain = load()[0](images)
        flipped = (plain + load()[0](images.flip(3))) / 2
        model, known = load(views="flip", also=[other, {"name": "", "checkpoint": other}])
        first, second, third = (member(images) for member in model.members)
        torch.testing.assert_close(first, flipped)
        torch.testing.assert_close(second, flipped)  # as the first
        torch.testing.assert_close(third, plain)  # by its own mapping
        others = [load(also=[{"name": "", "checkpoint": other, "views": views}])[1].weights for views in (None, "flip")]
        assert others[0] != others[1]  # another ensemble
        assert external.titles(known) == (
            f"{chain.teacher} (mean over views: flip) and {chain.teacher} (mean over views: flip) and {chain.teacher}"
        )
        again = load(**known.model_dump())[0]  # as the run's recipe keeps it
        torch.testing.assert_close(again(images), model(images))


SHORT = ("--recipe", "digits", "--epochs", 1, "--set", "schedule.warmup_epochs=0", *TINY, "--run-dir", "runs/one")


def test_tensorboard_is_written(toolkit: Toolkit, nowhere: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert toolkit("train", *SHORT, "--epochs", 2, "--log", "tensorboard").exit_code == 0
    found = EventAccumulator("runs/one/tensorboard").Reload()
    rows = Run(Path("runs/one")).history()
    for name in ("train_loss", "val_top1", "lr"):
        assert [(one.step, one.value) for one in found.Scalars(name)] == [
            (row["epoch"], pytest.approx(row[name])) for row in rows
        ]


def test_without_tensorboard_its_extra_is_named(
    toolkit: Toolkit, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(toolkit("train", *SHORT, "--log", "tensorboard"), ".[log]")
