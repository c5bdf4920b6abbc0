"""A training of seconds: its recipe, its digits, and every method at once."""

from toolkit import data as datasets
from toolkit.data import DataSet, Split
from toolkit.losses import names
from toolkit.recipe import resolve

TREE = {
    "data": {"dataset": "digits"},
    # Dropout makes the state of the random generator matter.
    "student": {"name": "tpsnet", "blocks": [1, 1, 1], "base": 4, "dropout": 0.2},
    "augment": {"crop_padding": 2, "rotation": 5},
    "optimizer": {"lr": 0.05},
    "schedule": {"warmup_epochs": 1},
    "precision": "fp32",
    "channels_last": True,
    "batch_size": 50,
    "epochs": 3,
}
TEACHER = {"name": "resnet9_wide", "widths": [8, 16, 16]}
LAYERS = [["network.stages.0", "network.stages.1"], ["network.stages", "network.stages.2"]]
EVERYTHING = {
    "teacher": TEACHER,
    "loss": {
        "kd_weight": 0.1,
        "temperature": {"start": 4, "end": 1},
        "methods": {name: {"layers": LAYERS} if name == "fitnets" else {} for name in names()},
    },
}


def small_digits(size: int = 16) -> DataSet:
    """220 digits to train on; 20 of them are a ragged rest for batches of 50."""
    whole = datasets.load(resolve(TREE, "distill", {"data.image_size": size}).data)
    parts = {"train": (whole.train, 220), "val": (whole.val, 100), "test": (whole.test, 100)}
    some = {name: Split(part.images[:n], part.labels[:n]) for name, (part, n) in parts.items()}
    return DataSet("digits", whole.classes, mean=whole.mean, std=whole.std, digest="d", **some)
