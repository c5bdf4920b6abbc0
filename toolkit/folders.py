"""Image files and their labels as people keep them: folders of classes, with or without parts, or a table. No torch.

Parts are ``train``, ``val`` and ``test``, in any spelling (``Training``, ``valid``, ``test_set``); ``eval`` is the
test, or val beside one. They lie above the classes (there also by names such as ``seg_train``) or within each of them,
or val and test beside the class folders; a class may have folders of its own below it.
A table is a CSV file with a column of paths, one of labels and, if it likes, one of parts.
"""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from toolkit.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp")
PART = re.compile(
    r"(?:(?P<train>train|training)|(?P<val>val|valid|validation|dev)|(?P<test>test|testing|tests)"
    r"|(?P<eval>eval|evaluation))(?:set|split|data|images)?"
)
PARTS = ("train", "val", "test")
SAYS_PART = re.compile("train|val|test")  # also within a word: Trainingsdaten
# What people call the columns of a table.
COLUMNS = {
    "path": ("path", "file", "filename", "filepath", "image", "imagepath", "img", "name"),
    "label": ("label", "class", "category", "target", "classname"),
    "part": ("split", "part", "set", "subset"),
}
TEST_FRACTION = 0.2  # of the images, where they come without a test part
WANTED = "a folder for each class is wanted there, with PNG, JPEG, WebP, GIF or BMP files in it"


@dataclass(frozen=True)
class Listing:
    """What there is: of each part, its files, each with the number of its class.

    ``places`` is where a part lies, for messages. Without labels there is one class, ``""``.
    """

    root: Path
    classes: tuple[str, ...]
    files: Mapping[str, Sequence[tuple[Path, int]]]
    places: Mapping[str, Path]
    table: bool = False

    def name(self, path: Path) -> str:
        """The path of a file as messages give it: from the root, where it lies there. A name need not be UTF-8."""
        return _from(self.root, path)


def _from(root: Path, path: Path) -> str:
    root, path = root.absolute(), path.absolute()
    return _readable(str(path.relative_to(root)) if path.is_relative_to(root) else str(path))


def _readable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def shares(images: np.ndarray, count: int) -> np.ndarray:
    """How many images of each class are among ``count`` that are held out of ``images`` [K]: to the nearest image."""
    wanted = images * (count / images.sum())
    whole = np.floor(wanted).astype(int)
    whole[np.argsort(whole - wanted, kind="stable")[: count - whole.sum()]] += 1  # the largest remainders
    return whole


def held_count(images: int, classes: int) -> int:
    """How many of the training images are held out where there are no test images."""
    return max(classes, round(TEST_FRACTION * images))


def part_of(name: str) -> str | None:
    """train, val, test or eval, where a name says so and nothing else."""
    match = PART.fullmatch(re.sub(r"[^a-z]", "", name.lower()))
    return match and match.lastgroup


def part_in(name: str) -> str | None:
    """``part_of`` one of the words of a name: of ``seg_train``, but not of ``train-test``."""
    found = {part for word in re.split(r"[\W\d_]+", name) if (part := part_of(word))}
    return found.pop() if len(found) == 1 else part_of(name)


def parts_of(names: Iterable[str], told: Callable[[str], str | None] = part_of) -> dict[str, str]:
    """Name to train, val or test, for those that say it. What is called eval is the test, or val beside one."""
    said = {name: part for name in names if (part := told(name))}
    either = "val" if "test" in said.values() else "test"
    return {name: either if part == "eval" else part for name, part in said.items()}


def find(root: Path, unlabelled: bool = False) -> Listing:
    """The images below ``root``, or those that a CSV file names. Raises ``DataError``.

    ``unlabelled``: folders say nothing about classes; all images of the parts count, or where there are none, all.
    """
    try:
        return _find(root, unlabelled)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or root}: {error.strerror}") from error


def _find(root: Path, unlabelled: bool) -> Listing:
    if root.is_file():
        return _table(root, unlabelled)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    inner = root
    while (inside := _wrapped(inner)) and not part_of(inside.name):
        inner = inside
    if unlabelled:
        parts = _parts(inner)
        if "train" not in parts:
            parts = _parts_in_other_words(inner) or {"train": [root]}
        files = {part: [(path, 0) for folder in folders for path in images(folder)] for part, folders in parts.items()}
        if not files["train"]:
            raise DataError(f"no images in {parts['train'][0]}: their names end in {listed(SUFFIXES)}")
        return Listing(root, ("",), files, {part: folders[0] for part, folders in parts.items()})
    root = inner
    parts = {part: found for part, found in _parts(root).items() if part != "train" or any(map(subfolders, found))}
    if "train" not in parts:  # such a name is then a class's, beside "bus" and "car"
        if within := _parts_within(root):
            return _labelled(root, within, dict.fromkeys(within, root))
        parts = _parts_in_other_words(root) or {"train": [root]} | _parts_beside(root, parts)
    taken = {folder for found in parts.values() for folder in found}
    layout: dict[str, dict[str, list[Path]]] = {part: defaultdict(list) for part in parts}
    for part, found in parts.items():
        for folder in _class_folders(found):
            if folder not in taken:
                layout[part][class_name(folder)].append(folder)
    if parts["train"] == [root]:
        _refuse_parts(root, [folder for folders in layout["train"].values() for folder in folders])
    return _labelled(root, layout, {part: found[0] for part, found in parts.items()})


def only(listing: Listing, names: Collection[str]) -> Listing:
    """The files of these names, in the parts and classes that have some."""
    files = {
        part: some
        for part, found in listing.files.items()
        if (some := [(path, label) for path, label in found if listing.name(path) in names])
    }
    left = sorted({label for found in files.values() for _, label in found})
    number = {label: new for new, label in enumerate(left)}
    numbered = {part: [(path, number[label]) for path, label in found] for part, found in files.items()}
    return replace(listing, classes=tuple(listing.classes[label] for label in left), files=numbered)


def subfolders(folder: Path) -> list[Path]:
    """Those that are not hidden, sorted; nor what macOS puts into archives."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != "__MACOSX"
    )


def nfc(text: str) -> str:
    """The text in one of the two ways in which Unicode writes an umlaut: macOS prefers the other one for files."""
    return unicodedata.normalize("NFC", text)


def class_name(folder: Path) -> str:
    return nfc(folder.name)


def _stop(error: OSError) -> None:
    raise error


def images(folder: Path, on_error: Callable[[OSError], None] = _stop) -> Iterator[Path]:
    """Files below ``folder`` that are named as images are, sorted; hidden ones are left out."""
    for path in _files(folder, on_error):
        try:
            if path.suffix.lower() in SUFFIXES and path.is_file():
                yield path
        except OSError as error:  # in a folder that may be listed and no more
            on_error(error)


def passed_over(listing: Listing) -> Counter[str]:
    """What else lies in a folder: files by suffix, images of no class, links that lead nowhere.

    A table names what it wants.
    """
    if listing.table:
        return Counter()
    taken = {path for found in listing.files.values() for path, _ in found}
    inside = "parts" if listing.classes == ("",) else "class folders"

    def kind(path: Path) -> str:
        if not os.path.isfile(path):  # noqa: PTH113  # which says so too of what may not be looked at
            return "dangling link"
        suffix = path.suffix.lower() or "no suffix"
        return f"{suffix} outside of the {inside}" if suffix in SUFFIXES else suffix

    # A folder that may not be read is no part of the data.
    return Counter(kind(path) for path in _files(listing.root, lambda error: None) if path not in taken)


def _files(folder: Path, on_error: Callable[[OSError], None]) -> list[Path]:
    """All files below ``folder`` but hidden ones, sorted. Links to folders are followed, but not in circles."""
    found, seen = [], set()
    for place, inside, names in os.walk(folder, onerror=on_error, followlinks=True):
        seen.add(os.path.realpath(place))
        inside[:] = [
            name for name in inside if not name.startswith(".") and os.path.realpath(Path(place, name)) not in seen
        ]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _labelled(root: Path, layout: Mapping[str, Mapping[str, Sequence[Path]]], places: Mapping[str, Path]) -> Listing:
    """From the folders of each class in each part; classes are those of train."""
    classes = tuple(sorted(layout["train"]))
    if odd := [name for name in map(_readable, classes) if name not in classes]:
        raise DataError(f"classes in {places['train']} have names that are not UTF-8: {listed(odd)}; rename them")
    for part, folders in layout.items():
        if odd := sorted(set(folders) ^ set(classes)):
            raise DataError(
                f"{places['train']} and {places[part]} do not hold the same classes: only one of them has {listed(odd)}"
                + ("" if folders else _instead(places[part]))
            )
    files = {
        part: [(path, label) for label, name in enumerate(classes) for one in folders[name] for path in images(one)]
        for part, folders in layout.items()
    }
    if not files["train"]:
        raise DataError(f"no images in {places['train']}: {WANTED}{_instead(places['train'])}")
    if len(classes) < 2:
        raise DataError(f"only one class in {places['train']} ({classes[0]}): at least two are needed")
    return Listing(root, classes, files, places)


def _parts(root: Path) -> dict[str, list[Path]]:
    """Part to the folders in ``root`` that are named so."""
    return _by_part(subfolders(root), part_of)


def _by_part(folders: Sequence[Path], told: Callable[[str], str | None]) -> dict[str, list[Path]]:
    found, parts = defaultdict(list), parts_of([folder.name for folder in folders], told)
    for folder in folders:
        if folder.name in parts:
            found[parts[folder.name]].append(folder)
    return {part: found[part] for part in PARTS if part in found}


def _class_folders(part: Sequence[Path]) -> list[Path]:
    """Those in the folders of a part; a single one may be a folder in a folder, as archives are unpacked."""
    if len(part) > 1:
        return [folder for one in part for folder in subfolders(one)]
    (folder,) = part
    while (inside := _wrapped(folder)) and part_in(inside.name) in (None, part_in(folder.name)):
        folder = inside
    return subfolders(folder)


def _parts_in_other_words(root: Path) -> dict[str, list[Path]]:
    """Folders whose names hold a part's word among others, where train and another part hold the same classes.

    A class may be called ``bullet_train`` too, or ``test_tube``, and then has neighbours that are no part.
    """
    folders = subfolders(root)
    parts = _by_part(folders, part_in)
    names = {part: set(map(class_name, _class_folders(found))) for part, found in parts.items()}
    if "train" not in parts or len(parts) < 2 or len(set.intersection(*names.values())) < 2:
        return {}
    given = [folder for found in parts.values() for folder in found]
    others = {class_name(inside) for folder in folders if folder not in given for inside in subfolders(folder)}
    return {} if others & names["train"] else parts


def _refuse_parts(root: Path, classes: Sequence[Path]) -> None:
    """Raise ``DataError`` where class folders are parts: by all their names, or by some and what lies in all."""
    said = {folder: set(SAYS_PART.findall(class_name(folder).lower())) for folder in classes}
    words = set[str]().union(*said.values())
    if "train" in words and len(words) > 1 and (all(said.values()) or same_inside(classes)):
        raise DataError(
            f"the folders in {root} look like parts, not classes: {listed(list(map(class_name, classes)))}; name them "
            "train and test (and val), with a folder for each class in them"
        )


def same_inside(folders: Sequence[Path]) -> list[str]:
    """The folders, two or more, that lie in each of several folders; none where these differ."""
    names = {tuple(class_name(inside) for inside in subfolders(folder)) for folder in folders}
    return list(names.pop()) if len(folders) > 1 and len(names) == 1 and len(min(names)) > 1 else []


def _parts_beside(root: Path, parts: Mapping[str, list[Path]]) -> dict[str, list[Path]]:
    """Those of ``parts`` whose folders are named as class folders beside them, which then are for training."""
    given = [folder for found in parts.values() for folder in found]
    classes = {class_name(folder) for folder in subfolders(root) if folder not in given}
    names = {part: set(map(class_name, _class_folders(found))) for part, found in parts.items()}
    return {part: found for part, found in parts.items() if names[part] and names[part] <= classes}


def _parts_within(root: Path) -> dict[str, dict[str, list[Path]]]:
    """Part to class to folders, where class folders are divided into train and perhaps more; else nothing.

    Raises ``DataError`` where one of them has images, but is not divided.
    """
    layout: dict[str, dict[str, list[Path]]] = {part: defaultdict(list) for part in PARTS}
    others = []
    for folder in subfolders(root):
        within = _parts(folder)
        kinds = [one for one in subfolders(folder) if not part_of(one.name)]  # of vehicle: car, beside train
        if "train" not in within or any(any(images(kind)) for kind in kinds):
            others.append(folder)
            continue
        for part, found in within.items():
            layout[part][class_name(folder)] += found
    if layout["train"] and (lacking := [_readable(folder.name) for folder in others if any(images(folder))]):
        raise DataError(
            f"class folders in {root} hold a folder train, but not {listed(lacking)}: give one to each of them, or to "
            "none"
        )
    return {part: found for part, found in layout.items() if found}


def _wrapped(folder: Path) -> Path | None:
    """The only folder in a folder, as archives are unpacked: where there are folders in it, and no images in either."""
    inside = subfolders(folder)
    if len(inside) != 1 or not subfolders(inside[0]):
        return None
    loose = any(path.suffix.lower() in SUFFIXES for one in (folder, inside[0]) for path in one.iterdir())
    return None if loose else inside[0]


def _instead(folder: Path) -> str:
    """What lies there in place of class folders with images."""
    loose = sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
    if loose:
        return f"; {loose} images lie beside the class folders (--unlabelled takes images without classes)"
    kinds = Counter(path.suffix.lower() or "no suffix" for path in folder.rglob("*") if path.is_file())
    return f"; there are {listed([f'{n} {kind}' for kind, n in kinds.most_common()])} files" if kinds else ""


# --- a table -----------------------------------------------------------------------------------------------


def _table(path: Path, unlabelled: bool) -> Listing:
    root = path.parent
    try:
        text = path.read_text(encoding="utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.DictReader(text.splitlines(), delimiter=delimiter)
        lines, rows = [], []
        for row in reader:
            lines.append(reader.line_num)  # blank ones are passed over
            rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file of paths and labels: {error}") from error
    if not rows:
        raise DataError(f"{path} names no images")
    columns = _columns(path, list(rows[0]), ("path",) if unlabelled else ("path", "label"))

    problems = []
    values = [{key: (row[name] or "").strip() for key, name in columns.items()} for row in rows]
    for value in values:
        value["label"] = "." if unlabelled else nfc(value["label"])
    if lacking := [line for line, row in zip(lines, values, strict=True) if not row["path"] or not row["label"]]:
        problems.append(f"{len(lacking)} of {len(rows)} rows lack a path or a label (lines {listed(lacking)})")
    places = {name: _place(root, name) for name in dict.fromkeys(row["path"] for row in values)}
    labels: dict[Path, set[str]] = defaultdict(set)
    for row in values:
        labels[places[row["path"]]].add(row["label"])
    if twice := [_from(root, place) for place, found in labels.items() if len(found) > 1]:
        problems.append(f"{len(twice)} files have more than one label: {listed(twice)}")
    if gone := [name for name, place in places.items() if name and not place.is_file()]:
        problems.append(f"{len(gone)} of {len(places)} files are not in {root}: {listed(gone)}")
    parts = parts_of({row["part"] for row in values if "part" in row})
    if odd := sorted({row["part"] for row in values if "part" in row and row["part"] not in parts}):
        problems.append(f"{listed(list(map(repr, odd)))} is none of train, val and test")
    if problems:
        raise DataError(f"{path} cannot be used: {'; '.join(problems)}")

    names = {row["label"] for row in values}
    numbered = all(name.isdecimal() for name in names)
    classes = tuple(sorted(names, key=lambda name: (int(name), name) if numbered else (0, name)))
    number = {name: label for label, name in enumerate(classes)}
    files: dict[str, dict[Path, int]] = defaultdict(dict)
    for row in values:
        files[parts[row["part"]] if "part" in row else "train"][places[row["path"]]] = number[row["label"]]
    if not files["train"]:
        raise DataError(f"{path} names no training images")
    if len(classes) < 2 and not unlabelled:
        raise DataError(f"only one class in {path} ({classes[0]}): at least two are needed")
    ordered = {part: list(files[part].items()) for part in PARTS if part in files}
    return Listing(root, ("",) if unlabelled else classes, ordered, dict.fromkeys(ordered, path), table=True)


def _place(root: Path, name: str) -> Path:
    """The file of this name, in whichever way Unicode writes its umlauts; else where it was said to be."""
    forms = (name, nfc(name), unicodedata.normalize("NFD", name))
    return next((place for form in forms if (place := root / form).is_file()), root / name)


def _columns(path: Path, found: Sequence[str | None], needed: Sequence[str]) -> dict[str, str]:
    """path, label and perhaps part, to the names of these columns; those that are ``needed`` are there."""
    plain = {re.sub(r"[^a-z]", "", str(name).lower()): str(name) for name in found}
    columns = {}
    for wanted, names in COLUMNS.items():
        if name := next((name for name in names if name in plain), None):
            columns[wanted] = plain[name]
    if missing := [wanted for wanted in needed if wanted not in columns]:
        needs = " and ".join(f"{wanted} (or {', '.join(COLUMNS[wanted][1:])})" for wanted in missing)
        raise DataError(f"{path} has the columns {listed(list(map(str, found)))}; it needs {needs}")
    return columns


def listed(items: Sequence[object], most: int = 5) -> str:
    """The first items, and how many more there are."""
    text = ", ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"
