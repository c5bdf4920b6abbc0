"""The training loop: determinism, resuming, what is kept, and what stops it."""

import contextlib
import dataclasses
import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import EVERYTHING, TEACHER, TREE, small_digits

from toolkit import checkpoint, distributed, engine, learner, teacher_cache, teaching
from toolkit.augment import Augmenter
from toolkit.classifier import Ensemble
from toolkit.data import DataSet, Split, at_once
from toolkit.errors import DeviceError, DivergedError, Interrupted, RunError, UserError
from toolkit.recipe import BatchGrowth, Teacher, resolve
from toolkit.run import Run, load_model, load_tensors, save_tensors
from toolkit.teacher_cache import TeacherCache


@pytest.fixture(scope="module")
def data():
    return small_digits()


def start(folder, **overrides):
    recipe = resolve(TREE, "distill", overrides)
    return recipe, Run.start(folder, recipe, resume=True)


def weights(run):
    return run.checkpoint("best").read_bytes()


def fit_in_pieces(recipe, data, run, monkeypatch, teacher=None):
    """Train with a stop after every third step; how often it was stopped."""

    class StopAt(engine.StopSignal):
        steps = 0

        @property
        def asked(self):
            StopAt.steps += 1
            return StopAt.steps == 3  # read once a step: within an epoch, and once at the end of all

        @asked.setter
        def asked(self, value):
            pass

    stops = 0
    with monkeypatch.context() as patch:
        patch.setattr(engine, "StopSignal", StopAt)
        patch.setattr(engine, "READ_SECONDS", 0.0)
        while not run.finished:
            StopAt.steps = 0
            with contextlib.suppress(Interrupted):
                engine.fit(recipe, data, run, teacher)
            stops += not run.finished
    return stops


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.name": "sgd", "average_decay": 0.9},
        # Parts of 24: oneDNN's 1x1 convs of less than 16 channels crash on odd batches in bf16, with several threads.
        {"optimizer.name": "adamw", "batch_growth.milestones": [1], "batch_size": 48, "micro_batch": 30},
        {"optimizer.name": "muon", "optimizer.lookahead_steps": 3},
        {"optimizer.sam_radius": 0.1, "swa_start": 1, "student.stochastic_depth": 0.3, "augment.policy": "trivial"},
        # With regressors, and their momentum.
        {**EVERYTHING, "precision": "fp32", "optimizer.lr": 0.01, "epochs": 2, "average_decay": 0.9},
    ],
)
def test_a_run_stopped_within_an_epoch_ends_as_one_that_was_not(tmp_path, data, monkeypatch, changes):
    changes = {"precision": "bf16"} | changes
    recipe, whole = start(tmp_path / "whole", **changes)
    teacher = build_teacher() if recipe.distils else None
    engine.fit(recipe, data, whole, teacher)
    recipe, halved = start(tmp_path / "halved", **changes)
    assert fit_in_pieces(recipe, data, halved, monkeypatch, teacher) > 1
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
    first = []
    for seed in (0, 1):
        recipe, run = start(tmp_path / str(seed), seed=seed, epochs=1, **{"optimizer.lr": 1e-30})
        engine.fit(recipe, data, run)
        first.append(load_tensors(run.checkpoint("best"))[0]["network.conv.weight"])
    assert not torch.equal(*first)  # where they begin is another place, too


def test_the_best_epoch_on_val_is_kept_and_the_last_where_val_is_missing(tmp_path, data):
    recipe, run = start(tmp_path / "best")
    summary = engine.fit(recipe, data, run)
    by_epoch = [row["val_top1"] for row in run.history()]
    assert summary["val_top1"] == max(by_epoch)
    assert summary["kept_epoch"] == by_epoch.index(max(by_epoch)) + 1
    model, _ = load_model(run.checkpoint("best"))
    logits = engine.predict(model, data.val.images, torch.device("cpu"))
    assert (logits.argmax(1) == data.val.labels.numpy()).mean() == pytest.approx(summary["val_top1"])

    recipe, run = start(tmp_path / "last", epochs=2)
    summary = engine.fit(recipe, dataclasses.replace(data, val=None), run)
    assert (summary["val_top1"], summary["kept_epoch"]) == (None, 2)
    last, _ = load_tensors(run.checkpoint("last"))
    best, _ = load_tensors(run.checkpoint("best"))
    assert all(torch.equal(best[key], last[f"model.{key}"]) for key in best)


@pytest.mark.parametrize("changes", [{"optimizer.lookahead_steps": 5}, {"average_decay": 0.9}, {"swa_start": 1}])
def test_averaged_weights_are_what_is_measured_and_kept(tmp_path, data, changes):
    recipe, run = start(tmp_path / "run", select="last", **changes)
    engine.fit(recipe, data, run)
    last, _ = load_tensors(run.checkpoint("last"))
    model, _ = load_model(run.checkpoint("best"))
    measured = []
    for part in ("average.module.", "model."):
        weights = {name: last[part + name] for name in model.state_dict()}
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items()) == (not measured)
        copied = learner.new_model(recipe, data)
        copied.load_state_dict(weights)
        measured.append(engine.evaluate(copied, data.val, torch.device("cpu"), torch.float32))
    row = run.history()[-1]
    assert (row["val_loss"], row["val_top1"]) == pytest.approx(measured[0], rel=1e-4)
    assert row["val_loss"] != pytest.approx(measured[1][0], rel=1e-3)


@pytest.mark.parametrize(("select", "kept", "top1"), [("best", 2, 0.9), ("last", 3, 0.1)])
def test_val_is_read_every_other_epoch_and_after_the_last(tmp_path, data, monkeypatch, select, kept, top1):
    measured = iter([(1.0, 0.9), (1.0, 0.1)])
    monkeypatch.setattr(engine, "evaluate", lambda *_: next(measured))
    recipe, run = start(tmp_path / "run", select=select, eval_epochs=2)
    summary = engine.fit(recipe, data, run)
    assert [row["val_top1"] for row in run.history()] == [None, 0.9, 0.1]
    assert (summary["kept_epoch"], summary["val_top1"]) == (kept, top1)
    assert load_tensors(run.checkpoint("best"))[1]["epoch"] == kept


class Plain(torch.nn.Module):
    """A net without batch statistics, for which the gradient of a batch is the mean of its parts'."""

    def __init__(self, memory=None, fails=0):
        super().__init__()
        self.conv, self.head, self.memory = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 10), memory
        self.fails, self.calls = fails, 0

    def forward(self, images):
        self.calls += self.training
        if (self.training and self.memory and len(images) > self.memory) or (
            self.training and self.calls == self.fails
        ):
            raise torch.OutOfMemoryError
        return self.head(torch.relu(self.conv(images)).mean((2, 3)))

    def prepare(self, images):
        pass


def test_parts_of_a_batch_add_up_to_the_same_steps(tmp_path, data, monkeypatch):
    """By recipe, and where the device's memory does not hold the batch."""
    ends = []
    second = {"micro_batch": 25}, 2  # it is full in the second part: what the first gave counts once
    for name, memory, changes, fails in (("whole", None, {}, 0), ("parts", None, {"micro_batch": 15}, 0),
                                         ("full", 20, {}, 0), ("full later", None, *second)):  # fmt: skip
        recipe, run = start(tmp_path / name, **changes)
        monkeypatch.setattr(learner, "new_model", lambda *_, memory=memory, fails=fails: Plain(memory, fails))
        engine.fit(recipe, data, run)
        ends.append(load_tensors(run.checkpoint("best"))[0])
    for other in ends[1:]:
        for key, value in ends[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6)
    recipe, run = start(tmp_path / "hopeless")
    monkeypatch.setattr(learner, "new_model", lambda *_: Plain(1))
    with pytest.raises(DeviceError, match="does not hold a step"):
        engine.fit(recipe, data, run)


def test_seconds_are_counted_once_however_often_a_run_is_stopped(tmp_path, data, monkeypatch):
    """Each step takes one, and each look at the teacher's answers ten."""
    clock = [0.0]

    def takes(seconds, kind, name):
        call = getattr(kind, name)

        def slow(*arguments):
            clock[0] += seconds
            return call(*arguments)

        monkeypatch.setattr(kind, name, slow)

    takes(1, learner.Learner, "step")
    takes(10, TeacherCache, "epoch")
    monkeypatch.setattr(engine.time, "monotonic", lambda: clock[0])
    changes = {"cached_epochs": 1, "loss.kd_weight": 1, "teacher.name": "wrn28"}
    recipe, run = start(tmp_path / "run", **changes)
    assert fit_in_pieces(recipe, data, run, monkeypatch, build_teacher()) > 1
    assert [(row["seconds"], row["images_per_second"]) for row in run.history()] == [(4, 50)] * 3
    assert run.summary()["train_seconds"] == 12


def build_teacher():
    return learner.build("resnet9_wide", "teacher", 10, widths=TEACHER["widths"])


def test_signals_are_for_the_training_alone_and_the_second_ends_it_at_once():
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]
    with engine.StopSignal() as stop:
        assert not {signal.getsignal(kind) for kind in kinds} & {*before}
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(kind) for kind in kinds] == before


def test_the_batch_grows_at_milestones_and_where_the_loss_stops_falling(tmp_path, data):
    growth = {"batch_growth.milestones": [1, 2], "batch_growth.factor": 3, "batch_growth.ceiling": 120}
    recipe, run = start(tmp_path / "run", **growth)
    summary = engine.fit(recipe, data, run)
    assert [(row["batch_size"], row["step"]) for row in run.history()] == [(50, 4), (120, 5), (120, 6)]
    assert summary["steps"] == 6

    config, at, sizes = BatchGrowth(patience=2, ceiling=100), checkpoint.Position(batch_size=25), []
    for epoch, loss in enumerate((3, 2, 2.1, 2.2, 2.3, 2.2, 2.4, 2.5, 2.5), 1):
        row = {"epoch": epoch, "batch_size": at.batch_size, "train_loss": loss}
        at.batch_size = engine.next_batch(config, at, row, 220)
        sizes.append(at.batch_size)
    assert sizes == [25, 25, 25, 50, 50, 50, 50, 100, 100]


@pytest.mark.parametrize(("ceiling", "most", "expected"), [(100, 220, 99), (200, 121, 120), (90, 220, 90)])
def test_a_batch_that_grows_stays_one_that_all_processes_share(monkeypatch, ceiling, most, expected):
    monkeypatch.setattr(distributed, "SIZE", 3)
    growth = BatchGrowth(milestones=[1], factor=9, ceiling=ceiling)
    row = {"epoch": 1, "batch_size": 30, "train_loss": 1}
    assert engine.next_batch(growth, checkpoint.Position(), row, most) == expected


def test_a_run_ends_when_val_stops_improving_and_stays_ended(tmp_path, data):
    still = {"optimizer.lr": 1e-30, "epochs": 40, "early_stop.patience": 2, "early_stop.metric": "val_top1"}
    recipe, run = start(tmp_path / "run", **still)
    summary = engine.fit(recipe, data, run)
    top1 = [row["val_top1"] for row in run.history()]
    assert summary["epochs"] == len(top1) == summary["kept_epoch"] + 2 < 40
    assert summary["val_top1"] == max(top1)
    (run.path / "summary.json").unlink()  # killed just before the end
    assert engine.fit(recipe, data, run) | {"peak_memory_bytes": 0} == summary | {"peak_memory_bytes": 0}


def test_images_grow_for_the_student_and_are_whole_for_the_teacher(tmp_path, monkeypatch):
    data = small_digits(24)
    seen = {"student": [], "teacher": []}

    class Watched(Plain):
        def __init__(self, who):
            super().__init__()
            self.who = who

        def forward(self, images):
            if self.training or self.who == "teacher":
                seen[self.who].append(images.shape[-1])
            return super().forward(images)

    changes = {"progressive.start": 16, "progressive.over": 0.75, "data.image_size": 24, "epochs": 4}
    changes |= {"loss.kd_weight": 1, "teacher.name": "wrn28"}
    recipe, run = start(tmp_path / "run", **changes)
    monkeypatch.setattr(learner, "new_model", lambda *_: Watched("student"))
    engine.fit(recipe, data, run, Watched("teacher"))
    assert seen["student"] == [16] * 4 + [16] * 4 + [20] * 4 + [24] * 4
    assert set(seen["teacher"]) == {24}


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, data, monkeypatch):
    recipe, run = start(tmp_path / "run")
    monkeypatch.setattr(learner.Learner, "lr", lambda self, done: 0.05 if done < 1 else 1e30)
    with pytest.raises(
        DivergedError, match=r"not finite any more at step \d+ \(epoch 2\); the last good checkpoint is"
    ):
        engine.fit(recipe, data, run)
    assert not run.finished
    assert all(t.isfinite().all() for t in load_tensors(run.checkpoint("last"))[0].values() if t.is_floating_point())


@pytest.mark.parametrize("held_out", [True, False])
def test_weights_that_break_in_the_last_step_are_no_result(tmp_path, data, monkeypatch, held_out):
    """The loss, which is computed before a step's update, does not know; states are written in every step."""
    recipe, run = start(tmp_path / "run", checkpoint_minutes=1e-9)
    monkeypatch.setattr(engine, "READ_SECONDS", 0.0)
    monkeypatch.setattr(learner.Learner, "lr", lambda self, done: 0.05 if done < 2.7 else 1e30)
    with pytest.raises(DivergedError, match=r"weights are not finite .* step 12 \(epoch 3\); the last good"):
        engine.fit(recipe, data if held_out else dataclasses.replace(data, val=None), run)
    assert not run.finished
    assert [row["epoch"] for row in run.history()] == [1, 2]
    for state in (run.path / "checkpoints").iterdir():
        assert all(t.isfinite().all() for t in load_tensors(state)[0].values() if t.is_floating_point())


def test_a_val_loss_that_is_not_finite_is_no_result(tmp_path, data, monkeypatch):
    recipe, run = start(tmp_path / "run")
    monkeypatch.setattr(engine, "evaluate", lambda *_: (float("nan"), 0.1))
    with pytest.raises(DivergedError, match=r"val loss is not finite any more at step 4 \(epoch 1\); no checkpoint"):
        engine.fit(recipe, data, run)
    assert not run.checkpoint("best").exists()
    with pytest.raises(ValueError, match="JSON"):  # of which NaN is no part
        run.append({"val_loss": float("nan")})


def test_a_signal_in_the_last_validation_stops_what_comes_next(tmp_path, data, monkeypatch):
    recipe, run = start(tmp_path / "run", epochs=1)

    def measured(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return 1.0, 0.5

    monkeypatch.setattr(engine, "evaluate", measured)
    with pytest.raises(Interrupted, match="run is finished; stopped before what comes after it"):
        engine.fit(recipe, data, run)
    assert engine.fit(recipe, data, run)["val_top1"] == 0.5


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
    wrong = dataclasses.replace(data, train=Split(data.train.images, data.train.labels[shuffled]))
    recipe = resolve(
        TREE | fast | {"teacher": {"name": "resnet9_wide"}, "loss": {"ce_weight": 0, "kd_weight": 1}}, "distill"
    )
    student = Run.start(tmp_path / "student", recipe, resume=False)
    engine.fit(recipe, wrong, student, teacher)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    distilled, _ = load_model(student.checkpoint("best"))
    answers = [engine.predict(m, data.test.images, torch.device("cpu")).argmax(1) for m in (teacher, distilled)]
    assert (answers[0] == answers[1]).mean() > 0.6


def test_cached_logits_replay_the_run_that_had_its_teacher(tmp_path, data):
    """With mixed images; the second run's teacher must never be asked."""

    class Asked(torch.nn.Module):
        def __init__(self, allowed):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.allowed = torch.nn.Linear(3, 10), allowed

        def forward(self, images):
            assert self.allowed
            return 5 * self.net(images.mean((2, 3)))

    changes = {"loss.kd_weight": 0.7, "loss.ce_weight": 0.3, "teacher.name": "wrn28", "augment.cutmix": 1.0}
    losses = {}
    for name, allowed, views in (("online", True, 0), ("fills", True, 3), ("replays", False, 3), ("few", True, 1)):
        recipe, run = start(tmp_path / "runs" / name, cached_epochs=views, **changes)
        engine.fit(recipe, data, run, Asked(allowed))
        losses[name] = [row["train_loss"] for row in run.history()]
    assert losses["fills"] == losses["replays"]
    assert losses["replays"] == pytest.approx(losses["online"], rel=2e-3)
    assert losses["few"][1:] != pytest.approx(losses["online"][1:], rel=2e-3)
    caches = set((tmp_path / "runs" / "teacher-logits").iterdir())
    assert len(caches) == 2
    torn = np.load(next(path for path in caches if path.name.endswith("-3.npy")), mmap_mode="r+")
    torn[0, 7, 3:] = np.nan  # half a row, as a power cut leaves it
    torn.flush()
    recipe, run = start(tmp_path / "runs" / "torn", cached_epochs=3, **changes)
    with pytest.raises(AssertionError):
        engine.fit(recipe, data, run, Asked(False))
    torn[0, 7, 3:] = 0
    torn.flush()
    whole = next(path for path in caches if path.name.endswith("-3.npy"))
    whole.write_bytes(whole.read_bytes()[:-1000])  # a copy that was cut short
    recipe, run = start(tmp_path / "runs" / "short", cached_epochs=3, **changes)
    with pytest.raises(AssertionError):
        engine.fit(recipe, data, run, Asked(False))
    recipe, run = start(tmp_path / "runs" / "seed", cached_epochs=3, seed=1, **changes)
    with pytest.raises(AssertionError):  # a cache of other views is not taken
        engine.fit(recipe, data, run, Asked(False))


def test_everything_that_decides_the_logits_decides_their_file(tmp_path, data, monkeypatch):
    teacher, other = Plain(), Plain()
    given = {"loss.kd_weight": 1, "teacher.name": "wrn28", "cached_epochs": 2}

    def path(data=data, teacher=teacher, dtype=torch.float32, **changes):
        return TeacherCache(tmp_path, resolve(TREE, "distill", given | changes), data, teacher, dtype).path

    killed, writing = tmp_path / ".a-2.npy.k3x_81yz.tmp", tmp_path / ".b-2.npy.k3x_81yz.tmp"
    killed.touch()
    os.utime(killed, (0, 0))
    writing.touch()
    others = [path(teacher=other), path(dataclasses.replace(data, digest="e")), path(dtype=torch.bfloat16)]
    others += [path(**change) for change in ({"data.split_seed": 1}, {"data.val_size": 0.2}, {"data.group_by": "x"})]
    others += [path(**change) for change in ({"augment.cutout": 4}, {"augment.plain_copy": True}, {"seed": 1})]
    mixed, sampled = {"augment.mixup": 1}, {"balance": "sampling"}
    others += [path(**mixed), path(**mixed, **sampled)]  # which draws the partners
    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "VIEWS", -1)
        others.append(path())
    assert len({path(), *others}) == 13
    assert path() == path(**sampled)
    assert path() == path(**{"optimizer.lr": 0.01, "epochs": 9})  # of which they know nothing
    assert set(tmp_path.glob(".*")) == {writing}  # what a kill left is removed


def test_a_pass_of_the_teacher_that_is_stopped_goes_on_where_it_was(tmp_path, data, monkeypatch):
    asked = []

    class Counts(torch.nn.Module):
        def forward(self, images):
            asked.append(len(images))
            return torch.ones(len(images), 10)

    monkeypatch.setattr(teacher_cache, "images_at_once", lambda *_: 100)
    given = {"loss.kd_weight": 1, "teacher.name": "wrn28", "cached_epochs": 1}
    recipe = resolve(TREE, "distill", given)
    augmenter = Augmenter(data.train.images, data.train.labels, 10, recipe.augment, 0)
    augmenter.start_epoch(0)

    def logits(*go_on):
        answers = iter(go_on)
        return TeacherCache(tmp_path, recipe, data, Counts(), torch.float32).epoch(0, augmenter, lambda: next(answers))

    assert logits(True, False) is None
    assert logits(True, True).eq(1).all()
    assert asked == [100, 100, 20]


def test_an_ensemble_is_the_mean_of_probabilities():
    members = [Plain() for _ in range(3)]
    images = torch.rand(5, 3, 16, 16)
    together = Ensemble(members)(images)
    expected = torch.stack([member(images).softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(together.exp(), expected)


def test_compiling_leaves_the_state_and_its_failure_the_model(monkeypatch, capfd):
    """The compiler itself runs on CUDA alone; here it is an identity, and then it fails."""

    def fails(images):
        raise RuntimeError("no Triton")

    model = learner.build("resnet9", "student", 7, widths=(8, 8, 8)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for compiler, said in ((lambda net, **_: net, "not counted as training"), (lambda *_, **__: fails, "no Triton")):
        monkeypatch.setattr(torch, "compile", compiler)
        assert learner.compiled(model, torch.rand(4, 3, 16, 16), torch.bfloat16) is model
        assert said in capfd.readouterr().err
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_states_are_kept_as_wanted_and_the_oldest_is_enough(tmp_path, data, keep, capfd):
    recipe, run = start(tmp_path / "run", keep_checkpoints=keep)
    engine.fit(recipe, data, run)
    states = ["last", "last-1", "last-2"][:keep]
    assert sorted(p.stem for p in run.checkpoint("best").parent.iterdir()) == ["best", *states]
    losses, whole = [row["train_loss"] for row in run.history()], weights(run)
    for name in states[:-1]:
        run.checkpoint(name).write_bytes(run.checkpoint(name).read_bytes()[:-100])
    (run.path / "summary.json").unlink()
    run.checkpoint("last-whole").write_bytes(b"somebody's own copy")
    changed = recipe.model_copy(update={"keep_checkpoints": 2, "device": "cpu"})
    run = Run.start(run.path, changed, resume=True)
    assert run.checkpoint("last-whole") not in run.states
    engine.fit(changed, data, run)
    assert Run(run.path).recipe == changed  # for those who go on without saying it again
    assert capfd.readouterr().err.count("going on with the state before it") == keep - 1
    assert [row["train_loss"] for row in run.history()] == losses
    assert weights(run) == whole
    assert sorted(p.stem for p in run.checkpoint("best").parent.iterdir()) == ["best", *states[:2], "last-whole"]


def test_a_disk_that_fills_leaves_the_last_state_to_go_on_from(tmp_path, data, monkeypatch):
    recipe, whole = start(tmp_path / "whole", select="last")
    engine.fit(recipe, data, whole)
    recipe, run = start(tmp_path / "run", select="last")
    before = []

    def full(descriptor):
        if run.checkpoint("last").is_file():
            before.append(run.checkpoint("last").read_bytes())
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"the disk is full: .*next\.safetensors .*; what was there before is kept"):
            engine.fit(recipe, data, run)
    assert [path.name for path in run.checkpoint("last").parent.iterdir()] == ["last.safetensors"]
    assert [run.checkpoint("last").read_bytes()] == before
    engine.fit(recipe, data, run)
    assert weights(run) == weights(whole)
    assert [row["train_loss"] for row in run.history()] == [row["train_loss"] for row in whole.history()]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no file that is always full")
def test_a_row_that_finds_the_disk_full(tmp_path):
    run = start(tmp_path / "run")[1]
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"the disk is full: .*metrics\.jsonl could not be written"):
        run.append({"epoch": 1})


def test_of_several_processes_the_first_writes_the_state(tmp_path, data, monkeypatch):
    recipe, run = start(tmp_path / "run")
    learning = learner.Learner(recipe, data, run, torch.device("cpu"), None)
    state = checkpoint.Checkpoint(run, learning, engine.describe(recipe, data))
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "RANK", rank)
        state.save(checkpoint.Position())
        assert bool(run.states) == (rank == 0)


def test_two_processes_do_not_write_one_run(tmp_path, data):
    recipe, run = start(tmp_path / "run")
    with run.lock(), pytest.raises(RunError, match=r"written by another process \(\d+\)"):
        engine.fit(recipe, data, run)


def test_weights_of_large_images_are_loaded_into_the_net_that_was_trained(tmp_path):
    """From 64 pixels on the stem has other strides, and the same parameters."""
    data = small_digits(64)
    recipe = resolve(TREE, "distill", {"data.image_size": 64})
    model = learner.new_model(recipe, data).eval()
    save_tensors(tmp_path / "w.safetensors", model.state_dict(), engine.describe(recipe, data))
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(load_model(tmp_path / "w.safetensors")[0](images), model(images))


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_run_that_was_stopped_early_is_not_extended(tmp_path, data, epochs):
    """Nor is one whose last epoch was what stopped it."""
    recipe, run = start(tmp_path / "run", epochs=epochs, **{"early_stop.patience": 1, "optimizer.lr": 1e-9})
    engine.fit(recipe, data, run)
    with pytest.raises(RunError, match=f"was stopped early, after 2 of {epochs} epochs"):
        Run.start(run.path, recipe.model_copy(update={"epochs": 9}), resume=True, extend=True)


def test_a_run_without_a_training_state_is_not_extended_from_nothing(tmp_path, data):
    recipe, run = start(tmp_path / "run", epochs=1)
    engine.fit(recipe, data, run)
    for state in (run.path / "checkpoints").glob("last*"):
        state.unlink()
    before = weights(run)
    with pytest.raises(RunError, match=f"no training state any more.*--init {run.path}"):
        Run.start(run.path, recipe.model_copy(update={"epochs": 2}), resume=True, extend=True)
    assert weights(run) == before
    assert run.finished


def unequal():
    """100 images, 5 of them of the second class, which are the bright ones."""
    labels = (torch.arange(100) >= 95).long()
    images = (labels * 255).to(torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16).contiguous()
    split = Split(images, labels)
    return DataSet("unequal", ["usual", "rare"], split, split, split, (0.5,) * 3, (0.25,) * 3, "d")


def test_a_perfect_teacher_of_unequal_classes_may_teach():
    """Its 100 val images are too few to tell it from a guess by three standard deviations."""

    class Perfect(torch.nn.Module):
        def forward(self, images):
            bright = images.mean((1, 2, 3))
            return torch.stack([1 - bright, bright], 1)

    recipe = resolve(TREE, "distill", {"data.image_size": 16})
    found = teaching.preflight(Perfect(), Teacher(name="perfect.onnx"), unequal(), recipe)
    assert (found["top1"], found["images"]) == (1, 100)


def test_balanced_sampling_is_held_to_the_chance_of_equal_classes():
    data = unequal()
    rows, four = [{"epoch": 50, "step": 5000, "train_top1": 0.35}], data.train.labels.clone()
    four[: len(four) // 2] = torch.arange(len(four) // 2) % 3 + 1  # the commonest of four classes is 0.45 to 0.5
    data = dataclasses.replace(data, classes=("a", "b", "c", "d"), train=Split(data.train.images, four))
    assert engine.gives_up(resolve(TREE, "distill"), rows, data)
    for balance in ("sampling", "weights"):
        assert not engine.gives_up(resolve(TREE, "distill", {"balance": balance}), rows, data)
    assert not engine.gives_up(resolve(TREE, "distill"), rows, unequal())  # 95 of 100 are one class: top-1 is blind


def test_a_run_is_extended_by_name_alone(tmp_path, data):
    changes = {"schedule.name": "constant"}
    recipe, run = start(tmp_path / "run", epochs=2, **changes)
    engine.fit(recipe, data, run)
    longer = resolve(TREE, "distill", {"epochs": 3, **changes})
    with pytest.raises(RunError, match=r"epochs: 2 -> 3.*--extend"):
        Run.start(run.path, longer, resume=True)
    with pytest.raises(RunError, match="seed: 0 -> 1"):
        Run.start(run.path, longer.model_copy(update={"seed": 1}), resume=True, extend=True)
    with pytest.raises(RunError, match="epochs: 2 -> 1"):
        Run.start(run.path, longer.model_copy(update={"epochs": 1}), resume=True, extend=True)
    assert run.finished
    extended = Run.start(run.path, longer, resume=False, extend=True)
    before = torch.get_rng_state()
    engine.fit(longer, data, extended)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's
    _, straight = start(tmp_path / "straight", epochs=3, **changes)
    engine.fit(straight.recipe, data, straight)
    same = "train_loss", "val_loss"
    assert [[row[k] for k in same] for row in extended.history()] == [
        [row[k] for k in same] for row in straight.history()
    ]


def test_training_that_stays_at_chance_is_stopped(tmp_path, data, monkeypatch):
    monkeypatch.setattr(engine, "CHANCE_STEPS", 40)  # 4 an epoch
    recipe, run = start(tmp_path / "run", **{"optimizer.lr": 1e-30, "epochs": 14})
    with pytest.raises(DivergedError, match=r"after 11 epochs, and never was better than a guess.* 44 steps"):
        engine.fit(recipe, data, run)


def test_few_steps_and_a_bad_epoch_are_no_reason_to_give_up(data):
    recipe, guess = resolve(TREE, "distill"), {"train_top1": 0.1}
    assert engine.gives_up(recipe, [guess, guess | {"epoch": 50, "step": 300}], data)
    assert not engine.gives_up(recipe, [guess, guess | {"epoch": 50, "step": 299}], data)
    assert not engine.gives_up(recipe, [{"train_top1": 0.3}, guess | {"epoch": 50, "step": 300}], data)


OFF = {"loss.methods": {"fitnets": {}, "soft_targets": {"weight": 0}}}
FEATURES, UNLABELLED = {"loss.methods": {"fitnets": {}}}, {"data.unlabelled": True, "data.dataset": "folder:photos"}


@pytest.mark.parametrize(
    ("changes", "top1", "expected"),
    [({}, 0.1, True), ({}, 0.3, False), (FEATURES, 0.1, False), (OFF, 0.1, False), (UNLABELLED, 0.1, False)],
    ids=["a guess", "it learns", "features alone", "the others off", "no labels"],
)
def test_a_teacher_alone_is_held_to_the_labels_where_they_tell_something(data, changes, top1, expected):
    alone = {"loss.ce_weight": 0, "loss.kd_weight": 1, "teacher.name": "resnet9_wide"}
    recipe = resolve(TREE, "distill", alone | changes)
    assert engine.gives_up(recipe, [{"epoch": 50, "step": 300, "train_top1": top1}], data) == expected


def test_a_teacher_that_finds_rare_classes_is_copied_at_the_expense_of_the_commonest(data):
    labels = torch.cat([torch.zeros(100, dtype=torch.long), torch.arange(120) % 9 + 1])
    data = dataclasses.replace(data, train=Split(data.train.images, labels))
    rows = [{"epoch": 50, "step": 300, "train_top1": 0.4}]
    alone = {"loss.ce_weight": 0, "loss.kd_weight": 1, "teacher.name": "resnet9_wide"}
    assert engine.gives_up(resolve(TREE, "distill"), rows, data)
    assert not engine.gives_up(resolve(TREE, "distill", alone), rows, data)


def test_metrics_of_a_kill_are_valid_and_rewound(tmp_path):
    _, run = start(tmp_path / "run")
    run.append({"epoch": 1})
    run.append({"epoch": 2})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 3}) + "\n" + '{"epoch": 4, "st')
    assert [row["epoch"] for row in run.history()] == [1, 2, 3]
    run.rewind(2)
    assert [row["epoch"] for row in run.history()] == [1, 2]


def test_predict_is_the_model_in_batches():
    model = learner.build("resnet9", "student", 7, widths=(8, 8, 8)).eval()
    images = torch.randint(0, 256, (2 * at_once(64) + 3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(images.float() / 255).numpy()
    np.testing.assert_allclose(engine.predict(model, images, torch.device("cpu")), expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("default")  # else the compiler's end as its failure
def test_training_on_cuda(tmp_path, data, capsys):
    recipe, run = start(tmp_path / "run", device="cuda", precision="bf16", epochs=6)
    summary = engine.fit(recipe, data, run)
    assert summary["device"] != "cpu"
    assert summary["val_top1"] > 0.3
    assert "compiled in" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_deterministic_run_on_cuda_repeats_to_the_last_bit(tmp_path, data, monkeypatch):
    """Also where it is stopped and resumed."""
    changes = {"device": "cuda", "deterministic": True, "compile": False, "augment.policy": "trivial"}
    try:
        recipe, whole = start(tmp_path / "whole", **changes)
        engine.fit(recipe, data, whole)
        recipe, halved = start(tmp_path / "halved", **changes)
        assert fit_in_pieces(recipe, data, halved, monkeypatch) > 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert weights(whole) == weights(halved)
