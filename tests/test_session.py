"""The session: what runs, on what, and what it refuses."""

import json
import os
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from small_net import LABELS, SIZE, changed, small_metadata, with_property, with_unknown_operator

from serve import session as module
from serve.session import Session
from toolkit.catalogue import pretrained
from toolkit.errors import ArtifactError, DeviceError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def session(path: Path) -> Session:
    return Session(path, "cpu")


def test_run_gives_logits_and_their_softmax(session: Session, images: np.ndarray) -> None:
    logits, probabilities = session.run(images)
    assert logits.shape == probabilities.shape == (40, len(LABELS))
    assert logits.dtype == probabilities.dtype == np.float32
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(probabilities, exponentials / exponentials.sum(1, keepdims=True), rtol=1e-4)
    assert session.provider == "CPUExecutionProvider"
    assert session.metadata == small_metadata()


def test_batches_are_the_whole(session: Session, images: np.ndarray) -> None:
    for whole, parts in zip(session.run(images), session.run_batches(images, 7), strict=True):
        np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_bound_memory_gives_what_run_gives(session: Session, images: np.ndarray) -> None:
    bound = session.bound(7)
    first, second = bound(images[:7]), bound(images[7:14])
    for i, outputs in ((0, first), (7, second)):
        for expected, actual in zip(session.run(images[i : i + 7]), outputs, strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((0, SIZE, SIZE, 3), np.uint8),
        np.zeros((1, SIZE, SIZE, 3), np.float32),
        np.zeros((1, SIZE + 1, SIZE, 3), np.uint8),
        np.zeros((1, 3, SIZE, SIZE), np.uint8),
        np.zeros((SIZE, SIZE, 3), np.uint8),
    ],
)
def test_wrong_input_is_refused(session: Session, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 \[N,16,16,3\] with N of 1 or more, not"):
        session.run(wrong)
    with pytest.raises(ValueError, match="images must be"):
        session.run_batches(wrong)


def test_predict_orders_the_classes(session: Session, images: np.ndarray) -> None:
    probabilities = session.run(images[:1])[1][0]
    prediction = session.predict(images[0], top_k=3)
    assert prediction.labels == tuple(LABELS[i] for i in np.argsort(-probabilities)[:3])
    assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)
    assert prediction.probabilities[0] == pytest.approx(probabilities.max())
    assert prediction.milliseconds > 0
    everything = session.predict(np.zeros((50, 91, 3), np.uint8), top_k=100)
    assert sorted(everything.labels) == sorted(LABELS)
    assert sum(everything.probabilities) == pytest.approx(1, abs=1e-5)
    assert json.loads(everything.model_dump_json())["labels"] == list(everything.labels)


def test_people_are_told_calibrated_probabilities(
    session: Session, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, probabilities = session.run(images)
    np.testing.assert_array_equal(session.classify(images), probabilities)  # no temperature is known
    fitted = session.metadata.model_copy(update={"temperature": 2.0})
    monkeypatch.setattr(session, "metadata", fitted)
    shares = np.exp(logits / 2)
    shares /= shares.sum(1, keepdims=True)
    np.testing.assert_allclose(session.classify(images), shares, rtol=1e-4)
    assert session.predict(images[0]).probabilities[0] == pytest.approx(shares[0].max(), rel=1e-4)
    monkeypatch.setattr(session, "metadata", fitted.model_copy(update={"calibrated": True}))  # the graph does it
    np.testing.assert_array_equal(session.classify(images), session.run(images)[1])


def test_threads_may_share_a_session(session: Session, images: np.ndarray) -> None:
    expected = [session.predict(image).labels for image in images]
    with ThreadPoolExecutor(8) as pool:
        assert [p.labels for p in pool.map(session.predict, images)] == expected


def test_threads_are_those_the_process_may_use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: 3)
    assert Session(path, "cpu")._session.get_session_options().intra_op_num_threads == 3
    assert Session(path, "cpu", threads=1)._session.get_session_options().intra_op_num_threads == 1


def test_cuda_without_a_driver_is_an_error_and_auto_says_what_it_took(
    path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module.ctypes, "CDLL", _no_library)
    with pytest.raises(DeviceError, match=r"the provider cuda is not available: .*(no NVIDIA driver|without CUDA)"):
        Session(path, "cuda")
    assert Session(path, "auto").provider == "CPUExecutionProvider"
    assert capfd.readouterr() == ("", "")


def test_tensorrt_does_not_round_unasked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its provider cannot be told; the variable must be there before NVIDIA's libraries are."""
    seen: list[str | None] = []

    def no_cuda() -> None:
        seen.append(os.environ.get("NVIDIA_TF32_OVERRIDE"))
        raise module.NoCudaError("none")

    monkeypatch.setattr(module, "need_cuda", no_cuda)
    for provider, tf32 in (("cuda", False), ("tensorrt", True), ("tensorrt", False)):
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
        with pytest.raises(DeviceError, match=f"the provider {provider} is not available: none"):
            Session(path, provider, tf32=tf32)
    assert seen == ["1", "1", "0"]


def test_eight_bits_that_this_cpu_adds_up_wrongly_are_told(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "lacks_vnni", lambda: True)
    for words, told in (
        ("U8S8 with weights of 7 bits QDQ", False),
        ("S8S8 QDQ", False),
        ("U8S8 QDQ, per channel", True),
    ):
        Session(changed(path, with_property("quantisation", json.dumps(words))), "cpu")
        assert ("may overflow on this CPU" in caplog.text) == told, words


def _no_library(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


def test_a_session_that_slides_to_the_cpu_is_refused(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """ONNX Runtime gives a CPU session, without a word, where CUDA does not load."""
    monkeypatch.setattr(module, "need_cuda", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(module, "CUDA", "DmlExecutionProvider")  # in no build for Linux or macOS
    with pytest.raises(DeviceError, match="is not available"), pytest.warns(UserWarning, match="Dml"):
        Session(path, "cuda")
    assert capfd.readouterr().out == ""
    with pytest.warns(UserWarning, match="Dml"):  # where there is a GPU the reason is told
        assert Session(path).provider == "CPUExecutionProvider"
    assert "; the CPU takes its place" in caplog.text


@pytest.mark.gpu
def test_cuda_computes_what_the_cpu_computes(path: Path, session: Session, images: np.ndarray) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime is built without CUDA")
    try:
        cuda = Session(path, "cuda")
    except DeviceError as error:
        pytest.skip(str(error))
    assert cuda.provider == "CUDAExecutionProvider"
    expected = session.run(images)[0]
    np.testing.assert_allclose(cuda.run(images)[0], expected, atol=1e-3)
    shipped, _ = pretrained("resnet9")
    shipped = shipped.with_suffix(".onnx")  # INT8
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    answers = [Session(shipped, provider).run(noise)[0].argmax(1) for provider in ("cpu", "cuda")]
    assert (answers[0] == answers[1]).mean() > 0.9
    recorded = Session(path, "cuda", cuda_graph=True)
    np.testing.assert_allclose(recorded.run(images)[0], expected, atol=1e-3)
    for one in (cuda, recorded):
        bounds = {batch: one.bound(batch) for batch in (1, 8)}
        for i in range(0, 32, 8):  # the first calls are recorded, the others replayed
            for batch, bound in bounds.items():
                np.testing.assert_allclose(bound(images[i : i + batch])[0], expected[i : i + batch], atol=1e-3)


def test_a_graph_that_cannot_run_is_an_artifact_error(path: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(changed(path, with_unknown_operator))
    with pytest.raises(ArtifactError, match=r"ONNX Runtime cannot run .*bad\.onnx"):
        Session(bad, "cpu")


def test_serving_needs_only_what_the_dockerfile_installs_and_tells_nobody(path: Path) -> None:
    """ONNX Runtime's telemetry is off only where the variable is set before its import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {"onnxruntime-gpu", "onnxruntime", *re.findall(r"'([\w-]+)>=", (ROOT / "serve/Dockerfile").read_text())}
    left_out = {re.split(r"[>\[]", each)[0] for each in project["dependencies"]} - installed
    assert {"torch", "scipy"} <= left_out
    owners = packages_distributions().items()
    missing = {name for name, found in owners if left_out & {one.lower().replace("_", "-") for one in found}}
    code = f"""
import importlib, os, pkgutil, sys
from pathlib import Path
sys.modules.update(dict.fromkeys({missing!r}))
def watch(event, arguments):
    assert (event, arguments[:1]) != ("import", ("onnxruntime",)) or os.environ.get("ORT_DISABLE_TELEMETRY") == "1"
sys.addaudithook(watch)
import numpy as np
import serve, toolkit.cli
names = [module.name for module in pkgutil.iter_modules(serve.__path__, "serve.")]
for name in names:
    importlib.import_module(name)
from serve import server
settings = server.Settings({{"student": Path({str(path)!r})}}, provider="cpu")
with server._engine(settings) as engine:
    server._app(settings, engine)
    engine.submit(np.zeros((40, 30, 3), np.uint8)).result()
print(len(names))
"""
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
