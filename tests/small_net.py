"""A small trained-looking classifier and its artifact, for the tests of export and serving."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export import parity
from export.artifact import Metadata
from export.onnx_export import OPSET, Deployed, build, fp32_copy, save, to_bytes

SIZE = 16
LABELS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


class SmallNet(nn.Module):
    """Images [B,3,H,W] in [0,1] to logits [B,7]; normalises inside, and its BN has lived."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.49, 0.48, 0.44]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.24, 0.25, 0.26]).view(1, 3, 1, 1))
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(24, len(LABELS)),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net((images - self.mean) / self.std)
        return logits


def small_net() -> SmallNet:
    """The same weights each time, left in training mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallNet().train()
        for _ in range(3):
            model(torch.rand(32, 3, SIZE, SIZE, generator=generator))
    with torch.no_grad():
        model.net[-1].weight.mul_(20)  # so that answers are sure of themselves
    return model


def small_images(n: int) -> Tensor:
    """uint8 [N,3,16,16]: coloured ramps, no two alike."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(n, 3, 4, generator=generator)
    y, x = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="ij")
    ramps = colours[..., 0, None, None] + colours[..., 1, None, None] * x + colours[..., 2, None, None] * y
    return (ramps / ramps.amax((1, 2, 3), keepdim=True) * 255).to(torch.uint8)


def small_metadata() -> Metadata:
    return Metadata(
        model="small_net",
        labels=LABELS,
        image_size=SIZE,
        parameters=4_119,
        macs=100_000,
        recipe_digest="12ab",
        dataset="ramps",
        dataset_digest="34cd",
        accuracy=0.9375,
        ece=0.0213,
        teacher="big_net",
        versions={"torch": "2.15"},
    )


def small_artifact(path: Path) -> Path:
    path.write_bytes(_content())
    return path


@cache
def _content() -> bytes:
    return to_bytes(build(small_net(), small_metadata()), small_metadata())


def export(model: nn.Module, metadata: Metadata, path: Path, opset: int = OPSET) -> None:
    """An artifact in fp32, without the gate."""
    save(build(model, metadata, opset), metadata, path)


def changed(artifact: Path, change: Callable[[onnx.ModelProto], None]) -> bytes:
    """The content of another artifact, which differs in this."""
    proto = onnx.load(artifact)
    change(proto)
    return bytes(proto.SerializeToString())


def with_property(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    """Another value of a metadata property."""

    def change(proto: onnx.ModelProto) -> None:
        next(item for item in proto.metadata_props if item.key == key).value = value

    return change


def with_weight(change: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[onnx.ModelProto], None]:
    """Another value of the first weight for which ``change`` gives something."""

    def edit(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            new = change(numpy_helper.to_array(tensor).copy())
            if new is not None:
                tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
                return
        raise AssertionError("nothing to change")

    return edit


def with_unknown_operator(proto: onnx.ModelProto) -> None:
    """What can be read, and not run."""
    proto.graph.node[3].op_type = "NoSuchOperator"


def check(
    run: parity.Run,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    provider: str,
    batches: Sequence[int] = parity.BATCHES,
    tolerance: parity.Tolerance = parity.tolerance("fp32", tf32=False, gpu=False),  # noqa: B008 - frozen
) -> parity.ParityReport:
    """The gate, for a model that takes float ``[B,3,S,S]`` in [0,1] and gives logits."""
    reference = parity.Reference(Deployed(fp32_copy(model)).eval(), images, labels, batches)
    answers = reference.answers(run)
    return parity.compare(run, reference, answers, provider=provider, precision="fp32", tf32=False, tolerance=tolerance)
