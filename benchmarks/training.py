"""Training throughput: the toolkit's loop against a stock one and a bare one, on the same images, nets and device.

Ours is ``engine.fit`` itself, with augmentation, metrics, progress and whatever precision it picks. The stock
loop is that of kuangliu/pytorch-cifar (``main.py``): torchvision's transforms in a DataLoader with 2 workers,
fp32, NCHW. The bare loop does forward, backward and step alone, on one resident batch, in our precision and
layout, compiled on CUDA as ours is: what data, augmentation, metrics and progress cost is its distance to ours. None
counts start-up: building and compiling the model and starting workers are before the clock.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import CIFAR10

from toolkit import compute, data, engine, learner, recipe
from toolkit.catalogue import builder
from toolkit.machine import available_cores, keep_freed_memory
from toolkit.run import Run

BATCH = 128
# What is measured; resnet18 is pytorch-cifar's, of 11,173,962 parameters.
STUDENTS: dict[str, dict[str, Any]] = {
    "tpsnet": {"name": "tpsnet"},
    "resnet18_42": {"name": "resnet18_42"},
    "resnet_large": {"name": "resnet_large"},
    "resnet18": {"name": "resnet18_42", "stem": 64, "widths": [64, 128, 256, 512], "dropout": 0.0},
    "resnet9": {"name": "resnet9"},
}
TEACHERS: dict[str, dict[str, Any]] = {"wrn28": {"name": "wrn28"}}  # on CUDA: a CPU takes minutes for a step of it


def network(net: str, device: torch.device) -> nn.Module:
    arguments, role = dict((STUDENTS | TEACHERS)[net]), "teacher" if net in TEACHERS else "student"
    return builder(arguments.pop("name"), role)(10, **arguments).to(device)


def stock(net: str, images: int, data_dir: Path) -> float:
    """Images a second of one epoch."""
    device = compute.pick_device("auto")
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
    model = network(net, device)
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
    taught = {"teacher": TEACHERS[net]} if net in TEACHERS else {"student": STUDENTS[net]}
    wanted = recipe.resolve(
        taught
        | {
            "data": {"dataset": "cifar10", "data_dir": str(data_dir), "val_size": 0},
            "augment": {"flip": "random", "crop_padding": 4, "padding_mode": "zero"},
            "budget": 12_000_000,
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4},
            "batch_size": BATCH,
            "epochs": 1,
        },
        "train" if net in TEACHERS else "distill",
    )
    whole = load(wanted.data)
    subset = data.Split(whole.train.images[:images], whole.train.labels[:images])
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(Path(folder), wanted, resume=False)
        summary = engine.fit(wanted, dataclasses.replace(whole, train=subset), run)
        rate = run.history()[-1]["images_per_second"]
    return rate, f"{summary['device']}, {summary['threads']} threads; toolkit in {summary['precision']}, stock in fp32"


def bare(net: str, images: int, data_dir: Path) -> float:
    """Images a second of forward, backward and step on one batch, as fast as the device does them."""
    device = compute.pick_device("auto")
    dtype = compute.pick_dtype("auto", device)
    if device.type == "cpu":
        keep_freed_memory()
    model = network(net, device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    pixels = torch.rand(BATCH, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.eye(10, device=device)[torch.randint(0, 10, (BATCH,), device=device)]
    model.train()
    fast = learner.compiled(model, pixels, dtype) if device.type == "cuda" else model
    for step in range(images // BATCH + 1):
        if step == 1:  # the first one warms up
            began = now(device)
        with compute.autocast(device, dtype):
            logits = fast(pixels)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return images / (now(device) - began)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


load = cache(data.load)


def main(
    images: Annotated[
        int | None,
        typer.Option(min=BATCH, help="Images a round, cut to whole batches of 128; else 1,280, on CUDA 25,600."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are counted, after one short warm-up.")] = 5,
    nets: Annotated[list[str] | None, typer.Option("--net", help="Only this net; may be repeated. Else all.")] = None,
    data_dir: Annotated[Path, typer.Option(envvar="TOOLKIT_DATA", help="Folder that holds CIFAR-10.")] = Path("data"),
) -> None:
    """Print images a second of the three loops and their ratios for each net, and the geometric means."""
    cuda = torch.cuda.is_available()
    if unknown := {*(nets or ())} - {*STUDENTS, *TEACHERS}:
        raise typer.BadParameter(
            f"{', '.join(unknown)}: there are {', '.join(STUDENTS | TEACHERS)}", param_hint="--net"
        )
    images = (images or (25_600 if cuda else 1_280)) // BATCH * BATCH
    threads = {"initializer": torch.set_num_threads, "initargs": (available_cores(),)}  # as many for all
    process = partial(ProcessPoolExecutor, 1, get_context("spawn"), **threads)
    gains, shares = [], []
    for net in nets or STUDENTS | (TEACHERS if cuda else {}):
        # A process for ours and one for the stock loop, as each sets the allocator and cuDNN for itself; they take
        # turns, so that what else the machine does meets all of them.
        with process() as left, process() as right:
            seen = []
            for count in [2 * BATCH] + [images] * rounds:
                rate, where = left.submit(ours, net, count, data_dir).result()
                limit = left.submit(bare, net, count, data_dir).result()
                seen.append((right.submit(stock, net, count, data_dir).result(), limit, rate))
        slow, limits, fast = zip(*seen[1:], strict=True)
        if not gains:
            print(f"{where}; medians of {rounds} rounds of {images} images, images a second")
            print(f"{'net':<13} {'stock':>7} {'bare':>7} {'toolkit':>8} {'to stock':>9} {'to bare':>8}")
        gains.append(statistics.median(b / a for a, b in zip(slow, fast, strict=True)))
        shares.append(statistics.median(b / a for a, b in zip(limits, fast, strict=True)))
        rates = "{:>7,.0f} {:>7,.0f} {:>8,.0f}".format(*map(statistics.median, (slow, limits, fast)))
        print(f"{net:<13} {rates} {gains[-1]:>9.2f} {shares[-1]:>8.3f}", flush=True)
    print(f"{'geometric mean':<38} {statistics.geometric_mean(gains):>9.2f} {statistics.geometric_mean(shares):>8.3f}")
    print(f"bars: {'8 (resnet18)' if cuda else 1.9} and 0.95")


if __name__ == "__main__":
    typer.run(main)
