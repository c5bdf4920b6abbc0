"""What is said of a teacher, or of weights to start from, that may know images which are held out here."""

import dataclasses
from pathlib import Path

import pytest
import torch
from small_run import small_digits

from toolkit import teaching
from toolkit.data import StoredImages, at_once
from toolkit.recipe import SPLIT, Teacher, resolve

OURS = {"val_size": 0.2, "split_seed": 0, "group_by": None, "skip_broken": False, "skip_leaks": False}
FOLDER = {"dataset": "folder:photos"}


@pytest.mark.parametrize(
    ("folder", "theirs", "differing", "said"),
    [
        (False, {}, {}, None),
        (False, {"dataset": "cifar10"}, {"split_seed": 1}, None),
        (False, {}, {"split_seed": 1}, "split_seed 1 there, 0 here"),
        (False, {"image_size": 64}, {"split_seed": 1}, "split_seed 1 there, 0 here"),
        (False, {}, {"val_size": 0.1}, "val_size 0.1 there, 0.2 here"),
        (False, {}, {"val_size": 0}, "val_size 0 there, 0.2 here"),
        (False, {}, {"val_size": 0.3}, None),  # what is held out here was there too
        (False, {}, {"val_size": 100}, None),
        (False, {}, {"val_size": 0.3, "split_seed": 1}, "val_size 0.3 there, 0.2 here; split_seed 1 there, 0 here"),
        (False, {}, {"group_by": "(.)"}, None),  # which folders alone have
        (True, FOLDER, {}, None),
        (True, FOLDER, {"val_size": 0.3}, "val_size 0.3 there, 0.2 here"),
        (True, FOLDER, {"group_by": "(.)"}, "group_by (.) there, None here"),
        (True, FOLDER, {"skip_leaks": True}, None),  # it left out none: the images are the same
        (True, FOLDER | {"dataset_digest": "e"}, {"skip_leaks": True}, "skip_leaks True there, False here"),
        (True, FOLDER | {"dataset_digest": "e"}, {}, "the images of folder:photos have changed"),
        (True, FOLDER | {"dataset_digest": "e", "image_size": 64}, {}, None),  # another size has another digest
    ],
)
@pytest.mark.parametrize("held_out", [True, False])
def test_what_weights_know_of_the_images_that_are_held_out(
    folder, theirs, differing, said, held_out, monkeypatch, capsys
):
    """Without val images the test's are what counts, and those of the built-in data are the same in all splits."""
    data = small_digits()
    if not held_out:
        data = dataclasses.replace(data, val=None)
    if folder:
        data = dataclasses.replace(data, name="folder:photos", files=("a.png",))
    assert tuple(OURS) == SPLIT
    header = {"dataset": "digits", "dataset_digest": "d", "image_size": 32, "split": OURS | differing} | theirs
    monkeypatch.setattr(teaching, "load_header", lambda path: header)
    settings = {f"data.{key}": value for key, value in OURS.items()} | {"data.dataset": data.name}
    wanted = resolve({"student": {"name": "tpsnet"}}, "distill", settings)
    teaching.tell_what_it_knows(Path("weights"), data, wanted)
    warning = capsys.readouterr().err
    same_test = header["dataset_digest"] == "d"
    if said is None or (same_test and not held_out):
        assert warning == ""
    else:
        assert said in warning
        assert warning.endswith("it may know some of the images that are held out here, and be measured too high\n")


def test_images_that_do_not_fit_the_memory_are_looked_at_in_batches(monkeypatch):
    """220 digits of 64 pixels, of which a batch has 125."""
    data, taken, real = small_digits(64), [], StoredImages.__getitem__
    rows = torch.arange(len(data.train))
    data = dataclasses.replace(
        data, val=None, train=dataclasses.replace(data.train, images=StoredImages(data.train.images, rows))
    )

    class Knowing(torch.nn.Module):
        def forward(self, images):
            right = data.train.labels[sum(map(len, taken)) - len(images) :][: len(images)]
            return torch.nn.functional.one_hot(right, 10).float()

    def watched(images, key):
        taken.append(real(images, key))
        return taken[-1]

    monkeypatch.setattr(StoredImages, "__getitem__", watched)
    wanted = resolve({"student": {"name": "tpsnet"}}, "distill", {"device": "cpu"})
    found = teaching.preflight(Knowing(), Teacher(name="onnx"), data, wanted)
    assert found == {"top1": 1, "images": 220, "split": "training"}
    assert max(map(len, taken)) <= at_once(64) < 220
