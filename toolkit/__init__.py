"""Train a large image classifier, distil it into a small one, prove it, export it and serve it.

The steps of the command line as functions: ``from toolkit import train, distill, validate, export``. They are imported
when they are first used: ``import toolkit`` alone does no work.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.artifacts import export
    from toolkit.recipe import resolve
    from toolkit.stages import distill, train, validate

__version__ = "0.1.0"

# From 1.29 on ONNX Runtime tells its maker of every session, unless this is set before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["distill", "export", "resolve", "train", "validate"]

_HOMES = {"train": "stages", "distill": "stages", "validate": "stages", "export": "artifacts", "resolve": "recipe"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"toolkit.{_HOMES[name]}"), name)
