"""A model repository for NVIDIA's Triton Inference Server, for those who outgrow one machine."""

from __future__ import annotations

import shutil
from pathlib import Path

from export.artifact import IMAGE, LOGITS, PROBABILITIES, Metadata, read
from toolkit.files import check_free, write_atomic, write_text

MAX_BATCH = 256
LABELS = "labels.txt"


def config(about: Metadata, name: str) -> str:
    """The text of config.pbtxt: batches of what waits, both outputs, the labels."""
    side = -1 if about.any_size else about.image_size
    classes = len(about.labels)
    # Triton joins only requests of the same shape, and waits for none: a delay pays under load alone.
    return f"""name: "{name}"
backend: "onnxruntime"
max_batch_size: {MAX_BATCH}
input [ {{ name: "{IMAGE}" data_type: TYPE_UINT8 dims: [ {side}, {side}, 3 ] }} ]
output [
  {{ name: "{PROBABILITIES}" data_type: TYPE_FP32 dims: [ {classes} ] label_filename: "{LABELS}" }},
  {{ name: "{LOGITS}" data_type: TYPE_FP32 dims: [ {classes} ] label_filename: "{LABELS}" }}
]
dynamic_batching {{ max_queue_delay_microseconds: 0 }}
instance_group [ {{ kind: KIND_AUTO }} ]
"""


def write_repository(artifact: Path, folder: Path, force: bool = False) -> Path:
    """Write ``folder/<stem of the artifact>`` with its config, labels and version 1; the model's folder.

    Raises ``UserError`` where that exists, unless ``force``.
    """
    about = read(artifact)
    name = artifact.stem
    model = folder / name
    check_free(model, force)
    write_atomic(model / "1" / "model.onnx", lambda temporary: shutil.copyfile(artifact, temporary))
    write_text(model / LABELS, "".join(f"{' '.join(label.split())}\n" for label in about.labels))
    write_text(model / "config.pbtxt", config(about, name))
    return model
