"""Data sets to tensors: uint8 images of one size, labels, class names, and the train / val / test split."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit import cifar, distributed, folders, recipe
from toolkit.decoded import decoded
from toolkit.errors import DataError
from toolkit.folders import listed
from toolkit.machine import total_memory
from toolkit.progress import say

SPLITTING = 4  # raised where the same options come to hold out other images
ANSWERED = ", labelled by the teacher"  # in the name of a data set
ORDERS = 20  # of groups that are tried, for a split that is near each class's share


class StoredImages:
    """Images uint8 [N,3,S,S], channels_last, that stay in a file: as much of a Tensor as data sets need."""

    def __init__(self, file: Tensor, rows: Tensor) -> None:
        self.file, self.rows = file, rows
        self.shape = torch.Size((len(rows), *file.shape[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Tensor | slice) -> Tensor:
        """A copy in memory of some images."""
        return self.file[self.rows[key]]

    def select(self, index: Tensor) -> StoredImages:
        """Some images, still in the file."""
        return StoredImages(self.file, self.rows[index])

    def split(self, size: int) -> Iterator[Tensor]:
        """Copies of ``size`` images at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))


@dataclass(frozen=True)
class Split:
    """``images`` uint8 [N,3,S,S] and ``labels`` int64 [N].

    ``groups`` int64 [N], where files are known: images of one number (copies, or one group of ``data.group_by``) are
    kept on one side of a split.
    """

    images: Tensor | StoredImages
    labels: Tensor
    groups: np.ndarray | None = None

    def select(self, index: Tensor) -> Split:
        """The images at ``index``; where they lie in a file they stay there."""
        images = self.images.select(index) if isinstance(self.images, StoredImages) else self.images[index]
        return Split(images, self.labels[index], None if self.groups is None else self.groups[index.numpy()])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """A data set in memory, or where that is too small for its images in a file.

    ``mean`` and ``std`` (per channel, of images in [0,1]) come from the training split alone. ``digest`` is the
    SHA-256 of classes, images and labels before the split, and of how a folder is split. ``files`` are the paths of the
    images in a folder that are used, ``broken`` those that cannot be read.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split | None
    test: Split
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digest: str
    broken: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


def load(config: recipe.Data) -> DataSet:
    """The data set that the recipe names. Raises ``DataError``."""
    path = config.dataset.partition(":")[2]
    files: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    version = ""  # images that never come in groups have always been split the same
    if config.kind == "folder":
        if not path:
            raise DataError("the data set is a folder, but which? Give --dataset folder:PATH, or --data-dir PATH")
        classes, parts, files, broken = _folder(Path(path).expanduser(), config)
        version = f"{SPLITTING}"
    else:
        classes, parts = _digits(config) if config.kind == "digits" else _cifar(config.kind, config)

    digest = _digest(classes, parts, version)
    train, val, test = parts["train"], parts.get("val"), parts["test"]
    if val is None and config.val_size:
        count = _val_count(train, config.val_size, classes)
        train, val = _hold_out(train, count, config.split_seed, classes, rare_may_lack=True)
    mean, std = _statistics(train.images)
    return DataSet(config.title, classes, train, val, test, mean, std, digest, broken, files)


# --- the built-in data set ---------------------------------------------------------------------------------


def _digits(config: recipe.Data) -> tuple[tuple[str, ...], dict[str, Split]]:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, with a fixed 80/20 split."""
    from sklearn.datasets import load_digits  # slow to import, and nobody else needs it

    digits = load_digits()
    grey = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)
    images = resize(grey[:, None].expand(-1, 3, -1, -1), config.image_size)
    whole = Split(images, torch.from_numpy(digits.target).long())
    classes = tuple(str(digit) for digit in digits.target_names)
    train, test = _hold_out(whole, round(folders.TEST_FRACTION * len(whole)), 0, classes)
    return classes, {"train": train, "test": test}


# --- CIFAR -------------------------------------------------------------------------------------------------


def _cifar(name: str, config: recipe.Data) -> tuple[tuple[str, ...], dict[str, Split]]:
    classes, read = cifar.read(name, config)
    parts = {
        part: Split(resize(torch.from_numpy(images), config.image_size), torch.from_numpy(labels))
        for part, (images, labels) in read.items()
    }
    return classes, parts


# --- a folder of images ------------------------------------------------------------------------------------


def _folder(
    root: Path, config: recipe.Data
) -> tuple[tuple[str, ...], dict[str, Split], tuple[str, ...], tuple[str, ...]]:
    """The images that ``folders.find`` finds.

    Without test images a fifth of the training images is held out. Returns classes, parts, the files that are in them,
    and those that could not be read and were left out.
    """
    listing = folders.find(root, config.unlabelled)
    if config.images is not None:
        listing = _only(listing, config.images)
    total = sum(len(found) for found in listing.files.values())
    # Each of several processes has a copy.
    limit = config.memory * 2**30 if config.memory else total_memory() / 2 / distributed.LOCAL_SIZE
    parts, names, digests, broken = {}, {}, {}, []
    for part, found in listing.files.items():
        parts[part], digest = _stored(found, config.image_size, limit * len(found) / total)
        good = (digest != 0).any(axis=1)
        digests[part] = digest[good]
        names[part] = [listing.name(path) for (path, _), fine in zip(found, good, strict=True) if fine]
        broken += [listing.name(path) for (path, _), fine in zip(found, good, strict=True) if not fine]
    if broken and not config.skip_broken:
        raise DataError(
            f"{len(broken)} of {total} images in {root} cannot be read: {listed(broken)}; repair them (`toolkit data "
            "check` says what is wrong), or leave them out with --skip-broken"
        )
    parts = _grouped(parts, names, digests, config)  # takes leaks out of the names, too
    for part, split in parts.items():
        missing = _missing(split.labels, listing.classes)
        # Validation without a rare class is poor but possible.
        if missing and (part != "val" or not len(split)):
            what = f" for {listed(missing)}" if listing.classes != ("",) else ""
            why = " (--skip-leaks leaves out those that are in val or test)" if config.skip_leaks else ""
            raise DataError(f"no readable images in {listing.places[part]}{what}, of the part {part}{why}")
    if "test" not in parts:
        held = folders.held_count(len(parts["train"]), len(listing.classes))
        parts["train"], parts["test"] = _hold_out(parts["train"], held, config.split_seed, listing.classes)
        if missing := _missing(parts["test"].labels, listing.classes):
            raise DataError(
                f"too few images of {listed(missing)} in {listing.places['train']} to hold out "
                f"{folders.TEST_FRACTION:.0%} of each class for the test: add some, or make folders train and test"
            )
    return listing.classes, parts, tuple(chain.from_iterable(names.values())), tuple(broken)


def _only(listing: folders.Listing, source: Path) -> folders.Listing:
    """The images that are named in a JSON file. Raises ``DataError``."""
    try:
        names = set(json.loads(source.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{source} is not a JSON list of images: {error}") from error
    there = {listing.name(path) for found in listing.files.values() for path, _ in found}
    if gone := sorted(names - there):
        raise DataError(
            f"the images of {listing.root} have changed since {source} was written, {len(gone)} are gone: "
            f"{listed(gone)}; bring them back"
        )
    if later := len(there - names):
        say(f"images in {listing.root} that are not in {source}: {later} (they came later, or were left out before)")
    kept = folders.only(listing, names)
    if "train" not in kept.files or len(kept.classes) < min(2, len(listing.classes)):
        raise DataError(f"{source} names too few images of {listing.root}: training images of two classes are needed")
    return kept


def _stored(files: Sequence[tuple[Path, int]], side: int, limit: float) -> tuple[Split, np.ndarray]:
    """The images that can be read; where they take more than ``limit`` bytes they stay in the file of ``decoded``.

    Also returns the digest of each file's pixels, uint8 [N,16], which is 0 where it cannot be read.
    """
    array, digests = decoded([path for path, _ in files], side)
    rows = torch.from_numpy(np.flatnonzero((digests != 0).any(axis=1)))
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)  # also where there are none
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nobody writes to it
        stored = StoredImages(torch.from_numpy(array).permute(0, 3, 1, 2), rows)
    # A split copies what it takes, and the augmentation may hold a copy.
    images = stored if 2 * array.nbytes > limit else stored[:]
    return Split(images, labels[rows]), digests


def _grouped(
    parts: dict[str, Split], names: dict[str, list[str]], digests: dict[str, np.ndarray], config: recipe.Data
) -> dict[str, Split]:
    """The parts with their groups, after a look at what two of them have in common."""
    every = [name for part in parts for name in names[part]]
    _, first, groups = np.unique(np.concatenate(list(digests.values())), axis=0, return_index=True, return_inverse=True)
    groups = first[groups]  # numbered by their places
    if config.group_by is not None:
        groups = _named_groups(every, groups, config.group_by)
    ends = np.cumsum([len(parts[part]) for part in parts])
    parts = {
        part: Split(split.images, split.labels, own)
        for (part, split), own in zip(parts.items(), np.split(groups, ends[:-1]), strict=True)
    }
    for part, others in (("train", ("test", "val")), ("val", ("test",))):
        for other in others:
            if part in parts and other in parts:
                parts[part] = _without_leaks(parts, names, part, other, config)
    return parts


def _named_groups(names: Sequence[str], copies: np.ndarray, pattern: str) -> np.ndarray:
    """A number for each file: by what the pattern finds in its path, and of its copies."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    found = [re.search(pattern, name) for name in names]
    if without := [name for name, match in zip(names, found, strict=True) if match is None]:
        raise DataError(
            f"--group-by {pattern!r} finds nothing in {len(without)} of {len(names)} paths: {listed(without)}"
        )
    keys = [(match[1] if match.re.groups else None) or match[0] for match in found if match]
    _, named = np.unique(keys, return_inverse=True)
    count = int(named.max()) + 1
    if count < 2:
        raise DataError(f"--group-by {pattern!r} makes one group of all {len(names)} images: {keys[0]!r}")
    # Files are edges between names and copies: what hangs together is one group.
    edges = coo_array((np.ones(len(named)), (named, copies + count)), shape=(count + len(names),) * 2)
    return connected_components(edges, directed=False)[1][named]


def _without_leaks(
    parts: dict[str, Split], names: dict[str, list[str]], part: str, other: str, config: recipe.Data
) -> Split:
    """``part`` without the groups that are in ``other`` too. Raises ``DataError`` unless that was asked for."""
    mine, theirs = parts[part].groups, parts[other].groups
    assert mine is not None
    assert theirs is not None
    shared = np.isin(mine, theirs)
    if not shared.any():
        return parts[part]
    if not config.skip_leaks:
        first = {group: names[other][place] for place, group in reversed(list(enumerate(theirs)))}
        pairs = [f"{names[part][place]} as {first[mine[place]]}" for place in np.flatnonzero(shared)]
        what = "images" if config.group_by is None else f"images or groups ({config.group_by!r})"
        raise DataError(
            f"the split leaks: {shared.sum()} of {len(mine)} {part} {what} are in {other} too: {listed(pairs, 3)}; "
            f"remove them, or leave them out of {part} with --skip-leaks"
        )
    names[part] = [name for name, leaks in zip(names[part], shared, strict=True) if not leaks]
    return parts[part].select(torch.from_numpy(np.flatnonzero(~shared)))


# --- what all of them share --------------------------------------------------------------------------------


def resize(images: Tensor, side: int) -> Tensor:
    """uint8 [N,3,H,W] to [N,3,side,side]: bilinear, antialiased; on the CPU the numbers are Pillow's."""
    if images.shape[-2:] == (side, side):
        return images
    resized = torch.empty(len(images), 3, side, side, dtype=torch.uint8)
    for source, target in zip(images.split(4096), resized.split(4096), strict=True):
        target.copy_(F.interpolate(source, size=(side, side), mode="bilinear", antialias=True))
    return resized


def at_once(side: int, count: int = 500) -> int:
    """Images of ``side`` pixels that take as much memory as ``count`` of 32; where these do, they do."""
    return max(1, min(count, count * 32 * 32 // side**2))


def labelled(data: DataSet, classes: Sequence[str], answer: Callable[[Tensor | StoredImages], np.ndarray]) -> DataSet:
    """Images without labels with those that ``answer`` (images uint8 [N,3,S,S] to logits [N,K]) gives them."""
    named = replace(data, name=f"{data.name}{ANSWERED}")
    return _relabelled(named, classes, lambda split: torch.from_numpy(answer(split.images).argmax(1)))


def in_order(data: DataSet, classes: Sequence[str]) -> DataSet:
    """The data set with its classes in another order."""
    if tuple(classes) == tuple(data.classes):
        return data
    number = torch.tensor([classes.index(name) for name in data.classes])
    return _relabelled(data, classes, lambda split: number[split.labels])


def _relabelled(data: DataSet, classes: Sequence[str], labels: Callable[[Split], Tensor]) -> DataSet:
    train, test = (replace(split, labels=labels(split)) for split in (data.train, data.test))
    val = None if data.val is None else replace(data.val, labels=labels(data.val))
    return replace(data, classes=tuple(classes), train=train, val=val, test=test)


def _val_count(train: Split, size: float, classes: Sequence[str]) -> int:
    """How many images ``val_size`` (a fraction below 1, or a count) holds out."""
    count = round(size * len(train)) if size < 1 else int(size)
    if size > 1 and count != size:
        raise DataError(f"data.val_size (={size:g}) must be a fraction below 1 or a whole number of images")
    if count < len(classes):
        raise DataError(
            f"data.val_size (={size:g}) holds out {count} images, fewer than the {len(classes)} classes: "
            "take more, or 0 for none"
        )
    if (left := len(train) - count) < len(classes):
        raise DataError(
            f"data.val_size (={size:g}) leaves {max(0, left)} of {len(train)} images to train on: take less"
        )
    return count


def _hold_out(
    whole: Split, count: int, seed: int, classes: Sequence[str], rare_may_lack: bool = False
) -> tuple[Split, Split]:
    """Split ``count`` images off, each class in proportion. Both parts keep the order of the whole.

    A rare class may have none among them; where groups stay together, if ``rare_may_lack``.
    """
    per_class = torch.bincount(whole.labels, minlength=len(classes))
    if per_class.min() < 2 or not len(classes) <= count <= len(whole) - len(classes):
        few = int(per_class.argmin())
        raise DataError(
            f"too few images to split {count} of {len(whole)} off: each class needs one on either side, "
            f"and {classes[few]!r} has {int(per_class[few])} in all; add images"
        )
    if whole.groups is None or len(np.unique(whole.groups)) == len(whole):
        held, rare_may_lack = stratified(whole.labels.numpy(), count, seed), True
        why = ": hold out fewer, or add images"
    else:
        held = stratified_groups(whole.labels.numpy(), whole.groups, count, seed)
        groups = len(np.unique(whole.groups))
        why = f" and groups stay together: these are {groups} groups, too few or too large"
    for side, kept in (("the rest", ~held), ("what is held out", held)):
        missing = _missing(whole.labels[torch.from_numpy(kept)], classes)
        if missing and not (rare_may_lack and kept is held and held.any()):
            raise DataError(
                f"no images of {listed(missing)} in {side}, where {count} of {len(whole)} images are split off{why}"
            )
    first, second = (whole.select(torch.from_numpy(np.flatnonzero(part))) for part in (~held, held))
    return first, second


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which ``count`` samples are held out, bool [N]: of each class its share, to the nearest image.

    Where all shares are whole these are the samples of scikit-learn's ``train_test_split``, whose import alone takes
    as long as loading CIFAR-10.
    """
    return _drawn(labels, folders.shares(np.bincount(labels), count), seed)


def _drawn(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """So many samples of each class, int64 [K], by chance: bool [N]."""
    random = np.random.RandomState(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label, some in enumerate(counts):
        members = random.permutation(np.flatnonzero(labels == label))
        held[members[len(members) - some :]] = True
    return held


def stratified_groups(labels: np.ndarray, groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """``stratified`` where images of one group (int64 [N]) stay together: as near to each class's share as that goes.

    Groups of two and more bring in their own share; images that are alone then fill up each class.
    """
    _, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    alone, per_class = sizes[groups] == 1, np.bincount(labels)
    held = np.zeros(len(labels), dtype=bool)
    held[~alone] = _whole_groups(labels[~alone], groups[~alone], count / len(labels), seed)
    lacking = folders.shares(per_class, count) - np.bincount(labels[held], minlength=len(per_class))
    there = np.bincount(labels[alone], minlength=len(per_class))
    held[alone] = _drawn(labels[alone], np.clip(lacking, 0, there), seed)
    return held


def _whole_groups(labels: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """About this fraction of each class, in whole groups: bool [N].

    Groups come in random order, and each is taken if that brings the counts nearer; of several orders the best counts.
    """
    places, groups = np.unique(groups, return_inverse=True)
    per_class = np.bincount(labels, minlength=1)
    # Each group's classes, and how many images of each. An array of groups by classes takes gigabytes.
    table: list[list[tuple[int, int]]] = [[] for _ in places]
    pairs, counts = np.unique(groups * len(per_class) + labels, return_counts=True)
    for pair, images in zip(pairs.tolist(), counts.tolist(), strict=True):
        table[pair // len(per_class)].append((pair % len(per_class), images))
    random, best = np.random.RandomState(seed), np.zeros(len(places), dtype=bool)
    left = shares = (per_class * fraction).tolist()
    for _ in range(ORDERS):
        lacking, taken = shares.copy(), np.zeros(len(places), dtype=bool)
        for group in random.permutation(len(places)):
            some = table[group]
            if sum(abs(lacking[label] - images) - abs(lacking[label]) for label, images in some) < 0:
                taken[group] = True
                for label, images in some:
                    lacking[label] -= images
        if sum(map(abs, lacking)) < sum(map(abs, left)):
            left, best = lacking, taken
        if max(map(abs, left)) < 1:
            break
    return best[groups]


def _missing(labels: Tensor, classes: Sequence[str]) -> list[str]:
    """Classes without an image."""
    counts = torch.bincount(labels, minlength=len(classes))
    return [name for name, count in zip(classes, counts, strict=True) if count == 0]


def _statistics(images: Tensor | StoredImages) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel in [0,1], exactly: from the counts of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for chunk in images.split(at_once(images.shape[-1])):
        counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in chunk.unbind(1)])
    mean, std = [], []
    for share in counts / counts.sum(1, keepdim=True):
        mean.append(float(share @ values))
        # A channel that never changes has no spread to divide by.
        std.append(max(float(share @ (values - mean[-1]) ** 2) ** 0.5, 1 / 255))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _digest(classes: Sequence[str], parts: dict[str, Split], version: str) -> str:
    digest = hashlib.sha256((repr(tuple(classes)) + version).encode())
    for part, split in sorted(parts.items()):
        digest.update(f"{part} {tuple(split.images.shape)}".encode())
        for images in split.images.split(at_once(split.images.shape[-1])):
            digest.update(images.contiguous().numpy().data)
        digest.update(split.labels.numpy().data)
    return digest.hexdigest()
