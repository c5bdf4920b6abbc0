"""Names and models. The folders ``teachers/`` and ``students/`` are the catalogue.

A file there lists its builders in ``__all__``; a builder is a function
``name(num_classes, **arguments, image_size=32)`` that returns a network from normalised images ``[B,3,H,W]`` to logits
``[B,K]``, with a docstring that ends in a line ``Source: ...``. Names are read without importing the file: a misspelt
one costs no import of torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from toolkit.choices import Role
from toolkit.errors import BudgetError, RecipeError, UnknownNameError

if TYPE_CHECKING:
    from toolkit.classifier import Classifier

ROLES: tuple[Role, ...] = get_args(Role)
BUDGET = 5_000_000
# In place of a path:
PRETRAINED = "pretrained"  # the weights in students/pretrained/
TEACHER = "teacher"  # those of the recipe's (first) teacher


@cache
def _modules(role: Role) -> dict[str, str]:
    """Name of each builder to the module that holds it."""
    found: dict[str, str] = {}
    for path in sorted(Path(str(files(f"{role}s"))).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                found |= dict.fromkeys(ast.literal_eval(node.value), f"{role}s.{path.stem}")
    return found


def pretrained(name: str, image_size: int | None = None) -> tuple[Path, dict[str, Any]]:
    """The shipped weights of a student, and the arguments that it was built with; or ``UnknownNameError``.

    At another ``image_size`` than its own the ``resize`` is left out: it was chosen for those images.
    """
    from safetensors import safe_open

    weights = Path(str(files("students")), PRETRAINED).glob("*.safetensors")
    found = {path.stem.rpartition("-")[0]: path for path in weights}  # NAME-DATA.safetensors
    if name not in found:
        raise UnknownNameError(f"no weights of {name!r} are shipped{closest(name, found)}")
    with safe_open(found[name], "np") as file:  # without torch
        header = json.loads(file.metadata()["toolkit"])
    arguments = header["arguments"]
    if image_size not in (None, header["image_size"]):
        arguments.pop("resize", None)
    return found[name], arguments


def names(role: Role) -> list[str]:
    """The models of a role, sorted."""
    return sorted(_modules(role))


def closest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known) or 'none'}"


def builder(name: str, role: Role) -> Callable[..., Any]:
    """The function that builds the model, or ``UnknownNameError``."""
    if name not in _modules(role):
        raise UnknownNameError(f"there is no {role} named {name!r}{closest(name, names(role))}")
    return getattr(importlib.import_module(_modules(role)[name]), name)


GIVEN = ("role", "num_classes", "mean", "std", "image_size", "budget")  # by data and recipe


def argument_names(name: str, role: Role) -> list[str]:
    """The arguments that a recipe may give to the builder."""
    return [key for key in list(inspect.signature(builder(name, role)).parameters)[1:] if key != "image_size"]


def build(
    name: str,
    role: Role,
    num_classes: int,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.25, 0.25, 0.25),
    image_size: int = 32,
    **arguments: Any,
) -> Classifier:
    """A new model: images ``[B,3,H,W]`` in [0,1] to logits ``[B,num_classes]``.

    ``mean`` and ``std`` are per channel, of images in [0,1]. ``image_size`` (pixels) decides strides and
    pools of the stem (``students.blocks.stem_reduction``), and no parameter. Raises ``RecipeError`` for arguments that
    the builder does not take or refuses.
    """
    from toolkit.classifier import Classifier

    known = argument_names(name, role)
    for key in arguments:
        if key not in known:
            raise RecipeError(f"{role}.{key}: {name} takes no such argument{closest(key, known)}")
    try:
        network = builder(name, role)(num_classes, **arguments, image_size=image_size)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        given = f" from {arguments}" if arguments else ""
        raise RecipeError(f"{role}: {name} cannot be built{given}: {error}") from error
    return Classifier(network, mean, std)


@dataclass(frozen=True)
class ModelInfo:
    """A row of ``toolkit models``. ``macs``: multiply-accumulates of one image."""

    name: str
    role: Role
    parameters: int
    macs: int
    fits_budget: bool
    source: str


def info(
    name: str,
    role: Role,
    image_size: int = 32,
    num_classes: int = 10,
    budget: int = BUDGET,
    **arguments: Any,
) -> ModelInfo:
    """Counts of a model, taken on the meta device: no memory, no arithmetic. Raises as ``build``."""
    parameters, macs = _counts(name, role, num_classes, image_size, json.dumps(arguments, sort_keys=True))
    doc = inspect.getdoc(builder(name, role)) or ""
    source = re.search(r"^Source: (.+)$", doc, re.MULTILINE)
    return ModelInfo(name, role, parameters, macs, parameters < budget, source[1] if source else "")


@cache
def _counts(name: str, role: Role, num_classes: int, image_size: int, arguments: str) -> tuple[int, int]:
    import torch

    with torch.device("meta"):
        model = build(name, role, num_classes, image_size=image_size, **json.loads(arguments))
    try:
        return parameter_count(model), mac_count(model, image_size)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise RecipeError(f"{role}: {name} cannot compute images of {image_size} pixels: {error}") from error


def parameter_count(model: Any) -> int:
    """Trainable and frozen parameters; buffers are not parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def mac_count(model: Any, image_size: int) -> int:
    """Multiply-accumulates of one image of ``image_size`` squared pixels, counted by PyTorch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device = next(itertools.chain(model.parameters(), model.buffers())).device
    was_training, fast = model.training, torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention is not counted
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, image_size, image_size, device=device))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    model.train(was_training)
    return counter.get_total_flops() // 2


def check_budget(name: str, parameters: int, budget: int, num_classes: int) -> None:
    """Raise ``BudgetError`` unless ``parameters`` is less than ``budget``."""
    if parameters < budget:
        return
    fitting = []
    for other in names("student"):
        with suppress(RecipeError):  # a file of the user's own that cannot be built
            entry = info(other, "student", num_classes=num_classes, budget=budget)
            fitting += [entry] if entry.fits_budget else []
    fitting.sort(key=lambda entry: -entry.parameters)
    nearest = ", ".join(f"{entry.name} ({entry.parameters:,})" for entry in fitting[:3]) or "none"
    raise BudgetError(
        f"student {name} has {parameters:,} parameters, {parameters - budget + 1:,} too many for a budget of fewer "
        f"than {budget:,}; the nearest that fit: {nearest}. --budget moves the line."
    )
