"""What docs/own-images.md works on: a folder of pictures, and somebody's big ONNX model of them.

    python benchmarks/own_images.py images FOLDER [--count 800]      # of each class
    toolkit train --recipe own-images --dataset folder:FOLDER --epochs 8
    python benchmarks/own_images.py teacher RUN teacher.onnx

The pictures are shapes, filled with one texture and laid on another: pieces of scikit-learn's two photographs. They are
JPEGs of different sizes, some upright and some not, as a folder of photographs has them. The teacher is trained here,
and written as if it came from elsewhere: the net alone, for normalised pixels, without a word about itself.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_sample_images

CONTRAST = 60  # least difference between the mean colours of shape and ground, of 765


def corners(count: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """A regular polygon, or with ``inner`` below 1 a star, in the unit circle."""
    points = count if inner == 1 else 2 * count
    radius = [inner if i % 2 else 1.0 for i in range(points)]
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
    "moon": arc(0.6, 2 * math.pi - 0.6) + arc(2 * math.pi - 1.0, 1.0, 0.75, 0.42),
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
    noisy = np.asarray(image) + random.normal(0, random.uniform(0, 20), (side, side, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def make_images(folder: Path, count: int) -> None:
    """``count`` JPEGs of each shape: most of about 128 pixels, a few of 64, in landscape, portrait and square."""
    photos, random = load_sample_images().images, np.random.default_rng(0)
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


def make_teacher(run: Path, output: Path) -> None:
    """Write a trained net alone, as others do: it takes normalised pixels [N,3,S,S] and says nothing of that."""
    import torch

    from toolkit.run import Run, load_run

    model, header = load_run(Run(run))
    example = torch.zeros(2, 3, header["image_size"], header["image_size"])
    torch.onnx.export(
        model.network, (example,), output, input_names=["input"], output_names=["output"],
        dynamic_shapes=({0: "batch"},), external_data=False, verbose=False,
    )  # fmt: skip
    mean, std = (",".join(f"{value:.3f}" for value in part.flatten().tolist()) for part in (model.mean, model.std))
    print(f"{output}: {sum(p.numel() for p in model.parameters()):,} parameters, mean {mean}, std {std}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["images", "teacher"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=800)
    wanted = parser.parse_args()
    if wanted.what == "images":
        make_images(wanted.folder, wanted.count)
    else:
        make_teacher(wanted.folder, wanted.output or Path("teacher.onnx"))
