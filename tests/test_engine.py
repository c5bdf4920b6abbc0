"""The training loop: determinism, resuming, what is kept, and what stops it."""

import contextlib
import json

import numpy as np
import pytest
import torch

from toolkit import data as datasets
from toolkit import engine
from toolkit.data import DataSet, Split
from toolkit.errors import CheckpointError, DeviceError, DivergedError, Interrupted
from toolkit.recipe import resolve
from toolkit.run import Run, load_tensors
from toolkit.stages import load_model

TREE = {
    "data": {"dataset": "digits"},
    # Dropout makes the state of the random generator matter.
    "student": {"name": "tpsnet", "blocks": [1, 1, 1], "base": 4, "dropout": 0.2},
    "augment": {"crop_padding": 2, "rotation": 5},
    "optimizer": {"lr": 0.05},
    "schedule": {"warmup_epochs": 1},
    "precision": "fp32",
    "batch_size": 50,
    "epochs": 3,
}


@pytest.fixture(scope="module")
def data():
    """220 digits in 16x16; 20 of 220 training images are a ragged rest for batches of 50."""
    whole = datasets.load(resolve(TREE, "distill", {"data.image_size": 16}).data)
    some = {name: Split(part.images[:n], part.labels[:n]) for name, part, n in parts(whole)}
    return DataSet("digits", whole.classes, mean=whole.mean, std=whole.std, digest="d", **some)


def parts(whole):
    return (("train", whole.train, 220), ("val", whole.val, 100), ("test", whole.test, 100))


def start(folder, **overrides):
    recipe = resolve(TREE, "distill", overrides)
    return recipe, Run.start(folder, recipe, resume=True)


def weights(run):
    return run.checkpoint("best").read_bytes()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_run_stopped_within_an_epoch_ends_as_one_that_was_not(tmp_path, data, monkeypatch, optimizer):
    changes = {"optimizer.name": optimizer, "average_decay": 0.9, "precision": "bf16"}
    recipe, whole = start(tmp_path / "whole", **changes)
    engine.fit(recipe, data, whole)

    class StopAt(engine.StopSignal):
        steps = 0

        @property
        def asked(self):
            StopAt.steps += 1
            return StopAt.steps == 3  # read once a step: within an epoch, and once at the end of all

        @asked.setter
        def asked(self, value):
            pass

    recipe, halved = start(tmp_path / "halved", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "StopSignal", StopAt)
        patch.setattr(engine, "READ_SECONDS", 0.0)
        stops = 0
        while not halved.finished:
            StopAt.steps = 0
            with contextlib.suppress(Interrupted):
                engine.fit(recipe, data, halved)
            stops += not halved.finished
    assert stops == 4
    assert weights(whole) == weights(halved)
    keys = ("epoch", "step", "train_loss", "train_top1", "val_loss", "val_top1", "lr")
    assert [[row[k] for k in keys] for row in whole.history()] == [[row[k] for k in keys] for row in halved.history()]


def test_the_same_recipe_gives_the_same_weights_and_another_seed_does_not(tmp_path, data):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        recipe, run = start(tmp_path / name, seed=seed, epochs=1)
        engine.fit(recipe, data, run)
        runs.append(load_tensors(run.checkpoint("best"))[0])
    a, b, c = runs
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["network.conv.weight"], c["network.conv.weight"])


def test_the_best_epoch_on_val_is_kept_and_the_last_where_val_is_missing(tmp_path, data):
    recipe, run = start(tmp_path / "best")
    summary = engine.fit(recipe, data, run)
    by_epoch = [row["val_top1"] for row in run.history()]
    assert summary["val_top1"] == max(by_epoch)
    assert summary["kept_epoch"] == by_epoch.index(max(by_epoch)) + 1
    model, _ = load_model(run.checkpoint("best"))
    logits = engine.predict(model, data.val.images, torch.device("cpu"))
    assert (logits.argmax(1) == data.val.labels.numpy()).mean() == pytest.approx(summary["val_top1"])

    blind = DataSet("digits", data.classes, data.train, None, data.test, data.mean, data.std, "d")
    recipe, run = start(tmp_path / "last", epochs=2)
    summary = engine.fit(recipe, blind, run)
    assert (summary["val_top1"], summary["kept_epoch"]) == (None, 2)
    last, _ = load_tensors(run.checkpoint("last"))
    best, _ = load_tensors(run.checkpoint("best"))
    assert all(torch.equal(best[key], last[f"model.{key}"]) for key in best)


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, data):
    recipe, run = start(tmp_path / "run", **{"optimizer.lr": 1e30, "schedule.initial_fraction": 0})
    with pytest.raises(DivergedError, match=r"not finite any more at step \d+ \(epoch \d\)"):
        engine.fit(recipe, data, run)
    assert not run.finished
    if run.checkpoint("last").is_file():
        assert all(
            t.isfinite().all() for t in load_tensors(run.checkpoint("last"))[0].values() if t.is_floating_point()
        )


def test_the_student_learns_from_the_teacher_alone_and_leaves_it_as_it_was(tmp_path, data):
    """Labels are shuffled: only the teacher knows, and with ce_weight 0 only the teacher counts."""
    fast = {
        "student": {"name": "resnet9", "widths": [16, 16, 32]},
        "optimizer": {"lr": 0.4, "momentum": 0.85},
        "augment": {"flip": "none", "crop_padding": 0},
        "epochs": 12,
    }
    recipe = resolve(TREE | fast, "distill")
    run = Run.start(tmp_path / "teacher", recipe, resume=False)
    engine.fit(recipe, data, run)
    teacher, _ = load_model(run.checkpoint("best"))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    shuffled = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(0))
    wrong = DataSet(
        "digits",
        data.classes,
        Split(data.train.images, data.train.labels[shuffled]),
        data.val,
        data.test,
        data.mean,
        data.std,
        "d",
    )
    recipe = resolve(
        TREE | fast | {"teacher": {"name": "resnet9_wide"}, "loss": {"ce_weight": 0, "kd_weight": 1}}, "distill"
    )
    student = Run.start(tmp_path / "student", recipe, resume=False)
    engine.fit(recipe, wrong, student, teacher)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    distilled, _ = load_model(student.checkpoint("best"))
    answers = [engine.predict(m, data.test.images, torch.device("cpu")).argmax(1) for m in (teacher, distilled)]
    assert (answers[0] == answers[1]).mean() > 0.6


def test_a_state_of_another_model_is_refused(tmp_path, data):
    recipe, run = start(tmp_path / "run", epochs=1)
    engine.fit(recipe, data, run)
    other = Run.start(tmp_path / "other", resolve(TREE, "distill", {"student.base": 6}), resume=True)
    other.checkpoint("last").parent.mkdir()
    run.checkpoint("last").rename(other.checkpoint("last"))
    with pytest.raises(CheckpointError, match=r"the state of another run.*base"):
        engine.fit(other.recipe, data, other)


def test_metrics_of_a_kill_are_valid_and_rewound(tmp_path, data):
    recipe, run = start(tmp_path / "run", epochs=2)
    engine.fit(recipe, data, run)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 3}) + "\n" + '{"epoch": 4, "st')
    assert [row["epoch"] for row in run.history()] == [1, 2, 3]
    run.rewind(2)
    assert [row["epoch"] for row in run.history()] == [1, 2]


def test_predict_is_the_model_in_batches():
    model = engine.build("resnet9", "student", 7, widths=(8, 8, 8)).eval()
    images = torch.randint(0, 256, (engine.EVAL_BATCH + 3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(images.float() / 255).numpy()
    np.testing.assert_allclose(engine.predict(model, images, torch.device("cpu")), expected, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_was_asked_for_and_is_not_there():
    with pytest.raises(DeviceError, match="cuda was asked for"):
        engine.pick_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_cuda(tmp_path, data):
    recipe, run = start(tmp_path / "run", device="cuda", precision="bf16", epochs=6)
    summary = engine.fit(recipe, data, run)
    assert summary["device"] != "cpu"
    assert summary["val_top1"] > 0.3
