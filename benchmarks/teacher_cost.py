"""What the teacher costs: images a second of a student alone, with its teacher in every step, and with cached logits.

The student is the fastest one, for which a teacher weighs most; the teacher is untrained, as its weights cost the
same. Rates are of epochs of ``engine.fit`` after the first, in which the cache is filled; that pass is shown apart.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit import data, engine, recipe
from toolkit.catalogue import build
from toolkit.run import Run

WAYS: dict[str, dict[str, Any]] = {
    "alone": {"loss": {"ce_weight": 1}},
    "online": {"loss": {"ce_weight": 0.5, "kd_weight": 0.5}},
    "cached": {"loss": {"ce_weight": 0.5, "kd_weight": 0.5}, "cached_epochs": 1},
}


def main(
    images: Annotated[int, typer.Option(min=1000, help="Images an epoch.")] = 5000,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs that are counted.")] = 2,
    data_dir: Annotated[Path, typer.Option(envvar="TOOLKIT_DATA", help="Folder that holds CIFAR-10.")] = Path("data"),
) -> None:
    """Print images a second of the three ways, and how much longer an epoch takes than that of the student alone."""
    config = {"dataset": "cifar10", "data_dir": str(data_dir), "val_size": 0}
    whole = data.load(recipe.resolve({"data": config, "student": {"name": "resnet9"}}, "distill").data)
    few = dataclasses.replace(whole, train=data.Split(whole.train.images[:images], whole.train.labels[:images]))
    teacher = build("resnet9_wide", "teacher", 10, whole.mean, whole.std)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(epochs):  # they take turns, so that what else the machine does meets all of them
            for way, changes in WAYS.items():
                base = {"data": config, "student": {"name": "resnet9"}, "teacher": {"name": "resnet9_wide"}}
                tree = base | {"batch_size": 500, "epochs": 2, "seed": turn} | changes
                wanted = recipe.resolve(tree, "distill")
                run = Run.start(Path(folder, f"{way}{turn}"), wanted, resume=False)
                summary = engine.fit(wanted, few, run, teacher if wanted.distils else None)
                rates[way].append(run.history()[-1]["images_per_second"])
    print(f"{summary['device']}, {summary['threads']} threads, {summary['precision']}; medians of {epochs}")
    alone = statistics.median(rates["alone"])
    for way, seen in rates.items():
        rate = statistics.median(seen)
        print(f"{way:<7} {rate:>7,.0f} images/s, {alone / rate:.2f} of the time alone")
    print(f"filling the cache: {images / summary['teacher_seconds']:,.0f} images/s")
    print("bar: 1.08 for cached")


if __name__ == "__main__":
    typer.run(main)
