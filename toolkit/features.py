"""Features: the outputs of modules within a net, taken by hooks under the module's path; the net is not changed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import RecipeError
from toolkit.recipe import FeatureMethod

Shapes = dict[str, tuple[int, ...]]
OUTER = 3  # an outer module has at most this many names in its path: network.stages.1, not what is within it
RESOLUTIONS = 3  # most layers that are paired by default


class Features:
    """Keeps what the modules at ``paths`` put out in the net's last forward pass."""

    def __init__(self, net: nn.Module, paths: Iterable[str]) -> None:
        self.kept: dict[str, Tensor] = {}
        self.hooks = [net.get_submodule(path).register_forward_hook(partial(self._keep, path)) for path in set(paths)]

    def _keep(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.kept[path] = output

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def output_shapes(net: nn.Module, images: Tensor, within: nn.Module | None = None) -> Shapes:
    """The shape, without the batch, of what each module puts out for images ``[B,3,H,W]``, in the order of running.

    ``within``: the part of the net whose modules are meant, and whose paths are given.
    """
    root, training = within or net, net.training
    features = Features(root, (path for path, _ in root.named_modules() if path))
    net.eval()  # leaves BN's statistics and the random generator as they are
    try:
        net(images)
    finally:
        features.remove()
        net.train(training)
    return {path: tuple(output.shape[1:]) for path, output in features.kept.items() if output.ndim > 1}


def pair(method: FeatureMethod, name: str, student: Shapes, teacher: Shapes) -> list[tuple[str, str]]:
    """The layers that a method compares: those of the recipe, or by default as ``FeatureMethod.layers`` says.

    Raises ``RecipeError`` for a module that is not there, with those that are, and for shapes that do not match.
    """
    where = f"loss.methods.{name}.layers"
    if not method.layers:
        pairs = list(zip(deepest(student), deepest(teacher), strict=False))
        if not pairs:
            raise RecipeError(
                f"{where}: one of the nets has no feature maps [C,S,S] to compare; give pairs of modules. The student "
                f"has {listed(student)}; the teacher has {listed(teacher)}"
            )
        return pairs if method.maps else pairs[:1]
    for paths in method.layers:
        for whose, path, shapes in zip(("student", "teacher"), paths, (student, teacher), strict=True):
            if path not in shapes:
                # Of all nets an ONNX file alone is a single module.
                there = "An ONNX file gives logits alone" if len(shapes) == 1 else "It has"
                raise RecipeError(
                    f"{where}: the {whose} has no module {path!r} that puts out a tensor. {there}: {listed(shapes)}"
                )
            if not (is_map(shapes[path]) or (len(shapes[path]) == 1 and not method.maps)):
                known: Shapes = {path: shape for path, shape in shapes.items() if is_map(shape)}
                raise RecipeError(
                    f"{where}: {path!r} of the {whose} puts out {list(shapes[path])}, and {name} compares "
                    f"{'feature maps [C,S,S]' if method.maps else 'vectors [C] or feature maps [C,S,S]'}. "
                    f"Maps: {listed(known)}"
                )
    return list(method.layers)


def is_map(shape: tuple[int, ...]) -> bool:
    """Whether it is ``[C,S,S]``: images are square here, so other numbers are tokens, or have the channels last."""
    return len(shape) == 3 and shape[1] == shape[2]


def outer(shapes: Shapes) -> Shapes:
    """The modules that are not deep within others."""
    return {path: shape for path, shape in shapes.items() if path.count(".") < OUTER}


def deepest(shapes: Shapes) -> list[str]:
    """The last outer modules that put out feature maps of each resolution, from the deepest to the third deepest."""
    last = {shape[1:]: path for path, shape in outer(shapes).items() if is_map(shape) and shape[1] > 1}
    return list(reversed(last.values()))[:RESOLUTIONS]


def listed(shapes: Shapes) -> str:
    some = outer(shapes)
    told = ", ".join(f"{path} {list(shape)}" for path, shape in some.items())
    return f"{told} and those within them" if len(some) < len(shapes) else told


def same_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two feature maps ``[B,C,H,W]``, each averaged to the smaller height and the smaller width of both."""
    size = min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
    return _averaged(one, size), _averaged(other, size)


def _averaged(features: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = features.shape[2:]
    if height % size[0] or width % size[1]:
        return F.adaptive_avg_pool2d(features, size)
    kernel = height // size[0], width // size[1]  # the same, and deterministic on CUDA
    return features if kernel == (1, 1) else F.avg_pool2d(features, kernel)
