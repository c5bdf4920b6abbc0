"""Folders and tables as people have them, what is looked at before training, and classes of unequal size."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
import unicodedata
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from conftest import Toolkit, benchmark
from PIL import Image
from sklearn.model_selection import train_test_split

from toolkit import data_check, folders, recipe
from toolkit.augment import Augmenter, balanced_order
from toolkit.data import SPLITTING, DataSet, StoredImages, load, stratified, stratified_groups
from toolkit.errors import DataError, RecipeError
from toolkit.learner import class_weights
from toolkit.objective import Objective


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tutorial's pictures, 6 of each of its 8 classes."""
    folder = tmp_path_factory.mktemp("drawn")
    benchmark("own_images").make_images(folder, 6)
    return folder


def draw(path: Path, mode: str = "RGB", **options: object) -> None:
    """Another picture for another path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(crc32(bytes(path))).integers(0, 256, (4, 5, bands), np.uint8)
    image = Image.fromarray(pixels.squeeze(), mode if mode != "RGB" else None).resize(
        (50, 40), Image.Resampling.BICUBIC
    )
    image.save(path, **options)


def load_folder(path: Path, **config: object) -> DataSet:
    return load(recipe.Data.model_validate({"dataset": f"folder:{path}", "val_size": 0} | config))


# --- layouts -----------------------------------------------------------------------------------------------

LAYOUTS = {
    "parts above": "{part}/{name}/{i}.png",
    "parts in other words": "{odd}/{name}/{i}.png",
    "parts within the classes": "{name}/{part}/{i}.png",
    "folders below the classes": "{part}/{name}/2024/may/{i}.png",
    "unpacked into a folder": "photos/photos-v2/{part}/{name}/{i}.png",
    "unpacked twice": "{odd}/{odd}/{name}/{i}.png",
    "a word among others": "seg_{part}/seg_{part}/{name}/{i}.png",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str) -> None:
    odd = {"train": "Training_Set", "val": "Valid", "test": "TEST2017"}
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                draw(tmp_path / LAYOUTS[layout].format(part=part, odd=odd[part], name=name, i=i))
    data = load_folder(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.val is not None
    assert [part.labels.bincount().tolist() for part in (data.train, data.val, data.test)] == [[4, 4], [2, 2], [3, 3]]


@pytest.mark.parametrize(
    ("places", "parts"),
    [
        (["train_1/cat", "train_2/dog", "eval/cat", "eval/dog"], {"train": 2, "test": 2}),
        (["train/cat", "train/dog", "eval/cat", "eval/dog", "test/cat", "test/dog"], {"train": 2, "val": 2, "test": 2}),
        (["training/cat", "training/dog", "validation/cat", "validation/dog", "evaluation/cat", "evaluation/dog"],
         {"train": 2, "val": 2, "test": 2}),
        (["my_train/cat", "my_train/dog", "test/cat", "test/dog", "my_pred/my_pred"], {"train": 2, "test": 2}),
        (["train_1/cat/2024", "train_2/dog/2024", "test/cat", "test/dog"], {"train": 2, "test": 2}),
        (["train/data/cat", "train/data/dog", "test/data/cat", "test/data/dog"], {"train": 2, "test": 2}),
    ],
)  # fmt: skip
def test_parts_in_other_words(tmp_path: Path, places: list[str], parts: dict[str, int]) -> None:
    for place in places:
        draw(tmp_path / place / "0.png")
    listing = folders.find(tmp_path)
    assert listing.classes == ("cat", "dog")
    assert {part: len(files) for part, files in listing.files.items()} == parts


@pytest.mark.parametrize(
    "classes",
    [
        ["bullet_train", "test_tube", "car"],
        ["bullet_train", "steam_train"],
        ["bus", "train"],
        ["bullet_train/side", "bullet_train/front", "car/side", "car/front"],
        ["test_tube/side", "test_tube/front", "flask"],
    ],
)
def test_a_part_s_word_as_a_class_or_in_its_name(tmp_path: Path, classes: list[str]) -> None:
    for name in classes:
        draw(tmp_path / name / "0.png")
    listing = folders.find(tmp_path)
    assert listing.classes == tuple(sorted({name.partition("/")[0] for name in classes}))
    assert (list(listing.files), len(listing.files["train"])) == (["train"], len(classes))


@pytest.mark.parametrize(
    ("places", "named"),
    [
        (["Trainingsdaten/cat", "Trainingsdaten/dog", "Testdaten/cat", "Testdaten/dog"], "Testdaten, Trainingsdaten"),
        (["train", "test"], "test, train"),  # without folders in them
        (["my_train/cat", "my_train/dog", "my_test/elk"], "my_test, my_train"),
        (["a_train/cat", "a_train/dog", "a_test/cat", "a_test/dog", "more/cat", "more/dog"], "a_test, a_train, more"),
    ],
)
def test_parts_are_no_classes(tmp_path: Path, places: list[str], named: str) -> None:
    for place in places:
        draw(tmp_path / place / "0.png")
    with pytest.raises(DataError, match=f"look like parts, not classes: {named};"):
        folders.find(tmp_path)


def test_a_kind_of_vehicle_is_no_part(tmp_path: Path) -> None:
    for name in ("vehicle/car", "vehicle/train", "animal/cat", "animal/dog"):
        for i in range(3):
            draw(tmp_path / name / f"{i}.png")
    listing = folders.find(tmp_path)
    assert listing.classes == ("animal", "vehicle")
    assert len(listing.files["train"]) == 12


def test_a_part_within_some_classes_is_a_mistake(tmp_path: Path) -> None:
    for name in ("cat/train", "cat/test", "dog/train", "dog/test", "fox", "elk/unsorted"):
        draw(tmp_path / name / "0.png")
    (tmp_path / "notes").mkdir()
    with pytest.raises(DataError, match="hold a folder train, but not elk, fox: give one to each"):
        folders.find(tmp_path)
    for name in ("elk", "fox"):
        (tmp_path / name).rename(tmp_path / f".{name}")
    listing = folders.find(tmp_path)  # an empty folder is no class
    assert (listing.classes, list(listing.files)) == (("cat", "dog"), ["train", "test"])


def test_a_part_may_lie_beside_the_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog", "test/elk"):
        draw(tmp_path / name / "0.png")
    assert folders.find(tmp_path).classes == ("cat", "dog", "test")  # it holds no folder of theirs
    (tmp_path / "test/elk").rename(tmp_path / "test/cat")
    draw(tmp_path / "test/dog/0.png")
    listing = folders.find(tmp_path)
    found = {part: [listing.name(path) for path, _ in files] for part, files in listing.files.items()}
    assert listing.classes == ("cat", "dog")
    assert found == {"train": ["cat/0.png", "dog/0.png"], "test": ["test/cat/0.png", "test/dog/0.png"]}


def test_umlauts_are_the_same_however_they_are_written(tmp_path: Path) -> None:
    one, other = (unicodedata.normalize(form, "Bär") for form in ("NFC", "NFD"))
    for i, name in enumerate((f"train/{one}", f"test/{other}", "train/Elch", "test/Elch")):
        draw(tmp_path / "above" / name / f"{i}.png")
    for i, name in enumerate((f"{one}/train", f"{other}/test", f"{other}/train_2", "Elch/train", "Elch/test")):
        draw(tmp_path / "within" / name / f"{i}.png")
    for place, count in (("above", 2), ("within", 3)):
        listing = folders.find(tmp_path / place)
        assert listing.classes == (one, "Elch")
        assert [len(files) for files in listing.files.values()] == [count, 2]
    draw(tmp_path / f"{other}.png")
    draw(tmp_path / "elch.png")
    (tmp_path / "labels.csv").write_text(f"path,label\n{one}.png,{one}\n{other}.png,{other}\nelch.png,Elch\n")
    listing = folders.find(tmp_path / "labels.csv")
    assert (listing.classes, len(listing.files["train"])) == ((one, "Elch"), 2)


def test_kinds_of_images_people_have(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i, (mode, suffix) in enumerate((("L", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("RGB", "webp"))):
            draw(tmp_path / name / f"{i}.{suffix}", mode)
        exif = Image.Exif()
        exif[0x0112] = 6  # held upright
        draw(tmp_path / name / "upright.jpg", exif=exif)
    data = load_folder(tmp_path, image_size=24)
    assert sorted([*data.train.labels.tolist(), *data.test.labels.tolist()]) == [0] * 5 + [1] * 5


TABLE = "Filename;Label;Split\n" + "".join(
    f"{i}.png;{('10', '9')[i % 2]};{('train', 'train', 'Test')[i % 3]}\n" for i in range(12)
)


def test_a_table_of_paths_and_labels(tmp_path: Path) -> None:
    for i in range(12):
        draw(tmp_path / f"{i}.png")
    (tmp_path / "labels.csv").write_text(TABLE)
    data = load_folder(tmp_path / "labels.csv")
    assert (data.name, data.classes) == ("folder:labels", ("9", "10"))  # numbers in their own order
    assert data.test.labels.tolist() == [1, 0, 1, 0]
    assert len(data.train) == 8


def test_a_table_of_paths_alone_has_no_classes(tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / f"{i}.png")
    (tmp_path / "paths.csv").write_text("path\n0.png\n1.png\n2.png\n")
    listing = folders.find(tmp_path / "paths.csv", unlabelled=True)
    assert (listing.classes, len(listing.files["train"])) == (("",), 3)
    with pytest.raises(DataError, match="it needs label"):
        folders.find(tmp_path / "paths.csv")


def test_unlabelled_images_count_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("0.png", "cat/1.png", "far/away/2.png"):
        draw(tmp_path / "loose" / name)
        draw(tmp_path / "parts/train" / name)
    draw(tmp_path / "parts/test/cat/3.png")
    for name in ("0.png", "cat/1.png", "test/2.png"):  # without train, test is a folder like others
        draw(tmp_path / "whole" / name)
    assert len(folders.find(tmp_path / "whole", unlabelled=True).files["train"]) == 3
    loose, parts = (folders.find(tmp_path / name, unlabelled=True) for name in ("loose", "parts"))
    assert loose.classes == parts.classes == ("",)
    assert sorted(path.name for path, label in loose.files["train"] if label == 0) == ["0.png", "1.png", "2.png"]
    assert {part: len(files) for part, files in parts.files.items()} == {"train": 3, "test": 1}
    (tmp_path / "unpacked/photos-v2").mkdir(parents=True)
    (tmp_path / "parts").rename(tmp_path / "unpacked/photos-v2/photos")
    inside = folders.find(tmp_path / "unpacked", unlabelled=True)
    assert {part: len(files) for part, files in inside.files.items()} == {"train": 3, "test": 1}
    assert inside.name(inside.files["test"][0][0]) == "photos-v2/photos/test/cat/3.png"
    checked = data_check.check(tmp_path / "unpacked", unlabelled=True)
    assert (checked.classes, checked.recipe) == ({}, "own-images")
    assert " --unlabelled " in checked.command
    assert checked.command.endswith("--teacher FILE.onnx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in"):
        folders.find(tmp_path / "empty", unlabelled=True)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("", "names no images"),
        ("a,b\n1,2\n", "has the columns a, b; it needs path (or file, filename, filepath, image"),
        ("path,label\n0.png,cat\n1.png\n2.png,\n", "2 of 3 rows lack a path or a label (lines 3, 4)"),
        ("path,label\n0.png,cat\n\n1.png\n2.png,\n", "2 of 3 rows lack a path or a label (lines 4, 5)"),
        ("path,label\n0.png,cat\n8.png,dog\n9.png,dog\n", "2 of 3 files are not in"),
        ("path,label\n0.png,cat\n1.png,dog\n0.png,dog\n", "1 files have more than one label: 0.png"),
        ("path,label\n0.png,cat\n1.png,dog\n./0.png,dog\n", "1 files have more than one label: 0.png"),
        ("path,label,split\n0.png,cat,train\n1.png,dog,later\n", "'later' is none of train, val and test"),
        ("path,label\n0.png,cat\n1.png,cat\n", "only one class in"),
    ],
)
def test_tables_that_cannot_be(tmp_path: Path, table: str, words: str) -> None:
    for i in range(3):
        draw(tmp_path / f"{i}.png")
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DataError) as error:
        folders.find(tmp_path / "labels.csv")
    assert words in str(error.value)


# --- splits ------------------------------------------------------------------------------------------------


def pixels(images: torch.Tensor | StoredImages) -> set[bytes]:
    return {image.numpy().tobytes() for image in images[:]}


def test_groups_and_copies_stay_on_one_side(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for person in range(10):
            for i in range(4):
                draw(tmp_path / name / f"p{person}_{i}.png")
    data = load_folder(tmp_path, group_by=r"(\w+/p\d+)_\d", val_size=0.2)
    assert data.val is not None
    assert [part.labels.bincount().tolist() for part in (data.test, data.val)] == [[8, 8], [8, 8]]
    groups = [set(part.groups.tolist()) for part in (data.train, data.val, data.test) if part.groups is not None]
    assert [len(group) for group in groups] == [12, 4, 4]
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]

    for i in range(8):  # without a pattern, copies are the groups
        (tmp_path / "cat" / f"again{i}.png").write_bytes((tmp_path / f"cat/p{i}_0.png").read_bytes())
    data = load_folder(tmp_path)
    assert not pixels(data.train.images) & pixels(data.test.images)
    assert len(data.train) + len(data.test) == 88
    data = load_folder(tmp_path, group_by=r"\w+/(?:p|again)\d+")  # nor does a pattern that knows nothing of them
    assert not pixels(data.train.images) & pixels(data.test.images)

    with pytest.raises(DataError, match=r"finds nothing in 80 of 88 paths: cat/p0_0.png"):
        load_folder(tmp_path, group_by="again")
    with pytest.raises(DataError, match="makes one group of all 88 images"):
        load_folder(tmp_path, group_by="png")
    with pytest.raises(DataError, match="no images of cat in what is held out"):
        load_folder(tmp_path, group_by=r"(cat)|p\d")
    with pytest.raises(RecipeError, match="is not a regular expression"):
        recipe.validate({"student": {"name": "resnet9"}, "data": {"group_by": "(x"}})


def test_stratified_groups_is_near_the_shares() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(0, 200, 3000)
    labels = random.choice(3, 3000, p=(0.7, 0.2, 0.1))
    held = stratified_groups(labels, groups, 600, 0)
    assert not set(groups[held]) & set(groups[~held])
    assert np.bincount(labels[held]) == pytest.approx(0.2 * np.bincount(labels), abs=10)


def test_stratified_groups_takes_single_images_as_stratified_does() -> None:
    """A table of all groups by all classes would take 160 MB here."""
    random = np.random.default_rng(0)
    labels = np.sort(random.choice(1000, 20_000))
    groups = np.arange(20_000)
    groups[1] = 0
    tracemalloc.start()
    held = stratified_groups(labels, groups, 4000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert held[0] == held[1]
    assert np.array_equal(np.bincount(labels[held]), folders.shares(np.bincount(labels), 4000))


def test_stratified_groups_takes_small_and_large_groups_alike() -> None:
    """One of 200 images beside 19 of 40: were the large ones taken first, that would be the test for every seed."""
    groups, labels = np.repeat(range(20), [200, *[40] * 19]), np.tile([0, 1], 480)
    held = [stratified_groups(labels, groups, 192, seed) for seed in range(20)]
    assert len({tuple(np.unique(groups[one])) for one in held}) > 10
    assert sum(0 in groups[one] for one in held) < 15


@pytest.mark.parametrize(("part", "other"), [("train", "test"), ("train", "val"), ("val", "test")])
def test_a_split_that_leaks_is_refused_or_cleaned(tmp_path: Path, part: str, other: str) -> None:
    for place, count in (("train", 6), ("val", 6), ("test", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                draw(tmp_path / place / name / f"{place}{i}.png")
    mine, theirs = tmp_path / part / "dog" / f"{part}2.png", tmp_path / other / "dog/again.png"
    theirs.write_bytes(mine.read_bytes())
    names = f"{part}/dog/{part}2.png as {other}/dog/again.png"
    with pytest.raises(DataError, match=f"the split leaks: 1 of 12 {part} images are in {other} too: {names}"):
        load_folder(tmp_path)
    assert len(getattr(load_folder(tmp_path, skip_leaks=True), part)) == 11
    theirs.unlink()
    with pytest.raises(DataError, match=f"2 of 12 {part} images or groups .* are in {other} too"):
        load_folder(tmp_path, group_by=rf"(?:{part}|{other})(2\.png)|\w+\.png")


def test_the_same_options_hold_out_the_same_images_for_ever() -> None:
    """Else an old run would be measured on what it has learnt from. Other images: another SPLITTING."""
    labels, groups = np.arange(300) % 3, np.random.RandomState(0).randint(0, 20, 300)
    held = [stratified(labels, 60, 1), stratified_groups(labels, groups, 60, 1)]
    assert (SPLITTING, *map(crc32, held)) == (4, 2689375708, 1119856887)
    _, known = train_test_split(np.arange(300), test_size=60, stratify=labels, random_state=1)
    assert sorted(known) == np.flatnonzero(held[0]).tolist()


def test_files_that_vanish_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        draw(tmp_path / "ab"[i % 2] / f"{i}.png")
    find = folders.find

    def slow(*arguments: object) -> folders.Listing:
        found = find(*arguments)  # type: ignore[arg-type]
        (tmp_path / "a/2.png").unlink()
        return found

    monkeypatch.setattr(folders, "find", slow)
    with pytest.raises(DataError, match=r"a/2.png was there a moment ago"):
        load_folder(tmp_path)


def test_several_folders_of_one_part_and_linked_ones_are_all_read(tmp_path: Path) -> None:
    for i, place in enumerate(("train_1/cat", "train_2/cat", "train_1/dog", "elsewhere/more", "test/cat", "test/dog")):
        draw(tmp_path / place / f"{i}.jfif")
    (tmp_path / "train_1/dog/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/more/circle").symlink_to(tmp_path / "elsewhere")
    listing = folders.find(tmp_path)
    assert [(path.name, label) for path, label in listing.files["train"]] == [
        ("0.jfif", 0),
        ("1.jfif", 0),
        ("2.jfif", 1),
        ("3.jfif", 1),
    ]


def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    for i in range(8):
        draw(tmp_path / "ab"[i % 2] / f"{i}.png")
    try:
        (tmp_path / "a" / os.fsdecode(b"f\xfcr.png")).write_bytes(b"broken")
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    with pytest.raises(DataError, match=r"cannot be read: a/f\\udcfcr.png; repair"):
        load_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / os.fsdecode(b"\xe4"))
    with pytest.raises(DataError, match=r"names that are not UTF-8: \\udce4; rename"):
        load_folder(tmp_path)


def test_trouble_with_the_disk_is_told_and_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(8):
        draw(tmp_path / "ab"[i % 2] / f"{i}.png")

    read = Path.read_bytes

    def failing(files: str, error: OSError) -> Callable[[Path], bytes]:
        def fails(path: Path) -> bytes:
            if path.match(files):
                raise error
            return read(path)

        return fails

    with monkeypatch.context() as trouble:
        trouble.setattr(Path, "read_bytes", failing("*.png", OSError(errno.EIO, "Input/output error")))
        with pytest.raises(DataError, match=r"8 of 8 images in .* cannot be read: a/0.png"):
            load_folder(tmp_path)
    assert load_folder(tmp_path).broken == ()

    with monkeypatch.context() as trouble:
        trouble.setattr(Path, "read_bytes", failing("0.png", PermissionError(errno.EACCES, "Permission denied")))
        trouble.setattr(os, "access", lambda path, mode: path.name != "0.png")
        for _ in range(2):  # read, and kept
            assert load_folder(tmp_path, skip_broken=True).broken == ("a/0.png",)
    assert load_folder(tmp_path).broken == ()

    def stops(*arguments: object, **settings: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "a/locked")

    monkeypatch.setattr(os, "walk", stops)
    with pytest.raises(DataError, match="cannot read a/locked: Permission denied"):
        load_folder(tmp_path)


def test_a_rare_class_may_lack_in_val_where_copies_stay_together(tmp_path: Path) -> None:
    for part, count in (("train", 40), ("test", 3)):
        for i in range(count):
            draw(tmp_path / part / "cat" / f"{i}.png")
    for i in range(4):
        draw(tmp_path / ("test" if i == 3 else "train") / "fox" / f"{i}.png")
    (tmp_path / "train/cat/again.png").write_bytes((tmp_path / "train/cat/1.png").read_bytes())
    data = load_folder(tmp_path, val_size=0.1)
    assert data.val is not None
    assert data.train.labels.bincount().tolist()[1] >= 2


# --- data check --------------------------------------------------------------------------------------------


def test_data_check_finds_what_is_wrong(drawn: Path, tmp_path: Path, toolkit: Toolkit) -> None:
    for part, some in (("train", range(5)), ("test", [5])):
        for shape in ("star", "moon"):
            for i in some:
                (tmp_path / part / shape).mkdir(parents=True, exist_ok=True)
                (tmp_path / part / shape / f"{i}.jpg").write_bytes((drawn / shape / f"000{i}.jpg").read_bytes())
    clean = data_check.check(tmp_path)
    assert clean.classes == {"moon": {"train": 5, "test": 1}, "star": {"train": 5, "test": 1}}
    assert (clean.problems, clean.near, clean.copies) == ([], [], [])

    star = tmp_path / "train/star/0.jpg"
    (tmp_path / "train/moon/wrong.jpg").write_bytes(star.read_bytes())
    with Image.open(star) as image:
        image.resize((image.width // 2, image.height // 2)).save(tmp_path / "test/star/smaller.png")
    (tmp_path / "train/star/cut.jpg").write_bytes(star.read_bytes()[:-900])
    result = toolkit("data", "check", tmp_path, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert list(found["broken"]) == ["train/star/cut.jpg"]
    assert found["copies"] == found["contradictions"] == [["train/moon/wrong.jpg", "train/star/0.jpg"]]
    assert ["train/moon/wrong.jpg", "test/star/smaller.png"] in found["near"]
    assert ["train/moon/wrong.jpg", "test/star/smaller.png"] in found["leaks"]
    text = toolkit("data", "check", tmp_path).stdout
    assert "problem: 1 of 15 images are broken: train/star/cut.jpg" in text
    assert "the split leaks" in text
    assert "--recipe fine-tune" in text
    assert " --skip-broken" in text
    (tmp_path / "train/star/iphone.heic").write_bytes(b"")
    (tmp_path / "train/star/gone.png").symlink_to("nowhere")
    (tmp_path / "loose.JPG").write_bytes(star.read_bytes())
    left = toolkit("data", "check", tmp_path).stdout.partition("not read  ")[2].splitlines()[0]
    assert sorted(left.split(", ")) == ["1 .heic", "1 .jpg outside of the class folders", "1 dangling link"]
    assert toolkit("data", "check", tmp_path / "nothing").exit_code == 1


@pytest.mark.parametrize("kind", ["noise", "flat"])
def test_data_check_finds_the_copies_that_training_finds(tmp_path: Path, kind: str) -> None:
    for part, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                draw(tmp_path / part / name / f"{i}.png")
    image = Image.open(tmp_path / "train/cat/0.png") if kind == "noise" else Image.new("RGB", (40, 40), "red")
    image.save(tmp_path / "train/cat/again.png")
    image.save(tmp_path / "test/cat/again.bmp")
    with pytest.raises(DataError, match="the split leaks"):
        load_folder(tmp_path)
    found = data_check.check(tmp_path)
    assert ("train/cat/again.png" if kind == "flat" else "train/cat/0.png", "test/cat/again.bmp") in found.leaks
    assert " --skip-leaks" in found.command
    load_folder(tmp_path, skip_leaks=True)


def test_data_check_compares_few_at_a_time_and_tells_how_far_it_is(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, toolkit: Toolkit
) -> None:
    with Image.open(drawn / "star/0000.jpg") as image:
        image.save(drawn / "star/0006.png")
    whole = data_check.check(drawn)
    monkeypatch.setattr(data_check, "DISTANCES", 100)  # two rows
    monkeypatch.setattr("toolkit.progress.TELL_SECONDS", -1)
    parts = toolkit("data", "check", drawn)
    (drawn / "star/0006.png").unlink()
    assert whole.copies + whole.near == [("star/0000.jpg", "star/0006.png")]
    assert parts.stdout.splitlines() == list(data_check.show(whole))
    for line in ("looking at 49 images: 98%\n", "comparing 49 images: 96%\n"):
        assert line in parts.stderr


def test_data_check_names_what_training_would_stop_at(tmp_path: Path, toolkit: Toolkit) -> None:
    for name in ("cat", "dog"):
        for i in range(4):
            draw(tmp_path / "whole" / name / f"{i}.png")
    for name in ("train/cat", "train/dog", "test/cat"):
        for i in range(2):
            draw(tmp_path / "parts" / name / f"{name.replace('/', '')}{i}.png")
    (tmp_path / "parts/val/cat").mkdir(parents=True)
    (tmp_path / "parts/val/dog").mkdir()
    (tmp_path / "parts/test/dog").mkdir()
    (tmp_path / "whole/fox").mkdir()
    for path, problem in (("parts", "dog has 0 images in test: at least 1"), ("whole", "fox has 0 images in train")):
        result = toolkit("data", "check", tmp_path / path)
        assert result.exit_code == 1
        assert f"problem: {problem}" in result.stdout
        assert ("problem: val holds no images" in result.stdout) == (path == "parts")
    for path in (tmp_path / "whole").rglob("*.png"):
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert "broken    8" in toolkit("data", "check", tmp_path / "whole").stdout


def test_data_check_names_folders_that_may_be_the_classes(tmp_path: Path) -> None:
    for place in ("site_a", "site_b"):
        for name in ("good", "bad"):
            for i in range(6):
                draw(tmp_path / "sites" / place / name / f"{i}.png")
    assert data_check.check(tmp_path / "sites").problems == [
        "each of the 2 class folders holds the same folders (bad, good): if these are the classes, move them up, or "
        "name their images in a table"
    ]
    for name in ("cat", "dog"):
        for part in ("train", "test"):
            for i in range(2):
                draw(tmp_path / "within" / name / part / f"{i}.png")
    assert data_check.check(tmp_path / "within").problems == []


def test_data_check_suggests_what_can_be_loaded(tmp_path: Path, toolkit: Toolkit) -> None:
    for name in "abcd":
        for i in range(6):
            draw(tmp_path / "few" / name / f"{i}.png")
        for i in range(60 if name == "a" else 3):
            draw(tmp_path / "rare" / name / f"{i}.png")
    few = toolkit("data", "check", tmp_path / "few")
    assert few.exit_code == 0
    assert "--set data.val_size=0" in few.stdout
    assert load_folder(tmp_path / "few", val_size=0).val is None
    with pytest.raises(DataError, match="holds out 2 images, fewer than the 4 classes"):
        load_folder(tmp_path / "few", val_size=0.1)
    rare = toolkit("data", "check", tmp_path / "rare")
    with pytest.raises(DataError, match="too few images of"):
        load_folder(tmp_path / "rare")
    assert (rare.exit_code, rare.stdout.count("too few for one among the 14")) == (1, 1)


@pytest.mark.parametrize(("counts", "balanced"), [((12, 4), True), ((11, 4), False)])
def test_data_check_suggests_size_recipe_and_balance(
    tmp_path: Path, counts: tuple[int, int], balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_check, "FEW", 15)
    rng = np.random.default_rng(0)
    for name, count in zip(("cat", "dog"), counts, strict=True):
        for i in range(count):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (140, 127, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    found = data_check.check(tmp_path)
    assert found.imbalance == counts[0] / counts[1]
    assert (found.image_size, found.recipe) == (96, "own-images")
    assert " --image-size 96 " in found.command
    assert (" --balance sampling" in found.command) == balanced
    (tmp_path / "cat/0.png").unlink()
    (tmp_path / "cat/1.png").unlink()
    assert data_check.check(tmp_path).recipe == "fine-tune"


def test_nine_in_ten_images_are_as_large_as_the_size_that_is_suggested(tmp_path: Path) -> None:
    """That of the file: to look at it, a JPEG is decoded no larger than needed."""
    random = np.random.default_rng(0)
    for i, side in enumerate([40, *[130] * 5, *[230] * 14]):
        path = tmp_path / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (side, side + 20, 3), np.uint8)).save(path)
    found = data_check.check(tmp_path)
    assert found.sizes == {"smallest": 40, "tenth": 130, "median": 230, "largest": 230}
    assert found.image_size == 128


def test_what_lies_around_a_picture_is_no_matter(tmp_path: Path) -> None:
    """A profile that Pillow refuses to read: page and training pass it over, so data check does."""
    for name in ("cat", "dog"):
        for i in range(4):
            draw(tmp_path / name / f"{i}.png", icc_profile=bytes(2 * 2**20))
    with pytest.raises(ValueError, match="Decompressed data too large"):
        Image.open(tmp_path / "cat/0.png").load()
    assert len(load_folder(tmp_path).train) == 6
    found = data_check.check(tmp_path)
    assert (found.formats, found.broken, found.sizes["smallest"]) == ({"PNG": 8}, {}, 40)


# --- classes of unequal size -------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_balance(smoothing: float) -> None:
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    order = balanced_order(np.random.default_rng(0), labels.numpy())
    assert np.bincount(labels[order]).tolist() in ([34, 33, 33], [33, 34, 33], [33, 33, 34])
    assert len(set(order[labels[order] == 0])) >= 33  # none twice where there are enough

    weights = class_weights(labels, 3)
    assert weights[labels].mean() == pytest.approx(1)
    assert (weights * labels.bincount()).tolist() == pytest.approx([100 / 3] * 3)
    wanted = recipe.validate(
        {"student": {"name": "resnet9"}, "balance": "weights", "loss": {"label_smoothing": smoothing}}
    )
    logits, one_hot = torch.randn(100, 3), torch.nn.functional.one_hot(labels, 3).float()
    loss = Objective(wanted, torch.nn.Identity(), None, weights)(logits, one_hot, None)
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    by_class = [each[labels == k].mean() for k in range(3)]
    torch.testing.assert_close(loss, sum(by_class, torch.zeros(())) / 3)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_what_a_balanced_epoch_mixes_in_is_balanced_too(mix: str) -> None:
    images, labels = torch.zeros(200, 3, 16, 16, dtype=torch.uint8), (torch.arange(200) >= 190).long()
    shown = Augmenter(images, labels, 2, recipe.Augment.model_validate({mix: 1.0}), 0, balanced=True)
    shown.start_epoch(0)
    assert shown.batch(shown.order(0))[1].mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.03)
