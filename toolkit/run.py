"""The run directory: everything that one run wrote.

recipe.yaml  environment.json  metrics.jsonl  summary.json (once finished)  images.json (of a folder)
probe.json (on a CPU)  tensorboard/ (where it is asked for)  .lock (while a process writes)
checkpoints/last.safetensors   all of the training state, to resume from; last-1, ... are the ones before it
checkpoints/best.safetensors   the weights that are kept, with what they are in the header
report/  export/  int8-.../ (a run of its own: the fine-tuning before INT8)
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from toolkit import __version__
from toolkit.catalogue import build
from toolkit.errors import CheckpointError, RecipeError, RunError, in_line
from toolkit.files import locked, write_atomic, write_text, writing
from toolkit.folders import nfc
from toolkit.recipe import Recipe, validate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from toolkit.classifier import Classifier

RUNS = Path("runs")


class Run:
    """A run directory that exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        source = path / "recipe.yaml"
        if not source.is_file():
            raise RunError(f"{path} is not a run directory: it has no recipe.yaml")
        try:
            self.recipe: Recipe = validate(yaml.safe_load(source.read_text()))
        except (yaml.YAMLError, ValueError, RecipeError) as error:
            raise RunError(f"{source} is damaged, or of another version of the toolkit: {in_line(error)}") from error

    @classmethod
    def at(cls, path: Path) -> Run | None:
        """The run directory at ``path``, if it is one."""
        return cls(path) if (path / "recipe.yaml").is_file() else None

    @classmethod
    def of(cls, artifact: Path) -> Run | None:
        """The run directory in which an artifact lies, if it does."""
        return cls.at(artifact.resolve().parent.parent)

    @classmethod
    def start(cls, path: Path, recipe: Recipe, resume: bool, extend: bool = False) -> Run:
        """The directory of this recipe's run, made where it does not exist.

        A directory of another run, or of an unfinished one without ``resume``, raises ``RunError``. ``extend``
        lets a run go on to more epochs than it was started with.
        """
        if (path / "recipe.yaml").is_file():
            run = cls(path)
            longer = recipe.epochs > run.recipe.epochs
            as_long = recipe.model_copy(update={"epochs": run.recipe.epochs})
            if extend and longer and not run.recipe.differences(as_long):
                summary = run.summary() if run.finished else {}
                if (done := summary.get("epochs", run.recipe.epochs)) < run.recipe.epochs or summary.get("stopped"):
                    raise RunError(
                        f"{path} was stopped early, after {done} of {run.recipe.epochs} epochs: a longer run would "
                        "stop there too. Choose another --run-dir, and a larger early_stop.patience."
                    )
                if run.finished and not run.resumable:
                    raise RunError(
                        f"{path} has no training state any more to go on from, only the weights that it kept: start "
                        f"another run from them by --init {path}."
                    )
                with run.lock():  # it may still be training
                    (run.report / "metrics.json").unlink(missing_ok=True)  # of weights that are to be replaced
                    (path / "summary.json").unlink(missing_ok=True)
                    write_text(path / "recipe.yaml", recipe.to_yaml())
                run = cls(path)
            if differences := run.recipe.differences(recipe):
                advice = "or --extend this one" if longer and len(differences) == 1 else "or repeat that run's recipe"
                raise RunError(
                    f"{path} already holds a different run; differing: {'; '.join(differences)}. "
                    f"Choose another --run-dir, {advice}."
                )
            if not run.finished and not (resume or extend) and run.resumable:
                raise RunError(
                    f"{path} holds an unfinished run of this recipe: add --resume to go on with it, "
                    "or choose another --run-dir."
                )
            return run
        # A kill in the first write leaves its temporary file; training removes it.
        if path.exists() and not (path.is_dir() and all(file.match(".recipe.yaml.*") for file in path.iterdir())):
            raise RunError(f"{path} exists and is not a run directory; choose another --run-dir")
        try:
            write_text(path / "recipe.yaml", recipe.to_yaml())
            write_text(path / "environment.json", json.dumps(environment(), indent=2))
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return cls(path)

    def begin(self, recipe: Recipe, files: Sequence[str]) -> None:
        """Under its lock: note where it runs now, and of a new run which ``files`` of a folder it has.

        The recipe differs from the run's in places and titles alone (see ``start``): who goes on need not say them
        again. An image that comes later is no part of the run.
        """
        if recipe != self.recipe:
            write_text(self.path / "recipe.yaml", recipe.to_yaml())
            self.recipe = recipe
        if files and not self.resumable:
            write_text(self.images, json.dumps(files))

    @property
    def resumable(self) -> bool:
        """Whether it has a training state to go on from."""
        return bool(self.states)

    @property
    def states(self) -> list[Path]:
        """Its training states, newest first; "next" is there only after a kill while the names moved on."""
        ages = {"next": -1, "last": 0}
        for path in (self.path / "checkpoints").glob("last-*.safetensors"):
            if (age := path.stem.removeprefix("last-")).isdecimal():  # and no copy that somebody made
                ages[path.stem] = int(age)
        return [self.checkpoint(name) for name in sorted(ages, key=ages.__getitem__) if self.checkpoint(name).is_file()]

    def checkpoint(self, name: str) -> Path:
        """``last``: the newest training state; ``last-1``, ...: older ones; ``best``: the weights that are kept."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def lock(self) -> AbstractContextManager[None]:
        """Keep every other process from writing this directory; entering raises ``RunError`` where one does."""
        return locked(self.path, RunError)

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def images(self) -> Path:
        """Which of a folder's images it has, of each part."""
        return self.path / "images.json"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def artifact(self) -> Path:
        return self.export / f"{self.recipe.role}.onnx"

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    @property
    def going_on(self) -> str:
        """The command that goes on with it, where it is not finished."""
        command = "distill" if self.recipe.role == "student" else "train"
        return f"toolkit {command} --run-dir {shlex.quote(str(self.path))} --resume"

    def summary(self) -> dict[str, Any]:
        """What the finished run reached."""
        if not self.finished:
            raise RunError(f"{self.path} is not finished; go on with it by `{self.going_on}`")
        return _read_json(self.path / "summary.json")

    @staticmethod
    def facts(path: Path) -> dict[str, Any]:
        """What environment.json says, of a directory that need not be there."""
        file = path / "environment.json"
        return _read_json(file) if file.is_file() else {}

    def note(self, **facts: Any) -> None:
        """Add to environment.json."""
        write_text(self.path / "environment.json", json.dumps(self.facts(self.path) | facts, indent=2))

    def finish(self, summary: Mapping[str, Any]) -> None:
        write_text(self.path / "summary.json", json.dumps(summary, indent=2, allow_nan=False))

    def history(self) -> list[dict[str, Any]]:
        """One row an epoch; a line that a kill cut short is left out."""
        path = self.path / "metrics.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        path = self.path / "metrics.jsonl"
        with writing(path), path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def rewind(self, epochs: int) -> None:
        """Forget the rows of epochs that the checkpoint does not know."""
        if not (self.path / "metrics.jsonl").is_file():
            return
        rows = [row for row in self.history() if row["epoch"] <= epochs]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise RunError(f"{path} is damaged: {error}") from error


def runs(root: Path = RUNS) -> list[Run]:
    """The run directories under ``root``, newest first; damaged ones are left out."""
    found = []
    for path in root.glob("*/recipe.yaml"):
        try:
            found.append((path.stat().st_mtime, Run(path.parent)))
        except (RunError, OSError):
            continue
    return [run for _, run in sorted(found, key=lambda item: (-item[0], str(item[1].path)))]


def weights_of(path: Path) -> Path:
    """The weights of a finished run directory, or the file itself. Raises ``RunError``."""
    if not path.is_dir():
        return path
    run = Run(path)
    weights = run.checkpoint("best")
    if not run.finished:
        so_far = f", or name the best weights so far: {weights}" if weights.is_file() else ""
        raise RunError(f"{path} is not finished: go on with it by `{run.going_on}`{so_far}")
    return weights


# The student that comes with the toolkit, for a user without a run.
SHIPPED = Path(str(files("students"))) / "pretrained/resnet9-cifar10.onnx"


def newest_artifact() -> Path:
    """The newest ONNX file of a run, else the student that comes with the toolkit."""
    found = RUNS.glob("*/export/[!.]*.onnx")  # a file that is being written is hidden
    return max(found, key=lambda path: path.stat().st_mtime, default=SHIPPED)


def default_path(recipe: Recipe) -> Path:
    """``runs/<what>-<digest>``: the same recipe finds its own run again."""
    parts = [recipe.model.name]
    if recipe.distils and recipe.teacher:
        parts += ["from", recipe.teacher.name]
    return RUNS / "-".join([*parts, recipe.data.kind, recipe.digest()[:8]])


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    packages = ("torch", "torchvision", "numpy", "onnx", "onnxruntime-gpu", "onnxruntime")
    versions = {"toolkit": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    program = Path(sys.argv[0]).name.replace("__main__.py", "toolkit")  # or a notebook, or a program of the user's
    return {"versions": versions, "platform": platform.platform(), "command": [program, *sys.argv[1:]]}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """A safetensors file, written whole or not at all. ``header`` is any JSON."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = {"toolkit": json.dumps(header)}
    write_atomic(path, lambda temporary: save_file(plain, temporary, metadata=text))


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of a module's names and tensors."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_header(path: Path) -> dict[str, Any]:
    """The header of a file of ``save_tensors``, without its tensors. Raises ``CheckpointError``."""
    with _opened(path) as (_, header):
        return header


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU and header of a file of ``save_tensors``. Raises ``CheckpointError``."""
    with _opened(path) as (file, header):
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("toolkit")
            if text is None:
                raise CheckpointError(f"{path} is a safetensors file, but not one of this toolkit")
            header = json.loads(text)
            yield file, header | {"classes": list(map(nfc, header["classes"]))}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def load_model(path: str | Path) -> tuple[Classifier, dict[str, Any]]:
    """The model of a file of weights, and the file's header (see ``engine.describe``).

    Raises ``CheckpointError``, and ``UnknownNameError`` or ``RecipeError`` where no such model can be built here.
    """
    path = Path(path)
    tensors, header = load_tensors(path)
    if "position" in header:
        raise CheckpointError(f"{path} is the state of an unfinished run; its weights are in best.safetensors")
    size = header["image_size"]
    model = build(header["model"], header["role"], len(header["classes"]), image_size=size, **header["arguments"])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {header['model']}: {in_line(error)}") from error
    return model.eval(), header


def load_run(run: Run) -> tuple[Classifier, dict[str, Any]]:
    """``load_model`` of a run; ``RunError`` where it is not finished, ``CheckpointError`` for foreign weights."""
    run.summary()
    weights, wanted = run.checkpoint("best"), run.recipe.model
    model, header = load_model(weights)
    if (header["model"], header["role"], header["arguments"]) != (wanted.name, run.recipe.role, wanted.arguments):
        raise CheckpointError(
            f"{weights} is not of this run: it holds {header['role']} {header['model']} {header['arguments'] or ''}, "
            f"the run's recipe has {run.recipe.role} {wanted.name} {wanted.arguments or ''}"
        )
    return model, header
