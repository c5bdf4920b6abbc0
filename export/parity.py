"""Parity: are the artifact's outputs those of PyTorch?

``Reference`` holds what the model in fp32 on the CPU gives; ``compare`` asks the very session that will be deployed
for the same images and gives a report; ``ParityReport.raise_if_failed`` is the gate.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, computed_field
from scipy.special import softmax
from torch import Tensor, nn

from export.preprocess import fit, nhwc
from serve.decode import decode
from toolkit.choices import Precision
from toolkit.errors import ImageError, ParityError, in_line

BATCHES = (1, 2, 3, 7, 64, 257)
CHUNK = 32  # images at a time where a case does not say: larger ones leave the caches of a CPU
SIZES = ((2.0, 3.0), (1.5, 1.0), (0.6, 0.8), (7.0, 5.0))  # of images for a graph that resizes, in sides of its square
SIZE_BATCHES = (1, 7, 64)
MOST_PIXELS = 64 * 2**20  # of a batch of them: all are held in memory

Array = NDArray[np.float32]
Images = NDArray[np.uint8]
Run = Callable[[Images], tuple[Array, Array]]


class Tolerance(BaseModel):
    """Largest difference that counts as equal.

    In fp32 on the CPU correct exports differ by 2e-7 to 8e-6 in the logits; one wrong weight by far more than 1e-4.
    What a logit is rounded by grows with it, and moves the probabilities by up to half of that.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")
    logits: float = Field(1e-4, description="times the larger of 1 and the image's largest logit")
    probabilities: float = Field(1e-4, description="times the larger of 1 and a hundredth of the largest logit")
    softmax: float = Field(1e-5, description="of the probabilities from the softmax of the artifact's own logits")
    resized: float = Field(1e-2, description="in place of both where the graph resizes: one pixel in 3,000 is off by 1")
    drop: float = Field(0, description="of top-1 on the test set, a fraction")
    agreement: float = Field(0, description="least share of test images with PyTorch's answer")


MAX_DROP, MIN_AGREEMENT = 0.002, 0.99  # of a lower precision


def tolerance(precision: Precision, tf32: bool, gpu: bool, drop: float = MAX_DROP) -> Tolerance:
    """What is held against a session of this precision; ``drop`` is what the lower ones may lose of top-1.

    fp32 keeps every answer on the CPU; a GPU adds up in another order, where a tie may fall otherwise. fp16 and TF32
    both have 10 bits of mantissa. INT8 is judged by its answers: single logits may be far off on images that are
    none, where activations leave the calibrated ranges.
    """
    if precision == "int8":
        return Tolerance(logits=np.inf, probabilities=np.inf, resized=np.inf, drop=drop, agreement=MIN_AGREEMENT)
    if precision == "fp16" or tf32:
        return Tolerance(logits=5e-2, probabilities=5e-2, resized=5e-2, drop=drop, agreement=MIN_AGREEMENT)
    if gpu:
        return Tolerance(logits=1e-3, probabilities=1e-3, drop=2e-4, agreement=0.9995)
    return Tolerance(agreement=1)


class Case(BaseModel):
    """One batch: how far the outputs are from PyTorch's."""

    # A NaN or infinite difference is reported as such, in valid JSON.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")
    images: str
    batch: int
    max_logit_difference: float
    mean_logit_difference: float
    max_scaled_difference: float  # in the logits, each image's divided by max(1, its largest logit)
    max_probability_difference: float
    max_scaled_probability_difference: float  # each image's divided by max(1, its largest logit / 100)
    mean_probability_difference: float
    max_softmax_difference: float  # of the artifact's probabilities from the softmax of its own logits
    tolerance: Tolerance

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        # Written so that NaN fails.
        return (
            self.max_scaled_difference <= self.tolerance.logits
            and self.max_scaled_probability_difference <= self.tolerance.probabilities
            and self.max_softmax_difference <= self.tolerance.softmax
        )


class ParityReport(BaseModel):
    """All cases, and the top-1 (a fraction) of both sides on ``n`` test images."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")
    provider: str
    precision: str
    tf32: bool
    optimisation: str = "all"  # ONNX Runtime's level: the session is opened as the server opens it
    tolerance: Tolerance
    cases: tuple[Case, ...]
    n: int
    top1_torch: float
    top1_artifact: float
    agreement: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """One line for each thing that is wrong."""
        wrong = [
            f"{case.images} images, batch {case.batch}: logits differ by {case.max_logit_difference:.2g}, scaled "
            f"{case.max_scaled_difference:.2g} (at most {case.tolerance.logits:.2g}), probabilities by "
            f"{case.max_scaled_probability_difference:.2g} (at most {case.tolerance.probabilities:.2g}), from the "
            f"softmax by {case.max_softmax_difference:.2g} (at most {case.tolerance.softmax:.2g})"
            for case in self.cases
            if not case.ok
        ]
        lost = abs(self.top1_torch - self.top1_artifact) if self.precision == "fp32" else self.drop
        if lost > self.tolerance.drop + 1e-12:
            wrong.append(
                f"test top-1: {self.top1_artifact:.4%} in the artifact, {self.top1_torch:.4%} in PyTorch "
                f"(n = {self.n}, agreement {self.agreement:.4%})"
            )
        elif self.agreement < self.tolerance.agreement:
            wrong.append(
                f"the artifact gives PyTorch's answer for {self.agreement:.4%} of {self.n} test images "
                f"(at least {self.tolerance.agreement:.4%})"
            )
        return wrong

    @property
    def drop(self) -> float:
        """Top-1 that the artifact loses, a fraction; negative where it gains."""
        return self.top1_torch - self.top1_artifact

    def document(self) -> dict[str, Any]:
        """For JSON, which has no infinity: that is a string there."""
        return dict(json.loads(self.model_dump_json()))

    def raise_if_failed(self) -> None:
        """Raises ``ParityError`` that names the first failure and counts the others."""
        if self.failures:
            first, *others = self.failures
            more = f"; and {len(others)} more" if others else ""
            raise ParityError(f"the artifact does not compute what PyTorch computes: {first}{more}")


class ManyImages(Protocol):
    """A tensor ``[N,3,S,S]``, or what lies in a file and is read as one."""

    @property
    def shape(self) -> torch.Size: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor, /) -> Tensor: ...
    def split(self, size: int, /) -> Iterable[Tensor]: ...


@dataclass(frozen=True)
class Kind:
    """Images of one kind, with PyTorch's logits and probabilities of them; the batches are their beginnings."""

    name: str
    images: Images
    batches: tuple[int, ...]
    expected: tuple[Array, Array]


class Reference:
    """What PyTorch gives, once, for any number of artifacts to be compared with.

    ``deployed`` maps uint8 ``[N,S,S,3]`` to probabilities and logits (see ``onnx_export.deployed``), and is brought
    into channels_last; ``images`` uint8 ``[N,3,S,S]``, which may lie in a file, and ``labels`` int64 ``[N]`` are the
    test set. Each of ``batches`` will go through an artifact in one call. With ``any_size`` there are images of other
    sizes too, which PyTorch sees as ``preprocess.fit`` makes them.
    """

    def __init__(
        self,
        deployed: nn.Module,
        images: ManyImages,
        labels: Tensor,
        batches: Sequence[int] = BATCHES,
        any_size: bool = False,
    ) -> None:
        if len(images) == 0:
            raise ValueError("parity needs at least one test image")
        self.images, self.size = images, images.shape[-1]
        self.labels = labels.cpu().numpy()
        deployed = deployed.to(memory_format=torch.channels_last)  # faster, and the same numbers but for rounding

        def pytorch(images: Images) -> tuple[Array, Array]:
            digests = [hashlib.sha256(image).hexdigest() for image in images]
            _, first, back = np.unique(digests, return_index=True, return_inverse=True)  # black is black 257 times
            distinct = images[first]
            chunks = (distinct[i : i + CHUNK] for i in range(0, len(distinct), CHUNK))
            logits, probabilities = _joined(_torch(deployed, chunk) for chunk in chunks)
            return logits[back], probabilities[back]

        self.expected = _joined(_torch(deployed, chunk) for chunk in self._chunks())
        first = np.arange(max(batches)) % len(images)
        real = nhwc(images[torch.from_numpy(first)])
        self.kinds = [Kind("real", real, tuple(batches), (self.expected[0][first], self.expected[1][first]))]
        self.kinds += [Kind(name, kind, tuple(batches), pytorch(kind)) for name, kind in _kinds(real)]
        for name, kind in _sizes(real) if any_size else ():
            square = np.stack([fit(image, self.size) for image in kind])
            batches_of_it = tuple(n for n in SIZE_BATCHES if n <= len(kind))
            self.kinds.append(Kind(name, kind, batches_of_it, pytorch(square)))

    def answers(self, run: Run) -> tuple[Array, Array]:
        """Logits and probabilities of the test set, which goes through ``run`` in chunks. Raises ``ParityError``."""
        return _joined(_answer(run, chunk) for chunk in self._chunks())

    def _chunks(self) -> Iterator[Images]:
        """The test set, a little at a time: it may be larger than the memory."""
        return map(nhwc, self.images.split(CHUNK))


def compare(
    run: Run,
    reference: Reference,
    answers: tuple[Array, Array],
    *,
    provider: str,
    precision: str,
    tf32: bool,
    tolerance: Tolerance,
) -> ParityReport:
    """Hold an artifact against PyTorch.

    ``run`` takes uint8 ``[N,S,S,3]`` and gives logits and probabilities, float32 ``[N,K]``; give it the session
    that will serve, and ``provider``, ``precision`` and ``tf32`` as that session states them. ``answers`` are its
    own on the test set (see ``Reference.answers``). Raises ``ParityError`` for a session that cannot run a batch or
    gives another shape; differences are in the report.
    """
    cases = [_compare("test", len(reference.labels), reference.expected, answers, tolerance)]
    for kind in reference.kinds:
        resized = kind.images.shape[1:3] != (reference.size, reference.size)
        held = tolerance if not resized else tolerance.model_copy(
            update={"logits": tolerance.resized, "probabilities": tolerance.resized}
        )  # fmt: skip
        for n in kind.batches:
            expected = (kind.expected[0][:n], kind.expected[1][:n])
            cases.append(_compare(kind.name, n, expected, _answer(run, kind.images[:n]), held))
    best = [logits.argmax(1) for logits in (reference.expected[0], answers[0])]
    return ParityReport(
        provider=provider,
        precision=precision,
        tf32=tf32,
        tolerance=tolerance,
        cases=tuple(cases),
        n=len(reference.labels),
        top1_torch=float((best[0] == reference.labels).mean()),
        top1_artifact=float((best[1] == reference.labels).mean()),
        agreement=float((best[0] == best[1]).mean()),
    )


def _kinds(real: Images) -> Iterator[tuple[str, Images]]:
    """Name and images of each other kind, as many as are ``real``."""
    n, *shape = real.shape
    rng = np.random.default_rng(0)
    yield "random", rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    yield "black", np.zeros((n, *shape), np.uint8)
    yield "white", np.full((n, *shape), 255, np.uint8)
    index, row, column = np.ogrid[:n, : shape[0], : shape[1]]
    cell = 1 + index % 8  # boards of 1 to 8 pixels a field
    board = ((row // cell + index // 8).astype(np.uint8) + (column // cell).astype(np.uint8)) % 2 * 255
    yield "checkerboard", np.repeat(board[..., None], 3, axis=-1)
    yield "corrupted JPEG", np.stack([_corrupted(image, rng) for image in real])


def _corrupted(image: Images, rng: np.random.Generator) -> Images:
    """The image as a JPEG in which a few bytes are wrong, decoded as the server decodes it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=75)
    good = buffer.getvalue()
    while True:
        data = bytearray(good)
        for place in rng.integers(len(data) // 2, len(data) - 2, 3):  # the second half is pixels, not tables
            data[place] = rng.integers(0, 255)
        with contextlib.suppress(ImageError):  # beyond decoding: others are wrong
            if (decoded := decode(bytes(data))).shape == image.shape:
                return decoded


def _sizes(real: Images) -> Iterator[tuple[str, Images]]:
    """Name and images of other sizes: noise, and test images blown up or shrunk."""
    side = real.shape[1]
    rng = np.random.default_rng(1)
    for times in SIZES:
        height, width = (round(side * factor) for factor in times)
        n = max(size for size in SIZE_BATCHES if size * height * width <= MOST_PIXELS)
        yield f"random {height}x{width}", rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
        scaled = [Image.fromarray(real[i % len(real)]).resize((width, height)) for i in range(n)]
        yield f"real {height}x{width}", np.stack([np.asarray(image) for image in scaled])


def _torch(deployed: nn.Module, images: Images) -> tuple[Array, Array]:
    with torch.inference_mode():
        probabilities, logits = deployed(torch.from_numpy(images))
    return logits.numpy(), probabilities.numpy()


def _answer(run: Run, images: Images) -> tuple[Array, Array]:
    """What the artifact gives; one that cannot take the batch is no better than one that is wrong."""
    try:
        return run(images)
    except Exception as error:  # ONNX Runtime's errors share no base class
        reason = in_line(error)
        raise ParityError(f"the artifact cannot run a batch of {len(images)} images: {reason}") from error


def _joined(answers: Iterable[tuple[Array, Array]]) -> tuple[Array, Array]:
    logits, probabilities = zip(*answers, strict=True)
    return np.concatenate(logits), np.concatenate(probabilities)


def _compare(
    name: str, batch: int, expected: tuple[Array, Array], actual: tuple[Array, Array], tolerance: Tolerance
) -> Case:
    for key, want, got in zip(("logits", "probabilities"), expected, actual, strict=True):
        if want.shape != got.shape:
            raise ParityError(
                f"the artifact gives {key} of shape {list(got.shape)}, PyTorch {list(want.shape)} "
                f"({name} images, batch {batch})"
            )
    logits, probabilities = (np.abs(e - a) for e, a in zip(expected, actual, strict=True))
    largest = np.abs(expected[0]).max(axis=1, keepdims=True)
    return Case(
        images=name,
        batch=batch,
        max_logit_difference=float(logits.max()),
        mean_logit_difference=float(logits.mean()),
        max_scaled_difference=float((logits / np.maximum(1, largest)).max()),
        max_probability_difference=float(probabilities.max()),
        max_scaled_probability_difference=float((probabilities / np.maximum(1, largest / 100)).max()),
        mean_probability_difference=float(probabilities.mean()),
        max_softmax_difference=float(np.abs(softmax(actual[0], axis=1) - actual[1]).max()),
        tolerance=tolerance,
    )
