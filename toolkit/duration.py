"""How many epochs fit into the minutes that a recipe gives: for a machine that is lent for a while."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit import distributed, engine
from toolkit.compute import pick_device
from toolkit.data import DataSet
from toolkit.errors import Interrupted, RecipeError
from toolkit.files import DAY, check_writable, remove_stale
from toolkit.learner import NORM_IMAGES
from toolkit.progress import say
from toolkit.recipe import Progressive, Recipe
from toolkit.run import Run

TIMED_STEPS, TIMED_STEPS_GPU = 20, 100  # in each of a few short epochs; the second is timed
MARGIN = 1.05  # a run that ends early has lost less than one that is cut off


def with_epochs(recipe: Recipe, path: Path, data: DataSet, teacher: nn.Module | None) -> Recipe:
    """The recipe with ``epochs`` in place of ``minutes``: as its run at ``path`` began, else as timed here.

    A few short epochs of the one training loop are timed in a directory beside it that is thrown away; the time that
    this takes, compiling included, counts. Raises ``RecipeError`` where fewer epochs
    fit than the warm-up takes, or than come before SWA, and for several processes; ``Interrupted`` after a signal.
    """
    if recipe.minutes is None:
        return recipe
    if known := Run.at(path):
        return recipe.model_copy(update={"minutes": None, "epochs": known.recipe.epochs})
    if distributed.SIZE > 1:
        raise RecipeError(f"minutes (={recipe.minutes:g}) is for one process: set epochs for several")
    check_writable(path / "recipe.yaml")
    began = time.monotonic()
    seen: list[tuple[float, dict[str, Any]]] = []  # when each short epoch ended, and its row
    gpu = pick_device(recipe.device).type == "cuda"
    count = min((TIMED_STEPS_GPU if gpu else TIMED_STEPS) * recipe.batch_size, len(data.train))
    some = dataclasses.replace(data, train=data.train.select(torch.arange(count)))  # read as all of them will be

    def short(epochs: int) -> Recipe:
        warmup = min(recipe.schedule.warmup_epochs, epochs)  # without it the loss may grow beyond all numbers
        schedule = recipe.schedule.model_copy(update={"warmup_epochs": warmup})
        length = {"minutes": None, "epochs": epochs, "eval_epochs": 1}
        return recipe.model_copy(update=length | {"schedule": schedule, "swa_start": None})

    # The second epoch is timed: the first includes one-off costs, on a GPU the last includes writing the state.
    timed_recipe = short(3 if gpu else 2)
    say("timing a few short epochs")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent, ".timed-*", DAY)  # younger ones may be another run's
    passes = {}
    if gpu:  # what a process has compiled once starts at once; one epoch is enough, unless image or batch size grow
        grows = recipe.progressive.start or recipe.batch_growth.milestones or recipe.batch_growth.patience
        passes["compiled"] = timed_recipe if grows else short(1)
    # In whole images: how much less the small ones take is known.
    passes["timed"] = timed_recipe.model_copy(update={"progressive": Progressive()})
    with tempfile.TemporaryDirectory(prefix=".timed-", dir=path.parent) as folder:  # on the disk that the run is on
        for name, timed in passes.items():
            started = time.monotonic()
            seen.clear()
            try:
                # A folder of its own: the teacher's answers are kept beside a run.
                run = Run.start(Path(folder, name, "run"), timed, False)
                engine.fit(timed, some, run, teacher, lambda row: seen.append((time.monotonic(), row)))
            except Interrupted as error:
                raise Interrupted("stopped while a few short epochs were timed; the run had not begun") from error
    (first_end, first), (second_end, second), *_ = seen
    samples = len(data.train) * recipe.augment.copies
    batch, whole = min(recipe.batch_size, samples), recipe.data.image_size
    share = sum((recipe.progressive.side(i / 100, whole) / whole) ** 2 for i in range(100)) / 100  # of all pixels
    if teacher is not None and not recipe.cached_epochs:
        share = 1  # the teacher, which is most of a step, sees them whole
    training = share * (samples // batch * batch) / second["images_per_second"]
    # Of one epoch's views, which are all that there are where the second epoch replays the first one's.
    teaching = max(first["teacher_seconds"], second["teacher_seconds"]) * len(data.train) / count
    beside = max(second_end - first_end - second["seconds"] - second["teacher_seconds"], 0)  # val and the checkpoint
    if recipe.swa_start is not None:  # BN is measured anew, at most as slowly as images are trained on
        beside += min(NORM_IMAGES, samples) / second["images_per_second"]
    starting = max(first_end - started - first["seconds"] - first["teacher_seconds"], 0)
    left = (60 * recipe.minutes - (time.monotonic() - began) - starting) / MARGIN
    epochs = int(left / (training + beside + teaching))
    if epochs > recipe.cached_epochs:  # from there on the teacher's answers are replayed
        epochs = int((left - teaching * recipe.cached_epochs) / (training + beside))
    if epochs < max(1, warmup := recipe.schedule.warmup_epochs):
        needed = f"the {warmup:g} epochs of its warm-up take" if warmup > 1 else "an epoch takes"
        raise RecipeError(
            f"minutes (={recipe.minutes:g}) is too short for this recipe here: {needed} "
            f"{max(1, warmup) * (training + beside + teaching):.0f} s, starting {starting:.0f} s"
        )
    if recipe.swa_start is not None and recipe.swa_start >= epochs:
        raise RecipeError(f"swa_start (={recipe.swa_start}) must be less than the {epochs} epochs that fit")
    say(f"{epochs} epochs of {training + beside:.1f} s fit into {recipe.minutes:g} minutes")
    return recipe.model_copy(update={"minutes": None, "epochs": epochs})
