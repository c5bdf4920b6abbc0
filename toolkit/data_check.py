"""What is in a folder of images, and what is wrong with it, before anything is trained on it. No torch."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.decode import declared, decode
from toolkit.decoded import each, pixel_digest
from toolkit.errors import ImageError
from toolkit.folders import (
    Listing,
    class_name,
    find,
    held_count,
    listed,
    part_of,
    passed_over,
    same_inside,
    shares,
    subfolders,
)
from toolkit.progress import told
from toolkit.recipe import resolve

SIZES = (32, 48, 64, 96, 128, 160, 192, 224)  # that are suggested: what students are made for
REACHED = 0.9  # share of the images that are at least as large as the suggested size
FEWEST = 3  # images of a class, where the test is held out of them
FEW = 2000  # training images: with fewer a trained student is the better start
IMBALANCED = 3  # largest class over smallest: from here on balance is suggested
LOOK = 16  # side of the grey thumbnails that near duplicates are found by
NEAR_BITS, NEAR_LEVELS = 4, 4.0  # of 64 bits of the difference hash, and mean difference of the thumbnails (of 255)
FLAT = 4.0  # standard deviation of a thumbnail: below it there is nothing to compare
DISTANCES = 2**20  # of the table of distances at a time
PAIRS = 50_000  # whose thumbnails are compared at a time
SHOWN = 5


@dataclass(frozen=True)
class Look:
    """One file: what is wrong with it, or its size, difference hash and thumbnail uint8 [16,16]."""

    error: str | None = None
    size: tuple[int, int] = (0, 0)
    format: str = ""
    hash: int = 0
    thumbnail: NDArray[np.uint8] | None = None


@dataclass
class Report:
    """``classes``: name to its images in each part; ``passed_over``: files that are not read, by kind.

    Pairs of names: ``copies`` are the same pixels, ``near`` look the same; ``leaks`` those of either that lie in two
    parts; ``contradictions`` copies in two classes. ``command`` distils with what is suggested.
    """

    images: int
    classes: dict[str, dict[str, int]]
    imbalance: float
    sizes: dict[str, int]
    formats: dict[str, int]
    broken: dict[str, str]
    passed_over: dict[str, int]
    copies: list[tuple[str, str]]
    near: list[tuple[str, str]]
    leaks: list[tuple[str, str]]
    contradictions: list[tuple[str, str]]
    image_size: int = 0
    recipe: str = ""
    command: str = ""
    problems: list[str] = field(default_factory=list)


def check(root: Path, unlabelled: bool = False) -> Report:
    """Look at every image of ``root`` (as ``folders.find`` takes it). Raises ``DataError`` where there is nothing."""
    listing = find(root, unlabelled)
    files = [(path, part, label) for part, found in listing.files.items() for path, label in found]
    names = [listing.name(path) for path, _, _ in files]
    paths = [path for path, _, _ in files]
    looks = list(each(lambda i: look(paths[i], names[i]), range(len(files)), f"looking at {len(files):,} images"))
    good = [i for i, one in enumerate(looks) if one.error is None]

    counts = {name: dict.fromkeys(listing.files, 0) for name in listing.classes}
    for i in good:
        counts[listing.classes[files[i][2]]][files[i][1]] += 1
    totals = [sum(parts.values()) for parts in counts.values()]
    short = sorted(min(looks[i].size) for i in good)
    ranks = {"smallest": 0.0, "tenth": 1 - REACHED, "median": 0.5, "largest": 1.0}  # the tenth: 10% are smaller
    sides = {name: short[round(rank * (len(short) - 1))] for name, rank in ranks.items()} if short else {}
    near = look_alikes(looks, good)
    suspects = sorted({i for pair in (*near, *same({i: thumbnail(looks[i]) for i in good})) for i in pair})
    decoded = each(lambda i: whole(paths[i]), suspects, f"decoding {len(suspects):,} of them whole")
    digests = dict(zip(suspects, decoded, strict=True))
    copies = list(same(digests))
    near = [(a, b) for a, b in near if digests[a] != digests[b]]

    def named(pairs: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
        return [(names[a], names[b]) for a, b in pairs]

    report = Report(
        images=len(files),
        classes={} if unlabelled else counts,
        imbalance=max(totals) / max(1, min(totals)),
        sizes=sides,
        formats=dict(Counter(looks[i].format for i in good).most_common()),
        broken={names[i]: str(one.error) for i, one in enumerate(looks) if one.error is not None},
        passed_over=dict(passed_over(listing).most_common()),
        copies=named(copies),
        near=named(near),
        leaks=named([(a, b) for a, b in (*copies, *near) if files[a][1] != files[b][1]]),
        contradictions=named([(a, b) for a, b in copies if files[a][2] != files[b][2]]),
    )
    report.problems = problems(report)
    if not unlabelled and not listing.table and (inside := folders_in_all(listing)):
        report.problems.append(
            f"each of the {len(listing.classes)} class folders holds the same folders ({listed(inside)}): if these are "
            "the classes, move them up, or name their images in a table"
        )
    suggest(report, root, sum(parts.get("train", 0) for parts in counts.values()), unlabelled)
    return report


def folders_in_all(listing: Listing) -> list[str]:
    """Folders, two or more, that lie in each class folder, and are neither parts nor numbers: maybe the classes."""
    place = listing.places["train"]
    inside = same_inside([folder for folder in subfolders(place) if class_name(folder) in listing.classes])
    return [] if any(part_of(name) or name.isdecimal() for name in inside) else inside


def look(path: Path, name: str) -> Look:
    """Decode one file, as training and serving do, though a JPEG no larger than is needed to look at it."""
    try:
        data = path.read_bytes()
        pixels = decode(data, name, side=4 * LOOK)
    except OSError as error:
        return Look(error=f"{name} cannot be read: {error.strerror}")
    except ImageError as error:
        return Look(error=str(error))
    format, size = declared(data)
    grey = Image.fromarray(pixels).convert("L")
    steps = np.asarray(grey.resize((9, 8), Image.Resampling.BOX)).astype(int)
    bits = np.packbits(steps[:, 1:] > steps[:, :-1])
    small = np.asarray(grey.resize((LOOK, LOOK), Image.Resampling.BOX))
    return Look(None, size, format, int.from_bytes(bits.tobytes(), "big"), small)


def thumbnail(look: Look) -> bytes:
    assert look.thumbnail is not None
    return look.thumbnail.tobytes()


def whole(path: Path) -> bytes:
    """The ``pixel_digest``: files of which it is the same are copies for training too."""
    try:
        return pixel_digest(decode(path.read_bytes()))
    except (OSError, ImageError):  # it has changed since it was looked at
        return str(path).encode()


def same(values: Mapping[int, bytes]) -> Iterator[tuple[int, int]]:
    """Each number whose value an earlier one has, after the first such."""
    first: dict[bytes, int] = {}
    for i, value in values.items():
        before = first.setdefault(value, i)
        if before != i:
            yield before, i


def look_alikes(looks: Sequence[Look], good: Sequence[int]) -> list[tuple[int, int]]:
    """Each image that looks like an earlier one, after the first such: their difference hashes (64 bits: is a pixel
    brighter than its left neighbour) and their thumbnails are near."""
    thumbnails = np.array([looks[i].thumbnail for i in good], dtype=np.uint8).reshape(len(good), LOOK * LOOK)
    telling = np.array([one.std() >= FLAT for one in thumbnails], dtype=bool)
    some, thumbnails = np.asarray(good)[telling], thumbnails[telling]
    hashes = np.array([looks[i].hash for i in some], dtype=np.uint64)
    first = np.full(len(hashes), -1)
    size = max(1, DISTANCES // max(1, len(hashes)))
    starts = range(0, len(hashes), size)
    for start in told(starts, len(starts), f"comparing {len(hashes):,} images"):
        far = np.bitwise_count(hashes[start : start + size, None] ^ hashes[None, start:])
        rows, columns = (place + start for place in divmod(np.flatnonzero(far <= NEAR_BITS), far.shape[1]))
        open_ = (rows < columns) & (first[columns] < 0)
        rows, columns = rows[open_], columns[open_]
        for part in range(0, len(rows), PAIRS):
            a, b = rows[part : part + PAIRS], columns[part : part + PAIRS]
            levels = np.abs(thumbnails[a].astype(np.int16) - thumbnails[b]).mean(1)
            near = (levels <= NEAR_LEVELS) & (first[b] < 0)
            later, place = np.unique(b[near], return_index=True)
            first[later] = a[near][place]
    return [(int(some[a]), int(some[b])) for b, a in enumerate(first) if a >= 0]


def held_out(classes: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Images of each class that are held out for the test, where there are no test images."""
    if not classes or any("test" in counts or not counts["train"] for counts in classes.values()):
        return {}
    images = np.array([counts["train"] for counts in classes.values()])
    held = shares(images, held_count(int(images.sum()), len(images)))
    return dict(zip(classes, held.tolist(), strict=True))


def problems(report: Report) -> list[str]:
    """What training would stop at, or learn wrongly from; one line each."""
    found = []
    if report.broken:
        found.append(f"{len(report.broken)} of {report.images} images are broken: {listed(list(report.broken))}")
    held = held_out(report.classes)
    for name, counts in report.classes.items():
        # Where there are no val or test images, some of the training images are held out.
        wanted = {"train": 1 if "val" in counts else 2, "test": 1} if "test" in counts else {"train": FEWEST}
        if held.get(name) == 0 and counts["train"] >= FEWEST:
            found.append(
                f"{name} has {counts['train']} images: too few for one among the {sum(held.values())} that are held "
                "out for the test; add some, or make folders train and test"
            )
        for part, least in wanted.items():
            if counts.get(part, 0) < least:
                found.append(f"{name} has {counts.get(part, 0)} images in {part}: at least {least} are needed")
    if report.classes and all(counts.get("val") == 0 for counts in report.classes.values()):
        found.append("val holds no images: add some, or remove it")
    for what, pairs in (
        ("pairs of copies lie in different classes", report.contradictions),
        ("pairs of copies or near copies lie in different parts: the split leaks", report.leaks),
    ):
        if pairs:
            found.append(f"{len(pairs)} {what}: {listed([f'{a} and {b}' for a, b in pairs], 3)}")
    return found


def suggest(report: Report, root: Path, training: int, unlabelled: bool) -> None:
    """Fill in image size, recipe and the command that uses them."""
    if not report.sizes:
        return
    short = report.sizes["tenth"]
    report.image_size = max((size for size in SIZES if size <= short), default=SIZES[0])
    # Without classes there is nothing to learn but the teacher's answers.
    tuned = training < FEW and not unlabelled
    report.recipe = "fine-tune" if tuned else "own-images"
    options = ["--unlabelled"] * unlabelled + ["--skip-broken"] * bool(report.broken)
    options += ["--skip-leaks"] * bool(set(report.leaks) & set(report.copies))
    if report.imbalance >= IMBALANCED:
        options += ["--balance", "sampling"]
    left = training - sum(held_out(report.classes).values())
    val_size = resolve(report.recipe, "distill").data.val_size
    given = any("val" in counts for counts in report.classes.values())
    if not given and round(val_size * left) < len(report.classes):  # no image of each class
        options += ["--set", "data.val_size=0"]
    if not tuned:
        options += ["--teacher", "FILE.onnx"] if unlabelled else ["--teacher", "resnet9_wide", "--train-teacher"]
    report.command = shlex.join(
        ["toolkit", "distill", "--recipe", report.recipe, "--dataset", f"folder:{root}",
         "--image-size", str(report.image_size), *options]
    )  # fmt: skip


def show(report: Report) -> Iterator[str]:
    """The report as lines of text."""
    parts = list(next(iter(report.classes.values()), {}))
    yield f"images    {report.images:,}" + (f" in {len(report.classes)} classes" if report.classes else "")
    width = max((len(name) for name in report.classes), default=0)
    for name, counts in report.classes.items():
        yield f"  {name:<{width}}  " + ", ".join(f"{counts[part]:,} {part}" for part in parts)
    if report.classes:
        yield f"imbalance {report.imbalance:.1f} (largest class over smallest)"
    if report.sizes:
        yield "sizes     short side " + ", ".join(f"{name} {side}" for name, side in report.sizes.items())
    yield "formats   " + ", ".join(f"{count:,} {name}" for name, count in report.formats.items())
    if report.passed_over:
        yield "not read  " + ", ".join(f"{count:,} {kind}" for kind, count in report.passed_over.items())
    yield f"broken    {len(report.broken):,}"
    yield from (f"  {reason}" for reason in list(report.broken.values())[:SHOWN])
    for name, pairs in (("copies", report.copies), ("near", report.near), ("leaks", report.leaks)):
        yield f"{name:<9} {len(pairs):,} pairs"
        yield from (f"  {a}  {b}" for a, b in pairs[:SHOWN])
    yield from (f"problem: {line}" for line in report.problems)
    if report.command:
        yield f"suggested {report.image_size} pixels, recipe {report.recipe}"
        yield f"next: {report.command}"
        if report.recipe == "fine-tune":
            yield "      (with a teacher: add --teacher FILE.onnx --set loss.kd_weight=0.9)"
        elif report.classes:
            yield "      (with a teacher of your own: --teacher FILE.onnx in place of the last three words)"
