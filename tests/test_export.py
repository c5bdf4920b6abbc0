"""Export, artifact, preprocessing and parity."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from scipy.special import softmax
from small_net import (
    LABELS,
    SIZE,
    changed,
    check,
    export,
    small_artifact,
    small_images,
    small_metadata,
    small_net,
    with_property,
    with_weight,
)
from torch import nn
from torchvision.transforms.v2 import functional as tv

from export import artifact, parity
from export.onnx_export import OPSETS, _factor, to_bytes
from export.onnx_export import build as build_graph
from export.preprocess import fit
from serve.session import Session
from toolkit.catalogue import build
from toolkit.errors import ArtifactError, ParityError


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    with torch.inference_mode():
        return small_net().eval()(small_images(300) / 255).argmax(1)


# --- the file


def test_the_artifact_describes_itself(path: Path) -> None:
    metadata = artifact.read(path)
    assert metadata == small_metadata()
    stored = {item.key: json.loads(item.value) for item in onnx.load(path).metadata_props}
    assert stored["labels"] == list(LABELS)
    assert stored["input_contract"].startswith("uint8 RGB [batch, 16, 16, 3]")
    proto = onnx.load(path)
    proto.metadata_props.add(key="author", value="me")  # by another tool
    assert artifact.read_metadata(proto, "a.onnx") == metadata


def test_nothing_of_this_machine_is_in_the_file_or_beside_it(path: Path) -> None:
    for trace in (b".py", b"site-packages", str(Path.cwd()).encode(), str(path.parent).encode(), b'File "'):
        assert trace not in path.read_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["student.onnx"]


def test_the_graph_is_lean(path: Path) -> None:
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert "BatchNormalization" not in operators
    assert "Shape" not in operators  # it would run on the CPU beside a CUDA session
    assert len(operators) < 15


def test_enlarging_is_by_constants() -> None:
    """A size that the graph computes is computed on the CPU, and a CUDA session that is whole cannot be had."""
    model = build("resnet9", "student", len(LABELS), image_size=SIZE, widths=(8, 8), resize=23).eval()
    graph = build_graph(model, small_metadata())
    operators = {node.op_type for node in graph.graph.node}
    assert "Resize" in operators
    assert not operators & {"Shape", "Concat", "Gather"}
    images = small_images(5)
    session = Session(to_bytes(graph, small_metadata()), "cpu")
    with torch.inference_mode():
        expected = model(images / 255).numpy()
    np.testing.assert_allclose(session.run(images.permute(0, 2, 3, 1).numpy())[0], expected, atol=1e-4)


def test_a_norm_behind_a_pool_that_turns_signs_stays_behind_it() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), norm, nn.Flatten(), nn.Linear(8 * 7**2, len(LABELS))
    ).eval()
    images = small_images(5)
    net(images / 255)
    with torch.no_grad():
        norm.weight[0] = -1
        expected = net(images / 255).numpy()
    session = Session(to_bytes(build_graph(net, small_metadata()), small_metadata()), "cpu")
    np.testing.assert_allclose(session.run(images.permute(0, 2, 3, 1).numpy())[0], expected, atol=1e-4)


@given(before=st.integers(1, 2000), after=st.integers(1, 2000))
def test_a_factor_gives_the_size(before: int, after: int) -> None:
    assert int(np.float32(before) * _factor(before, after)) == after


def test_the_model_is_left_as_it_was_and_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    model = small_net().to(memory_format=torch.channels_last)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export(model, small_metadata(), tmp_path / "a.onnx")
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (tmp_path / "a.onnx").read_bytes() == small_artifact(tmp_path / "b.onnx").read_bytes()


def test_labels_must_fit_the_model(tmp_path: Path) -> None:
    metadata = small_metadata().model_copy(update={"labels": ("a", "b")})
    with pytest.raises(ValueError, match="7 outputs, the metadata 2 labels"):
        export(small_net(), metadata, tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: b"", "is empty"),
        (lambda path: b"PK\x03\x04 not a model" * 20, "not an ONNX file"),
        (lambda path: path.read_bytes()[: path.stat().st_size // 2], "not an ONNX file, or it is cut short"),
        (lambda path: changed(path, with_property("format", "2")), "cannot be understood: format"),
        (lambda path: changed(path, with_property("labels", "[")), "cannot be understood"),
        (lambda path: changed(path, with_property("labels", '["a", "b"]')), "wrong inputs or outputs"),
        (lambda path: changed(path, with_property("image_size", "32")), "wrong inputs or outputs"),
    ],
)
def test_what_is_not_an_artifact_is_refused(
    make: Callable[[Path], bytes], message: str, path: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(make(path))
    with pytest.raises(ArtifactError, match=message) as caught:
        artifact.read(bad)
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_opset_is_the_one_asked_for_or_an_error(tmp_path: Path, path: Path) -> None:
    images = small_images(3).permute(0, 2, 3, 1).numpy()
    expected = Session(path, "cpu").run(images)[0]
    about = small_metadata().model_copy(update={"any_size": True})
    for opset in (OPSETS[0], OPSETS[-1]):
        export(small_net(), about, tmp_path / "a.onnx", opset)
        (written,) = onnx.load(tmp_path / "a.onnx").opset_import
        assert (written.domain, written.version) == ("", opset)
        np.testing.assert_allclose(Session(tmp_path / "a.onnx", "cpu").run(images)[0], expected, atol=1e-4)
    for opset in (7, OPSETS[0] - 1, OPSETS[-1] + 1):
        with pytest.raises(ArtifactError, match=f"--opset {opset} cannot be written: choose one of 18 to"):
            export(small_net(), about, tmp_path / "b.onnx", opset)


# --- parity


def test_a_good_export_passes(path: Path, labels: torch.Tensor) -> None:
    session = Session(path, "cpu")
    report = check(session.run, small_net(), small_images(300), labels, provider=session.provider)
    report.raise_if_failed()
    seen = {(case.images, case.batch) for case in report.cases}
    kinds = ("random", "black", "white", "checkerboard", "real", "corrupted JPEG")
    assert seen == {(kind, n) for kind in kinds for n in (1, 2, 3, 7, 64, 257)} | {("test", 300)}
    assert report.top1_torch == report.top1_artifact == report.agreement == 1
    stored = json.loads(report.model_dump_json())
    assert stored["ok"] is True
    assert stored["provider"] == "CPUExecutionProvider"


def test_few_test_images_do(path: Path, labels: torch.Tensor) -> None:
    session = Session(path, "cpu")
    report = check(session.run, small_net(), small_images(300)[:3], labels[:3], provider="cpu", batches=(1, 5))
    assert report.ok
    assert report.n == 3
    assert {case.batch for case in report.cases} == {1, 3, 5}
    with pytest.raises(ValueError, match="at least one"):
        check(session.run, small_net(), small_images(300)[:0], labels[:0], provider="cpu")


def _one_weight(w: np.ndarray) -> np.ndarray | None:
    if w.shape != (16, 3, 3, 3):
        return None
    w.flat[np.abs(w).argmax()] *= 1.02
    return w


def _other_normalisation(w: np.ndarray) -> np.ndarray | None:
    return w + np.float32(0.002) if w.shape == (1, 3, 1, 1) else None


def _swapped_channels(w: np.ndarray) -> np.ndarray | None:
    return w[:, ::-1].copy() if w.shape == (16, 3, 3, 3) else None


def _swapped_classes(w: np.ndarray) -> np.ndarray | None:
    return w[::-1].copy() if w.shape == (len(LABELS), 24) else None


@pytest.mark.parametrize("damage", [_one_weight, _other_normalisation, _swapped_channels, _swapped_classes])
def test_a_damaged_graph_fails(
    damage: Callable[[np.ndarray], np.ndarray | None], path: Path, labels: torch.Tensor, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(changed(path, with_weight(damage)))
    session = Session(bad, "cpu")
    report = check(session.run, small_net(), small_images(300), labels, provider=session.provider)
    assert not report.ok
    with pytest.raises(ParityError, match=r"logits differ by .* and \d+ more"):
        report.raise_if_failed()


def _without_softmax(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "Softmax")
    node.op_type = "Identity"
    del node.attribute[:]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_dropped_softmax_fails(precision: Any, path: Path, labels: torch.Tensor, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(changed(path, _without_softmax))
    tolerance = parity.tolerance(precision, tf32=False, gpu=False)
    session = Session(bad, "cpu")
    report = check(session.run, small_net(), small_images(300), labels, provider="cpu", tolerance=tolerance)
    assert "from the softmax by" in report.failures[0]


def test_a_batch_frozen_to_1_fails(path: Path, labels: torch.Tensor, tmp_path: Path) -> None:
    def declared(proto: onnx.ModelProto) -> None:
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1

    def within(proto: onnx.ModelProto) -> None:
        shape = np.array([1, SIZE, SIZE, 3])
        proto.graph.initializer.append(numpy_helper.from_array(shape, "frozen"))
        for node in proto.graph.node:
            node.input[:] = ["first" if name == artifact.IMAGE else name for name in node.input]
        proto.graph.node.insert(0, onnx.helper.make_node("Reshape", [artifact.IMAGE, "frozen"], ["first"]))

    bad = tmp_path / "bad.onnx"
    bad.write_bytes(changed(path, declared))
    with pytest.raises(ArtifactError, match="wrong inputs or outputs"):
        Session(bad, "cpu")
    bad.write_bytes(changed(path, within))
    session = Session(bad, "cpu")  # a batch of 1 runs
    with pytest.raises(ParityError, match="cannot run a batch of"):
        check(session.run, small_net(), small_images(300), labels, provider="cpu")


def test_wrong_answers_of_the_session_fail(path: Path, labels: torch.Tensor) -> None:
    session, images = Session(path, "cpu"), small_images(300)

    def checked(run: parity.Run) -> parity.ParityReport:
        return check(run, small_net(), images, labels, provider="cpu")

    def nan(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, probabilities = session.run(batch)
        logits[-1, 0] = np.nan
        return logits, probabilities

    report = checked(nan)
    assert not report.ok
    assert json.loads(report.model_dump_json())["cases"][0]["max_logit_difference"] == "NaN"

    with pytest.raises(ParityError, match=r"logits of shape \[256, 6\]|logits of shape \[300, 6\]"):
        checked(lambda batch: tuple(part[:, :6] for part in session.run(batch)))  # type: ignore[arg-type]

    def beyond_batch_2(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, probabilities = session.run(batch)
        return (logits, probabilities) if len(batch) <= 2 else (logits[::-1], probabilities[::-1])

    assert {case.batch for case in checked(beyond_batch_2).cases if not case.ok} >= {3, 7, 64, 257}


def test_top1_alone_can_fail(path: Path, labels: torch.Tensor) -> None:
    """Differences far under a loose tolerance still may not cost a single test image."""
    session, images = Session(path, "cpu"), small_images(300)
    unlucky = images[:2].permute(0, 2, 3, 1).numpy()

    def two_wrong(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, _ = session.run(batch)
        for image in unlucky:
            found = (batch == image).all((1, 2, 3))
            logits[found] = np.roll(logits[found], 1, axis=1)
        return logits, softmax(logits, axis=1)

    def failures(labels: torch.Tensor) -> list[str]:
        loose = parity.tolerance("fp32", tf32=False, gpu=False).model_copy(update={"logits": 1e9, "probabilities": 1})
        report = check(two_wrong, small_net(), images, labels, provider="cpu", tolerance=loose)
        assert all(case.ok for case in report.cases)
        return report.failures

    assert failures(labels) == [
        "test top-1: 99.3333% in the artifact, 100.0000% in PyTorch (n = 300, agreement 99.3333%)"
    ]
    gained = labels.clone()
    gained[1] = (labels[1] + 1) % len(LABELS)  # what the artifact answers there: one lost, and one gained
    (failure,) = failures(gained)
    assert failure.startswith("the artifact gives PyTorch's answer for 99.3333%")


@pytest.mark.parametrize(("size", "ok"), [(5, False), (500, True)])
def test_probabilities_of_large_logits_may_differ_by_their_rounding(size: float, ok: bool) -> None:
    logits = np.array([[size, size, 0]], np.float32)
    rounded = logits + np.array([[1e-3, 0, 0]], np.float32)
    expected, actual = ((each, softmax(each, axis=1)) for each in (logits, rounded))
    case = parity._compare("of this size", 1, expected, actual, parity.Tolerance(logits=1))
    assert case.max_probability_difference == pytest.approx(2.5e-4, rel=0.1)
    assert case.ok == ok


def test_a_lower_precision_may_lose_what_was_allowed(path: Path, labels: torch.Tensor) -> None:
    report = check(Session(path, "cpu").run, small_net(), small_images(300), labels, provider="cpu")
    lost = {"precision": "int8", "top1_torch": 0.9, "top1_artifact": 0.898, "agreement": 0.99}

    def failures(**changes: float) -> list[str]:
        tolerance = parity.tolerance("int8", tf32=False, gpu=False, drop=0.002)
        return report.model_copy(update=lost | changes | {"tolerance": tolerance}).failures

    assert failures() == []
    assert failures(top1_artifact=0.95) == []  # better is no failure
    assert failures(top1_artifact=0.8979)[0].startswith("test top-1: 89.7900% in the artifact")
    assert failures(agreement=0.9899)[0].startswith("the artifact gives PyTorch's answer for 98.9900%")


def test_sessions_are_opened_at_the_level_that_reports_tell(path: Path) -> None:
    level = Session(path, "cpu")._session.get_session_options().graph_optimization_level
    assert level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL


# --- preprocessing


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(0, 255))
def test_fit_gives_the_size_and_keeps_colours(height: int, width: int, size: int, grey: int) -> None:
    result = fit(np.full((height, width, 3), grey, np.uint8), size)
    assert result.shape == (size, size, 3)
    assert result.dtype == np.uint8
    assert (result == grey).all()


def test_fit_takes_the_centre_and_leaves_what_fits() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (fit(wide, 10) == 200).all()
    assert (fit(wide.transpose(1, 0, 2).copy(), 5) == 200).all()
    assert fit(wide[:, :10], 10).base is wide  # not even copied
    assert fit(np.zeros((1, 30_000, 3), np.uint8), 32).shape == (32, 32, 3)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 20), (16, 16), (9, 12), (101, 75)])
def test_fit_is_torchvisions_antialiased_resize(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = torch.from_numpy(image).permute(2, 0, 1)[:, top : top + side, left : left + side]
    expected = tv.resize(square, [SIZE, SIZE], antialias=True).permute(1, 2, 0).numpy()
    assert np.abs(fit(image, SIZE).astype(int) - expected).max() <= 1
