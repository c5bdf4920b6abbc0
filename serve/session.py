"""An opened artifact: ONNX Runtime on a provider that really runs. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from export import artifact
from export.preprocess import fit
from toolkit.choices import Provider
from toolkit.errors import ArtifactError, DeviceError, in_line
from toolkit.machine import available_cores, lacks_vnni

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
Array = NDArray[np.float32]


logger = logging.getLogger(__name__)


def _graph(number: int) -> ort.RunOptions:
    """Which recorded graph a run is, where CUDA records at all."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options


UNRECORDED = _graph(-1)


class Prediction(BaseModel):
    """The best classes of one image, best first, and the time it took (resizing and model, no decoding)."""

    model_config = ConfigDict(frozen=True)
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    milliseconds: float


class Session:
    """An artifact, by its path or as bytes, ready to answer; calls from several threads are safe.

    ``metadata`` is what the artifact says of itself, ``provider`` the ONNX Runtime provider that runs it. With
    ``provider="cuda"`` or ``"tensorrt"`` nothing falls back to the CPU: what cannot be had raises ``DeviceError``.
    ``auto`` takes CUDA where it works, else the CPU. ``threads`` defaults to the cores this process may use;
    ``tf32`` lets CUDA and TensorRT round to 10 bits of mantissa, faster and outside of the parity of fp32. With
    ``cuda_graph`` CUDA records the kernels of each function that ``bound`` gives, and launches them as one. Raises
    ``ArtifactError`` for a file that is not an artifact.
    """

    def __init__(
        self,
        source: Path | str | bytes,
        provider: Provider = "auto",
        threads: int | None = None,
        tf32: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        name = "the artifact" if isinstance(source, bytes) else str(source)
        data = source if isinstance(source, bytes) else artifact.read_bytes(Path(source))
        self.metadata = artifact.parse(data, name)
        self.threads = threads or available_cores()
        session = None if provider == "cpu" else self._gpu(data, provider, tf32, cuda_graph)
        if session is None:
            try:
                session = self._open(data, {CPU: {}})
            except Exception as error:  # ONNX Runtime's errors share no base class
                raise ArtifactError(f"ONNX Runtime cannot run {name}: {in_line(error)}") from error
            if self.metadata.overflows and lacks_vnni():
                logger.warning(
                    "%s holds weights of 8 bits, whose sums may overflow on this CPU (not known to have VNNI): export "
                    "it anew on this machine, or take fp32",
                    name,
                )
        self._session = session
        self.provider: str = session.get_providers()[0]
        self.tf32 = tf32 and self.provider != CPU

    def run(self, images: NDArray[np.uint8]) -> tuple[Array, Array]:
        """Logits and probabilities, float32 ``[N,K]``, of uint8 images ``[N,S,S,3]`` with N of 1 or more.

        Images of another size are taken where the artifact takes any. Raises ``ValueError`` for another shape or type.
        """
        size = self.metadata.image_size
        fits = images.shape[3:] == (3,) if self.metadata.any_size else images.shape[1:] == (size, size, 3)
        if images.dtype != np.uint8 or not fits or images.size == 0:
            wanted = "H,W" if self.metadata.any_size else f"{size},{size}"
            raise ValueError(
                f"images must be uint8 [N,{wanted},3] with N of 1 or more, not {images.dtype} {list(images.shape)}"
            )
        return self._call(self._session, images)

    def classify(self, images: NDArray[np.uint8]) -> Array:
        """Probabilities ``[N,K]`` of images as ``run`` takes them, calibrated wherever a temperature was fitted.

        That is what people and programs are told; ``run`` gives what the graph itself says, for parity.
        """
        logits, probabilities = self.run(images)
        about = self.metadata
        if about.temperature is None or about.calibrated:
            return probabilities
        scaled = logits / about.temperature
        shares = np.exp(scaled - scaled.max(1, keepdims=True))
        return np.asarray(shares / shares.sum(1, keepdims=True))

    def run_batches(self, images: NDArray[np.uint8], batch_size: int = 256) -> tuple[Array, Array]:
        """``run`` for any number of images, ``batch_size`` at a time, so that memory stays small."""
        parts = [self.run(images[i : i + batch_size]) for i in range(0, max(1, len(images)), batch_size)]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def predict(self, image: NDArray[np.uint8], top_k: int = 5) -> Prediction:
        """The ``top_k`` best classes (fewer where there are fewer) of a uint8 image ``[H,W,3]`` of any size."""
        start = time.perf_counter()
        probabilities = self.classify(fit(image, self.metadata.image_size)[None])[0]
        milliseconds = (time.perf_counter() - start) * 1000
        best = np.argsort(-probabilities, kind="stable")[:top_k]
        return Prediction(
            labels=tuple(self.metadata.labels[i] for i in best),
            probabilities=tuple(float(probabilities[i]) for i in best),
            milliseconds=milliseconds,
        )

    def bound(self, batch: int) -> Callable[[NDArray[np.uint8]], tuple[Array, Array]]:
        """``run`` for ``batch`` images of the artifact's size, through memory that stays on the device.

        Calls must follow each other.
        """
        device = "cpu" if self.provider == CPU else "cuda"
        about = self.metadata
        shape = [batch, about.image_size, about.image_size, 3]
        held = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, device)
        outputs = {
            name: ort.OrtValue.ortvalue_from_shape_and_type([batch, len(about.labels)], np.float32, device)
            for name in (artifact.LOGITS, artifact.PROBABILITIES)
        }
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(artifact.IMAGE, held)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        options = _graph(batch)

        def run(images: NDArray[np.uint8]) -> tuple[Array, Array]:
            held.update_inplace(np.ascontiguousarray(images))
            self._session.run_with_iobinding(binding, options)
            logits, probabilities = (value.numpy().copy() for value in outputs.values())  # on the CPU they are views
            return logits, probabilities

        return run

    def _gpu(self, data: bytes, provider: Provider, tf32: bool, cuda_graph: bool) -> ort.InferenceSession | None:
        """A session on the GPU; with ``auto`` None where there is no GPU, or it cannot run this, which is told."""
        try:
            return self._open_gpu(data, "tensorrt" if provider == "tensorrt" else "cuda", tf32, cuda_graph)
        except DeviceError as error:
            if provider != "auto":
                raise
            if not isinstance(error.__cause__, NoCudaError):
                logger.warning("%s; the CPU takes its place", error)
            return None

    def _open_gpu(
        self, data: bytes, provider: Literal["cuda", "tensorrt"], tf32: bool, cuda_graph: bool
    ) -> ort.InferenceSession:
        if provider == "tensorrt" and not tf32:
            # TensorRT rounds so by default, and its provider has no option for it. NVIDIA's libraries read this when
            # they are loaded: a session on CUDA that came before, or that wants TF32 afterwards, does not get its own.
            os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
        with _quiet() as said:
            try:
                need_cuda()
                # EXHAUSTIVE tunes anew for each batch size, for hundreds of milliseconds.
                options = {"use_tf32": str(int(tf32)), "cudnn_conv_algo_search": "HEURISTIC"}
                options["enable_cuda_graph"] = str(int(cuda_graph))
                if provider == "cuda":
                    return self._open(data, {CUDA: options})
                # TensorRT takes bytes only where they become floats at once: what comes before that is CUDA's.
                rt = {"trt_fp16_enable": str(self.metadata.precision == "fp16")}
                return self._open(data, {TENSORRT: rt, CUDA: options | {"enable_cuda_graph": "0"}})
            except Exception as error:
                reason = next(iter(said.getvalue().splitlines()), "") or in_line(error)
                raise DeviceError(f"the provider {provider} is not available: {reason}") from error

    def _open(self, data: bytes, providers: dict[str, dict[str, str]]) -> ort.InferenceSession:
        provider = next(iter(providers))
        options = session_options(self.threads)
        if provider != CPU and not self.metadata.any_size:  # sizes are computed on the CPU
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        # CUDA and TensorRT have no kernel for the biases of 32 bits that the optimiser would make of an INT8 graph's.
        disabled = []
        if provider == CUDA:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        elif provider == TENSORRT:
            disabled = ["WeightBiasQuantization"]
        session = ort.InferenceSession(
            data, options, providers=list(providers.items()), disabled_optimizers=disabled, enable_fallback=0
        )
        session.disable_fallback()
        # What the build offers says nothing; only the session knows, and only a run shows that it works.
        if session.get_providers()[0] != provider:
            raise RuntimeError(f"the session runs on {session.get_providers()[0]}")
        size = self.metadata.image_size
        self._call(session, np.zeros((1, size, size, 3), np.uint8))
        return session

    @staticmethod
    def _call(session: ort.InferenceSession, images: NDArray[np.uint8]) -> tuple[Array, Array]:
        names = [artifact.LOGITS, artifact.PROBABILITIES]
        logits, probabilities = session.run(names, {artifact.IMAGE: images}, UNRECORDED)
        return logits, probabilities


def session_options(threads: int) -> ort.SessionOptions:
    """What all sessions have in common, a teacher's too."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that wait for the next operator spin for microseconds: longer would take the cores from decoding, HTTP,
    # PyTorch and other processes, and threads that sleep at once wake too late for small batches.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    options.add_session_config_entry("session.force_spinning_stop", "1")  # for ONNX Runtime before 1.26
    return options


def check_provider(provider: Provider) -> None:
    """Raises ``DeviceError`` where CUDA or TensorRT is asked for and cannot work: before anything long is done."""
    if provider in ("cuda", "tensorrt"):
        with _quiet():
            try:
                need_cuda()
            except NoCudaError as error:
                raise DeviceError(f"the provider {provider} is not available: {error}") from error


class NoCudaError(RuntimeError):
    """There is no GPU, or nothing to use it with."""


def need_cuda() -> None:
    """Raises ``NoCudaError`` where ONNX Runtime's CUDA cannot work, before its gigabytes of libraries are loaded."""
    if CUDA not in ort.get_available_providers():
        raise NoCudaError("this onnxruntime is built without CUDA (install onnxruntime-gpu)")
    driver = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(driver)
    except OSError as error:
        raise NoCudaError(f"no NVIDIA driver here ({driver} does not load)") from error
    ort.preload_dlls()  # from the nvidia packages; nobody has imported torch, which would have loaded them


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Keeps ONNX Runtime's remarks on a missing GPU off the terminal; gives what it printed."""
    said = io.StringIO()
    ort.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(said):
            yield said
    finally:
        ort.set_default_logger_severity(2)
