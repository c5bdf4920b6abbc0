"""Every system of the five reports, trained from its shipped recipe, shortened by one rule for all, in one table.

The rule:

- The same images for all: the first of each class, ``--images`` in all, of CIFAR-10's training set. None are held
  out: nothing stops early, and the last epoch is measured, on the first ``--test-images`` of each class likewise.
- As many samples for all: a recipe's ``epochs`` become ``--epochs`` (half where a plain copy doubles an epoch), and
  whatever else it counts in epochs (warm-up, milestones, patience) is multiplied by the same factor.
- Nothing else is changed: batch size, learning rate and augmentation are the recipe's. Batches of more than 250 images
  are computed in parts of 250, for the sake of memory.

So short a run says that a system trains, and how fast; not how good it becomes. What takes steps, and not epochs, is
not shortened: ``anand``'s own log stays at chance for four epochs of 400 steps, and its BN keeps 0.997 of the old
statistics at each step, so that its row says nothing but how fast it is.

A system that is finished is not trained again, and one that was stopped goes on: the same command takes up its runs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from toolkit import compute, engine, recipe
from toolkit import data as datasets
from toolkit.catalogue import info
from toolkit.data import DataSet, Split
from toolkit.errors import DivergedError, Interrupted, UserError
from toolkit.files import write_text
from toolkit.progress import say
from toolkit.recipe import Recipe
from toolkit.run import Run, load_run

MICRO_BATCH = 250
HEAD = (
    "recipe", "system", "source", "parameters", "M MACs", "steps", "samples", "seconds", "train top-1", "test top-1",
    "*claimed by the report for its full run*",
)  # fmt: skip


def systems() -> list[str]:
    """The shipped recipes that say what their source reports."""
    return [name for name in recipe.shipped() if "reported_top1" in recipe.read(name)]


def resolved(name: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The run of a recipe that names a student alone, or a teacher alone."""
    return recipe.resolve(name, "distill" if "student" in recipe.read(name) else "train", changes)


def shortened(name: str, epochs: int, data_dir: Path | None = None) -> Recipe:
    """The recipe by the rule above."""
    full = resolved(name)
    passes = max(1, epochs // 2 if full.augment.plain_copy else epochs)
    factor = passes / full.epochs

    def scaled(length: int) -> int:
        return max(1, round(length * factor))

    growth = full.batch_growth
    changes = {
        "data.val_size": 0,
        "select": "last",
        "early_stop.patience": None,
        "epochs": passes,
        "schedule.warmup_epochs": full.schedule.warmup_epochs * factor,
        "schedule.milestones": [milestone * factor for milestone in full.schedule.milestones],
        "batch_growth.milestones": [scaled(milestone) for milestone in growth.milestones],
        "batch_growth.patience": growth.patience and scaled(growth.patience),
        "micro_batch": MICRO_BATCH,
    }
    return resolved(name, changes | ({"data.data_dir": str(data_dir)} if data_dir else {}))


def first_of_each_class(split: Split, count: int, classes: int) -> Split:
    """``count`` images, as many of each class, in the order of the split."""
    places = [(split.labels == label).nonzero()[: count // classes, 0] for label in range(classes)]
    return split.select(torch.cat(places).sort().values)


def train(name: str, wanted: Recipe, data: DataSet, folder: Path) -> list[str]:
    """The row of a system, trained where its run is not finished yet."""
    run = Run.start(folder / name, wanted, resume=True)
    say(f"{run.path}: {'finished already' if run.finished else f'training {wanted.model.name}'}")
    try:
        engine.fit(wanted, data, run)
        top1 = f"{measure(run, data):.1%}"
    except DivergedError as error:
        say(f"{name}: {error}")
        top1 = "diverged"
    history = run.history()
    steps = [0, *(row["step"] for row in history)]
    samples = sum((b - a) * row["batch_size"] for (a, b), row in zip(pairwise(steps), history, strict=True))
    full, about = resolved(name), info(wanted.model.name, wanted.role, **wanted.model.arguments)
    return [
        name,
        about.name,
        full.source or "",
        f"{about.parameters:,}",
        f"{about.macs / 1e6:,.0f}",
        f"{steps[-1]:,}",
        f"{samples:,}",
        f"{sum(row['seconds'] for row in history):,.0f}",
        f"{history[-1]['train_top1']:.1%}" if history else "none",
        top1,
        f"*{full.reported_top1:.2%} after {full.epochs} epochs*",
    ]


def measure(run: Run, data: DataSet) -> float:
    """Top-1 on the test images."""
    device = compute.pick_device(run.recipe.device)
    return engine.evaluate(load_run(run)[0].to(device), data.test, device, torch.float32)[1]


def page(rows: Sequence[Sequence[str]], data: DataSet, epochs: int) -> str:
    """The caption, which says the rule, and the table, in Markdown."""
    device = compute.pick_device("auto")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    precision = str(compute.pick_dtype("auto", device)).removeprefix("torch.")
    caption = (
        f"Each system from its shipped recipe, shortened: {len(data.train):,} of CIFAR-10's training images (the same "
        f"for all, as many of each class), {epochs} epochs of them (half of it where a plain copy doubles an epoch), "
        "and whatever else a recipe counts in epochs multiplied by the same factor; batch size, learning rate and "
        f"augmentation as in the recipe. No validation; the last epoch, on {len(data.test):,} test images. Train top-1 "
        "is the mean over the last epoch, on augmented and mixed images, while the net changes. Such runs say that a "
        "system trains and how fast, not how good it becomes; `anand` is at chance for the first 1,600 steps of its "
        "report's own log. The last column is another thing: what the report claims "
        f"for its full run on all 10,000 test images; it was not measured here. {where}, {precision}; n = 1."
    )
    lines = [HEAD, ["---"] * 3 + ["---:"] * (len(HEAD) - 3), *rows]
    return "\n".join([caption, "", *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Recipes; all systems of reports where left out.")] = None,
    images: Annotated[int, typer.Option(min=10, help="Training images.")] = 2500,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over them.")] = 8,
    test_images: Annotated[int, typer.Option(min=10, help="Test images.")] = 1000,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of CIFAR-10; else $TOOLKIT_DATA, else ./data.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder for the runs and the table.")] = Path("runs/systems"),
) -> None:
    """Train every system of the reports, shortened by one rule, and compare them."""
    try:
        recipes = {name: shortened(name, epochs, data_dir) for name in names or systems()}
        everything = datasets.load(next(iter(recipes.values())).data)
        classes = len(everything.classes)
        part = dataclasses.replace(
            everything,
            train=first_of_each_class(everything.train, images, classes),
            test=first_of_each_class(everything.test, test_images, classes),
        )
        # Runs on other images are other runs, which their recipes do not say.
        place = folder / f"{len(part.train)}-images"
        rows = [train(name, wanted, part, place / f"{epochs}-epochs") for name, wanted in recipes.items()]
    except Interrupted:
        sys.exit("stopped; what was done is saved, and the same command goes on from there")
    except UserError as error:
        sys.exit(f"error: {error}")
    table = page(rows, part, epochs)
    write_text(place / f"{epochs}-epochs" / "systems.md", table)
    print(table, end="")


if __name__ == "__main__":
    typer.run(main)
