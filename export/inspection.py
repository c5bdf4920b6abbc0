"""What can be said of an ONNX file: as fields, as words, as a model card. No torch."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from export.artifact import Metadata, load, producer, read_bytes, read_metadata, type_of
from toolkit.errors import ArtifactError


class Description(BaseModel):
    """What can be said of any ONNX file; ``metadata`` is None where this toolkit did not make it, for ``reason``."""

    model_config = ConfigDict(frozen=True)
    file: str
    bytes: int
    sha256: str
    producer: str
    opset: dict[str, int]
    inputs: dict[str, str]
    outputs: dict[str, str]
    weights: int = Field(description="numbers in constant tensors")
    operators: dict[str, int]
    properties: dict[str, str] = Field(description="metadata of a foreign file")
    metadata: Metadata | None
    reason: str | None


def describe(path: Path) -> Description:
    """Look at an ONNX file, whoever made it. Raises ``ArtifactError`` where it is none."""
    data = read_bytes(path)
    proto = load(data, str(path))
    if not proto.graph.node:
        raise ArtifactError(f"{path} is not an ONNX file, or holds no graph")
    metadata, reason = None, None
    try:
        metadata = read_metadata(proto, str(path))
    except ArtifactError as error:
        reason = str(error)
    return Description(
        file=path.name,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        producer=producer(proto),
        opset={item.domain or "ai.onnx": item.version for item in proto.opset_import},
        inputs={value.name: type_of(value) for value in proto.graph.input},
        outputs={value.name: type_of(value) for value in proto.graph.output},
        weights=sum(math.prod(tensor.dims) for tensor in proto.graph.initializer),
        operators=dict(Counter(node.op_type for node in proto.graph.node).most_common()),
        properties={} if metadata else {item.key: item.value for item in proto.metadata_props},
        metadata=metadata,
        reason=reason,
    )


def model_card(description: Description) -> str:
    """The model card of an artifact, in Markdown; of a foreign file what is known of it."""
    about = description.metadata
    if about is None:
        head = [f"# {description.file}", "", f"{description.reason}.", ""]
        facts = {}
    else:
        percent = "unknown" if about.accuracy is None else f"{about.accuracy:.2%}"
        n = f" (n = {about.test_images:,})" if about.test_images else ""
        made = f"distilled from {about.teacher}" if about.teacher else "trained"
        head = [
            f"# {about.model}, an image classifier for {about.dataset}",
            "",
            f"{about.parameters:,} parameters, {made} on {about.dataset}; test top-1 {percent}{n}.",
            "",
            "## Use",
            "",
            f"Input `image`: {about.input_contract}.",
            f"Outputs `logits` and `probabilities`: float32 [batch, {len(about.labels)}], in the order of the labels.",
            "",
            f"    toolkit serve {description.file}",
            f"    toolkit predict --artifact {description.file} IMAGE...",
            "",
            "It answers with one of its labels whatever the image shows, and was measured on images like those it was",
            "trained on: on others it is less often right, and its probabilities say less.",
            "",
            "## Facts",
            "",
        ]
        facts = facts_of(about)
    facts |= file_facts(description)
    cells = ((key, str(value).replace("|", "\\|")) for key, value in facts.items())
    rows = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells)]
    return "\n".join([*head, *rows]) + "\n"


def file_facts(description: Description) -> dict[str, str]:
    """What can be said of any ONNX file, in words."""
    return {
        "file": f"{description.file}, {description.bytes / 1e6:.1f} MB",
        "SHA-256": description.sha256,
        "producer": description.producer,
        "opset": ", ".join(f"{domain} {version}" for domain, version in description.opset.items()),
        "inputs": "; ".join(f"{name}: {kind}" for name, kind in description.inputs.items()),
        "outputs": "; ".join(f"{name}: {kind}" for name, kind in description.outputs.items()),
        "operators": ", ".join(f"{count} {name}" for name, count in description.operators.items()),
        "constants": f"{description.weights:,} numbers",
    } | description.properties


def facts_of(about: Metadata) -> dict[str, str]:
    """What an artifact says of itself, in words; what it does not know is left out."""

    def percent(value: float | None) -> str | None:
        return None if value is None else f"{value:.2%}"

    views = f"{about.views} views of each image are averaged in the graph" if about.views > 1 else None
    temperature = about.temperature and (
        f"{about.temperature:.3f} (fitted on val), {'' if about.calibrated else 'not '}applied in the graph"
        f"{'' if about.calibrated else ' (serve and predict apply it)'}"
    )
    facts = {
        "model": about.model,
        "labels": f"{len(about.labels)}: {', '.join(about.labels)}",
        "parameters": f"{about.parameters:,}",
        "multiply-accumulates": about.macs and f"{about.macs * about.views:,} an image",
        "precision": about.precision,
        "quantisation": about.quantisation,
        "test top-1": percent(about.accuracy),
        "test top-1 in PyTorch, fp32, one view": percent(about.plain_accuracy),
        "test images": about.test_images and f"{about.test_images:,}",
        "expected calibration error": percent(about.ece),
        "temperature": temperature,
        "test-time augmentation": views,
        "data set": about.dataset,
        "data set's SHA-256": about.dataset_digest,
        "recipe's SHA-256": about.recipe_digest,
        "teacher": about.teacher or "none",
        "licence": about.licence or "not stated",
        "created": about.created,
        "made with": ", ".join(f"{tool} {version}" for tool, version in about.versions.items()) or None,
    }
    return {key: value for key, value in facts.items() if value}
