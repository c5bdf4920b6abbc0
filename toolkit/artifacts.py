"""The stage ``export``: a finished run becomes the file that ships, or the proof that it does not."""

from __future__ import annotations

import io
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import nn

from export import inspection, onnx_export, parity, quantise, triton
from export.artifact import Metadata
from export.preprocess import nhwc
from serve.session import CPU as CPU_PROVIDER
from serve.session import Session, check_provider
from toolkit import data as datasets
from toolkit import engine, report, stages
from toolkit.bench import alternate
from toolkit.catalogue import check_budget, mac_count, parameter_count
from toolkit.choices import Precision, Provider, Views
from toolkit.classifier import Classifier, TestTimeAugmentation, with_views
from toolkit.compute import without_tf32
from toolkit.errors import ArtifactError, DataError, DeviceError, ParityError, RunError, UserError, in_line
from toolkit.files import check_free, check_writable, write_bytes, write_text
from toolkit.progress import say
from toolkit.recipe import Data, Recipe
from toolkit.run import Run, environment, load_run

EXAMPLES = 8  # test images beside an artifact, for the page
FITTED_ON = 1000  # val images: the temperature is one number
CHOSEN_ON = 2000  # val images for INT8's calibration method
HELD = 2**17  # images of 32 pixels, 384 MiB: of larger ones no more are held at once than take as much
SPEED_BATCHES = (1, 64)
SPEED_ROUNDS = 5
FASTER = 1.05  # what counts as measured faster: less is noise
TUNING_LR = 1e-4  # larger steps move more answers than the rounding does
CPU = torch.device("cpu")


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Options:
    """What an artifact is to be, and what it may cost.

    ``max_drop``: top-1 on the test set, a fraction, that a lower precision may lose. ``any_size``: the graph crops and
    resizes. ``calibrated``: divide the logits by the temperature that was fitted on val. ``views``: of each image,
    averaged in the graph. ``calibration_images``: of the training set, for INT8's ranges. ``tuning_epochs``: of
    quantisation-aware fine-tuning before INT8. ``even_if_slower``: ship a precision for another machine than this one.
    ``tf32``: CUDA may round to 10 bits of mantissa. ``licence``: of the weights. ``budget``: a student has fewer
    parameters (None: the run's). ``triton``: a folder for a model repository. ``force``: replace files that exist.
    Raises pydantic's ``ValidationError`` for another value or name.
    """

    precision: Literal[Precision, "auto"] = "fp32"
    max_drop: float = parity.MAX_DROP
    opset: int = onnx_export.OPSET
    any_size: bool = False
    calibrated: bool = False
    views: Views | None = None
    calibration_images: int = 512
    tuning_epochs: int = 0
    even_if_slower: bool = False
    tf32: bool = False
    licence: str | None = None
    budget: int | None = None
    triton: Path | None = None
    force: bool = False


# What only some precisions take: the field of ``Options``, its flag, the precisions.
ONLY_FOR: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("tuning_epochs", "--fine-tune", ("int8", "auto")),
    ("calibration_images", "--calibration-images", ("int8", "auto")),
    ("even_if_slower", "--even-if-slower", ("fp16", "int8")),
)


@dataclass(frozen=True)
class Candidate:
    """An artifact that was made and measured. ``speed`` is to fp32: the geometric mean over the batch sizes."""

    graph: onnx.ModelProto
    metadata: Metadata
    session: Session
    bytes: int
    parity: parity.ParityReport
    milliseconds: dict[int, float]
    speed: float = 1.0

    def refused(self, options: Options) -> str | None:
        """Why it is not shipped, or None."""
        if self.parity.failures:
            tunable = self.metadata.precision == "int8" and not options.tuning_epochs
            return self.parity.failures[0] + (" (--fine-tune 1 may win that back)" if tunable else "")
        if self.metadata.precision != "fp32" and self.speed < FASTER and not options.even_if_slower:
            return f"{self.speed:.2f} times as fast as fp32 here, at least {FASTER:g} is wanted (or --even-if-slower)"
        return None


@dataclass(frozen=True)
class Exported:
    """``rows``: a line for each precision, of one that could not be made with nothing but why; ``report`` holds them
    and ``parity``, of what is shipped."""

    path: Path
    metadata: Metadata
    parity: parity.ParityReport
    rows: list[dict[str, Any]]
    report: Path
    card: Path
    triton: Path | None


def export(
    target: str | Path | None = None,
    output: str | Path | None = None,
    data_dir: str | Path | None = None,
    provider: Provider = "auto",
    options: Options | None = None,
) -> Exported:
    """Write a finished run's model as an ONNX artifact, and hold it against PyTorch.

    The session that is compared is opened as ``serve`` opens it. Where the precision that was asked for does not
    pass, ``ParityError`` is raised: the measurements are kept in refused.json, nothing else is touched. Without
    ``output`` the run's own artifact is replaced. Raises ``UserError`` too for options that do not go together, a file
    that exists, or a precision that cannot be made of this model; ``RunError``, ``DataError``, ``BudgetError``,
    ``DeviceError`` and ``ArtifactError``.
    """
    options = options or Options()
    onnx_export.check_opset(options.opset)
    check_provider(provider)
    check_options(options)
    if target is None:
        run = stages.newest_run()
        say(f"exporting the newest {run.recipe.role}, {run.path}")
    else:
        run = _run_at(Path(target))
    output, data_dir = (None if path is None else Path(path) for path in (output, data_dir))
    path, card, parity_report, examples = _files(run, output, options)
    refused = parity_report.with_name(parity_report.name.replace("parity.json", "refused.json"))
    model, header = load_run(run)
    if header["role"] == "student":
        check_budget(
            header["model"], parameter_count(model), options.budget or run.recipe.budget, len(header["classes"])
        )
    elif options.budget is not None:
        raise UserError(f"--budget is for students, {run.path} is a teacher: leave it out")
    advice, device = "export needs the same ones, else train again", "cpu" if provider == "cpu" else "auto"
    data = stages.data_of(run, header, run.path, None, data_dir, advice, device)
    if wants(options, "int8"):
        check_calibration_count(options.calibration_images, data)

    network = with_views(model, options.views)
    temperature = fitted_temperature(network, data)
    if options.calibrated and temperature is None:
        raise DataError("--calibrate needs a validation split to fit the temperature on: data.val_size is 0")
    about = describe(header, model, options, temperature)
    with without_tf32():  # which a training on CUDA in this process has allowed
        reference = parity.Reference(
            onnx_export.deployed(network, about), data.test.images, data.test.labels, any_size=options.any_size
        )
    plain = reference.expected[0] if options.views is None else engine.predict(model, data.test.images, CPU)
    about = about.model_copy(update={"plain_accuracy": float((plain.argmax(1) == reference.labels).mean())})

    measure = partial(measured, reference=reference, provider=provider, options=options)
    graph = onnx_export.build(network, about, options.opset)
    fp32 = measure(graph, about)
    if fp32.parity.failures:
        _write_parity(refused, fp32, [_row(fp32, options)])
    fp32.parity.raise_if_failed()
    candidates = [fp32]
    tuned = graph
    if wants(options, "int8") and options.tuning_epochs:
        images = stages.data_config(run, header, None, data_dir)
        model = load_run(fine_tuned(run, images, options.tuning_epochs, device))[0]
        tuned = onnx_export.build(with_views(model, options.views), about, options.opset)

    def half() -> Candidate:
        return measure(quantise.half(graph), about.model_copy(update={"precision": "fp16"}))

    def int8() -> Candidate:
        scheme = quantise.scheme_for(gpu=fp32.session.provider != CPU_PROVIDER)
        return measure(*best_int8(tuned, about, data, scheme, provider, options))

    lower: dict[Precision, Callable[[], Candidate]] = {"fp16": half, "int8": int8}
    impossible: dict[Precision, str] = {}
    for precision, make in lower.items():
        if wants(options, precision):
            try:
                candidates.append(make())
            except (*quantise.REFUSED, ArtifactError, DeviceError, ParityError) as error:
                impossible[precision] = f"it cannot be made of this model: {in_line(error, 200)}"
                if options.precision == precision:
                    raise UserError(f"{precision} is not shipped: {impossible[precision]}") from error
    if len(candidates) > 1:
        candidates = raced(candidates)
    rows = [_row(one, options) for one in candidates]
    rows += [dict.fromkeys(rows[0]) | {"precision": name, "refused": why} for name, why in impossible.items()]
    passing = [one for one in candidates if one.refused(options) is None]
    if options.precision == "auto":
        chosen = max(passing, key=lambda one: one.speed)
    else:
        chosen = candidates[-1]
    if chosen not in passing:
        _write_parity(refused, chosen, rows)
        raise ParityError(
            f"{chosen.metadata.precision} is not shipped: {chosen.refused(options)}. The measurements are in {refused}"
        )
    onnx_export.save(chosen.graph, chosen.metadata, path)
    _write_parity(parity_report, chosen, rows)
    refused.unlink(missing_ok=True)  # of an export before
    write_text(card, inspection.model_card(inspection.describe(path)))
    _write_examples(examples, data)
    repository = triton.write_repository(path, options.triton, options.force) if options.triton else None
    return Exported(path, chosen.metadata, chosen.parity, rows, parity_report, card, repository)


def _run_at(path: Path) -> Run:
    """The run directory at ``path``, or ``RunError``, which says of a file in one what to give."""
    if not path.is_file():
        return Run(path)
    own = next((folder for folder in path.resolve().parents[:2] if (folder / "recipe.yaml").is_file()), None)
    advice = f"give {own}, in which it lies" if own else "`toolkit train` and `toolkit distill` make one"
    raise RunError(f"{path} is a file, and export takes a run directory: {advice}")


def _files(run: Run, output: Path | None, options: Options) -> tuple[Path, Path, Path, Path]:
    """Where artifact, card, parity report and examples will be written. Raises ``UserError`` where they cannot."""
    path = output or run.artifact
    card = path.with_suffix(".md")
    parity_report = path.with_name(f"{path.stem}.parity.json" if output else "parity.json")
    examples = path.with_suffix(".examples") if output else path.with_name("examples")
    if path.suffix != ".onnx":
        raise UserError(f"--output {path} must end in .onnx")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a directory")
    for file in (path, card, parity_report, examples) if output else ():
        check_free(file, options.force)
    if options.triton is not None:
        check_free(options.triton / path.stem, options.force)
        check_writable(options.triton / path.stem)
    check_writable(path)
    return path, card, parity_report, examples


def wants(options: Options, precision: Precision) -> bool:
    return options.precision in (precision, "auto")


def check_options(options: Options) -> None:
    """Raise ``UserError`` for an option that the chosen precision has no use for."""
    for field, flag, precisions in ONLY_FOR:
        if options.precision not in precisions and getattr(options, field) != getattr(Options(), field):
            raise UserError(
                f"{flag} has no use for {options.precision}: leave it out, or add --precision {' or '.join(precisions)}"
            )


def describe(header: Mapping[str, Any], model: Classifier, options: Options, temperature: float | None) -> Metadata:
    """What is known of an artifact before it is measured."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        created = epoch and datetime.fromtimestamp(int(epoch), UTC).isoformat()
    except (ValueError, OverflowError, OSError) as error:  # the others where the year is beyond what there is
        raise UserError(f"SOURCE_DATE_EPOCH (={epoch!r}) must be a number of seconds since 1970") from error
    return Metadata(
        model=header["model"],
        labels=tuple(header["classes"]),
        image_size=header["image_size"],
        any_size=options.any_size,
        parameters=parameter_count(model),
        macs=mac_count(model, header["image_size"]),
        recipe_digest=header["recipe_digest"],
        dataset=header["dataset"],
        dataset_digest=header["dataset_digest"],
        split=header.get("split", {}),
        views=len(TestTimeAugmentation(model, options.views).weights) if options.views else 1,
        temperature=temperature,
        calibrated=options.calibrated,
        teacher=header["teacher"],
        licence=options.licence,
        created=created or None,
        versions=environment()["versions"],
    )


def fitted_temperature(network: nn.Module, data: datasets.DataSet) -> float | None:
    """What logits are divided by for the least negative log-likelihood on val (Guo et al. 2017); None without val."""
    if data.val is None:
        return None
    images, labels = spread(data.val, FITTED_ON)
    logits = engine.predict(network, images, CPU).astype(np.float64)
    # All of n right do not prove the next one: without this doubt the temperature would go to 0 (Platt 1999).
    doubt = 1 / (len(labels) + 2) if (logits.argmax(1) == labels).all() else 0.0

    def nll(log_temperature: float) -> float:
        log_p = log_softmax(logits / math.exp(log_temperature), axis=1)
        return float(-((1 - doubt) * log_p[np.arange(len(labels)), labels] + doubt * log_p.mean(1)).mean())

    # Six digits: more would differ from machine to machine.
    return float(f"{math.exp(minimize_scalar(nll, bounds=(-4, 4), method='bounded').x):.6g}")


def spread(split: datasets.Split, most: int) -> tuple[torch.Tensor, np.ndarray]:
    """Up to ``most`` images and labels from all over the split: those of a folder come class by class.

    Large images are fewer: they are held in memory.
    """
    count = min(len(split), holdable(split, most))
    index = torch.arange(count) * len(split) // count
    return split.images[index], split.labels[index].numpy()


def holdable(split: datasets.Split, most: int) -> int:
    return min(most, datasets.at_once(split.images.shape[-1], HELD))


def measured(
    graph: onnx.ModelProto,
    about: Metadata,
    reference: parity.Reference,
    provider: Provider,
    options: Options,
) -> Candidate:
    """The graph in the session that would be deployed, and how it compares; its metadata say what it reaches."""
    session, size = opened(graph, about, provider, options)
    answers = reference.answers(session.run)
    tolerance = parity.tolerance(about.precision, session.tf32, session.provider != CPU_PROVIDER, options.max_drop)
    result = parity.compare(
        session.run,
        reference,
        answers,
        provider=session.provider,
        precision=about.precision,
        tf32=session.tf32,
        tolerance=tolerance,
    )
    if not result.failures:
        metrics = report.measure(answers[0], reference.labels, about.labels)
        update = {"accuracy": metrics["top1"], "ece": metrics["ece"], "test_images": metrics["n"]}
        about = about.model_copy(update=update)
    return Candidate(graph, about, session, size, result, {})


def opened(graph: onnx.ModelProto, about: Metadata, provider: Provider, options: Options) -> tuple[Session, int]:
    """A graph as the server would open it, and its size in bytes."""
    content = onnx_export.to_bytes(graph, about)
    return Session(content, provider, tf32=options.tf32), len(content)


def check_calibration_count(count: int, data: datasets.DataSet) -> None:
    """Raise ``DataError`` unless INT8 can be calibrated with so many of the training images."""
    # Without a validation split some images must be left to choose the calibration method by.
    chosen_by = quantise.FEWEST if data.val is None else 0
    most = len(data.train) - chosen_by
    if most < quantise.FEWEST:
        raise DataError(
            f"INT8 is calibrated on at least {quantise.FEWEST} training images"
            + (f", and without val {chosen_by} more choose how" if chosen_by else "")
            + f"; {data.name} has {len(data.train)}: take --precision fp32 or fp16"
        )
    if not quantise.FEWEST <= count <= most:
        raise DataError(
            f"--calibration-images {count} must be between {quantise.FEWEST} and {most:,}: {data.name} has "
            f"{len(data.train):,} training images"
        )


def best_int8(
    graph: onnx.ModelProto,
    about: Metadata,
    data: datasets.DataSet,
    scheme: quantise.Scheme,
    provider: Provider,
    options: Options,
) -> tuple[onnx.ModelProto, Metadata]:
    """The graph in INT8 by the calibration method that answers val best, and metadata that say which that was.

    Without a validation split the methods are compared on training images that calibrated nothing.
    """
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    index, rest = order.split([options.calibration_images, len(order) - options.calibration_images])
    images = nhwc(data.train.images[index.sort().values])
    chosen_on = data.val
    if chosen_on is None:
        chosen_on = data.train.select(rest[: holdable(data.train, CHOSEN_ON)].sort().values)
    some, labels = spread(chosen_on, CHOSEN_ON)
    shown = nhwc(some)
    tried = []
    for method in quantise.METHODS:
        quantised = quantise.int8(graph, images, method, scheme)
        logits = opened(quantised, about, provider, options)[0].run_batches(shown, 64)[0]
        top1 = float((logits.argmax(1) == labels).mean())
        nll = float(-log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels].mean())
        say(f"INT8 calibrated by {method}: {'val' if data.val else 'training'} top-1 {top1:.2%}, NLL {nll:.4f}")
        tried.append((top1, -nll, method, quantised))
    _, _, method, best = max(tried, key=lambda one: one[:2])
    tuned = f", after {options.tuning_epochs} epochs of fine-tuning" if options.tuning_epochs else ""
    calibrated = options.calibration_images // quantise.BATCH * quantise.BATCH  # whole batches
    words = f"{scheme.name} QDQ, per channel, {method} on {calibrated} training images{tuned}"
    return best, about.model_copy(update={"precision": "int8", "quantisation": words})


def fine_tuned(run: Run, images: Data, epochs: int, device: str) -> Run:
    """A short run of the one training loop from this run's weights, in which convs and products round as INT8 does.

    Data and augmentation are those of the run. A student is taught by its own fp32 weights, as the artifact will be
    held to their answers; a teacher learns from the labels as before. The new run lies within the run directory, and
    is found again there.
    """
    own = run.recipe.model_dump()
    changes: dict[str, Any] = {
        "data": images,
        "start_from": run.checkpoint("best"),
        "int8": True,
        "epochs": epochs,
        "optimizer": {"name": "sgd", "lr": TUNING_LR, "weight_decay": 0},
        "schedule": {"name": "cosine"},
        "probe": False,
        "device": device,  # of this machine, which need not be the one that the run was made on
    }
    if run.recipe.role == "student":
        changes["teacher"] = own["student"] | {"checkpoint": run.path}
        changes["loss"] = {"ce_weight": 0, "kd_weight": 1, "temperature": 1}
        changes["balance"] = "sampling" if own["balance"] == "sampling" else "none"  # weights are the labels'
    # What belongs to the length of the whole training is left at its defaults.
    dropped = ("cached_epochs", "batch_growth", "early_stop", "progressive", "average_decay", "swa_start", "select")
    wanted = Recipe.model_validate({key: value for key, value in own.items() if key not in dropped} | changes)
    # The digests tell apart what was trained on since, and the places that it was called by.
    folder = run.path / f"int8-{epochs}-{run.recipe.digest()[:8]}-{wanted.digest()[:8]}"
    fit = stages.distill if wanted.distils else stages.train
    with stages.within("export`"):
        return fit(wanted, folder, resume=True)


def raced(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with their times; they take turns, fp32 among them."""
    size = candidates[0].metadata.image_size
    times: list[dict[int, float]] = [{} for _ in candidates]
    for batch in SPEED_BATCHES:
        images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        calls = [partial(one.session.run, images) for one in candidates]
        for own, seconds in zip(times, alternate(calls, SPEED_ROUNDS), strict=True):
            own[batch] = 1000 * statistics.median(seconds)
    return [
        replace(
            one,
            milliseconds=own,
            speed=statistics.geometric_mean([times[0][batch] / own[batch] for batch in SPEED_BATCHES]),
        )
        for one, own in zip(candidates, times, strict=True)
    ]


def _row(one: Candidate, options: Options) -> dict[str, Any]:
    return {
        "precision": one.metadata.precision,
        "quantisation": one.metadata.quantisation,
        "bytes": one.bytes,
        "top1": one.parity.top1_artifact,
        "drop": one.parity.drop,
        "agreement": one.parity.agreement,
        "milliseconds": one.milliseconds,
        "speed": one.speed,
        "refused": one.refused(options),
    }


def _write_parity(path: Path, one: Candidate, rows: Sequence[Mapping[str, Any]]) -> None:
    """The report on ``one``, and a line for each precision."""
    write_text(path, json.dumps(one.parity.document() | {"precisions": rows}, indent=2))


def _write_examples(folder: Path, data: datasets.DataSet) -> None:
    """The first test image of each of the first classes, as PNG, for the page."""
    for old in folder.glob("*.png"):
        old.unlink()
    for index, name in enumerate(data.classes[:EXAMPLES]):
        found = (data.test.labels == index).nonzero()
        if len(found):
            buffer = io.BytesIO()
            Image.fromarray(nhwc(data.test.images[found[0]])[0]).save(buffer, "PNG")
            safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
            write_bytes(folder / f"{index:02}-{safe}.png", buffer.getvalue())
