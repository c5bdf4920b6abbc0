"""The stages of the chain, each one call: ``train``, ``distill``, ``validate``, ``pipeline``; see also ``artifacts``.

They find what they are not given (the newest run, the teacher's run), call the module that does the work, and
return what happened. The command line prints it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from export.preprocess import nhwc
from toolkit import compute, distributed, engine, external, learner, recipe, teaching
from toolkit import data as datasets
from toolkit.catalogue import mac_count, parameter_count
from toolkit.choices import Provider, Stage, Views
from toolkit.classifier import TestTimeAugmentation
from toolkit.duration import with_epochs
from toolkit.errors import CheckpointError, DataError, Interrupted, RecipeError, RunError, TeacherError, UserError
from toolkit.files import check_writable
from toolkit.folders import listed, nfc
from toolkit.progress import say
from toolkit.recipe import Data, Recipe
from toolkit.run import RUNS, SHIPPED, Run, default_path, load_header, load_model, load_run, runs
from toolkit.tracking import summary_writer, tensorboard

if TYPE_CHECKING:
    from toolkit.artifacts import Exported
    from toolkit.classifier import Classifier

# --- training ----------------------------------------------------------------------------------------------


OnEpoch = Callable[[dict[str, Any]], None]


def train(
    wanted: Recipe | str | Path,
    run_dir: str | Path | None = None,
    resume: bool = False,
    on_epoch: OnEpoch | None = None,
    extend: bool = False,
    log: str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Train the recipe's teacher (or of a resolved ``Recipe`` its student, without one); the finished run.

    ``wanted`` is a recipe, or the name or file of one with ``settings``, which map fields such as ``optimizer.lr`` to
    values (see ``recipe.resolve``, which raises ``RecipeError``). The run directory is ``run_dir``, else one under
    ``runs/``; ``resume`` goes on with an unfinished run. Ctrl-C or SIGTERM raises ``Interrupted`` once all is saved.
    ``on_epoch`` gets each epoch's row of metrics.jsonl; ``extend`` goes on with a run that was shorter;
    ``log="tensorboard"`` writes the rows for TensorBoard too. Raises ``DataError``, ``DeviceError``, ``BudgetError``,
    ``RunError`` (the directory holds another or an unfinished run, or the images have changed), ``CheckpointError`` and
    ``DivergedError``.
    """
    wanted = _resolved(wanted, "train", settings)
    wanted = without_teacher(wanted) if wanted.distils else wanted
    path = None if run_dir is None else Path(run_dir)
    return _fit(wanted, check(wanted), None, path, resume, on_epoch, extend, log)


def distill(
    wanted: Recipe | str | Path,
    run_dir: str | Path | None = None,
    resume: bool = False,
    on_epoch: OnEpoch | None = None,
    extend: bool = False,
    log: str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Distil the recipe's student from its teacher; the finished run (more arguments: see ``train``).

    The teacher comes from ``teacher.checkpoint``, else from the newest finished run of that name on the same
    data. Raises ``TeacherError`` where there is none, it does not fit the data or has nothing to teach.
    """
    wanted = _resolved(wanted, "distill", settings)
    if not wanted.distils:
        if wanted.teacher is not None:
            named = wanted.teacher.checkpoint or wanted.teacher.name
            say(f"the teacher {named} is not asked, as loss.kd_weight is 0: --set loss.kd_weight=0.9 asks it")
        return train(wanted, run_dir, resume, on_epoch, extend, log)
    assert wanted.teacher is not None
    compute.settle(CPU)
    data = None if wanted.data.unlabelled else check(wanted)
    teacher, known, classes = teaching.load(wanted, data.classes if data else None)
    if data is None:
        data = _answered(_images(wanted.data), teacher, classes, wanted, wanted.device)
        learner.new_model(wanted, data)
    wanted = wanted.model_copy(update={"teacher": known})
    path = default_path(wanted) if run_dir is None else Path(run_dir)
    # Without labels there is nothing to compare its answers with.
    looked_at = wanted.data.unlabelled or "teacher" in Run.facts(path)
    facts = {} if looked_at else {"teacher": teaching.preflight(teacher, known, data, wanted)}
    return _fit(wanted, data, teacher, path, resume, on_epoch, extend, log, facts)


def _resolved(wanted: Recipe | str | Path, stage: Stage, settings: Mapping[str, Any] | None) -> Recipe:
    if isinstance(wanted, Recipe):
        if settings:
            raise ValueError("settings belong to the name or file of a recipe, not to one that is resolved")
        return wanted
    return recipe.resolve(wanted, stage, settings)


def check(wanted: Recipe) -> datasets.DataSet:
    """Raise what is wrong with data, device or model (a student's size above all) before anything is made."""
    # PyTorch's optimizers import it, for more than a second: beside the reading of the data.
    Thread(target=import_module, args=("torch._dynamo",)).start()
    if wanted.data.unlabelled:
        raise DataError(
            "images without labels have nothing to train on: `toolkit distill --unlabelled` takes a teacher"
        )
    data = _images(wanted.data)
    compute.pick_device(wanted.device)
    learner.new_model(wanted, data)
    return data


def _fit(
    wanted: Recipe,
    data: datasets.DataSet,
    teacher: nn.Module | None,
    run_dir: Path | None,
    resume: bool,
    on_epoch: OnEpoch | None = None,
    extend: bool = False,
    log: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Run:
    """The finished run; ``facts`` are noted in its directory when it starts."""
    path = run_dir or default_path(wanted)
    if log:
        summary_writer()  # nothing is changed before it is known that there is one
    wanted = with_epochs(wanted, path, data, teacher)
    fresh = not (path / "recipe.yaml").exists()
    beyond = [f"{epoch:g}" for epoch in wanted.schedule.milestones if epoch >= wanted.epochs]
    if beyond and wanted.schedule.name == "step":
        say(
            f"warning: the learning rate does not fall at epoch {', '.join(beyond)}, which the {wanted.epochs} epochs "
            "do not reach: give --set schedule.milestones=[...]"
        )
    if fresh and wanted.start_from is not None and not wanted.starts_from_teacher:
        teaching.tell_what_it_knows(learner.first_weights(wanted), data, wanted)
    distributed.join(distributed.own_device(compute.pick_device(wanted.device)))
    if distributed.RANK == 0:
        if extend and not fresh and (states := Run(path).states):  # nothing is changed before that is known
            with suppress(CheckpointError):  # a damaged state is passed over, and the one before it compared
                check_unchanged(data, load_header(states[0])["dataset_digest"], path)
        run = Run.start(path, wanted, resume, extend)
        if facts:
            run.note(**facts)
    distributed.wait()
    run = Run(path)
    if run.finished:
        check_unchanged(data, run.summary()["dataset_digest"], run.path)
        say(f"{run.path} is finished already; its results are kept")
    else:
        say(f"{_doing(wanted, data)} in {run.path}")
    try:
        board = tensorboard(run.path / "tensorboard") if log and distributed.RANK == 0 else None
        engine.fit(wanted, data, run, teacher, _watch(on_epoch, board))
    except RunError:  # another process writes it
        raise
    except UserError:
        if fresh and distributed.RANK == 0 and not run.checkpoint("last").is_file():
            shutil.rmtree(path, ignore_errors=True)  # nothing was reached
        raise
    return run


def _doing(wanted: Recipe, data: datasets.DataSet) -> str:
    if not wanted.distils or wanted.teacher is None:
        return f"training {wanted.model.name} on {data.name}"
    return f"distilling {wanted.model.name} from {external.titles(wanted.teacher)} on {data.name}"


def check_unchanged(
    data: datasets.DataSet, digest: str, what: Path, advice: str = "move it away, or choose another --run-dir"
) -> None:
    """Raise ``RunError`` unless the images are those, of SHA-256 ``digest``, that ``what`` was trained on.

    Of other images others would be held out for the test: some that were trained on.
    """
    if digest != data.digest:
        raise RunError(
            f"the images of {data.name} have changed since {what} was trained, or are read or split in another way "
            f"by this version: {advice}"
        )


def _watch(*watchers: OnEpoch | None) -> OnEpoch:
    def watch(row: dict[str, Any]) -> None:
        for watcher in watchers:
            if watcher is not None:
                watcher(row)

    return watch


def train_baseline(wanted: Recipe, taught: Run, run_dir: Path | None, resume: bool, extend: bool = False) -> Run:
    """The run of the same student without its teacher, as long as the one that was ``taught``."""
    alone = without_teacher(wanted).model_copy(update={"minutes": None, "epochs": taught.recipe.epochs})
    path = run_dir or default_path(alone)
    known = (path / "summary.json").is_file()  # what was there before is more than a baseline
    return _fit(alone, check(alone), None, path, resume, extend=extend, facts={} if known else {"baseline": True})


def without_teacher(wanted: Recipe) -> Recipe:
    """The baseline of a distillation: the same recipe with the labels alone, and new views in every epoch.

    Views are repeated (``cached_epochs``) to ask the teacher less often; without one that is a handicap.
    """
    loss = wanted.loss.model_copy(update={"ce_weight": 1.0, "kd_weight": 0.0})
    start = None if wanted.starts_from_teacher else wanted.start_from
    return wanted.model_copy(update={"teacher": None, "loss": loss, "start_from": start, "cached_epochs": 0})


def load_data(config: Data, taught: Recipe | None = None, device: str = "auto") -> datasets.DataSet:
    """The data set; images without labels get those of the teacher of ``taught``."""
    data = _images(config)
    if not config.unlabelled:
        return data
    assert taught is not None
    teacher, _, classes = teaching.load(taught, None)
    return _answered(data, teacher, classes, taught, device)


def _images(config: Data) -> datasets.DataSet:
    compute.settle(CPU)  # an ONNX teacher, which is loaded after its images, has as many threads
    data = datasets.load(config)
    if data.broken:
        say(f"unreadable files left out: {len(data.broken)} ({listed(data.broken)})")
    return data


def _answered(
    data: datasets.DataSet, teacher: nn.Module, classes: Sequence[str], taught: Recipe, where: str
) -> datasets.DataSet:
    """Images without labels, with the answers of the recipe's teacher."""
    device = distributed.own_device(compute.pick_device(where))
    dtype = compute.pick_dtype(taught.precision, device)
    teacher = teacher.to(device).to(memory_format=torch.channels_last)
    return datasets.labelled(data, classes, lambda images: engine.predict(teacher, images, device, dtype))


# --- what a command works on -------------------------------------------------------------------------------


def _is_baseline(run: Run) -> bool:
    try:
        return bool(run.facts(run.path).get("baseline"))
    except RunError:  # its environment.json is damaged
        return False


def newest_run() -> Run:
    """The newest finished run of a student, else of a teacher; a baseline is no result. ``RunError``."""
    finished = [run for run in runs() if run.finished and not _is_baseline(run)]
    if not finished:
        raise RunError(f"there is no finished run under {RUNS}/: `toolkit distill` makes one, `toolkit pipeline` too")
    return max(finished, key=lambda run: run.recipe.role == "student")  # the first of equals


# --- validation --------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
ANYWAY = (
    "some of the images it was trained on may be test images now. To measure on the images as they are, name them by "
    "--dataset"
)


def validate(
    target: str | Path | None = None,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    device: str = "auto",
    provider: Provider = "auto",
    tta: Views | None = None,
) -> tuple[dict[str, Any], Path]:
    """Measure a run directory, a file of weights or an artifact on the test set.

    Without a target ``newest_run`` is taken, else the student that comes with the toolkit. A model of PyTorch is
    measured on ``device``, in fp32; an artifact by ``provider``, as it is. Returns the metrics and the folder of the
    report. The metrics are those of ``report.measure``, ``model``, ``dataset``, ``dataset_digest``, ``provider``, and
    the ``seconds`` that the test set took; with ``tta`` also ``tta_top1``, the accuracy over these ``tta_views`` (all
    other figures are of the plain images); of an artifact that averages views their number, ``views``. Raises
    ``RunError`` (unfinished, or its images have changed), ``DataError`` (other classes, or no images),
    ``CheckpointError``, ``ArtifactError``, ``DeviceError``, and ``UserError`` for an option that the target has no use
    for.
    """
    if target is None:
        try:
            newest = newest_run()
            target = newest.path
            say(f"validating the newest {newest.recipe.role}, {target}")
        except RunError:
            target = SHIPPED
            say(f"validating the student that comes with the toolkit, {target}")
    target, data_dir = Path(target), None if data_dir is None else Path(data_dir)
    if target.suffix == ".onnx":
        if tta:
            raise UserError(f"--tta augments models of PyTorch; {target} is an artifact and measured as it is")
        if device != "auto":
            raise UserError(f"--device is PyTorch's; {target} is an artifact: give --provider")
        return _validate_artifact(target, dataset, data_dir, provider)
    if provider != "auto":
        raise UserError(f"--provider is ONNX Runtime's; {target} is measured by PyTorch: give --device")
    run = Run(target) if target.is_dir() else None
    if run is not None:
        check_writable(run.report / "metrics.json")
    weights = run.checkpoint("best") if run else target
    model, header = load_run(run) if run else load_model(weights)
    data = data_of(run, header, weights, dataset, data_dir, device=device)
    place = compute.pick_device(device)
    began = time.monotonic()
    logits = engine.predict(model.to(place), data.test.images, place)
    seconds = time.monotonic() - began
    teacher_logits = None
    facts = {
        "model": header["model"],
        "role": header["role"],
        "parameters": f"{parameter_count(model):,}",
        "MACs": f"{mac_count(model, header['image_size']):,} at {header['image_size']}x{header['image_size']}",
        "data": f"{data.name}, {len(data.test):,} test images",
        "teacher": header["teacher"] or "none",
    }
    from toolkit import report  # with matplotlib

    history: list[dict[str, Any]] = []
    if run is not None:
        history, summary = run.history(), run.summary()
        facts |= {
            "recipe": f"{run.recipe.name} ({run.recipe.digest()[:12]})",
            "seed": str(run.recipe.seed),
            "epochs": f"{summary['epochs']} ({summary['steps']:,} steps)",
            "training": f"{summary['train_seconds']:,.0f} s on {summary['device']} in {summary['precision']}",
        }
        if history:
            facts["batch"] = f"{report.batch_sizes(history)} images"
        teacher_logits = _teacher_logits(run, data, place)
    metrics = report.measure(logits, data.test.labels.numpy(), data.classes, teacher_logits)
    if tta:
        views = engine.predict(TestTimeAugmentation(model, tta).to(place), data.test.images, place)
        metrics["tta_top1"] = float((views.argmax(1) == data.test.labels.numpy()).mean())
        metrics["tta_views"] = facts["test-time augmentation"] = tta
    where, table = run.report if run else _report_beside(weights), layer_table(model, header)
    name = header["model"]
    return _reported(where, name, name, f"pytorch {place}", seconds, metrics, data, logits, facts, history, table)


def _validate_artifact(
    path: Path, dataset: str | None, data_dir: Path | None, provider: Provider
) -> tuple[dict[str, Any], Path]:
    from serve.session import Session
    from toolkit import report

    session = Session(path, provider)
    about = session.metadata
    header = about.model_dump(include={"dataset", "dataset_digest", "image_size", "split"})
    header["classes"] = list(about.labels)
    run, device = Run.of(path), "cpu" if provider == "cpu" else "auto"
    data = data_of(run, header, path, dataset, data_dir, device=device)
    began = time.monotonic()
    chunks = data.test.images.split(datasets.at_once(session.metadata.image_size, 512))
    logits = np.concatenate([session.run_batches(nhwc(chunk))[0] for chunk in chunks])
    seconds = time.monotonic() - began
    teacher_logits = _teacher_logits(run, data, compute.pick_device(device)) if run else None
    metrics = report.measure(logits, data.test.labels.numpy(), data.classes, teacher_logits)
    facts = {
        "artifact": path.name,
        "model": about.model,
        "provider": session.provider,
        "precision": about.precision,
        "parameters": f"{about.parameters:,}",
        "data": f"{data.name}, {len(data.test):,} test images",
        "teacher": about.teacher or "none",
    }
    if about.views > 1:
        metrics["views"] = about.views
        facts["test-time augmentation"] = f"the graph averages {about.views} views of each image"
    where = _report_beside(path)
    return _reported(where, path.name, about.model, session.provider, seconds, metrics, data, logits, facts)


def _report_beside(path: Path) -> Path:
    """The report of a file lies beside it, but for what comes with the toolkit, or where nothing can be written."""
    elsewhere = path.resolve().parent == SHIPPED.resolve().parent or not os.access(path.parent, os.W_OK)
    return (RUNS / path.name if elsewhere else path).with_suffix(".report")


def _reported(
    folder: Path,
    title: str,
    model: str,
    provider: str,
    seconds: float,
    metrics: dict[str, Any],
    data: datasets.DataSet,
    logits: np.ndarray,
    facts: Mapping[str, str],
    history: Sequence[Mapping[str, Any]] = (),
    table: str | None = None,
) -> tuple[dict[str, Any], Path]:
    """Write the report; the metrics with what was measured, and the folder."""
    from toolkit import report

    identity = {"model": model, "dataset": data.name, "dataset_digest": data.digest, "provider": provider}
    metrics = identity | {"seconds": seconds} | metrics
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    labels = data.test.labels.numpy()

    def images(index: np.ndarray) -> np.ndarray:
        return nhwc(data.test.images[torch.from_numpy(index)])

    report.write(folder, title, metrics, history, images, labels, probabilities, data.classes, facts, table)
    return metrics, folder


def layer_table(model: Classifier, header: Mapping[str, Any]) -> str:
    """Layers with output shapes and parameters, as torchinfo prints them."""
    import torchinfo

    size = header["image_size"]
    return str(torchinfo.summary(model, (1, 3, size, size), device="cpu", verbose=0, depth=6))


def data_of(
    run: Run | None,
    header: Mapping[str, Any],
    what: Path,
    dataset: str | None,
    data_dir: Path | None,
    advice: str = ANYWAY,
    device: str = "auto",
) -> datasets.DataSet:
    """The images that ``what`` was trained on, or those of ``dataset``, if its classes are the same.

    Where they are: the flags, else the run, else what the ``header`` says. ``RunError`` with ``advice`` where they
    have changed. ``device`` is where a teacher answers for images without labels.
    """
    config = data_config(run, header, dataset, data_dir)
    data = load_data(config, run.recipe if run else None, device)
    known = list(map(nfc, header["classes"]))
    if set(known) != set(data.classes):
        raise DataError(
            f"{what} knows the classes {', '.join(known[:5])}... ({len(known)}), {data.name} "
            f"has {', '.join(data.classes[:5])}... ({len(data.classes)}): they must be the same"
        )
    data = datasets.in_order(data, known)  # that of a teacher, where images without labels had its answers
    if dataset is None:
        check_unchanged(data, header["dataset_digest"], what, advice)
    elif data.name == header["dataset"].removesuffix(datasets.ANSWERED) and data.digest != header["dataset_digest"]:
        say(
            f"warning: the images of {data.name} have changed since {what} was trained, or are split in another way: "
            "where it was trained on some that are test images now, it is measured too high"
        )
    return data


def data_config(run: Run | None, header: Mapping[str, Any], dataset: str | None, data_dir: Path | None) -> Data:
    of_run = run.recipe.data if run else None
    try:
        named = None if dataset is None else Data.model_validate({"dataset": dataset, "data_dir": data_dir})
    except ValidationError as error:
        (item,) = error.errors()
        odd = "should be cifar10, cifar100, digits, or folder:PATH"
        why = odd if item["type"] == "string_pattern_mismatch" else recipe.explained("it", item)
        raise DataError(f"--dataset {dataset}: {why}") from error
    if of_run is None:
        name = header["dataset"]
        if dataset is None and name.startswith("folder"):
            raise DataError(f"the model was trained on {name}; say where it is by --dataset folder:PATH")
        split = header.get("split", {}) if (named or Data(dataset=name)).title == name else {}
        of_run = Data.model_validate(
            {"dataset": dataset or name, "image_size": header["image_size"], **split, "val_size": 0}
        )
    changes: dict[str, Any] = {}
    if named is not None:
        # Test images are what is wanted, with labels of their own.
        changes |= {"dataset": dataset, "images": None, "val_size": 0, "unlabelled": False}
        if named.title != of_run.title:  # others have paths of their own, too
            changes |= {"group_by": None, "skip_broken": True, "skip_leaks": True}
    elif run is not None and run.images.is_file():
        changes["images"] = run.images
    if data_dir is not None:
        changes["data_dir"] = data_dir
        if dataset is None and of_run.kind == "folder":  # a folder is named by its path: it has moved
            changes["dataset"] = "folder"
    return Data.model_validate(of_run.model_dump() | changes)


def _teacher_logits(run: Run, data: datasets.DataSet, device: torch.device) -> np.ndarray | None:
    """The teacher's logits on the test set, or None where there is no teacher any more."""
    if not run.recipe.distils:
        return None
    try:
        assert run.recipe.teacher is not None
        teacher = teaching.load(run.recipe, data.classes)[0]  # the very one, by its weights
    except (TeacherError, CheckpointError, RunError) as error:
        say(f"the comparison with the teacher is left out: {error}")
        return None
    teacher = teacher.to(device).to(memory_format=torch.channels_last)
    return engine.predict(teacher, data.test.images, device)


# --- the whole chain ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """What ``pipeline`` made. ``metrics`` are those of ``validate``, with a baseline also ``baseline_top1``."""

    student: Run
    metrics: dict[str, Any]
    exported: Exported
    seconds: float


def pipeline(
    source: str | Path,
    overrides: Mapping[str, Any],
    root: Path | None = None,
    resume: bool = False,
    baseline: bool = False,
) -> Chain:
    """Teacher, student, report and artifact from one recipe file; ``root`` holds the run directories."""
    if distributed.SIZE > 1:  # each would measure and export
        raise UserError(
            "pipeline is for one process: start `toolkit train` and `toolkit distill` by torchrun, then `toolkit "
            "validate` and `toolkit export` without it"
        )
    began = time.monotonic()
    teacher_recipe = recipe.resolve(source, "train", overrides)
    student_recipe = recipe.resolve(source, "distill", overrides)
    if not student_recipe.distils or student_recipe.teacher is None:
        raise RecipeError("pipeline distils, and this recipe asks no teacher: add --set distill.loss.kd_weight=0.9")
    if student_recipe.teacher.checkpoint is not None:
        raise RecipeError("pipeline trains the teacher: `toolkit distill` takes one that is trained")
    check(student_recipe)
    with within("pipeline` and --resume"):
        teacher = train(teacher_recipe, root and root / "teacher", resume)
        student_recipe = from_teacher(student_recipe, teacher)
        student = distill(student_recipe, root and root / "student", resume)
        alone = train_baseline(student_recipe, student, root and root / "baseline", resume) if baseline else None
    device = student_recipe.device
    metrics, _ = validate(student.path, device=device)
    if alone is not None:
        metrics["baseline_top1"] = validate(alone.path, device=device)[0]["top1"]
    from toolkit import artifacts

    exported = artifacts.export(student.path, provider="cpu" if device == "cpu" else "auto")
    return Chain(student, metrics, exported, time.monotonic() - began)


SHARED = ("seed", "device", "data", "balance", "teacher", "train", "deterministic", "probe")


@contextmanager
def within(command: str) -> Iterator[None]:
    """Of a training that is interrupted within a longer command, say what goes on with all of it."""
    try:
        yield
    except Interrupted as error:
        raise Interrupted(f"{error}; all of it goes on with the same `toolkit {command}") from error


def train_teacher(wanted: Recipe, source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any]) -> Run:
    """The run of the teacher that ``wanted``, made of ``source`` and ``overrides``, learns from.

    Of the overrides it takes those of data, teacher, device and repeatability, and what ``train.`` sets: other lengths
    and rates are the student's.
    """
    check(wanted)
    shared = {path: value for path, value in overrides.items() if path.split(".")[0] in SHARED}
    with within("distill` or `toolkit compare`"):
        return train(recipe.resolve(source, "train", shared), resume=True)


def from_teacher(wanted: Recipe, run: Run) -> Recipe:
    """The recipe with this run as its teacher, where it wants one."""
    if wanted.teacher is None:
        return wanted
    return wanted.model_copy(update={"teacher": wanted.teacher.model_copy(update={"checkpoint": run.path})})
