"""The benchmark of the reports' systems: its rule, and its table on a few random images."""

import copy

import pytest
import torch
from conftest import benchmark

from toolkit.data import DataSet, Split
from toolkit.errors import DivergedError
from toolkit.recipe import Augment, Recipe

SGD = "sgd momentum 0.9"
CHAWLA = Augment(flip="random", crop_padding=2, padding_mode="zero", rotation=5)
RAO = Augment(flip="random", crop_padding=4, padding_mode="zero", rotation=5)
JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1}
XU = Augment(
    flip="random", crop_padding=4, padding_mode="zero", rotation=10, translation=0.1, plain_copy=True, **JITTER
)
WHITE = Augment(flip="random", crop_padding=4, padding_mode="white")
CUTMIX = Augment(flip="random", crop_padding=4, padding_mode="zero", cutmix=1, mix_probability=0.5)
# Optimizer, lr, weight decay, schedule, epochs, batch, share held out, epoch kept, augmentation.
REPORTED = {
    "chawla-1": (SGD, 0.01, 0, "constant", 200, 128, 0.1, "last", CHAWLA),
    "chawla-2": (SGD, 0.01, 0, "constant", 100, 16, 0.1, "last", CHAWLA),
    "chawla-3": (SGD, 0.01, 0, "constant", 350, 32, 0.1, "last", CHAWLA),
    "lakkimsetty": (SGD, 0.1, 5e-4, "cosine", 200, 128, 0.1, "best", CUTMIX),
    "xu-resnet18-42": ("adamw momentum 0.9", 1e-3, 0.01, "cosine", 80, 64, 0, "last", XU),
    "xu-resnet-large": (SGD, 0.05, 5e-4, "cosine", 120, 64, 0, "last", XU),
    "rao-tpsnet": (SGD, 0.01, 5e-4, "cosine", 300, 128, 0.1, "best", RAO),
    "rao-333": (SGD, 0.01, 5e-4, "cosine", 300, 128, 0.1, "best", RAO),
    "rao-777": (SGD, 0.01, 5e-4, "cosine", 300, 128, 0.1, "best", RAO),
    "rao-17": (SGD, 0.01, 5e-4, "cosine to 0.976", 30, 128, 0.1, "best", RAO),
    "rao-23": (SGD, 0.01, 5e-4, "cosine to 0.976", 30, 128, 0.1, "best", RAO),
    "anand": (SGD, 0.1, 2e-4, "constant", 90, 125, 0, "last", WHITE),
}
QUIRKS = {
    "chawla-3": {"student.dropout": 0.1},
    "lakkimsetty": {
        "optimizer.lookahead_steps": 5, "optimizer.lookahead_alpha": 0.5, "optimizer.grad_clip": 0.1,
        "early_stop.patience": 80, "early_stop.metric": "val_loss",
    },
    "xu-resnet18-42": {"student.dropout": 0.15},
    "anand": {"batch_growth.factor": 2, "batch_growth.milestones": (60, 70, 80), "batch_growth.ceiling": 1000},
}  # fmt: skip


def test_no_system_is_missing(systems):
    assert REPORTED.keys() == set(systems.systems())


@pytest.mark.parametrize("name", REPORTED)
def test_recipes_hold_what_the_reports_say(systems, name):
    recipe = systems.resolved(name)
    optimizer, schedule = recipe.optimizer, recipe.schedule
    ends = f" to {schedule.final_fraction:g}" if schedule.final_fraction else ""
    found = (
        f"{optimizer.name} momentum {optimizer.momentum:g}", optimizer.lr, optimizer.weight_decay,
        schedule.name + ends, recipe.epochs, recipe.batch_size, recipe.data.val_size, recipe.select,
        recipe.augment,
    )  # fmt: skip
    assert found == REPORTED[name]
    assert optimizer.nesterov is False or optimizer.name == "adamw"
    assert schedule.warmup_epochs == 0
    quirks = QUIRKS.get(name, {})
    tree = recipe.model_dump()
    tree["student"] = recipe.student.arguments if recipe.student else {}
    assert {field: tree[field.split(".")[0]][field.split(".")[1]] for field in quirks} == quirks
    if name not in ("lakkimsetty", "anand"):
        assert not any([optimizer.lookahead_steps, optimizer.grad_clip, recipe.early_stop.patience])
        assert not recipe.batch_growth.milestones


@pytest.fixture(scope="module")
def systems():
    return benchmark("systems")


def test_all_systems_see_as_many_samples_and_keep_the_rest_of_their_recipe(systems):
    for name in systems.systems():
        full, short = systems.resolved(name), systems.shortened(name, 8)
        assert short.epochs * (2 if short.augment.plain_copy else 1) == 8
        changed = {line.split(":")[0] for line in full.differences(short)}
        assert changed <= {
            "epochs", "data.val_size", "select", "early_stop.patience", "batch_growth.milestones", "micro_batch"
        }  # fmt: skip
    assert systems.shortened("anand", 8).batch_growth.milestones == (5, 6, 7)


def test_lengths_in_epochs_are_scaled(systems, monkeypatch):
    tree = {
        "student": {"name": "resnet_large"},
        "epochs": 40,
        "schedule": {"name": "step", "warmup_epochs": 2, "milestones": [10, 30]},
        "batch_growth": {"patience": 8},
    }
    monkeypatch.setattr(systems.recipe, "read", lambda _: copy.deepcopy(tree))
    short: Recipe = systems.shortened("any", 10)
    assert short.schedule.warmup_epochs == 0.5
    assert short.schedule.milestones == (2.5, 7.5)
    assert short.batch_growth.patience == 2


def random_split(count: int) -> Split:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count) * 7 % 10)


def few_images() -> DataSet:
    classes = tuple("abcdefghij")
    return DataSet("cifar10", classes, random_split(40), None, random_split(20), (0.5,) * 3, (0.2,) * 3, "0")


def test_the_subset_holds_as_many_of_each_class_in_order(systems):
    split = random_split(100)
    part = systems.first_of_each_class(split, 30, 10)
    assert torch.bincount(part.labels).tolist() == [3] * 10
    assert torch.equal(part.images, split.images[:30])  # labels repeat every ten images here


def test_trains_tabulates_and_trains_nothing_twice(systems, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(systems.datasets, "load", lambda _: few_images())
    names = ["xu-resnet-large", "chawla-1"]
    systems.main(names, images=20, epochs=2, test_images=10, folder=tmp_path)
    table = capsys.readouterr().out
    assert (tmp_path / "20-images" / "2-epochs" / "systems.md").read_text() == table
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [["xu-resnet-large", "resnet_large"], ["chawla-1", "resnet18_242_k3"]]
    assert [row[6] for row in rows[2:]] == ["40", "40"]
    assert rows[3][-1] == "*86.44% after 200 epochs*"

    monkeypatch.setattr(systems.engine, "_fit", None)  # which training would call
    systems.main(names, images=20, epochs=2, test_images=10, folder=tmp_path)
    assert capsys.readouterr().out == table


def test_a_system_that_diverges_does_not_end_the_comparison(systems, monkeypatch, tmp_path):
    def diverges(*_):
        raise DivergedError("the loss is not finite any more")

    monkeypatch.setattr(systems.engine, "fit", diverges)
    row = systems.train("chawla-1", systems.shortened("chawla-1", 8), few_images(), tmp_path)
    assert row[5:10] == ["0", "0", "0", "none", "diverged"]
