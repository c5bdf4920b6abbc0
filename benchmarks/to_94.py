"""Seconds to 94% on CIFAR-10's test images on one GPU: airbench94 (extra ``bench``, arXiv 2404.00498) and our recipe.

Both train a net of widths 64, 256, 256 on all 50,000 images and are measured with test-time augmentation by flips and
shifts, as airbench is. Compiling and the first run, which warms the GPU up, are not counted; evaluation is not either.
The whitening of the first conv, and normalising and padding the images, are in airbench's time and not in ours.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer

from toolkit import compute, data, engine, recipe
from toolkit.classifier import TestTimeAugmentation
from toolkit.run import Run, load_run

BAR = 1.5


def ours(whole: data.DataSet, data_dir: Path, epochs: int, seed: int, folder: Path) -> tuple[float, float]:
    """Seconds of training and test top-1 with test-time augmentation, of the student of ``cifar10-cpu`` on its own."""
    alone = {"loss.ce_weight": 1, "loss.kd_weight": 0, "data.val_size": 0, "augment.cutout": 0}
    wanted = recipe.resolve(
        "cifar10-cpu", "distill", alone | {"epochs": epochs, "seed": seed, "data.data_dir": str(data_dir)}
    )
    run = Run.start(folder / f"run{seed}", wanted, resume=False)
    seconds = engine.fit(wanted, whole, run)["train_seconds"]
    model, _ = load_run(run)
    device = compute.pick_device("auto")
    views = TestTimeAugmentation(model, "flip_and_shift").to(device)
    return seconds, engine.evaluate(views, whole.test, device, torch.float32)[1]


def theirs(data_dir: Path, folder: Path, runs: int) -> list[tuple[float, float]]:
    """The same of ``airbench.train94``, which looks for ./cifar10 and writes files of its own beside it."""
    import airbench

    (folder / "cifar10").mkdir()
    (folder / "cifar10/cifar-10-batches-py").symlink_to((data_dir / "cifar-10-batches-py").resolve())
    with contextlib.chdir(folder):
        airbench.warmup94(verbose=False)
        found = []
        settings = airbench.lib_airbench94.hyp
        batch_size, views = settings["opt"]["batch_size"], settings["aug"]
        for run in range(1, runs + 1):
            # Made before: neither side's time holds the reading and the upload of the images.
            images = airbench.CifarLoader("cifar10", train=True, batch_size=batch_size, aug=views, altflip=True)
            net = airbench.make_net94()  # and its weights
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            with mock.patch("airbench.utils.CifarLoader"):  # of test images, which it loads and does not look at
                model = airbench.train94(images, make_net=lambda net=net: net, run=run, verbose=False)
            end.record()
            torch.cuda.synchronize()
            loader = airbench.CifarLoader("cifar10", train=False, batch_size=2000)
            found.append((start.elapsed_time(end) / 1000, airbench.evaluate(model, loader, tta_level=2)))
    return found


def main(
    runs: Annotated[int, typer.Option(min=1, help="Runs of each that are counted.")] = 5,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of ours.")] = 9,
    data_dir: Annotated[Path, typer.Option(envvar="TOOLKIT_DATA", help="Folder that holds CIFAR-10.")] = Path("data"),
) -> None:
    """Print mean accuracy and median seconds of both, and their ratio."""
    if not torch.cuda.is_available():
        print("airbench needs a CUDA device: there is none here")
        raise typer.Exit(1)
    data_dir = data_dir.resolve()
    whole = data.load(recipe.Data(dataset="cifar10", data_dir=data_dir, val_size=0))
    with tempfile.TemporaryDirectory() as folder:
        seen = {
            "airbench94": theirs(data_dir, Path(folder), runs),
            "toolkit": [ours(whole, data_dir, epochs, seed, Path(folder)) for seed in range(runs + 1)][1:],
        }
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, n = {runs}")
    for name, results in seen.items():
        seconds, accuracy = zip(*results, strict=True)
        print(f"{name:<10} {statistics.median(seconds):6.2f} s, top-1 {statistics.mean(accuracy):.2%}")
    medians = [statistics.median(seconds for seconds, _ in results) for results in seen.values()]
    print(f"ratio {medians[1] / medians[0]:.2f} (bar: {BAR}); it counts where both reach 94%")


if __name__ == "__main__":
    typer.run(main)
