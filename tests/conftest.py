"""What tests share: a way to call the command line, one small run of the whole chain, one running server."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import util
from pathlib import Path
from types import ModuleType

import httpx
import hypothesis
import numpy as np
import pytest
from click.testing import Result
from served import Served, encoded, serving
from typer.testing import CliRunner

from toolkit.cli import app

Toolkit = Callable[..., Result]


@dataclass(frozen=True)
class Chain:
    """A folder in which ``toolkit pipeline`` was run on the digits, and what that made; paths in the folder."""

    folder: Path
    teacher: Path
    student: Path
    artifact: Path
    example: Path
    output: str


hypothesis.settings.register_profile("toolkit", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("toolkit")


def pytest_configure(config: pytest.Config) -> None:
    """The CPU everywhere, for the same bits each time, unless the tests marked ``gpu`` are asked for.

    Nor does it matter which terminal the tests run in, and which proxy the machine has.
    """
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= {"_TYPER_FORCE_DISABLE_TERMINAL": "1", "NO_COLOR": "1", "COLUMNS": "120"}
    for name in list(os.environ):
        if name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH") or name.lower().endswith("_proxy"):
            del os.environ[name]


def module_at(path: Path) -> ModuleType:
    """A file that is in no package, or is wanted without its package."""
    spec = util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def benchmark(name: str) -> ModuleType:
    """A script in ``benchmarks/``, which is no package."""
    return module_at(Path(__file__).parents[1] / f"benchmarks/{name}.py")


def _toolkit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def refused(result: Result, *words: object, lines: int = 2) -> None:
    """The command ended with an error of at most so many lines, with all these words in it."""
    _, found, message = result.stderr.partition("error: ")
    assert found, result.output
    assert result.exit_code == 1
    assert result.stdout == ""
    for word in words:
        assert str(word) in message
    assert len(message.strip().splitlines()) <= lines, message
    assert len(message) < 700, message


def files(folder: Path) -> dict[Path, bytes]:
    """All that is in the folder."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws is the same each time."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def toolkit() -> Toolkit:
    """Calls the command line in this process. Bugs raise, as they would end a command with a traceback."""
    return _toolkit


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Two and three epochs of the recipe ``digits``, on the CPU for the same bits each time. ``chain`` is a copy."""
    folder = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = _toolkit("pipeline", "--device", "cpu", "--set", "train.epochs=2", "--set", "distill.epochs=3")
        assert result.exit_code == 0, result.output
        (teacher,) = Path("runs").glob("resnet9_wide-digits-*")
        (student,) = Path("runs").glob("resnet9-from-*")
        example = min(student.glob("export/examples/*.png"))
    return Chain(folder, teacher, student, student / "export/student.onnx", example, result.output)


@pytest.fixture
def chain(pipeline: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    """A copy of the small run of the chain, with the working directory in it."""
    folder = tmp_path / "chain"
    shutil.copytree(pipeline.folder, folder)
    monkeypatch.chdir(folder)
    return Chain(folder, pipeline.teacher, pipeline.student, pipeline.artifact, pipeline.example, pipeline.output)


@pytest.fixture
def few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what comes after an export's comparison with PyTorch."""
    from export import parity  # torch

    monkeypatch.setattr(parity, "Reference", partial(parity.Reference, batches=(1,)))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports whose pictures nobody looks at: drawing them takes longer than measuring a small model."""
    from toolkit import report

    monkeypatch.setattr(report, "as_image", lambda figure, kind="png": b"\x89PNG")


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small artifact, alone in its folder; for reading."""
    from small_net import small_artifact  # torch

    return small_artifact(tmp_path_factory.mktemp("artifact") / "student.onnx")


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """40 images as the small artifact takes them; for reading."""
    from small_net import small_images  # torch

    return small_images(40).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A running server with a small artifact under two names, ``student`` and ``copy``, and one example, ``ramp``."""
    from small_net import small_artifact, small_images  # torch

    folder = tmp_path_factory.mktemp("server")
    path = small_artifact(folder / "student.onnx")
    (folder / "student.examples").mkdir()
    (folder / "student.examples" / "ramp.png").write_bytes(encoded(small_images(1)[0].permute(1, 2, 0).numpy()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        # Gradio is strictest where its uploads are below the working directory.
        with serving(path, f"copy={path}", patch=f"import os; os.chdir({str(folder)!r})") as server:
            server.artifact = path
            yield server
    assert server.said == ""  # no client writes into the log
    assert not list((folder / "uploads").rglob("holiday.png"))  # what people upload is not kept


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory without data or runs."""
    folder = tmp_path / "nowhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TOOLKIT_DATA", raising=False)
    return folder


@pytest.fixture(scope="session")
def real_cifar() -> Path:
    """The folder that holds CIFAR-10."""
    for root in (Path(os.environ.get("TOOLKIT_DATA", "-")), Path(__file__).parents[2] / "shared/data"):
        if (root / "cifar-10-batches-py").is_dir():
            return root
    pytest.skip("CIFAR-10 is neither in $TOOLKIT_DATA nor in ../shared/data")


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
