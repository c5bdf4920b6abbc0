"""The serving engine: batches, limits, reloads, and an end without lost answers."""

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from served import wait_until
from small_net import (
    LABELS,
    SIZE,
    changed,
    export,
    small_artifact,
    small_metadata,
    small_net,
    with_property,
    with_weight,
)

from serve import engine as module
from serve.engine import Closed, DeadlineExceeded, Engine, named
from serve.session import Session
from toolkit.errors import UnknownNameError, UserError


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with Engine({"student": path}, "cpu", max_batch=8, max_queue=20) as engine:
        yield engine


class Gate:
    """Lets a session's runs through only when it is open; remembers their batch sizes."""

    def __init__(self, engine: Engine, name: str | None = None) -> None:
        session = engine._model(name).session
        self.sizes: list[int] = []
        self._open, self._entered, run = threading.Event(), threading.Event(), session.run

        def wait(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            self.sizes.append(len(images))
            self._entered.set()
            assert self._open.wait(10)
            return run(images)

        session.run = wait  # type: ignore[method-assign]

    def hold(self, engine: Engine, image: np.ndarray) -> None:
        """Keep the worker busy with one image."""
        engine.submit(image)
        assert self._entered.wait(10)

    def open(self) -> None:
        self._open.set()


def test_answers_are_those_of_the_session(engine: Engine, path: Path, images: np.ndarray) -> None:
    probabilities = Session(path, "cpu").run(images)[1]
    futures = [engine.submit(image) for image in images[:20]]
    for index, answer in enumerate(future.result(10) for future in futures):
        np.testing.assert_allclose(answer.probabilities, probabilities[index], atol=1e-6)
        assert answer.best(2)[0][0] == LABELS[probabilities[index].argmax()]
        assert answer.milliseconds > 0
        assert answer.metadata == engine.metadata()
    assert len(answer.best(99)) == len(LABELS)
    wide = engine.submit(np.zeros((50, 91, 3), np.uint8)).result(10)  # any size
    assert wide.provider == engine.provider() == "CPUExecutionProvider"


def test_what_waits_runs_together(engine: Engine, images: np.ndarray) -> None:
    gate = Gate(engine)
    gate.hold(engine, images[0])
    futures = [engine.submit(image) for image in images[:19]]
    assert b'toolkit_queue_images{artifact="student"} 19.0' in engine.metrics.text()
    gate.open()
    assert all(future.result(10) for future in futures)
    assert gate.sizes == [1, 8, 8, 3]  # and no wait for more
    assert b'toolkit_queue_images{artifact="student"} 0.0' in engine.metrics.text()


def test_late_and_cancelled_images_are_not_computed(engine: Engine, images: np.ndarray) -> None:
    gate = Gate(engine)
    gate.hold(engine, images[0])
    late, cancelled, good = engine.submit(images[0], deadline=0.01), engine.submit(images[1]), engine.submit(images[2])
    assert cancelled.cancel()
    time.sleep(0.02)
    gate.open()
    with pytest.raises(DeadlineExceeded, match="within the deadline"):
        late.result(10)
    assert 20 <= good.result(10).milliseconds < 10_000
    assert gate.sizes == [1, 1]
    with pytest.raises(DeadlineExceeded):
        engine.submit(images[0], deadline=0).result(10)


def test_closing_refuses_what_waits_and_what_comes(path: Path, images: np.ndarray) -> None:
    engine = Engine({"student": path}, "cpu")
    gate = Gate(engine)
    gate.hold(engine, images[0])
    waiting = engine.submit(images[1])
    closing = threading.Thread(target=engine.close)
    closing.start()
    with pytest.raises(Closed, match="stopped"):
        waiting.result(10)
    with pytest.raises(Closed, match="stopping"):
        engine.submit(images[2])
    gate.open()
    closing.join(10)
    assert not closing.is_alive()
    assert engine.closed
    assert engine.ended
    assert not engine.ready


def test_closing_leaves_what_hangs(path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine({"student": path}, "cpu")
    gate = Gate(engine)
    gate.hold(engine, images[0])
    with monkeypatch.context() as patch:
        patch.setattr(module, "CLOSE_SECONDS", 0.1)
        engine.close()
    assert not engine.ended
    gate.open()
    engine.close()
    assert engine.ended


def test_a_new_artifact_of_another_size_takes_only_what_comes_after_it(tmp_path: Path, images: np.ndarray) -> None:
    path = small_artifact(tmp_path / "student.onnx")
    with Engine({"student": path}, "cpu", max_batch=8) as engine:
        gate = Gate(engine)
        gate.hold(engine, images[0])
        before = [engine.submit(image) for image in images[1:4]]
        export(small_net(), small_metadata().model_copy(update={"image_size": 2 * SIZE}), path)
        engine._model(None).reload()
        after = [engine.submit(image) for image in images[1:4]]
        gate.open()
        for futures, size in ((before, SIZE), (after, 2 * SIZE)):
            answers = [future.result(10) for future in futures]
            assert [answer.metadata.image_size for answer in answers] == [size] * 3
        assert gate.sizes == [1, 3]
        session = weakref.ref(engine._model(None).session)
        small_artifact(path)
        engine._model(None).reload()
        end = time.monotonic() + 10
        while session() is not None:  # a model that waits keeps no session of the past
            assert time.monotonic() < end
            gc.collect()


def test_a_failing_batch_is_told_and_the_next_one_runs(
    engine: Engine, images: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = engine._model(None).session
    with monkeypatch.context() as patch:
        patch.setattr(session, "run", lambda images: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.submit(images[0]).result(10)
    assert "the artifact student failed" in caplog.text
    assert engine.submit(images[0]).result(10)


def test_a_device_sees_a_few_batch_sizes(engine: Engine, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    session = engine._model(None).session
    monkeypatch.setattr(session, "provider", "CUDAExecutionProvider")
    expected = session.run(images[:3])[1]
    gate = Gate(engine)
    gate.hold(engine, images[0])
    futures = [engine.submit(image) for image in images[:3]]
    gate.open()
    for future, probabilities in zip(futures, expected, strict=True):
        np.testing.assert_allclose(future.result(10).probabilities, probabilities, atol=1e-6)
    assert gate.sizes == [1, 4]
    assert not engine.ready
    engine.warm_up()
    assert gate.sizes[2:] == [1, 2, 4, 8]
    assert engine.ready


def test_artifacts_by_name(path: Path, images: np.ndarray) -> None:
    with Engine({"a": path, "b": path}, "cpu") as engine:
        assert engine.names == ["a", "b"]
        gate = Gate(engine, "b")
        gate.open()
        engine.submit(images[0]).result(10)
        assert gate.sizes == []
        engine.submit(images[0], "b").result(10)
        assert gate.sizes == [1]
        with pytest.raises(UnknownNameError, match="no artifact 'c' is served: there is a, b"):
            engine.submit(images[0], "c")


def test_names_come_from_files_or_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = named(["runs/x/student.onnx", "int8=runs/x/student.int8.onnx", "teacher.onnx"])
    assert paths == {
        "student": Path("runs/x/student.onnx"),
        "int8": Path("runs/x/student.int8.onnx"),
        "teacher": Path("teacher.onnx"),
    }
    assert named([os.fsdecode(b"f\xfcr.onnx"), os.fsdecode(b"\xfc=a.onnx")]).keys() == {"f?r", "?"}
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1").mkdir()
    Path("lr=0.1/a.onnx").touch()
    assert named(["lr=0.1/a.onnx"]) == {"a": Path("lr=0.1/a.onnx")}
    with pytest.raises(UserError, match=r"two artifacts have the name 'a': tell them apart with NAME=y/a\.onnx"):
        named(["x/a.onnx", "y/a.onnx"])


def _replace(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Put another artifact in the place of ``path``, as ``toolkit export`` does."""
    new = path.with_suffix(".new")
    new.write_bytes(changed(path, change))
    new.replace(path)


RENAMED = with_property("model", '"newer_net"')


def _without_softmax(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "Softmax")
    node.op_type = "Identity"
    del node.attribute[:]


SPOILED = with_weight(lambda weight: np.full_like(weight, np.nan) if weight.ndim == 2 else None)


def test_reload_takes_what_is_good_and_keeps_what_was(
    tmp_path: Path, images: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    path = small_artifact(tmp_path / "student.onnx")
    good = path.read_bytes()
    with Engine({"student": path}, "cpu") as engine:
        engine.watch(0.02)

        def until(text: str) -> None:
            def told() -> bool:
                assert engine.submit(images[0]).result(10).metadata.model == "small_net"
                return text in caplog.text

            wait_until(told)
            caplog.clear()

        path.write_bytes(b"junk")
        until("kept the old artifact student: ")
        path.unlink()
        path.write_bytes(good)
        _replace(path, SPOILED)
        until("no probabilities")
        path.write_bytes(good)
        _replace(path, _without_softmax)
        until("no probabilities")
        path.write_bytes(good[: len(good) // 2])
        until("is not an ONNX file, or it is cut short")
        path.write_bytes(good)
        _replace(path, RENAMED)
        wait_until(lambda: engine.submit(images[0]).result(10).metadata.model == "newer_net")


def test_a_file_that_changes_during_the_start_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_artifact(tmp_path / "student.onnx")

    def opened(path: Path, *arguments: object) -> Session:
        session = Session(path, *arguments)
        _replace(path, RENAMED)
        return session

    with monkeypatch.context() as patch:
        patch.setattr(module, "Session", opened)
        engine = Engine({"student": path}, "cpu")
    with engine:
        engine._model(None).reload()
        assert engine.metadata().model == "newer_net"


def test_a_file_is_taken_once_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy in progress is not an artifact: it is looked at again when it has changed again."""
    path = small_artifact(tmp_path / "student.onnx")
    good = path.read_bytes()
    with Engine({"student": path}, "cpu", threads=1) as engine:
        opened = []
        monkeypatch.setattr(module, "Session", lambda *arguments: opened.append(arguments) or Session(*arguments))
        model = engine._model(None)
        path.write_bytes(good[:100])
        model.reload()
        model.reload()
        assert len(opened) == 1
        path.write_bytes(good)
        model.reload()
        assert len(opened) == 2
        path.chmod(0o600)  # as one that could not be read at first
        model.reload()
        assert opened == [(path, "cpu", 1, False)] * 3  # as at the start
