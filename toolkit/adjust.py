"""What augmentation does to a batch of images ``[B,3,S,S]`` in [0,1], with parameters for each image.

No result depends on the other images of the batch, to the last bit. Operations with names as torchvision's do what
``torchvision.transforms.v2.functional`` does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def inverse_affine(angle: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """For each sample the map from a place in the result to the place in the image that is shown there.

    ``angle`` [N] in radians, counter-clockwise about the centre, then ``shift`` [N,2], (right, down) as
    fractions of the side. Returns float32 [N,2,3] in coordinates that run from -1 to 1, as ``grid_sample``'s.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = 2 * shift.T
    rows = [[cos, -sin, sin * y - cos * x], [sin, cos, -sin * x - cos * y]]
    return np.array(rows, dtype=np.float32).transpose(2, 0, 1).copy()


def affine(images: Tensor, inverse: Tensor, mode: str = "bilinear") -> Tensor:
    """Images [B,3,S,S] moved by ``inverse_affine``'s maps [B,2,3]; ``mode`` is bilinear or nearest. Black outside."""
    side = images.shape[-1]
    place = (2 * torch.arange(side, device=images.device) + 1) / side - 1
    # Not affine_grid: its matrix product may round by the size of the batch.
    a, b, c = inverse[:, :, :, None, None].unbind(2)
    grid = a * place + b * place[:, None] + c
    moved = F.grid_sample(images, grid.permute(0, 2, 3, 1), mode, align_corners=False)
    return moved.contiguous(memory_format=torch.channels_last)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Images [B,3,S,S] in [0,1] times ``factor`` [B]; clipped, as by the other adjustments, to [0,1]."""
    return (images * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Distances from the image's mean grey times ``factor`` [B]."""
    # Rows, then columns: a sum over all pixels of a single image may be split, and round otherwise than in a batch.
    mean = grey(images).mean(2).mean(1)
    return _blend(images, mean.view(-1, 1, 1, 1), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Distances from each pixel's grey times ``factor`` [B]."""
    return _blend(images, grey(images)[:, None], factor)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Hues moved by ``turn`` [B] of the colour circle; lightest and darkest channel of a pixel keep their values."""
    red, green, blue = images.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    span = chroma + (chroma == 0)  # a grey pixel has no hue, and needs none
    hue = torch.where(high == green, 2 + (blue - red) / span, 4 + (red - green) / span)
    hue = torch.where(high == red, (green - blue) / span, hue) + 6 * turn.view(-1, 1, 1)  # in sixths of the circle
    channels = []
    for offset in (5, 3, 1):
        place = hue + offset
        place = place - 6 * (place / 6).floor()
        channels.append(high - chroma * torch.minimum(place, 4 - place).clamp_(0, 1))
    return torch.stack(channels, -1).permute(0, 3, 1, 2)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Distances from the blurred image times ``factor`` [B]; the outermost pixels stay."""
    inner = images[:, :, 1:-1, 1:-1]
    columns = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    blurred = (columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:] + 4 * inner) / 13
    sharpened = images.clone()
    sharpened[:, :, 1:-1, 1:-1] = _blend(inner, blurred, factor)
    return sharpened


def posterize(images: Tensor, step: Tensor) -> Tensor:
    """Values cut to multiples of ``step`` [B], a whole number of 255ths."""
    step = step.view(-1, 1, 1, 1)
    return (levels(images) / step).floor() * step / 255


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Values of ``threshold`` [B], a whole number of 255ths, and above become their negatives."""
    return torch.where(levels(images) >= threshold.view(-1, 1, 1, 1), 1 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Each channel stretched to the whole of [0,1]; one of a single value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = high == low
    return ((images - low.masked_fill(flat, 0)) / (high - low).masked_fill(flat, 1)).clamp_(0, 1)


def equalize(images: Tensor) -> Tensor:
    """Each channel with its 256 levels equally frequent, as Pillow does it."""
    count, channels, side, _ = images.shape
    level = levels(images).long().reshape(count * channels, side * side)
    # One dimension: all that CUDA adds up in the same way each time. bincount would wait for it.
    places = (level + 256 * torch.arange(count * channels, device=images.device)[:, None]).flatten()
    histogram = torch.zeros(256 * count * channels, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(0, places, torch.ones_like(places))
    histogram = histogram.view(-1, 256)
    below = histogram.cumsum(1)
    brightest = histogram.gather(1, below.argmax(1, keepdim=True))
    step = (side * side - brightest) // 255
    table = ((below - histogram + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    equalized = torch.where(step > 0, table.gather(1, level), level).view(count, channels, side, side)
    return (equalized / 255).contiguous(memory_format=torch.channels_last)


def levels(images: Tensor) -> Tensor:
    """The whole numbers 0 to 255 that stand for the values of images in [0,1]."""
    return (images * 255).round()


# What the operations of TrivialAugment and RandAugment do: of images and six numbers for each, [B,6], the new images.
EDITS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda images, values: affine(images, values.view(-1, 2, 3), "nearest"),
    lambda images, values: adjust_brightness(images, values[:, 0]),
    lambda images, values: adjust_saturation(images, values[:, 0]),
    lambda images, values: adjust_contrast(images, values[:, 0]),
    lambda images, values: adjust_sharpness(images, values[:, 0]),
    lambda images, values: posterize(images, values[:, 0]),
    lambda images, values: solarize(images, values[:, 0]),
    lambda images, _: autocontrast(images),
    lambda images, _: equalize(images),
)

# Colour jitter: the fields of the recipe in the order in which they are applied, always this one.
JITTER = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


def grey(images: Tensor) -> Tensor:
    """[B,3,S,S] to [B,S,S], by the weights of ITU-R BT.601."""
    red, green, blue = images.unbind(1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _blend(images: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    factor = factor.view(-1, 1, 1, 1)
    return (images * factor + others * (1 - factor)).clamp_(0, 1)
