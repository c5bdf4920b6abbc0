"""Augmentation in batches, on the device of the images, as a pure function of (seed, epoch, sample index).

For each epoch one table holds the random parameters of every sample, and a batch reads its rows. What
happens to a sample therefore depends neither on the batch it is in nor on what ran before: resuming, several
devices and a cache of the teacher's logits see the same images.

To add an augmentation: a field in ``recipe.Augment``, its draws in ``Augmenter._draw`` under a stream name of
its own (the draws of the others stay as they are), and its effect in ``Augmenter._view``.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit import recipe
from toolkit.errors import RecipeError


def generator(seed: int, epoch: int | None, stream: str) -> np.random.Generator:
    """The generator of one stream of one epoch (None: of the whole run). On the CPU, the same everywhere."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{stream}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


class Augmenter:
    """Training images and what an epoch does to them.

    ``images`` is uint8 [N,3,S,S] and ``labels`` int64 [N], both on the device where batches are wanted; a
    padded copy of the images is kept there. Raises ``RecipeError`` where the padding does not fit the images.
    Starts in epoch 0.
    """

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int, config: recipe.Augment, seed: int) -> None:
        self.config, self.seed, self.device = config, seed, images.device
        self.count, _, self.side, _ = images.shape
        # One row of three bytes a pixel: flip and crop are then a single gather of rows.
        self.padded_side = self.side + 2 * config.crop_padding
        self.pixels = pad(images, config.crop_padding, config.padding_mode).reshape(-1, 3)
        self.labels = labels
        self.one_hot = torch.eye(num_classes, device=self.device)
        self.axis = torch.arange(self.side, device=self.device)
        self.mixes = config.mix_probability > 0 and (config.mixup > 0 or config.cutmix > 0)
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Draw the parameters of all samples for this epoch."""
        self.table = {name: torch.from_numpy(rows).to(self.device) for name, rows in self._draw(epoch).items()}

    def order(self, epoch: int) -> Tensor:
        """The order of the samples in this epoch: a permutation, int64 [N]."""
        permutation = generator(self.seed, epoch, "order").permutation(self.count)
        return torch.from_numpy(permutation).to(self.device)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The samples ``index`` (int64 [B]) as this epoch shows them.

        Returns images, float32 [B,3,S,S] in [0,1] and channels_last, and soft labels, float32 [B,K].
        """
        if not self.mixes:
            return self._view(index), self.one_hot[self.labels[index]]
        partner = self.table["partner"][index]
        images, others = self._view(index), self._view(partner)
        weight = self.table["weight"][index].view(-1, 1, 1, 1)
        if self.config.cutmix:
            weight = weight.masked_fill(self._inside(self.table["box"][index]), 0)
        # Separate products, as a fused lerp rounds differently at different places of a batch.
        images = images * weight + others * (1 - weight)
        lam = self.table["lam"][index, None]
        labels = self.one_hot[self.labels[index]] * lam + self.one_hot[self.labels[partner]] * (1 - lam)
        return images, labels

    def _draw(self, epoch: int) -> dict[str, np.ndarray]:
        """The table: by parameter, one row for each sample."""
        config, n, side = self.config, self.count, self.side
        table: dict[str, np.ndarray] = {}

        if config.flip == "random":
            table["flip"] = generator(self.seed, epoch, "flip").random(n) < 0.5
        elif config.flip == "alternating":  # the first side is random, and stays so for the whole run
            table["flip"] = (generator(self.seed, None, "flip").random(n) < 0.5) ^ (epoch % 2 == 1)
        if config.crop_padding:
            random = generator(self.seed, epoch, "crop")
            table["corner"] = random.integers(0, 2 * config.crop_padding, (n, 2), endpoint=True)
        if config.rotation or config.translation:
            angle = generator(self.seed, epoch, "rotation").uniform(-1, 1, n) * np.deg2rad(config.rotation)
            shift = generator(self.seed, epoch, "translation").uniform(-1, 1, (n, 2)) * config.translation
            table["affine"] = inverse_affine(angle, shift)
        if config.cutout:
            first = generator(self.seed, epoch, "cutout").integers(0, side, (n, 2)) - config.cutout // 2
            table["cutout"] = np.concatenate([first, first + config.cutout], axis=1)
        if self.mixes:
            table |= self._draw_mix(epoch)
        return table

    def _draw_mix(self, epoch: int) -> dict[str, np.ndarray]:
        """``partner`` [N], the ``box`` [N,4] that shows it alone, the image's ``weight`` [N] elsewhere;
        ``lam`` [N] is the image's weight in the label."""
        config, n = self.config, self.count
        coin = generator(self.seed, epoch, "mix")
        applied = coin.random(n) < config.mix_probability
        if config.mixup and config.cutmix:
            cuts = coin.random(n) < 0.5
        else:
            cuts = np.full(n, config.cutmix > 0)

        lam = np.ones(n)
        if config.mixup:
            drawn = generator(self.seed, epoch, "mixup").beta(config.mixup, config.mixup, n)
            lam = np.where(applied & ~cuts, drawn, 1)
        mix: dict[str, np.ndarray] = {
            "partner": generator(self.seed, epoch, "partner").permutation(n),
            "weight": lam.astype(np.float32),
        }
        if config.cutmix:
            box = cutmix_boxes(generator(self.seed, epoch, "cutmix"), config.cutmix, n, self.side)
            box[~(applied & cuts)] = 0
            mix["box"] = box
            lam = lam * (1 - (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / self.side**2)
        mix["lam"] = lam.astype(np.float32)
        return mix

    def _view(self, index: Tensor) -> Tensor:
        """The samples without mixing, float32 [B,3,S,S] in [0,1]."""
        y = x = self.axis.expand(len(index), -1)
        if "flip" in self.table:
            x = torch.where(self.table["flip"][index, None], self.side - 1 - x, x)
        if "corner" in self.table:
            top, left = self.table["corner"][index].unbind(1)
            y, x = y + top[:, None], x + left[:, None]
        rows = (index[:, None] * self.padded_side + y) * self.padded_side
        pixels = self.pixels.index_select(0, (rows[:, :, None] + x[:, None, :]).flatten())
        images = pixels.view(-1, self.side, self.side, 3).permute(0, 3, 1, 2).float().div_(255)

        if "affine" in self.table:
            images = affine(images, self.table["affine"][index])
        if "cutout" in self.table:
            images = images.masked_fill_(self._inside(self.table["cutout"][index]), 0)
        return images

    def _inside(self, box: Tensor) -> Tensor:
        """The pixels inside of boxes [B,4] of (top, left, bottom, right): bool [B,1,S,S]."""
        top, left, bottom, right = box[:, :, None].unbind(1)
        y = (self.axis >= top) & (self.axis < bottom)
        x = (self.axis >= left) & (self.axis < right)
        return (y[:, :, None] & x[:, None, :])[:, None]


def pad(images: Tensor, padding: int, mode: str) -> Tensor:
    """uint8 [N,3,S,S] to [N,S+2p,S+2p,3]; ``mode`` is reflect, zero or white."""
    images = images.permute(0, 2, 3, 1)
    count, side = images.shape[:2]
    if mode == "reflect":
        if padding >= side:
            raise RecipeError(
                f"augment.crop_padding (={padding}) must be less than the side of the images (={side}) "
                "to be filled by reflection; take less, or augment.padding_mode=zero"
            )
        place = torch.arange(-padding, side + padding, device=images.device).abs()
        place = side - 1 - (side - 1 - place).abs()
        return images[:, place][:, :, place]
    full = side + 2 * padding
    padded = images.new_full((count, full, full, 3), {"zero": 0, "white": 255}[mode])
    padded[:, padding : padding + side, padding : padding + side] = images
    return padded


def inverse_affine(angle: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """For each sample the map from a place in the result to the place in the image that is shown there.

    ``angle`` [N] in radians, counter-clockwise about the centre, then ``shift`` [N,2], (right, down) as
    fractions of the side. Returns float32 [N,2,3] in coordinates that run from -1 to 1, as ``grid_sample``'s.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = 2 * shift.T
    rows = [[cos, -sin, sin * y - cos * x], [sin, cos, -sin * x - cos * y]]
    return np.array(rows, dtype=np.float32).transpose(2, 0, 1).copy()


def affine(images: Tensor, inverse: Tensor) -> Tensor:
    """Images [B,3,S,S] moved by ``inverse_affine``'s maps [B,2,3]: bilinear, black outside of the image."""
    side = images.shape[-1]
    place = (2 * torch.arange(side, device=images.device) + 1) / side - 1
    # Not affine_grid: its matrix product may round by the size of the batch.
    a, b, c = inverse[:, :, :, None, None].unbind(2)
    grid = a * place + b * place[:, None] + c
    moved = F.grid_sample(images, grid.permute(0, 2, 3, 1), align_corners=False)
    return moved.contiguous(memory_format=torch.channels_last)


def cutmix_boxes(random: np.random.Generator, alpha: float, count: int, side: int) -> np.ndarray:
    """Boxes [N,4] of (top, left, bottom, right) that cover 1 - Beta(alpha, alpha) of the image, then clipped.

    The centre is uniform over the pixels (Yun et al. 2019, as ``torchvision.transforms.v2.CutMix``).
    """
    half = (0.5 * np.sqrt(1 - random.beta(alpha, alpha, count)) * side).astype(np.int64)[:, None]
    centre = random.integers(0, side, (count, 2))
    return np.concatenate([centre - half, centre + half], axis=1).clip(0, side)
