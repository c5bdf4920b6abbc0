"""Parity: are the artifact's outputs those of PyTorch?

``check`` asks the very session that will be deployed, compares it with the model in fp32 on the CPU, and gives
a report; ``ParityReport.raise_if_failed`` is the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, computed_field
from torch import Tensor, nn

from export.onnx_export import Deployed, fp32_copy
from toolkit.errors import ParityError

BATCHES = (1, 2, 3, 7, 64, 257)
CHUNK = 256  # images at a time on the test set

Array = NDArray[np.float32]
Run = Callable[[NDArray[np.uint8]], tuple[Array, Array]]


class Tolerance(BaseModel):
    """Largest difference that counts as equal.

    Correct exports differ by 2e-7 to 8e-6 in the logits; one wrong weight by far more than these.
    """

    model_config = ConfigDict(frozen=True)
    logits: float = 1e-4  # times the larger of 1 and the image's largest logit
    probabilities: float = 1e-4


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
    tolerance: Tolerance

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        # Written so that NaN fails.
        return (
            self.max_scaled_difference <= self.tolerance.logits
            and self.max_probability_difference <= self.tolerance.probabilities
        )


class ParityReport(BaseModel):
    """All cases, and the top-1 (a fraction) of both sides on ``n`` test images."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")
    provider: str
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
            f"{case.max_probability_difference:.2g} (at most {case.tolerance.probabilities:.2g})"
            for case in self.cases
            if not case.ok
        ]
        if self.top1_torch != self.top1_artifact:
            wrong.append(
                f"test top-1: {self.top1_artifact:.4%} in the artifact, {self.top1_torch:.4%} in PyTorch "
                f"(n = {self.n}, agreement {self.agreement:.4%})"
            )
        return wrong

    def raise_if_failed(self) -> None:
        """Raises ``ParityError`` that names the first failure and counts the others."""
        if self.failures:
            first, *others = self.failures
            more = f"; and {len(others)} more" if others else ""
            raise ParityError(f"the artifact does not compute what PyTorch computes: {first}{more}")


def check(
    run: Run,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    provider: str,
    batches: Sequence[int] = BATCHES,
    tolerance: Tolerance = Tolerance(),  # noqa: B008 - frozen
) -> ParityReport:
    """Compare ``run`` with ``model``.

    ``run`` takes uint8 ``[N,S,S,3]`` and gives logits and probabilities, float32 ``[N,K]``; give it the session
    that will serve, and ``provider`` as that session states it. ``model`` takes float ``[B,3,S,S]`` in [0,1] and
    gives logits; ``images`` uint8 ``[N,3,S,S]`` and ``labels`` int64 ``[N]`` are the test set, which goes through
    ``run`` in chunks; each of ``batches`` goes through it in one call.
    """
    if len(images) == 0:
        raise ValueError("parity needs at least one test image")
    deployed = Deployed(fp32_copy(model)).eval()
    test = np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())
    expected = _in_chunks(lambda chunk: _torch(deployed, chunk), test)
    actual = _in_chunks(run, test)
    truth = labels.cpu().numpy()
    cases = [_compare("test", len(test), expected, actual, tolerance)]
    for name, kind in _kinds(test, max(batches)):
        reference = _torch(deployed, kind)
        cases += [_compare(name, n, (reference[0][:n], reference[1][:n]), run(kind[:n]), tolerance) for n in batches]
    answers = [logits.argmax(1) for logits in (expected[0], actual[0])]
    return ParityReport(
        provider=provider,
        cases=tuple(cases),
        n=len(test),
        top1_torch=float((answers[0] == truth).mean()),
        top1_artifact=float((answers[1] == truth).mean()),
        agreement=float((answers[0] == answers[1]).mean()),
    )


def _kinds(test: NDArray[np.uint8], n: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Name and ``n`` images of each kind."""
    shape = test.shape[1:]
    rng = np.random.default_rng(0)
    yield "random", rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    yield "black", np.zeros((n, *shape), np.uint8)
    yield "white", np.full((n, *shape), 255, np.uint8)
    index, row, column = np.ogrid[:n, : shape[0], : shape[1]]
    cell = 1 + index % 8  # boards of 1 to 8 pixels a field
    board = (row // cell + column // cell + index // 8) % 2
    yield "checkerboard", np.repeat(board[..., None] * 255, 3, axis=-1).astype(np.uint8)
    yield "real", test[np.arange(n) % len(test)]


def _torch(deployed: nn.Module, images: NDArray[np.uint8]) -> tuple[Array, Array]:
    with torch.inference_mode():
        probabilities, logits = deployed(torch.from_numpy(images))
    return logits.numpy(), probabilities.numpy()


def _in_chunks(run: Run, images: NDArray[np.uint8]) -> tuple[Array, Array]:
    parts = [run(images[i : i + CHUNK]) for i in range(0, len(images), CHUNK)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


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
    scale = np.maximum(1, np.abs(expected[0]).max(axis=1, keepdims=True))
    return Case(
        images=name,
        batch=batch,
        max_logit_difference=float(logits.max()),
        mean_logit_difference=float(logits.mean()),
        max_scaled_difference=float((logits / scale).max()),
        max_probability_difference=float(probabilities.max()),
        tolerance=tolerance,
    )
