"""Draws the page's example pictures into this folder: `python serve/examples/draw.py`.

Simple scenes of our own, so that the page has something to try that nobody else has rights in. Each is named after
what it shows; `something_else` shows what no class is meant for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE, SCALE = 128, 4  # pixels of a picture, and how many times larger it is drawn
Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]


class Scene:
    """A canvas with coordinates in 0..1, y downwards."""

    def __init__(self, top: Colour, bottom: Colour) -> None:
        ramp = np.linspace(0, 1, SIZE * SCALE)[:, None, None]
        pixels = np.array(top) * (1 - ramp) + np.array(bottom) * ramp
        self.image = Image.fromarray(np.broadcast_to(pixels, (SIZE * SCALE, SIZE * SCALE, 3)).astype(np.uint8))
        self._draw = ImageDraw.Draw(self.image)

    def polygon(self, colour: Colour, points: Points) -> None:
        self._draw.polygon([(x * SIZE * SCALE, y * SIZE * SCALE) for x, y in points], fill=colour)

    def ellipse(self, colour: Colour, x: float, y: float, rx: float, ry: float) -> None:
        box = [(x - rx) * SIZE * SCALE, (y - ry) * SIZE * SCALE, (x + rx) * SIZE * SCALE, (y + ry) * SIZE * SCALE]
        self._draw.ellipse(box, fill=colour)

    def line(self, colour: Colour, points: Points, width: float) -> None:
        scaled = [(x * SIZE * SCALE, y * SIZE * SCALE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * SIZE * SCALE), joint="curve")

    def band(self, y0: float, y1: float, top: Colour, bottom: Colour) -> None:
        """A ground or a sea: a gradient from edge to edge."""
        for y in range(round(y0 * SIZE * SCALE), round(y1 * SIZE * SCALE)):
            part = (y / SIZE / SCALE - y0) / (y1 - y0)
            colour = tuple(round(a * (1 - part) + b * part) for a, b in zip(top, bottom, strict=True))
            self._draw.line([(0, y), (SIZE * SCALE, y)], fill=colour)

    def soften(self, radius: float) -> None:
        """Blur what has been drawn so far: the distance."""
        self.image = self.image.filter(ImageFilter.GaussianBlur(radius * SIZE * SCALE))
        self._draw = ImageDraw.Draw(self.image)

    def finished(self, seed: int) -> Image.Image:
        """Reduced to ``SIZE``, with a little grain, as a camera leaves it."""
        small = np.asarray(self.image.resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float32)
        grain = np.random.default_rng(seed).normal(0, 2.5, (SIZE, SIZE, 1))
        return Image.fromarray((small + grain).clip(0, 255).astype(np.uint8))


def airplane() -> Scene:
    scene = Scene((66, 128, 200), (190, 216, 240))
    for x, y, r in ((0.1, 0.8, 0.16), (0.25, 0.84, 0.2), (0.75, 0.88, 0.22), (0.95, 0.82, 0.15)):
        scene.ellipse((238, 243, 248), x, y, r, r * 0.4)
    scene.soften(0.02)
    scene.polygon((150, 158, 170), [(0.46, 0.44), (0.60, 0.43), (0.50, 0.22), (0.43, 0.23)])  # far wing
    scene.polygon((226, 230, 236), [(0.08, 0.47), (0.14, 0.43), (0.78, 0.40), (0.90, 0.45), (0.93, 0.49),
                                    (0.86, 0.53), (0.60, 0.56), (0.22, 0.54)])  # fmt: skip
    scene.polygon((176, 182, 192), [(0.10, 0.49), (0.93, 0.49), (0.86, 0.53), (0.60, 0.56), (0.22, 0.54)])
    scene.polygon((40, 84, 160), [(0.08, 0.47), (0.05, 0.24), (0.12, 0.24), (0.24, 0.44)])  # fin
    scene.polygon((198, 204, 212), [(0.03, 0.45), (0.02, 0.41), (0.20, 0.46), (0.18, 0.48)])
    scene.polygon((205, 210, 218), [(0.40, 0.52), (0.62, 0.51), (0.36, 0.78), (0.28, 0.79)])  # near wing
    scene.ellipse((90, 98, 112), 0.47, 0.63, 0.055, 0.03)
    scene.polygon((46, 58, 78), [(0.82, 0.435), (0.88, 0.455), (0.885, 0.468), (0.82, 0.462)])
    for x in np.arange(0.28, 0.78, 0.035):
        scene.ellipse((60, 72, 92), float(x), 0.465, 0.008, 0.011)
    return scene


def ship() -> Scene:
    scene = Scene((120, 170, 215), (214, 228, 238))
    scene.band(0.62, 1.0, (52, 104, 146), (16, 52, 88))
    for y in (0.70, 0.78, 0.88, 0.95):
        for x in np.arange(0.02, 1, 0.17):
            scene.line((92, 140, 176), [(float(x), y), (float(x) + 0.09, y - 0.004)], 0.006)
    scene.soften(0.006)
    scene.polygon((176, 44, 40), [(0.08, 0.63), (0.93, 0.63), (0.86, 0.73), (0.14, 0.73)])
    scene.polygon((30, 40, 58), [(0.05, 0.54), (0.97, 0.52), (0.91, 0.66), (0.09, 0.66)])
    scene.polygon((240, 242, 244), [(0.16, 0.44), (0.70, 0.44), (0.76, 0.54), (0.12, 0.545)])
    scene.polygon((222, 226, 230), [(0.24, 0.35), (0.60, 0.35), (0.63, 0.44), (0.22, 0.44)])
    scene.polygon((244, 246, 248), [(0.46, 0.27), (0.58, 0.27), (0.60, 0.35), (0.45, 0.35)])
    scene.polygon((200, 70, 40), [(0.30, 0.20), (0.39, 0.20), (0.40, 0.35), (0.29, 0.35)])  # funnel
    scene.polygon((28, 30, 36), [(0.30, 0.20), (0.39, 0.20), (0.392, 0.24), (0.298, 0.24)])
    scene.line((70, 76, 84), [(0.52, 0.27), (0.52, 0.13)], 0.01)
    scene.line((70, 76, 84), [(0.86, 0.53), (0.86, 0.36)], 0.01)
    for y, first, last in ((0.49, 0.20, 0.70), (0.395, 0.27, 0.60), (0.305, 0.48, 0.58)):
        for x in np.arange(first, last, 0.045):
            scene.ellipse((40, 62, 88), float(x), y, 0.012, 0.013)
    scene.line((236, 242, 246), [(0.08, 0.735), (0.30, 0.725), (0.60, 0.74), (0.92, 0.725)], 0.012)
    return scene


def _wheel(scene: Scene, x: float, y: float, r: float) -> None:
    scene.ellipse((22, 22, 24), x, y, r, r)
    scene.ellipse((172, 176, 182), x, y, r * 0.58, r * 0.58)
    scene.ellipse((70, 72, 76), x, y, r * 0.18, r * 0.18)


def automobile() -> Scene:
    scene = Scene((196, 206, 214), (226, 228, 226))
    for x, height in ((0.0, 0.3), (0.2, 0.22), (0.42, 0.33), (0.64, 0.25), (0.84, 0.34)):
        scene.polygon((136, 146, 138), [(x, 0.62), (x, 0.62 - height), (x + 0.18, 0.62 - height), (x + 0.18, 0.62)])
    scene.band(0.60, 1.0, (120, 120, 122), (84, 84, 88))
    scene.soften(0.012)
    scene.ellipse((48, 48, 52), 0.5, 0.795, 0.45, 0.035)
    scene.polygon((196, 22, 28), [(0.05, 0.56), (0.10, 0.50), (0.28, 0.47), (0.38, 0.33), (0.68, 0.33), (0.82, 0.47),
                                  (0.94, 0.51), (0.96, 0.66), (0.94, 0.74), (0.06, 0.74), (0.04, 0.66)])  # fmt: skip
    scene.polygon((150, 12, 20), [(0.04, 0.64), (0.96, 0.64), (0.94, 0.74), (0.06, 0.74)])
    scene.polygon((44, 56, 70), [(0.32, 0.47), (0.40, 0.36), (0.52, 0.36), (0.52, 0.47)])
    scene.polygon((44, 56, 70), [(0.545, 0.47), (0.545, 0.36), (0.665, 0.36), (0.77, 0.47)])
    scene.polygon((120, 140, 156), [(0.34, 0.47), (0.41, 0.36), (0.45, 0.36), (0.38, 0.47)])
    scene.line((120, 8, 14), [(0.533, 0.47), (0.533, 0.72)], 0.006)
    scene.polygon((252, 240, 196), [(0.045, 0.56), (0.10, 0.54), (0.11, 0.585), (0.045, 0.60)])
    scene.polygon((255, 120, 90), [(0.93, 0.53), (0.955, 0.55), (0.955, 0.60), (0.925, 0.58)])
    scene.line((228, 90, 90), [(0.12, 0.515), (0.30, 0.488), (0.78, 0.488)], 0.008)
    for x in (0.23, 0.77):
        scene.ellipse((28, 12, 14), x, 0.725, 0.112, 0.112)
        _wheel(scene, x, 0.735, 0.095)
    return scene


def truck() -> Scene:
    scene = Scene((142, 186, 224), (222, 232, 236))
    scene.ellipse((98, 128, 92), 0.2, 0.66, 0.34, 0.12)
    scene.ellipse((86, 118, 84), 0.8, 0.66, 0.36, 0.14)
    scene.band(0.66, 1.0, (128, 124, 118), (92, 90, 88))
    scene.soften(0.012)
    scene.ellipse((50, 48, 48), 0.5, 0.825, 0.47, 0.03)
    scene.polygon((52, 54, 60), [(0.05, 0.68), (0.95, 0.68), (0.95, 0.75), (0.05, 0.75)])
    scene.polygon((238, 238, 232), [(0.34, 0.22), (0.96, 0.22), (0.96, 0.69), (0.34, 0.69)])  # box
    scene.polygon((208, 208, 202), [(0.34, 0.62), (0.96, 0.62), (0.96, 0.69), (0.34, 0.69)])
    for x in (0.465, 0.59, 0.715, 0.84):
        scene.line((214, 214, 208), [(x, 0.23), (x, 0.62)], 0.006)
    scene.polygon((28, 92, 168), [(0.05, 0.72), (0.05, 0.55), (0.11, 0.36), (0.31, 0.34), (0.31, 0.72)])  # cab
    scene.polygon((20, 66, 124), [(0.05, 0.62), (0.31, 0.62), (0.31, 0.72), (0.05, 0.72)])
    scene.polygon((40, 54, 70), [(0.085, 0.53), (0.13, 0.39), (0.265, 0.38), (0.265, 0.53)])
    scene.polygon((118, 140, 158), [(0.10, 0.53), (0.14, 0.39), (0.17, 0.388), (0.135, 0.53)])
    scene.polygon((250, 236, 190), [(0.05, 0.60), (0.085, 0.60), (0.085, 0.645), (0.05, 0.645)])
    for x in (0.18, 0.68, 0.86):
        _wheel(scene, x, 0.75, 0.083)
    return scene


def frog() -> Scene:
    scene = Scene((70, 92, 44), (122, 112, 70))
    generator = np.random.default_rng(3)
    for x, y, r in generator.uniform((0, 0, 0.03), (1, 1, 0.1), (60, 3)):
        shade = int(generator.integers(-24, 24))
        scene.ellipse((96 + shade, 100 + shade, 58 + shade), x, y, r, r * 0.6)
    scene.soften(0.02)
    scene.ellipse((52, 50, 32), 0.5, 0.80, 0.40, 0.07)
    skin, dark, light = (94, 142, 44), (62, 104, 32), (196, 204, 130)
    scene.ellipse(dark, 0.20, 0.68, 0.16, 0.13)  # hind legs
    scene.ellipse(dark, 0.80, 0.68, 0.16, 0.13)
    scene.ellipse(skin, 0.19, 0.65, 0.13, 0.10)
    scene.ellipse(skin, 0.81, 0.65, 0.13, 0.10)
    scene.ellipse(skin, 0.5, 0.60, 0.29, 0.24)
    scene.ellipse(light, 0.5, 0.71, 0.22, 0.13)
    scene.ellipse(skin, 0.5, 0.42, 0.27, 0.17)
    scene.line(dark, [(0.27, 0.46), (0.38, 0.51), (0.62, 0.51), (0.73, 0.46)], 0.014)
    for x in (0.34, 0.66):
        scene.ellipse(skin, x, 0.29, 0.09, 0.09)
        scene.ellipse((214, 176, 60), x, 0.28, 0.062, 0.062)
        scene.ellipse((16, 16, 12), x, 0.28, 0.044, 0.026)
        scene.ellipse((250, 250, 240), x + 0.02, 0.262, 0.012, 0.012)
    for x in (0.36, 0.64):  # front legs
        scene.line(skin, [(x, 0.62), (x + (x - 0.5) * 0.3, 0.82)], 0.075)
        scene.ellipse(dark, x + (x - 0.5) * 0.4, 0.835, 0.075, 0.028)
    for x, y, r in (
        (0.42, 0.36, 0.022),
        (0.58, 0.37, 0.02),
        (0.30, 0.58, 0.022),
        (0.70, 0.57, 0.024),
        (0.5, 0.34, 0.016),
    ):
        scene.ellipse(dark, x, y, r, r * 0.8)
    return scene


def horse() -> Scene:
    scene = Scene((150, 190, 226), (220, 230, 226))
    scene.ellipse((86, 124, 84), 0.15, 0.58, 0.4, 0.12)
    scene.ellipse((74, 112, 76), 0.8, 0.58, 0.45, 0.1)
    scene.band(0.60, 1.0, (116, 152, 70), (84, 120, 50))
    scene.soften(0.014)
    coat, shade, mane = (134, 78, 40), (98, 54, 28), (40, 24, 18)
    scene.ellipse((66, 92, 42), 0.48, 0.905, 0.36, 0.03)
    for x, lean in ((0.30, -0.02), (0.62, 0.02)):  # far legs
        scene.polygon(shade, [(x, 0.58), (x + 0.09, 0.58), (x + 0.065 + lean, 0.89), (x + 0.02 + lean, 0.89)])
    scene.polygon(mane, [(0.15, 0.44), (0.20, 0.42), (0.17, 0.60), (0.11, 0.74), (0.08, 0.72), (0.11, 0.56)])  # tail
    scene.ellipse(coat, 0.44, 0.51, 0.28, 0.125)
    scene.ellipse(coat, 0.27, 0.49, 0.13, 0.125)
    scene.ellipse(coat, 0.62, 0.50, 0.12, 0.14)
    scene.polygon(coat, [(0.54, 0.42), (0.70, 0.20), (0.80, 0.22), (0.78, 0.34), (0.72, 0.56)])  # neck
    scene.polygon(coat, [(0.70, 0.19), (0.79, 0.17), (0.93, 0.31), (0.93, 0.37), (0.87, 0.39), (0.76, 0.33)])  # head
    scene.polygon(coat, [(0.72, 0.20), (0.73, 0.12), (0.78, 0.18)])
    scene.polygon(mane, [(0.73, 0.15), (0.69, 0.18), (0.53, 0.40), (0.58, 0.43), (0.72, 0.26)])
    scene.ellipse((20, 14, 12), 0.805, 0.235, 0.013, 0.013)
    scene.ellipse(shade, 0.905, 0.345, 0.025, 0.028)
    for x, lean in ((0.19, 0.01), (0.57, 0.0)):
        scene.polygon(coat, [(x, 0.55), (x + 0.12, 0.57), (x + 0.085 + lean, 0.72), (x + 0.08 + lean, 0.90),
                             (x + 0.025 + lean, 0.90), (x + 0.03 + lean, 0.72)])  # fmt: skip
        scene.polygon(mane, [(x + 0.08 + lean, 0.87), (x + 0.095 + lean, 0.91), (x + 0.02 + lean, 0.91),
                             (x + 0.025 + lean, 0.87)])  # fmt: skip
    return scene


def something_else() -> Scene:
    """A cup of coffee."""
    scene = Scene((232, 214, 190), (214, 188, 156))
    scene.band(0.66, 1.0, (150, 104, 66), (112, 72, 44))
    scene.soften(0.01)
    scene.ellipse((88, 58, 38), 0.48, 0.83, 0.36, 0.07)
    scene.ellipse((236, 236, 240), 0.46, 0.80, 0.34, 0.07)
    scene.ellipse((206, 208, 214), 0.46, 0.80, 0.22, 0.04)
    scene.ellipse((228, 230, 236), 0.72, 0.56, 0.13, 0.12)
    scene.ellipse((214, 188, 156), 0.72, 0.56, 0.075, 0.07)
    scene.polygon((240, 241, 245), [(0.20, 0.40), (0.72, 0.40), (0.66, 0.70), (0.58, 0.79), (0.34, 0.79), (0.26, 0.70)])
    scene.polygon((212, 214, 222), [(0.58, 0.40), (0.72, 0.40), (0.66, 0.70), (0.58, 0.79), (0.50, 0.79)])
    scene.ellipse((250, 250, 252), 0.46, 0.40, 0.26, 0.06)
    scene.ellipse((70, 40, 22), 0.46, 0.405, 0.225, 0.046)
    for x in (0.36, 0.46, 0.56):
        points = [(x + 0.02 * float(np.sin(t * 7)), 0.34 - 0.2 * t) for t in np.linspace(0, 1, 20)]
        scene.line((246, 238, 228), points, 0.012)
    return scene


SCENES: tuple[Callable[[], Scene], ...] = (airplane, automobile, frog, horse, ship, truck, something_else)

if __name__ == "__main__":
    for seed, draw in enumerate(SCENES):
        draw().finished(seed).save(Path(__file__).with_name(f"{draw.__name__}.png"), optimize=True)
