"""What a model takes on this machine at an image size: images a second, and memory for each image of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit import compute, recipe
from toolkit.catalogue import build
from toolkit.choices import Role

IMAGES = 16  # in the step that is timed


@dataclass(frozen=True)
class Footprint:
    """``training`` and ``inference``: images a second of PyTorch on ``device``; ``memory``: bytes an image that a
    training step keeps for its backward pass, activations above all."""

    training: float
    inference: float
    memory: int
    device: str


def footprint(name: str, role: Role, image_size: int, device: str = "auto") -> Footprint:
    """Time and memory of a catalogue model with 10 classes, as it would be trained here.

    Raises ``RecipeError`` where the model does not take this size.
    """
    tree = {role: {"name": name}, "data": {"image_size": image_size}, "device": device}
    wanted = recipe.validate(tree)
    model = build(name, role, 10, image_size=image_size)
    training, inference = (1 / compute.seconds_an_image(model, wanted, backward, IMAGES) for backward in (True, False))
    place = compute.pick_device(device)
    numbers = compute.usual(wanted, place)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.rand(2, 3, image_size, image_size, device=place).contiguous(memory_format=numbers.layout)
    sizes = []
    # The difference of two batches is without the weights, which are there in bf16 too.
    for some in (images, images.repeat(2, 1, 1, 1)):
        kept.clear()
        saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with saved, compute.autocast(place, numbers.dtype):
            logits = model.train()(some)
        sizes.append(sum(kept.values()))
        del logits
    return Footprint(training, inference, (sizes[1] - sizes[0]) // len(images), str(place))
