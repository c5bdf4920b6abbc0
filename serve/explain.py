"""Where a model looked: parts of the picture are covered, one after the other, and the answer is watched.

Source: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks" (2014), section 4.2. It needs
nothing but the model's answers, so it holds for every artifact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.session import Array

STEPS = 7  # positions of the cover in each direction
SHARE = 3  # a cover's side is the picture's divided by this
NOTABLE = 0.1  # a loss of log-probability below this is no more than noise


@dataclass(frozen=True)
class Attention:
    """What covering did to one class.

    ``heat`` is float32 ``[S,S]`` in 0..1: how much the class lost where that pixel was covered, 1 where it lost
    most, dark all over where it never lost much. ``before`` is the probability of the class, ``after`` the lowest
    one under a cover.
    """

    heat: Array
    before: float
    after: float


def covered(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``image``, uint8 ``[S,S,3]``, and its copies with one part in the image's mean colour: ``[1+STEPS²,S,S,3]``."""
    size = image.shape[0]
    copies = np.repeat(image[None], 1 + STEPS * STEPS, axis=0)
    for copy, (top, left) in zip(copies[1:], _corners(size), strict=True):
        copy[top : top + _side(size), left : left + _side(size)] = image.mean((0, 1)).round()
    return copies


def attention(probabilities: Array, size: int) -> Attention:
    """What the answers to ``covered`` images of side ``size`` say of the first one's best class.

    ``probabilities`` is float32 ``[1+STEPS²,K]``.
    """
    scores = probabilities[:, probabilities[0].argmax()]
    # In logarithms: a class at 99.9% would hide what a cover does to it.
    lost = np.log(scores[0] + 1e-6) - np.log(scores[1:] + 1e-6)
    total, times = np.zeros((2, size, size), np.float32)
    for loss, (top, left) in zip(lost, _corners(size), strict=True):
        window = np.s_[top : top + _side(size), left : left + _side(size)]
        total[window] += max(0.0, float(loss))
        times[window] += 1
    heat = total / times
    return Attention(heat / max(float(heat.max()), NOTABLE), float(scores[0]), float(scores.min()))


def overlay(image: NDArray[np.uint8], heat: Array) -> NDArray[np.uint8]:
    """``image``, uint8 ``[H,H,3]``, in colour and in warm light where ``heat`` (``[S,S]``) is high, else dark grey."""
    side = image.shape[0]
    coarse = Image.fromarray(heat).resize((STEPS, STEPS), Image.Resampling.BOX)  # no finer than the covers tell
    light = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    colour = image.astype(np.float32)
    grey = colour.mean(2, keepdims=True)
    lit = colour * 0.8 + np.array([255, 176, 32], np.float32) * 0.2
    return np.asarray((grey * 0.55 * (1 - light) + lit * light).round(), np.uint8)


def _side(size: int) -> int:
    return max(1, round(size / SHARE))


def _corners(size: int) -> list[tuple[int, int]]:
    """Top and left of each cover, row by row; they overlap, and together they reach every pixel."""
    starts = np.linspace(0, size - _side(size), STEPS).round().astype(int).tolist()
    return [(top, left) for top in starts for left in starts]
