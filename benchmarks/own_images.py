"""What docs/own-images.md works on: a folder of pictures, and somebody's big ONNX model of them.

    python benchmarks/own_images.py images FOLDER [--count 800]      # of each class
    python benchmarks/own_images.py teacher FOLDER teacher.onnx      # torchvision's ResNet-18, 11.2M parameters

The pictures are shapes, filled with one texture and laid on another: pieces of scikit-learn's two photographs. They are
JPEGs of different sizes, some upright and some not, as a folder of photographs has them. The teacher is trained by
plain PyTorch, as if it came from elsewhere: 96 pixels, [N,3,96,96], normalised as ImageNet's models are.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_sample_images

CONTRAST = 120  # least difference between the mean colours of shape and ground, of 765
MEAN, STD, SIDE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 96


def corners(count: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """A regular polygon, or with ``inner`` below 1 a star, in the unit circle."""
    points = count if inner == 1 else 2 * count
    radius = [1.0 if inner == 1 or i % 2 == 0 else inner for i in range(points)]
    return [(r * math.cos(2 * math.pi * i / points), r * math.sin(2 * math.pi * i / points))
            for i, r in enumerate(radius)]  # fmt: skip


def arc(start: float, end: float, radius: float = 1.0, x: float = 0.0) -> list[tuple[float, float]]:
    return [(x + radius * math.cos(a), radius * math.sin(a)) for a in np.linspace(start, end, 60)]


THIRD = 1 / 3
SHAPES = {
    "circle": arc(0, 2 * math.pi),
    "cross": [(a * s, b * t) for s, t, pair in
              ((1, 1, 0), (-1, 1, 1), (-1, -1, 0), (1, -1, 1))
              for a, b in (((1, THIRD), (THIRD, THIRD), (THIRD, 1)), ((THIRD, 1), (THIRD, THIRD), (1, THIRD)))[pair]],
    "hexagon": corners(6),
    "moon": arc(0.6, 2 * math.pi - 0.6) + arc(2 * math.pi - 1.0, 1.0, 0.75, 0.42)[::1],
    "pentagon": corners(5),
    "square": corners(4),
    "star": corners(5, 0.45),
    "triangle": corners(3),
}  # fmt: skip


def texture(photos: list[np.ndarray], side: int, random: np.random.Generator) -> Image.Image:
    """A piece of a photograph, coloured anew."""
    photo = photos[random.integers(len(photos))]
    piece = int(random.integers(40, 240))
    top, left = (int(random.integers(0, size - piece)) for size in photo.shape[:2])
    colours = photo[top : top + piece, left : left + piece].astype(np.float32)[..., random.permutation(3)]
    colours = (colours - 128) * random.uniform(0.5, 1) + 128 + random.uniform(-60, 60, 3)
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


def picture(shape: str, photos: list[np.ndarray], random: np.random.Generator) -> Image.Image:
    side = int(random.integers(130, 240))
    angle, size = random.uniform(0, 2 * math.pi), random.uniform(0.16, 0.42) * side
    x, y = (random.uniform(size, side - size) for _ in range(2))
    stretch = random.uniform(0.75, 1.0)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    points = (np.array(SHAPES[shape]) * (1, stretch)) @ turn * size + (x, y)
    mask = Image.new("L", (2 * side, 2 * side))
    ImageDraw.Draw(mask).polygon([(2 * px, 2 * py) for px, py in points], fill=255)
    mask = mask.resize((side, side), Image.Resampling.LANCZOS)
    image, fill = texture(photos, side, random), texture(photos, side, random)
    while np.abs(np.subtract(*(np.asarray(one).mean((0, 1)) for one in (image, fill)))).sum() < CONTRAST:
        fill = texture(photos, side, random)
    image.paste(fill, mask=mask)
    image = image.filter(ImageFilter.GaussianBlur(random.uniform(0, 1.5)))
    noisy = np.asarray(image) + random.normal(0, random.uniform(0, 12), (side, side, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def make_images(folder: Path, count: int, seed: int = 0) -> None:
    """``count`` JPEGs of each shape: most of about 128 pixels, a few of 64, in landscape, portrait and square."""
    photos, random = load_sample_images().images, np.random.default_rng(seed)
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image = picture(shape, photos, random)
            short = 64 if random.random() < 0.1 else int(random.integers(112, 145))
            image = image.resize((short, short), Image.Resampling.LANCZOS)
            if (more := int(random.integers(0, 40))) and random.random() < 0.5:  # the border that a camera adds
                wide = texture(photos, short + more, random)
                wide = wide.crop((0, 0, short + more, short) if random.random() < 0.5 else (0, 0, short, short + more))
                wide.paste(image, ((wide.width - short) // 2, (wide.height - short) // 2))
                image = wide
            image.save(folder / shape / f"{i:04}.jpg", quality=int(random.integers(75, 96)))


def make_teacher(folder: Path, output: Path, epochs: int) -> None:
    """Train on the training images of the toolkit's own split, and write the ONNX file."""
    import torch
    from torchvision.models import resnet18

    from toolkit import recipe
    from toolkit.data import load

    data = load(recipe.Data(dataset=f"folder:{folder}", image_size=SIDE))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    torch.manual_seed(0)
    model = resnet18(num_classes=len(data.classes)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    count, batch, began = len(data.train), 64, time.monotonic()
    steps = epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)

    def right(split) -> float:
        model.eval()
        with torch.inference_mode():
            parts = zip(split.images.split(250), split.labels.split(250), strict=True)
            hits = [(model((x.float() / 255 - mean) / std).argmax(1) == y).sum().item() for x, y in parts]
        return sum(hits) / len(split)

    for epoch in range(epochs):
        model.train()
        for index in torch.randperm(count)[: count // batch * batch].split(batch):
            images = data.train.images[index].float() / 255
            images = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, images.flip(3), images)
            images = torch.nn.functional.pad(images, (8, 8, 8, 8), mode="reflect")
            top, left = torch.randint(0, 17, (2,)).tolist()
            images = images[:, :, top : top + SIDE, left : left + SIDE]
            images = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images), data.train.labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        print(f"epoch {epoch + 1}: val {right(data.val):.2%}, {time.monotonic() - began:,.0f} s", flush=True)
    print(f"test {right(data.test):.2%}, {sum(p.numel() for p in model.parameters()):,} parameters")
    model = model.to(memory_format=torch.contiguous_format).eval()
    example = torch.zeros(2, 3, SIDE, SIDE)
    torch.onnx.export(
        model, (example,), output, input_names=["input"], output_names=["logits"],
        dynamic_shapes={"x": {0: "batch"}}, external_data=False, verbose=False,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["images", "teacher"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=14)
    wanted = parser.parse_args()
    if wanted.what == "images":
        make_images(wanted.folder, wanted.count)
    else:
        make_teacher(wanted.folder, wanted.output or Path("teacher.onnx"), wanted.epochs)
