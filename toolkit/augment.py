"""Augmentation in batches, on the device of the images, as a pure function of (seed, epoch, sample index).

For each epoch one table holds the random parameters of every sample, and a batch reads its rows. What
happens to a sample therefore depends neither on the batch it is in nor on what ran before: resuming, several
devices and a cache of the teacher's logits see the same images.

To add an augmentation: a field in ``recipe.Augment``, its draws in ``Augmenter._draw`` under a stream name of
its own (the draws of the others stay as they are), its effect in ``Augmenter._view`` (what it does to pixels is in
``adjust.py``), and in ``Augmenter._with_plain_rows`` the value that leaves an image as it is. Where what others show
changes, ``VIEWS`` is raised.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from toolkit import recipe
from toolkit.adjust import EDITS, JITTER, affine, inverse_affine
from toolkit.data import StoredImages
from toolkit.errors import RecipeError

# Torchvision's, in its order. Those that move pixels are one of EDITS; the others follow one by one.
OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
EDIT_OF = np.array([0, 1, 1, 1, 1, 1, *range(2, len(EDITS) + 1)])  # its number from 1; Identity has none
FILLED = {"zero": 0, "white": 255}  # what padding holds where it reflects nothing
VIEWS = 1  # raised where the same fields come to show other images: cached logits of the old ones do not count then
STRENGTHS = 31  # of each operation, from no effect to the strongest


def generator(seed: int, epoch: int | None, stream: str) -> np.random.Generator:
    """The generator of one stream of one epoch (None: of the whole run). On the CPU, the same everywhere."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{stream}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


class Augmenter:
    """Training images and what an epoch does to them.

    ``images`` is uint8 [N,3,S,S], in a file or like ``labels``, int64 [N], on the device where batches are wanted. An
    epoch has ``count`` samples: sample i shows image i, and with ``plain_copy`` there are 2N of them, of which N+i is
    image i as it is. Raises ``RecipeError`` where the padding does not fit the images. ``balanced``: see ``order``.
    Starts in epoch 0.
    """

    def __init__(
        self,
        images: Tensor | StoredImages,
        labels: Tensor,
        num_classes: int,
        config: recipe.Augment,
        seed: int,
        balanced: bool = False,
    ) -> None:
        self.config, self.seed, self.device, self.balanced = config, seed, labels.device, balanced
        self.originals, _, self.side, _ = images.shape
        if config.padding_mode == "reflect" and config.crop_padding >= self.side:
            raise RecipeError(
                f"augment.crop_padding (={config.crop_padding}) must be less than the side of the images "
                f"(={self.side}) to be filled by reflection; take less, or augment.padding_mode=zero"
            )
        self.count = self.originals * config.copies
        self.images = images if isinstance(images, StoredImages) else as_rows(images)
        self.labels = labels.repeat(config.copies)
        self.one_hot = torch.eye(num_classes, device=self.device)
        self.axis = torch.arange(self.side, device=self.device)
        self.mixes = config.mix_probability > 0 and (config.mixup > 0 or config.cutmix > 0)
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Draw the parameters of all samples for this epoch."""
        self.table = {name: torch.from_numpy(rows).to(self.device) for name, rows in self._draw(epoch).items()}

    def order(self, epoch: int) -> Tensor:
        """The order of the samples in this epoch, int64 [count]: a permutation, or ``balanced`` over the classes."""
        random = generator(self.seed, epoch, "order")
        order = balanced_order(random, self.labels.cpu().numpy()) if self.balanced else random.permutation(self.count)
        return torch.from_numpy(order).to(self.device)

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
        config, n, side = self.config, self.originals, self.side
        table: dict[str, np.ndarray] = {}

        if config.flip == "random":
            table["flip"] = generator(self.seed, epoch, "flip").random(n) < 0.5
        elif config.flip == "alternating":  # the first side is random, and stays so for the whole run
            table["flip"] = (generator(self.seed, None, "flip").random(n) < 0.5) ^ (epoch % 2 == 1)
        if config.crop_padding:
            random = generator(self.seed, epoch, "crop")
            table["corner"] = random.integers(0, 2 * config.crop_padding, (n, 2), endpoint=True)
        if config.policy != "none":
            random = generator(self.seed, epoch, config.policy)
            shape = (n, 1 if config.policy == "trivial" else config.rand_operations)
            operation = random.integers(0, len(OPERATIONS), shape)
            strength = random.integers(0, STRENGTHS, shape) if config.policy == "trivial" else config.rand_magnitude
            sign = random.integers(0, 2, shape)
            table["edit"] = EDIT_OF[operation]
            table["values"] = edit_values(config.policy, side)[operation, strength, sign]
        if config.rotation or config.translation:
            angle = generator(self.seed, epoch, "rotation").uniform(-1, 1, n) * np.deg2rad(config.rotation)
            shift = generator(self.seed, epoch, "translation").uniform(-1, 1, (n, 2)) * config.translation
            table["affine"] = inverse_affine(angle, shift)
        for name in JITTER:
            if reach := getattr(config, name):
                low, high = (-reach, reach) if name == "hue" else (max(0, 1 - reach), 1 + reach)
                table[name] = generator(self.seed, epoch, name).uniform(low, high, n).astype(np.float32)
        if config.cutout:
            first = generator(self.seed, epoch, "cutout").integers(0, side, (n, 2)) - config.cutout // 2
            table["cutout"] = np.concatenate([first, first + config.cutout], axis=1)
        if config.erasing:
            random = generator(self.seed, epoch, "erasing")
            table["erased"] = erased_boxes(random, n, side) * (random.random((n, 1)) < config.erasing)
            table["colour"] = random.random((n, 3), dtype=np.float32)
        if self.mixes:
            table |= self._draw_mix(epoch)
        return self._with_plain_rows(table) if config.plain_copy else table

    def _with_plain_rows(self, table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The table, and below the N rows that it has N rows that leave the images as they are."""
        plain = {
            "flip": False,
            "corner": self.config.crop_padding,
            "affine": np.eye(2, 3),
            **dict.fromkeys(("brightness", "contrast", "saturation", "weight", "lam"), 1),
            **dict.fromkeys(("edit", "values", "hue", "cutout", "erased", "colour", "box"), 0),
            "partner": np.arange(self.originals, self.count),
        }
        return {name: np.concatenate([rows, np.full_like(rows, plain[name])]) for name, rows in table.items()}

    def _draw_mix(self, epoch: int) -> dict[str, np.ndarray]:
        """``partner`` [N], the ``box`` [N,4] that shows it alone, the image's ``weight`` [N] elsewhere;
        ``lam`` [N] is the image's weight in the label."""
        config, n = self.config, self.originals
        coin = generator(self.seed, epoch, "mix")
        applied = coin.random(n) < config.mix_probability
        cuts = coin.random(n) < (0.5 if config.mixup and config.cutmix else config.cutmix > 0)

        lam = np.ones(n)
        if config.mixup:
            drawn = generator(self.seed, epoch, "mixup").beta(config.mixup, config.mixup, n)
            lam = np.where(applied & ~cuts, drawn, 1)
        random = generator(self.seed, epoch, "partner")
        partner = balanced_order(random, self.labels[:n].cpu().numpy()) if self.balanced else random.permutation(n)
        mix: dict[str, np.ndarray] = {"partner": partner, "weight": lam.astype(np.float32)}
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
            top, left = (self.table["corner"][index] - self.config.crop_padding).unbind(1)
            y, x = y + top[:, None], x + left[:, None]
        place, pixels = index % self.originals, self.images
        if isinstance(pixels, StoredImages):
            pixels = as_rows(pixels[place.cpu()].to(self.device))
            place = torch.arange(len(index), device=index.device)
        near_y, near_x = reflected(y, self.side), reflected(x, self.side)
        rows = (place[:, None] * self.side + near_y) * self.side
        images = pixels.index_select(0, (rows[:, :, None] + near_x[:, None, :]).flatten())
        images = images.view(-1, self.side, self.side, 3).permute(0, 3, 1, 2)
        if "corner" in self.table and self.config.padding_mode != "reflect":
            outside = (y != near_y)[:, :, None] | (x != near_x)[:, None, :]
            images.masked_fill_(outside[:, None], FILLED[self.config.padding_mode])
        images = images.float().div_(255)

        if "edit" in self.table:
            for edit, values in zip(self.table["edit"][index].T, self.table["values"][index].unbind(1), strict=True):
                images = self._edit(images, edit, values)
        if "affine" in self.table:
            images = affine(images, self.table["affine"][index])
        for name, adjust in JITTER.items():
            if name in self.table:
                images = adjust(images, self.table[name][index])
        if "cutout" in self.table:
            images = images.masked_fill_(self._inside(self.table["cutout"][index]), 0)
        if "erased" in self.table:
            colour = self.table["colour"][index].view(-1, 3, 1, 1)
            images = torch.where(self._inside(self.table["erased"][index]), colour, images)
        return images

    def _edit(self, images: Tensor, edit: Tensor, values: Tensor) -> Tensor:
        """Each image after one of ``EDITS``, by its number from 1 in ``edit`` [B] (0: none), with ``values`` [B,6]."""
        for number, apply in enumerate(EDITS, 1):
            chosen = edit == number
            if self.device.type == "cpu":
                rows = chosen.nonzero()[:, 0]
                images[rows] = apply(images[rows], values[rows])
            else:  # to know how many are chosen is to wait for the device: do it to all
                images = torch.where(chosen.view(-1, 1, 1, 1), apply(images, values), images)
        return images

    def _inside(self, box: Tensor) -> Tensor:
        """The pixels inside of boxes [B,4] of (top, left, bottom, right): bool [B,1,S,S]."""
        top, left, bottom, right = box[:, :, None].unbind(1)
        y = (self.axis >= top) & (self.axis < bottom)
        x = (self.axis >= left) & (self.axis < right)
        return (y[:, :, None] & x[:, None, :])[:, None]


def balanced_order(random: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """As many samples as there are labels, int64 [N]: the same number of each class, to one, in random order.

    Of a large class some are left out, those of a small one come several times (as this epoch shows them).
    """
    classes = random.permutation(np.unique(labels))
    wanted = len(labels) // len(classes) + (np.arange(len(classes)) < len(labels) % len(classes))
    drawn = []
    for label, count in zip(classes, wanted, strict=True):
        members = np.flatnonzero(labels == label)
        drawn += [random.permutation(members)[: count - start] for start in range(0, count, len(members))]
    return random.permutation(np.concatenate(drawn))


def as_rows(images: Tensor) -> Tensor:
    """uint8 [N,3,S,S] to one row of three bytes a pixel: flip and crop are then a single gather of rows."""
    return images.permute(0, 2, 3, 1).reshape(-1, 3)


def reflected(place: Tensor, side: int) -> Tensor:
    """Places in 0 .. ``side`` - 1: those outside are mirrored at the first and last pixel, or 0 if that is too far."""
    return (side - 1 - (side - 1 - place.abs()).abs()).clamp(min=0)


def cutmix_boxes(random: np.random.Generator, alpha: float, count: int, side: int) -> np.ndarray:
    """Boxes [N,4] of (top, left, bottom, right) that cover 1 - Beta(alpha, alpha) of the image, then clipped.

    The centre is uniform over the pixels (Yun et al. 2019, as ``torchvision.transforms.v2.CutMix``).
    """
    half = (0.5 * np.sqrt(1 - random.beta(alpha, alpha, count)) * side).astype(np.int64)[:, None]
    centre = random.integers(0, side, (count, 2))
    return np.concatenate([centre - half, centre + half], axis=1).clip(0, side)


def erased_boxes(random: np.random.Generator, count: int, side: int) -> np.ndarray:
    """Boxes [N,4] of (top, left, bottom, right) in the image that cover 2% to 33% of it, 3:10 to 33:10 in shape.

    The first of ten drawn boxes that fits, and none where none does (Zhong et al. 2017, as
    ``torchvision.transforms.v2.RandomErasing``).
    """
    area = random.uniform(0.02, 0.33, (count, 10)) * side**2
    ratio = np.exp(random.uniform(np.log(0.3), np.log(3.3), (count, 10)))
    size = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 2).round().astype(np.int64)
    fits = (size[..., 0] < side) & (size[..., 1] < side)
    size = size[np.arange(count), fits.argmax(1)] * fits.any(1, keepdims=True)
    first = random.integers(0, side - size, endpoint=True)
    return np.concatenate([first, first + size], axis=1)


def edit_values(policy: str, side: int) -> np.ndarray:
    """The numbers that ``EDITS`` take for each operation, strength and sign: float32 [14,31,2,6].

    ``trivial`` has the strengths of ``torchvision.transforms.v2.TrivialAugmentWide``, ``rand`` those of
    ``RandAugment``.
    """
    wide = policy == "trivial"
    shear, shift, turn, blend, bits = (0.99, 32, 135, 0.99, 6) if wide else (0.3, 150 / 331 * side, 30, 0.9, 4)
    values = np.zeros((len(OPERATIONS), STRENGTHS, 2, 2, 3))
    at = dict(zip(OPERATIONS, values, strict=True))

    def both_ways(reach: float) -> np.ndarray:
        strength = torch.linspace(0, reach, STRENGTHS).double().numpy()
        return np.stack([strength, -strength], 1)

    for name in ("ShearX", "ShearY", "TranslateX", "TranslateY"):
        at[name][:] = np.eye(2, 3)
    # About the corner: nothing moves along the first edge.
    at["ShearX"][..., 0, 1] = at["ShearX"][..., 0, 2] = both_ways(shear)
    at["ShearY"][..., 1, 0] = at["ShearY"][..., 1, 2] = both_ways(shear)
    at["TranslateX"][..., 0, 2] = at["TranslateY"][..., 1, 2] = -2 * np.trunc(both_ways(shift)) / side
    angle = np.deg2rad(both_ways(turn)).flatten()
    at["Rotate"][:] = inverse_affine(angle, np.zeros((len(angle), 2))).reshape(STRENGTHS, 2, 2, 3)
    for name in ("Brightness", "Color", "Contrast", "Sharpness"):
        at[name][..., 0, 0] = 1 + both_ways(blend)
    strength = torch.arange(STRENGTHS, dtype=torch.float64)[:, None]
    at["Posterize"][..., 0, 0] = 2 ** (8 - (8 - strength * bits / (STRENGTHS - 1)).round())
    at["Solarize"][..., 0, 0] = (255 * torch.linspace(1, 0, STRENGTHS).double()).float().ceil()[:, None]
    return values.reshape(*values.shape[:3], 6).astype(np.float32)
