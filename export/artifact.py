"""The artifact: one ONNX file that describes itself. Written by ``onnx_export``, read here without torch.

Each field of ``Metadata`` stands in the file's metadata under its own name, as JSON, so that any ONNX tool
can show it. The graph takes ``image`` (uint8 ``[N,S,S,3]``, RGB; with ``any_size`` ``[N,H,W,3]``) and gives
``probabilities`` and ``logits`` (float32 ``[N,K]``); N is free, all preprocessing of pixel values is inside.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import onnx
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

from toolkit.choices import Precision
from toolkit.errors import ArtifactError

IMAGE, PROBABILITIES, LOGITS = "image", "probabilities", "logits"


class Metadata(BaseModel):
    """What an artifact says of itself."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = Field(default=1, description="version of this list of fields")
    model: str = Field(description="name in the catalogue")
    labels: tuple[str, ...] = Field(min_length=2, description="class names, in the order of the outputs")
    image_size: int = Field(gt=0, description="side S of the images that the network sees, in pixels")
    any_size: bool = Field(default=False, description="takes images of any size, and resizes in the graph")
    parameters: int = Field(gt=0, description="parameters of the PyTorch model")
    macs: int | None = Field(default=None, description="multiply-accumulates an image, of one view of it")
    recipe_digest: str = Field(description="SHA-256 of the recipe")
    dataset: str = Field(description="name of the data set")
    dataset_digest: str = Field(description="SHA-256 of classes, images and labels")
    split: dict[str, Any] = Field(
        default_factory=dict, description="how val and test were held out of them: fields of the recipe's data"
    )
    accuracy: float | None = Field(default=None, ge=0, le=1, description="top-1 of this file on the test set")
    ece: float | None = Field(
        default=None, ge=0, le=1, description="expected calibration error of this file on the test set"
    )
    test_images: int | None = Field(default=None, description="images of which accuracy and ece are")
    plain_accuracy: float | None = Field(
        default=None, ge=0, le=1, description="top-1 of the PyTorch model on it: in fp32, one view of each image"
    )
    views: int = Field(default=1, ge=1, description="views of each image that the graph averages over")
    temperature: float | None = Field(default=None, gt=0, description="fitted on val; logits divided by it calibrate")
    calibrated: bool = Field(default=False, description="the graph divides its logits by the temperature")
    teacher: str | None = Field(default=None, description="name of the teacher it was distilled from")
    precision: Precision = Field(default="fp32", description="of the graph's convs and products")
    quantisation: str | None = Field(default=None, description="how an INT8 graph was made")
    licence: str | None = Field(default=None, description="what the weights may be used for, as their maker says")
    created: str | None = Field(default=None, description="UTC, from SOURCE_DATE_EPOCH at export")
    versions: dict[str, str] = Field(default_factory=dict, description="tool to version, at export")

    @property
    def overflows(self) -> bool:
        """Whether it holds U8S8 weights of 8 bits, which an x86 without VNNI adds up in 16."""
        return (self.quantisation or "").startswith("U8S8 QDQ")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def input_contract(self) -> str:
        """How an image becomes the input, in words."""
        size = self.image_size
        square = f"the central square of the image, resized to {size} pixels with an antialiased bilinear filter"
        if self.any_size:
            return f"uint8 RGB [batch, height, width, 3], any size; the graph takes {square}; no normalisation"
        return f"uint8 RGB [batch, {size}, {size}, 3]: {square}; no normalisation"

    def to_properties(self) -> dict[str, str]:
        return {key: json.dumps(value) for key, value in self.model_dump(mode="json").items()}


def read_bytes(path: Path) -> bytes:
    """The bytes of an artifact, or an ``ArtifactError`` where there is no such file or it is empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read the artifact {path}: {error.strerror}") from error
    if not data:
        raise ArtifactError(f"the artifact {path} is empty")
    return data


def parse(data: bytes, name: str) -> Metadata:
    """The metadata in the bytes of an artifact; ``name`` is what messages call it.

    Raises ``ArtifactError`` where the bytes are not ONNX, or not an artifact of this toolkit.
    """
    return read_metadata(load(data, name), name)


def load(data: bytes, name: str) -> onnx.ModelProto:
    """The ONNX model in the bytes of any file, or an ``ArtifactError``."""
    try:
        return onnx.load_model_from_string(data)
    except DecodeError as error:
        raise ArtifactError(f"{name} is not an ONNX file, or it is cut short") from error


def read_metadata(proto: onnx.ModelProto, name: str) -> Metadata:
    """The metadata of a model, or an ``ArtifactError`` where it is not an artifact of this toolkit."""
    properties = {item.key: item.value for item in proto.metadata_props}
    if not proto.graph.node or "format" not in properties:
        raise ArtifactError(f"{name} is not an artifact of this toolkit: {_foreign(proto)}")
    try:
        ours = {key: value for key, value in properties.items() if key in Metadata.model_fields}  # another tool may add
        metadata = Metadata.model_validate({key: json.loads(value) for key, value in ours.items()})
    except (ValidationError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{name} carries metadata that cannot be understood: {_first(error)}") from error
    side = None if metadata.any_size else metadata.image_size
    classes = len(metadata.labels)
    found = {value.name: _shape(value) for value in (*proto.graph.input, *proto.graph.output)}
    wanted = {
        IMAGE: ("UINT8", None, side, side, 3),
        PROBABILITIES: ("FLOAT", None, classes),
        LOGITS: ("FLOAT", None, classes),
    }
    if found != wanted:
        raise ArtifactError(f"{name} has the wrong inputs or outputs: {found}, not {wanted}")
    return metadata


def read(path: Path) -> Metadata:
    """The metadata of the artifact at ``path``. Raises ``ArtifactError``."""
    return parse(read_bytes(path), str(path))


def producer(proto: onnx.ModelProto) -> str:
    return f"{proto.producer_name} {proto.producer_version}".strip() or "an unknown tool"


def type_of(value: onnx.ValueInfoProto) -> str:
    """``uint8 [batch, 32, 32, 3]``."""
    tensor = value.type.tensor_type
    sizes = (d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "?") for d in tensor.shape.dim)
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} [{', '.join(sizes)}]"


def _foreign(proto: onnx.ModelProto) -> str:
    """What can be said of another tool's file, in some words."""
    if not proto.graph.node:
        return "it holds no graph"
    inputs, outputs = (
        ", ".join(f"{value.name} {type_of(value)}" for value in values[:3]) + (" ..." if len(values) > 3 else "")
        for values in (proto.graph.input, proto.graph.output)
    )
    return f"{producer(proto)} made it, it takes {inputs} and gives {outputs}"


def _shape(value: onnx.ValueInfoProto) -> tuple[str | int | None, ...]:
    """Element type and dimensions; None for a free dimension."""
    tensor = value.type.tensor_type
    sizes = (d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return (onnx.TensorProto.DataType.Name(tensor.elem_type), *sizes)


def _first(error: ValidationError | json.JSONDecodeError) -> str:
    if isinstance(error, ValidationError):
        item = error.errors()[0]
        return f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
    return str(error)
