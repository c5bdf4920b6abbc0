"""Which run a command finds by itself: the teacher's, and the newest."""

import os
from pathlib import Path

import pytest

from toolkit import stages, teaching
from toolkit.choices import Stage
from toolkit.errors import RunError
from toolkit.recipe import resolve
from toolkit.run import SHIPPED, Run, newest_artifact


def made(name: str, age: int, stage: Stage = "train", finished: bool = True, **settings: object) -> Run:
    """A run by hand, of the recipe ``digits``, that was begun so many hours ago."""
    run = Run.start(Path("runs", name), resolve("digits", stage, settings), resume=False)
    for file in (run.checkpoint("best"), run.artifact):
        file.parent.mkdir()
        file.touch()
    if finished:
        run.finish({})
    for file in run.path.rglob("*"):
        os.utime(file, (1e9 - 3600 * age,) * 2)
    return run


def test_a_kill_in_the_first_write_leaves_a_directory_that_can_be_used(nowhere: Path) -> None:
    recipe = resolve("digits", "train")
    left = nowhere / "run/.recipe.yaml.k3x_81yz.tmp"
    left.parent.mkdir()
    left.write_text("epochs:")
    assert Run.start(left.parent, recipe, resume=False).recipe == recipe
    letter = nowhere / "letters/mum.txt"
    letter.parent.mkdir()
    left.rename(letter.with_name(left.name))
    letter.write_text("dear")
    with pytest.raises(RunError, match="is not a run directory"):
        Run.start(letter.parent, recipe, resume=False)


def test_the_teacher_is_the_newest_finished_run_on_the_same_images(nowhere: Path) -> None:
    others = [
        {"data.split_seed": 1},
        {"data.val_size": 0.2},
        {"data.image_size": 48},
        {"data.group_by": "(.)"},
        {"teacher.widths": [8, 16, 32]},
    ]
    for number, settings in enumerate(others):
        made(f"other-{number}", age=number, **settings)
    made("unfinished", age=5, finished=False)
    made("new", age=6)
    made("old", age=7, **{"optimizer.lr": 0.1})
    assert teaching.find(resolve("digits", "distill")) == Path("runs/new/checkpoints/best.safetensors")
    found = [teaching.find(resolve("digits", "distill", settings)) for settings in others]
    assert found == [Path(f"runs/other-{number}/checkpoints/best.safetensors") for number in range(len(others))]


def test_the_newest_student_goes_before_a_newer_teacher(nowhere: Path) -> None:
    made("teacher", age=1)
    assert stages.newest_run().path == Path("runs/teacher")
    made("old", age=4, stage="distill")
    made("new", age=3, stage="distill", seed=1)
    made("unfinished", age=2, stage="distill", seed=2, finished=False)
    assert stages.newest_run().path == Path("runs/new")


def test_the_newest_artifact_is_the_one_that_was_exported_last(nowhere: Path) -> None:
    assert newest_artifact() == SHIPPED
    old, new = (made(name, age, stage="distill", seed=age) for name, age in (("old", 2), ("new", 1)))
    assert newest_artifact() == new.artifact
    old.artifact.touch()
    new.artifact.with_name(".student.onnx").touch()  # is being written
    assert newest_artifact() == old.artifact
