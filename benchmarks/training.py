"""Training throughput: the toolkit's loop against a stock PyTorch one, on the same images, nets and device.

Ours is ``engine.fit`` itself, with augmentation, metrics, progress and whatever precision it picks. The stock
loop is that of kuangliu/pytorch-cifar (``main.py``): torchvision's transforms in a DataLoader with 2 workers,
fp32, NCHW. Neither counts start-up: building the model and starting workers are before the clock.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import CIFAR10

from toolkit import data, engine, recipe
from toolkit.catalogue import builder
from toolkit.run import Run

BATCH = 128
# The students that are measured. TPSNet's blocks with the stem, widths and depths of ResNet-18 are the
# ResNet-18 of pytorch-cifar: 11,173,962 parameters.
NETS: dict[str, dict[str, Any]] = {
    "tpsnet": {"name": "tpsnet"},
    "resnet18": {"name": "tpsnet", "blocks": [2, 2, 2, 2], "base": 64, "width": 1},
    "resnet9": {"name": "resnet9"},
}


def stock(net: str, images: int, data_dir: Path) -> float:
    """Images a second of one epoch."""
    device = engine.pick_device("auto")
    torch.backends.cudnn.benchmark = True
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ]
    )
    subset = Subset(CIFAR10(data_dir, train=True, transform=transform), range(images))
    loader = DataLoader(subset, batch_size=BATCH, shuffle=True, num_workers=2)
    arguments = dict(NETS[net])
    model = builder(arguments.pop("name"), "student")(10, **arguments).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    batches = iter(loader)
    began = time.perf_counter()
    model.train()
    train_loss, correct = 0.0, 0
    for inputs, targets in batches:
        inputs, targets = inputs.to(device), targets.to(device)
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = criterion(outputs, targets)
        loss.backward()
        optimizer.step()
        train_loss += loss.item()
        correct += outputs.max(1)[1].eq(targets).sum().item()
    return images / (time.perf_counter() - began)


def ours(net: str, images: int, data_dir: Path) -> tuple[float, str]:
    """Images a second of one epoch, and what it ran on."""
    wanted = recipe.resolve(
        {
            "data": {"dataset": "cifar10", "data_dir": str(data_dir), "val_size": 0},
            "augment": {"flip": "random", "crop_padding": 4, "padding_mode": "zero"},
            "student": NETS[net],
            "budget": 12_000_000,
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4},
            "batch_size": BATCH,
            "epochs": 1,
        },
        "distill",
    )
    whole = load(wanted.data)
    subset = data.Split(whole.train.images[:images], whole.train.labels[:images])
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(Path(folder), wanted, resume=False)
        summary = engine.fit(wanted, dataclasses.replace(whole, train=subset), run)
        rate = run.history()[-1]["images_per_second"]
    return rate, f"{summary['device']}, {summary['threads']} threads; toolkit in {summary['precision']}, stock in fp32"


load = cache(data.load)


def main(
    images: Annotated[int, typer.Option(min=BATCH, help="Images a round, cut to whole batches of 128.")] = 1280,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are counted, after one short warm-up.")] = 5,
    data_dir: Annotated[Path, typer.Option(envvar="TOOLKIT_DATA", help="Folder that holds CIFAR-10.")] = Path("data"),
) -> None:
    """Print images a second of both loops, their ratio for each net, and the geometric mean of the ratios."""
    images -= images % BATCH
    spawn, rows = get_context("spawn"), []
    for net in NETS:
        # A process for each side, as each sets the allocator and cuDNN for itself; they take turns, so that
        # what else the machine does meets both.
        with ProcessPoolExecutor(1, spawn) as left, ProcessPoolExecutor(1, spawn) as right:
            pairs = []
            for count in [2 * BATCH] + [images] * rounds:
                rate, where = left.submit(ours, net, count, data_dir).result()
                pairs.append((right.submit(stock, net, count, data_dir).result(), rate))
        pairs = pairs[1:]
        rows.append((net, *map(statistics.median, zip(*pairs, strict=True)), [b / a for a, b in pairs]))

    print(f"{where}; medians of {rounds} rounds of {images} images")
    print(f"{'net':<10} {'stock img/s':>12} {'toolkit img/s':>14} {'ratio':>7}   lowest, highest")
    for net, slow, fast, ratios in rows:
        ratio = statistics.median(ratios)
        print(f"{net:<10} {slow:>12,.1f} {fast:>14,.1f} {ratio:>7.2f}   {min(ratios):.2f}, {max(ratios):.2f}")
    mean = statistics.geometric_mean(statistics.median(ratios) for *_, ratios in rows)
    print(f"{'geometric mean':<38} {mean:>7.2f}   (bar: 1.8)")


if __name__ == "__main__":
    typer.run(main)
