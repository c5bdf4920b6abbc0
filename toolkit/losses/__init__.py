"""Distillation methods, one a file; the folder is the catalogue, and a method's name is its file's.

A file has ``Params`` (a ``recipe.Method``, or a ``recipe.FeatureMethod``), its settings in a recipe, and ``Term``, a
module made from them whose result is a scalar: the mean over a batch, computed in float32, without a gradient to the
teacher. The ``Term`` of a

- method on logits is called with the student's and the teacher's logits ``[B,K]``, the labels ``[B,K]`` as
  probabilities, and the temperature, and raises ``RecipeError`` where it cannot teach so few classes;
- method on features is made from the ``Params`` and, for each pair of layers, the two shapes without the batch, and
  called with two lists: the student's features and the teacher's, ``[B,...]`` each.

``toolkit/objective.py`` adds the terms up. Names are read without importing a file, and with it torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType


def names() -> list[str]:
    """The methods, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def load(name: str) -> ModuleType:
    """The file of a method."""
    return importlib.import_module(f"toolkit.losses.{name}")
