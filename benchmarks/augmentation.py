"""Images a second that augmentation makes: the toolkit's in batches, by recipe, and torchvision's image by image.

All give 32x32 images as floats, flipped and cropped at random with 4 pixels of padding. Random pixels: no operation
depends on what they show. torchvision's per-image transforms run in this process, as in one worker of a DataLoader; on
images of Pillow, as its CIFAR10 gives them, and on tensors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torchvision.transforms import v2

from toolkit.augment import Augmenter
from toolkit.machine import keep_freed_memory
from toolkit.recipe import Augment

BATCH = 500
RECIPES = {
    "flip and crop": {},
    "with cutout": {"cutout": 8},
    "with colour jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "with TrivialAugment": {"policy": "trivial"},
    "with RandAugment": {"policy": "rand"},
    "with random erasing": {"erasing": 0.5},
}


def batches(config: Augment, count: int, device: str) -> Callable[[], float]:
    """Images a second of an epoch of ``count`` images, the drawing of its parameters included."""
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, device=device)
    augmenter = Augmenter(pixels, torch.zeros(count, dtype=torch.int64, device=device), 10, config, 0)
    epochs = iter(range(1, 1_000_000))

    def rate() -> float:
        began = time.perf_counter()
        epoch = next(epochs)
        augmenter.start_epoch(epoch)
        for index in augmenter.order(epoch).split(BATCH):
            images, _ = augmenter.batch(index)
        images.sum().item()  # the device is done
        return count / (time.perf_counter() - began)

    return rate


def one_by_one(count: int, pillow: bool) -> Callable[[], float]:
    """The same for TrivialAugment in torchvision's transforms."""
    images = list(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8))
    as_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose(
        [v2.RandomCrop(32, 4, padding_mode="reflect"), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide(), *as_float]
    )
    if pillow:
        images = [v2.functional.to_pil_image(image) for image in images]

    def rate() -> float:
        began = time.perf_counter()
        for image in images:
            transform(image)
        return count / (time.perf_counter() - began)

    return rate


def main(
    images: Annotated[int, typer.Option(min=BATCH, help="Images a round.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are counted, after one warm-up.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda; torchvision's run on the CPU.")] = "cpu",
) -> None:
    """Print the medians, and how they compare with flip and crop and with torchvision's TrivialAugment."""
    keep_freed_memory()  # as the training does
    sides = {name: batches(Augment.model_validate(changes), images, device) for name, changes in RECIPES.items()}
    few = images // 10  # they are slow
    sides |= {"torchvision, Pillow": one_by_one(few, True), "torchvision, tensors": one_by_one(few, False)}
    seen: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):  # in turns, so that what else the machine does meets all of them
        for name, rate in sides.items():
            seen[name].append(rate())
    medians = {name: statistics.median(rates[1:]) for name, rates in seen.items()}
    print(f"{device}, {torch.get_num_threads()} threads; medians of {rounds} rounds of {images} images")
    print(f"{'':<22} {'images/s':>10} {'to flip and crop':>17} {'to torchvision':>15}")
    base, slow = medians["flip and crop"], max(medians["torchvision, Pillow"], medians["torchvision, tensors"])
    for name, rate in medians.items():
        print(f"{name:<22} {rate:>10,.0f} {rate / base:>17.2f} {rate / slow:>15.1f}")


if __name__ == "__main__":
    typer.run(main)
