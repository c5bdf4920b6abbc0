"""`toolkit bench`."""

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Chain, Toolkit, refused
from matplotlib.figure import Figure
from small_net import small_artifact
from torch import nn

from export.artifact import read
from serve.session import Session
from toolkit import bench
from toolkit.classifier import TestTimeAugmentation
from toolkit.errors import DeviceError

QUICK = ("--batch", 1, "--batch", 3, "--rounds", 1, "--provider", "cpu", "--threads", 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TURN_SECONDS", 0.01)
    monkeypatch.setattr(bench, "PEAK_SIDE", 256)


def test_artifacts_beside_pytorch(toolkit: Toolkit, chain: Chain) -> None:
    cores = os.sched_getaffinity(0)
    result = toolkit("bench", chain.artifact, *QUICK, "--no-compile")
    assert result.exit_code == 0, result.output
    document = json.loads(Path("bench/bench.json").read_text())
    names = ["resnet9 PyTorch eager", "resnet9 PyTorch eager, channels_last", "student fp32 on CPU"]
    assert [(row["name"], row["batch"]) for row in document["rows"]] == [(n, b) for b in (1, 3) for n in names]
    macs = read(chain.artifact).macs
    assert macs
    for row in document["rows"]:
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["p50_ms"])
        assert row["peak"] > 1e9
        assert row["operations_per_second"] == pytest.approx(2 * macs * row["images_per_second"])
    for name in names:
        assert name in result.stdout
    assert Path("bench/bench.png").read_bytes().startswith(b"\x89PNG")
    assert os.sched_getaffinity(0) == cores
    result = toolkit("bench", *QUICK, "--no-compile", "--json")
    assert f"timing the newest artifact, {chain.artifact}" in result.stderr
    document = json.loads(result.stdout)
    assert (document["threads"], document["rows"][-1]["name"]) == (1, names[-1])


def test_a_gpu_session_is_timed_bound_and_recorded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_artifact(tmp_path / "small.onnx")
    opened = []

    def session(file: Path, provider: str, threads: int, cuda_graph: bool = False) -> Session:
        if cuda_graph and len(opened) > 1:
            raise DeviceError("a node runs on the CPU")
        opened.append(cuda_graph)
        return Session(file, "cpu", threads)

    monkeypatch.setattr(bench, "Session", session)
    monkeypatch.setattr(bench, "CUDA", "CPUExecutionProvider")  # stands in for it
    monkeypatch.setattr(bench, "_pytorch", lambda *_: [])
    monkeypatch.setattr(bench, "peak", lambda *_: 1e12)
    names = ["small fp32 on CPU", "small fp32 on CPU, bound", "small fp32 on CPU, CUDA graph"]
    for left in (3, 2):  # the second time nothing can be recorded
        rows, _ = bench.bench([path], batches=(1, 3), rounds=1, threads=1)
        assert [(row.name, row.batch) for row in rows] == [(name, b) for b in (1, 3) for name in names[:left]]


def test_without_a_compiler_the_others_are_timed(
    toolkit: Toolkit, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nanywhere")

    monkeypatch.setattr(torch, "compile", failing)
    result = toolkit("bench", chain.artifact, *QUICK)
    assert "torch.compile is left out: no C++ compiler anywhere" in result.stderr
    assert "student fp32 on CPU" in result.stdout


def test_the_compiled_model_takes_part(toolkit: Toolkit, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: compiled.append(module) or module)
    result = toolkit("bench", chain.artifact, *QUICK, "--json")
    assert [row["name"] for row in json.loads(result.stdout)["rows"]].count("resnet9 PyTorch compiled") == 2
    assert len(compiled) == 1


def test_threads_stay_on_as_many_cores() -> None:
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(2)
    try:
        with bench.pinned(1), ThreadPoolExecutor(1) as pool:
            assert torch.get_num_threads() == 1
            assert pool.submit(os.sched_getaffinity, 0).result() == {min(cores)}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert os.sched_getaffinity(0) == cores


def test_a_run_that_cannot_be_loaded_is_left_out(toolkit: Toolkit, chain: Chain) -> None:
    (chain.student / "summary.json").unlink()  # as one that is extended
    for reason in ("is not finished", "there is no checkpoint"):
        result = toolkit("bench", chain.artifact, *QUICK, "--json")
        assert result.exit_code == 0, result.output
        assert f"PyTorch is left out for {chain.artifact}: " in result.stderr
        assert reason in result.stderr
        assert {row["name"] for row in json.loads(result.stdout)["rows"]} == {"student fp32 on CPU"}
        (chain.student / "summary.json").write_text("{}")
        (chain.student / "checkpoints/best.safetensors").unlink(missing_ok=True)


def test_artifacts_that_cannot_be_compared(toolkit: Toolkit, chain: Chain) -> None:
    small = small_artifact(Path("small.onnx"))
    refused(toolkit("bench", small, chain.artifact), "different sizes: 16, 32", lines=3)
    refused(toolkit("bench", "none.onnx"), "none.onnx", "No such file")
    result = toolkit("bench", small, *QUICK)
    assert "PyTorch is left out for small.onnx: it does not lie in a run directory" in result.stderr
    assert result.exit_code == 0


def test_turns_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TURN_SECONDS", 0)
    called: list[str] = []
    times = bench.alternate([lambda: called.append("a"), lambda: called.append("b")], rounds=2)
    assert called[2 * bench.WARM_CALLS :] == ["a", "b", "b", "a"]
    assert Counter(map(len, times)) == {2: 2}


def test_the_table_compares_with_the_first() -> None:
    rows = [bench.Row(name, "fp32", 1, 9, 10.0, 11.0, rate, 5e11, 1e12) for name, rate in (("a", 100.0), ("b", 200.0))]
    first, second = (line.split() for line in bench.table(rows).splitlines()[1:])
    assert first == ["a", "1", "10.00", "11.00", "100", "500", "1,000", "50%", "1.00"]
    assert (second[4], second[-1]) == ("200", "2.00")


def test_pytorch_computes_as_many_views_as_the_artifact(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    deployed, net = [], partial(nn.Conv2d, 3, 4, 3)
    monkeypatch.setattr(bench.onnx_export, "deployed", lambda model, about: deployed.append(model) or net())
    session = Session(chain.artifact, "cpu")
    session.metadata = session.metadata.model_copy(update={"views": 6})
    contestants = bench._pytorch({chain.artifact: session}, compiled=False)
    assert [type(model) for model in deployed] == [TestTimeAugmentation] * 2
    assert [one.operations for one in contestants] == [2 * 6 * session.metadata.macs] * 2
    layouts = [one.run.args[0].weight.is_contiguous(memory_format=torch.channels_last) for one in contestants]
    assert layouts == [False, True]


def test_the_plot_of_many_contestants(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(bench, "as_image", lambda figure: drawn.append(figure) or b"")
    rows = [
        bench.Row(f"net {i}", "fp32", b, 9, 1.0 + i, 2.0 + i, 1e3 / b, None, 1e12) for b in (1, 8) for i in range(9)
    ]
    bench.plot(rows)
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [f"net {i}" for i in range(9)]
    assert "net 8" in bench.table(rows)
