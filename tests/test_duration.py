"""Epochs from minutes."""

import os

import numpy as np
import pytest
import torch
from small_run import TREE

from toolkit import duration, stages
from toolkit.data import DataSet, Split
from toolkit.errors import RecipeError
from toolkit.recipe import resolve
from toolkit.run import Run


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (400, 3, 16, 16), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(400) % 10)
    return DataSet("noise", [str(k) for k in range(10)], split, split, split, (0.5,) * 3, (0.25,) * 3, "d")


def recipe_of(**changes):
    student = {"name": "resnet9", "widths": [8, 8, 8]}
    alone = {"loss.ce_weight": 1, "loss.kd_weight": 0, "schedule.warmup_epochs": 0, "data.image_size": 16}
    return resolve(TREE | {"student": student}, "distill", alone | changes)


def test_the_epochs_are_those_that_the_run_began_with(tmp_path, data, monkeypatch):
    monkeypatch.setattr(duration, "TIMED_STEPS", 2)
    timed = duration.with_epochs(recipe_of(minutes=1), tmp_path / "run", data, None)
    assert timed.minutes is None
    assert timed.epochs > 2
    Run.start(tmp_path / "run", timed, False)
    assert duration.with_epochs(recipe_of(minutes=99), tmp_path / "run", data, None) == timed


def test_the_estimate_by_a_clock_that_is_known(tmp_path, data, monkeypatch):
    """400 images take 4 s, val 1 s, the first views of the teacher 2 s an epoch; starting 10 s."""
    clock = [0.0]

    def fit(recipe, some, run, teacher, on_epoch):
        assert recipe.epochs == 2
        assert len(some.train) == 100
        clock[0] += 10
        for _ in range(recipe.epochs):
            clock[0] += 0.5 + 1 + 1
            on_epoch({"images_per_second": 100.0, "seconds": 1.0, "teacher_seconds": 0.5})

    monkeypatch.setattr(duration, "MARGIN", 1)
    monkeypatch.setattr(duration.engine, "fit", fit)
    monkeypatch.setattr(duration.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(duration, "TIMED_STEPS", 2)
    timed = duration.with_epochs(recipe_of(minutes=2, cached_epochs=3), tmp_path, data, None)
    spent = 10 + 2 * 2.5
    starting = 10 + 2.5 - 1.5
    assert timed.epochs == int((120 - spent - starting - 3 * 2) / (4 + 1))
    clock[0] = 0
    several = recipe_of(minutes=2, cached_epochs=30)  # more views than epochs fit: each epoch has its own
    timed = duration.with_epochs(several, tmp_path, data, None)
    assert timed.epochs == int((120 - spent - starting) / (4 + 1 + 2))
    clock[0] = 0
    with pytest.raises(RecipeError, match="is too short for this recipe here: the 50 epochs of its warm-up take 350 s"):
        duration.with_epochs(recipe_of(minutes=2, epochs=60, **{"schedule.warmup_epochs": 50}), tmp_path, data, None)
    clock[0] = 0
    with monkeypatch.context() as patch:
        patch.setattr(duration, "MARGIN", 2)  # ends early rather than late
        timed = duration.with_epochs(several, tmp_path, data, None)
    assert timed.epochs == int((120 - spent - starting) / 2 / (4 + 1 + 2))
    monkeypatch.setattr("toolkit.distributed.SIZE", 2)
    with pytest.raises(RecipeError, match=r"minutes \(=2\) is for one process"):
        duration.with_epochs(several, tmp_path, data, None)
    monkeypatch.setattr("toolkit.distributed.SIZE", 1)
    clock[0] = 0
    with pytest.raises(RecipeError, match=r"swa_start \(=10\) must be less than the 10 epochs that fit"):
        duration.with_epochs(recipe_of(minutes=2, epochs=30, swa_start=10), tmp_path, data, None)


def test_small_images_and_small_data_are_reckoned_with(tmp_path, data, monkeypatch):
    """Whole images are timed, 100 of them a second: small ones take as much less as they have pixels."""
    clock, seen = [0.0], []

    def fit(recipe, some, run, teacher, on_epoch):
        seen.append((recipe.progressive.start, len(some.train), recipe.schedule.warmup_epochs))
        for _ in range(recipe.epochs):
            clock[0] += 1
            on_epoch({"images_per_second": 100.0, "seconds": 1.0, "teacher_seconds": 0.0})

    monkeypatch.setattr(duration, "MARGIN", 1)
    monkeypatch.setattr(duration.engine, "fit", fit)
    monkeypatch.setattr(duration.time, "monotonic", lambda: clock[0])
    growing = {"progressive.start": 16, "progressive.over": 1, "data.image_size": 32}
    warm = {"schedule.warmup_epochs": 5, "epochs": 9}
    timed = duration.with_epochs(recipe_of(**growing, **warm).model_copy(update={"minutes": 2}), tmp_path, data, None)
    share = sum(10 * side**2 for side in (*[16] * 2, *[20] * 3, *[24] * 2, *[28] * 3)) / (100 * 32**2)
    assert timed.epochs == pytest.approx((120 - 2) / (4 * share), abs=1.5)
    assert timed.progressive.start == 16
    clock[0] = 0
    wanted = recipe_of(**growing, **warm).model_copy(update={"minutes": 2})
    taught = duration.with_epochs(wanted, tmp_path, data, torch.nn.Identity())  # who sees whole images
    assert taught.epochs == (120 - 2) // 4
    clock[0] = 0
    averaged = recipe_of(minutes=2, epochs=99, swa_start=5)
    assert duration.with_epochs(averaged, tmp_path, data, None).epochs == (120 - 2) // (4 + 4)  # BN is measured anew
    del seen[1:]
    clock[0] = 0
    assert duration.with_epochs(recipe_of(minutes=2, batch_size=1000), tmp_path, data, None).epochs == (120 - 2) // 4
    assert seen == [(None, 400, 2), (None, 400, 0)]  # with the warm-up of a long run its first steps do not diverge


def test_too_short_a_time_is_told(tmp_path, data, monkeypatch):
    monkeypatch.setattr(duration, "TIMED_STEPS", 2)
    killed, running = tmp_path / ".timed-1", tmp_path / ".timed-2"
    (killed / "timed").mkdir(parents=True)
    os.utime(killed, (0, 0))
    running.mkdir()
    with pytest.raises(RecipeError, match=r"minutes \(=0\.0001\) is too short for this recipe here: an epoch takes"):
        duration.with_epochs(recipe_of(minutes=0.0001), tmp_path / "run", data, None)
    assert list(tmp_path.iterdir()) == [running]


def test_epochs_that_are_asked_for_win():
    assert resolve("cifar10-gpu", "distill", {"epochs": 7}).minutes is None
    assert resolve("cifar10-gpu", "distill").minutes


SMALL = {
    "data.dataset": "digits", "data.image_size": 16, "data.val_size": 0.1, "device": "cpu", "probe": False,
    "teacher.depth": 10, "teacher.width": 1, "distill.student.stem": 4, "distill.student.widths": [4, 4, 8],
    "distill.student.blocks": [1, 1, 1],
    "train.augment.cutout": 0, "train.augment.policy": "none", "batch_size": 64, "schedule.warmup_epochs": 0,
    "distill.cached_epochs": 2,
}  # fmt: skip


def test_a_run_has_the_epochs_that_fit_into_its_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(duration, "TIMED_STEPS", 2)
    run = stages.train("cifar10-gpu", tmp_path / "teacher", settings=SMALL | {"train.minutes": 0.1})
    assert run.recipe.minutes is None
    assert [row["epoch"] for row in run.history()] == [*range(1, run.recipe.epochs + 1)]
    again = stages.train("cifar10-gpu", tmp_path / "teacher", settings=SMALL | {"train.minutes": 0.1})
    assert again.recipe == run.recipe
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_the_chain_of_the_gpu_recipe_in_small(tmp_path, monkeypatch):
    """Teacher and student of ``toolkit pipeline --recipe cifar10-gpu`` on the digits: smaller nets, a few epochs."""
    few = {"minutes": None, "epochs": 8}
    monkeypatch.setattr(stages, "with_epochs", lambda recipe, *_: recipe.model_copy(update=few))
    teacher = stages.train("cifar10-gpu", tmp_path / "teacher", settings=SMALL)
    wanted = stages.from_teacher(resolve("cifar10-gpu", "distill", SMALL), teacher)
    student = stages.distill(wanted, tmp_path / "student")
    assert student.recipe.augment.mixup == 1
    assert [row["epoch"] for row in student.history()] == [*range(1, 9)]
    assert [run.summary()["val_top1"] > least for run, least in ((teacher, 0.4), (student, 0.2))] == [True, True]
    (cache,) = (tmp_path / "teacher-logits").iterdir()
    views = np.load(cache)
    assert views.shape == (2, 1294, 10)
    assert not np.isnan(views).any()
