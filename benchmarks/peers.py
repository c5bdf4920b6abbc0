"""Distilling with soft targets: the toolkit's loop against those of torchdistill and timm, images a second.

The same student, teacher, batch, precision (bf16 where the hardware has it) and memory format for all, and the
teacher in every step. The peers read CIFAR-10 through torchvision's transforms and a DataLoader of 2 workers:
torchdistill by its DistillationBox, timm by its own loader, optimizer factory and LogitDistillationTask. Their
loops are those of their example scripts, without validation and logging; timm crops by its own RandomResizedCrop.
Start-up is not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from torchvision import transforms
from torchvision.datasets import CIFAR10
from training import now

from toolkit import compute, data, engine, recipe
from toolkit.catalogue import build
from toolkit.machine import available_cores
from toolkit.run import Run

BATCH = 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
STUDENTS = ("resnet9", "tpsnet")
TEACHER = "resnet9_wide"
LOGITS = {"path": ".", "io": "output"}  # what torchdistill compares
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def nets(student: str) -> tuple[nn.Module, nn.Module]:
    """An untrained student and teacher, in the memory format that all take."""
    device = compute.pick_device("auto")
    pair = (build(student, "student", 10, MEAN, STD), build(TEACHER, "teacher", 10, MEAN, STD))
    for net in pair:
        # What timm asks a net for; ours normalise inside.
        net.num_classes, net.in_chans, net.pretrained_cfg = 10, 3, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    first, second = (net.to(device).to(memory_format=torch.channels_last) for net in pair)
    return first.train(), second.eval().requires_grad_(False)


def ours(student: str, images: int, data_dir: Path) -> tuple[float, str]:
    """Images a second of one epoch, and what it ran on."""
    wanted = recipe.resolve(
        {
            "data": {"dataset": "cifar10", "data_dir": str(data_dir), "val_size": 0},
            "augment": {"flip": "random", "crop_padding": 4, "padding_mode": "zero"},
            "student": {"name": student},
            "teacher": {"name": TEACHER},
            "loss": {"ce_weight": 0.5, "kd_weight": 0.5, "temperature": 4},
            "optimizer": {"name": "sgd", "nesterov": False, **SGD},
            "batch_size": BATCH,
            "epochs": 1,
        },
        "distill",
    )
    whole = data.load(wanted.data)
    subset = data.Split(whole.train.images[:images], whole.train.labels[:images])
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(Path(folder), wanted, resume=False)
        summary = engine.fit(wanted, dataclasses.replace(whole, train=subset), run, nets(student)[1])
        rate = run.history()[-1]["images_per_second"]
    return rate, f"{summary['device']}, {summary['threads']} threads, {summary['precision']}"


def torchdistill(student: str, images: int, data_dir: Path) -> float:
    """Images a second of one epoch of its DistillationBox."""
    from torch.utils.data import RandomSampler
    from torchdistill.core.distillation import get_distillation_box

    device = compute.pick_device("auto")
    paths = {f"{who}_module_{key}": value for who in ("student", "teacher") for key, value in LOGITS.items()}
    distillation = {"key": "KDLoss", "kwargs": {**paths, "temperature": 4.0, "alpha": 0.5}}
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": BATCH, "num_workers": 2, "drop_last": True},
        },
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": distillation, "weight": 1.0}}},
        },
    }
    small, large = nets(student)
    box = get_distillation_box(large, small, {"train": training_set(images, data_dir)}, config, device, None, False, 1)
    box.student_model.train()
    batches = iter(box.train_data_loader)
    began = now(device)
    for sample, targets, extra in batches:
        sample = sample.to(device).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            loss = box.forward_process(sample, targets.to(device), extra)
        box.post_forward_process(loss)
    return images / (now(device) - began)


def timm(student: str, images: int, data_dir: Path) -> float:
    """Images a second of one epoch of its pieces, put together as in its train.py."""
    from timm.data import create_loader
    from timm.optim import create_optimizer_v2
    from timm.task import LogitDistillationTask

    device = compute.pick_device("auto")
    small, large = nets(student)
    loader = create_loader(
        training_set(images, data_dir), (3, 32, 32), BATCH, is_training=True, color_jitter=0.0, num_workers=2,
        mean=(0, 0, 0), std=(1, 1, 1), device=device, use_prefetcher=device.type == "cuda",
    )  # fmt: skip
    optimizer = create_optimizer_v2(small, opt="sgd", **SGD)
    task = LogitDistillationTask(
        small, large, nn.CrossEntropyLoss(), distill_loss_weight=0.5, task_loss_weight=0.5, temperature=4.0,
        device=device, verbose=False,
    )  # fmt: skip
    task.train()
    batches = iter(loader)
    began = now(device)
    for sample, targets in batches:
        sample = sample.to(device).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            loss = task(sample, targets.to(device))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return images / (now(device) - began)


def training_set(images: int, data_dir: Path) -> CIFAR10:
    """The first ``images`` of CIFAR-10, cropped and flipped by torchvision."""
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    dataset = CIFAR10(data_dir, train=True, transform=transforms.Compose(steps))
    dataset.data, dataset.targets = dataset.data[:images], dataset.targets[:images]
    return dataset


def autocast(device: torch.device) -> torch.autocast:
    return compute.autocast(device, compute.pick_dtype("auto", device))


def main(
    images: Annotated[int, typer.Option(min=BATCH, help="Images a round, cut to whole batches of 128.")] = 1280,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are counted, after one short warm-up.")] = 3,
    data_dir: Annotated[Path, typer.Option(envvar="TOOLKIT_DATA", help="Folder that holds CIFAR-10.")] = Path("data"),
) -> None:
    """Print images a second of the three loops, and ours as a multiple of theirs."""
    images -= images % BATCH
    loops = {"toolkit": ours, "torchdistill": torchdistill, "timm": timm}
    threads = {"initializer": torch.set_num_threads, "initargs": (available_cores(),)}  # as many for all
    process = partial(ProcessPoolExecutor, 1, get_context("spawn"), **threads)
    print(f"{'student':<10} " + " ".join(f"{name:>13}" for name in loops))
    for student in STUDENTS:
        seen: dict[str, list[float]] = {name: [] for name in loops}
        with contextlib.ExitStack() as stack:  # a process for each, which take turns
            pools = {name: stack.enter_context(process()) for name in loops}
            for count in [2 * BATCH] + [images] * rounds:
                for name, loop in loops.items():
                    result = pools[name].submit(loop, student, count, data_dir).result()
                    if name == "toolkit":
                        result, where = result
                    seen[name].append(result)
        rates = {name: statistics.median(values[1:]) for name, values in seen.items()}
        print(f"{student:<10} " + " ".join(f"{rate:>13,.0f}" for rate in rates.values()))
        gains = (
            statistics.median(a / b for a, b in zip(seen["toolkit"][1:], seen[name][1:], strict=True)) for name in loops
        )
        print(f"{'':<10} " + " ".join(f"{gain:>12.2f}x" for gain in gains))
    print(f"{where}; medians of {rounds} rounds of {images} images; below: the toolkit's rate as a multiple")


if __name__ == "__main__":
    typer.run(main)
