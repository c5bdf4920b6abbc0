"""From an image of any size to the model's input. Training on folders and serving use this same function."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def nhwc(images: Any) -> NDArray[np.uint8]:
    """A tensor uint8 ``[N,3,H,W]`` to what an artifact takes, ``[N,H,W,3]``."""
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())


def fit(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The central square of ``image``, resized.

    ``image`` is uint8 ``[H,W,3]``, the result uint8 ``[size,size,3]``. Bilinear, antialiased where it shrinks
    (Pillow's filter). An image that already has this size comes back as it is.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    # The crop comes first: a picture of 1 x 10,000 pixels is never blown up.
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))
