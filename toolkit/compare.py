"""Methods beside each other, and beside no teacher at all: the same student, recipe, data and steps, several seeds.

A method is a distillation loss by its name, or a YAML file with the recipe fields that make it. Each method, and the
baseline without a teacher, is run with each seed; all learn from the same trained teacher. The test set is read once
the last run is finished. The output directory holds

soft_targets-0/ ...   the run directories, named after method and seed
report.md  results.json  differences.png

Nothing here imports torch before the methods' names are known to be right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import losses
from toolkit import recipe as recipes
from toolkit.catalogue import closest, mac_count, parameter_count
from toolkit.errors import Interrupted, RecipeError, RunError, TeacherError
from toolkit.progress import clock, say
from toolkit.recipe import Recipe, Teacher
from toolkit.run import RUNS, Run, load_run, runs

if TYPE_CHECKING:
    from torch import nn

    from toolkit.data import DataSet

BASELINE = "baseline"
# What a method may be made of. All else is shared, or a difference would say nothing of the method.
OWN = ("loss", "augment", "cached_epochs")
WITHOUT_VAL = "without a val split the test images would choose the best method: set data.val_size above 0"


# --- what is compared --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The recipe of each method with the first seed, the baseline first; the seeds; where the runs lie."""

    methods: dict[str, Recipe]
    seeds: range
    output: Path

    @property
    def baseline(self) -> Recipe:
        return self.methods[BASELINE]

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Method and seed of all runs, seed by seed: what is there after an early end can be compared."""
        return [(method, seed) for seed in self.seeds for method in self.methods]

    def recipe(self, method: str, seed: int) -> Recipe:
        return self.methods[method].model_copy(update={"seed": seed, "probe": False})

    def path(self, method: str, seed: int) -> Path:
        return self.output / f"{method}-{seed}"


def make_plan(
    methods: Sequence[str],
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any],
    seeds: int,
    output: Path | None = None,
) -> Plan:
    """The plan of ``toolkit compare METHODS... --seeds N``; the seeds are the recipe's and those after it.

    Raises ``RecipeError`` for a method that is neither a loss nor a file, or changes what all share, and
    ``TeacherError`` where the recipe names no teacher.
    """
    base = recipes.resolve(source, "distill", overrides)
    if base.teacher is None:
        raise TeacherError(f"the recipe {base.name} names no teacher: give one by --teacher NAME")
    recipes.check_length(base)
    for path in ("early_stop.patience", "batch_growth.patience"):
        if recipes.at_path(base.model_dump(), path) is not None:
            raise RecipeError(f"{path} gives each run steps of its own: --set {path}=null")
    if base.data.kind != "folder" and not base.data.val_size:  # a folder may bring its own
        raise RecipeError(WITHOUT_VAL)
    if base.starts_from_teacher:
        raise RecipeError(
            "start_from=teacher gives the methods weights that the baseline cannot have: name others by "
            "--set start_from=RUN, or none by --set start_from="
        )
    found: dict[str, Recipe] = {}
    for method in methods:
        name, changes = _read_method(method, base)
        if name in found or name == BASELINE:
            raise RecipeError(f"two methods are called {name}: each needs a name of its own")
        try:
            found[name] = recipes.resolve(source, "distill", {**overrides, **changes})
        except RecipeError as error:
            raise RecipeError(f"{method}: {error}") from error
        if shared := [path for path in changes if path.partition(".")[0] not in OWN]:
            raise RecipeError(f"{method} sets {shared[0]}, which all methods share: it may set {', '.join(OWN)}")
        if found[name].augment.copies != base.augment.copies:  # an epoch would be twice as long
            raise RecipeError(f"{method} sets augment.plain_copy, which all methods share")
    from toolkit.stages import without_teacher  # imports torch: a misspelt name is told before that

    output = output or RUNS / f"compare-{base.model.name}-{base.data.kind}-{base.digest()[:8]}"
    return Plan({BASELINE: without_teacher(base), **found}, range(base.seed, base.seed + seeds), output)


def _read_method(method: str, base: Recipe) -> tuple[str, dict[str, Any]]:
    """The name of a method and, by their paths, the recipe fields that it sets."""
    if Path(method).suffix in (".yaml", ".yml"):
        changes = recipes.as_overrides(recipes.read_mapping(method, Path(), "method", RecipeError))
        changes.pop("name", None)
        return Path(method).stem, {path.removeprefix("distill."): value for path, value in changes.items()}
    if method not in losses.names():
        raise RecipeError(f"there is no method {method!r}, and it is no YAML file{closest(method, losses.names())}")
    if not base.distils:
        raise RecipeError(f"the recipe {base.name} does not distil: give --set loss.kd_weight= and loss.ce_weight=")
    return method, {"loss.methods": {method: base.loss.methods.get(method, {})}}


# --- running it --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What came of one run.

    Top-1, ``agreement`` with the teacher and ``ece`` are fractions, of the test images but for ``val_top1``; ``kl`` is
    the mean KL(teacher || student) in nats. ``teacher_seconds`` are those of the pass that fills the cache of the
    teacher's logits; where the teacher runs in every step instead, they are part of ``train_seconds``. FLOPs: see
    ``flops``; None where they are not known.
    """

    method: str
    seed: int
    run: str
    val_top1: float
    top1: float
    agreement: float
    kl: float
    ece: float
    train_seconds: float
    teacher_seconds: float
    student_flops: int
    teacher_flops: int | None


@dataclass(frozen=True)
class Comparison:
    """The runs of a plan, in the order of ``Plan.runs``, and what they have in common."""

    plan: Plan
    results: list[Result]
    facts: dict[str, Any]


def compare(plan: Plan) -> Comparison:
    """Train what is not finished, then read the test set and measure all runs.

    The same plan goes on where it was stopped. Before the first step this raises whatever is wrong with data,
    student, teacher, methods or directories; ``Interrupted`` after Ctrl-C or SIGTERM.
    """
    from toolkit import stages, teaching

    data = stages.check(plan.baseline)
    if data.val is None:
        raise RecipeError(WITHOUT_VAL)
    base = next(recipe for recipe in plan.methods.values() if recipe.teacher is not None)
    teacher, known, _ = teaching.load(_with_its_teacher(base, plan), data.classes)
    methods = {  # whichever is the newest run later on: the teacher stays the same
        method: recipe.model_copy(update={"teacher": known}) if recipe.distils else recipe
        for method, recipe in plan.methods.items()
    }
    plan = replace(plan, methods=methods)
    _check(plan, data, teacher)
    _train(plan, data, teacher, known)
    return _measure(plan, data, teacher, known)


def _with_its_teacher(base: Recipe, plan: Plan) -> Recipe:
    """The recipe with the weights that the plan's finished or unfinished runs learn from, unless it names some."""
    assert base.teacher is not None
    if base.teacher.checkpoint is None and not base.teacher.external:
        for method, seed in plan.runs:
            path = plan.path(method, seed)
            run = Run.at(path)
            known = run.recipe.teacher if run else None
            same = known is not None and (known.name, known.arguments) == (base.teacher.name, base.teacher.arguments)
            weights = known.checkpoint if known is not None and same else None
            if weights is not None and weights.is_file():
                return base.model_copy(update={"teacher": base.teacher.model_copy(update={"checkpoint": weights})})
    return base


def _check(plan: Plan, data: DataSet, teacher: nn.Module) -> None:
    """Raise what is wrong with a method for this student and teacher, before the runs of another one are trained."""
    from toolkit import learner
    from toolkit.objective import Objective

    for method, recipe in plan.methods.items():
        try:
            model = learner.new_model(recipe, data)
            objective = Objective(recipe, model, teacher if recipe.distils else None)
        except RecipeError as error:
            raise RecipeError(f"{method}: {error}") from error
        if objective.hooked:
            objective.teacher.remove()


def _train(plan: Plan, data: DataSet, teacher: nn.Module, known: Teacher) -> None:
    from toolkit import external, stages, teaching

    waiting = _waiting(plan, data)
    if waiting:  # a poor teacher is told before the first baseline is trained
        teaching.preflight(teacher, known, data, plan.baseline)
    recipe = plan.baseline
    say(
        f"comparing {', '.join(plan.methods)} by {recipe.model.name} on {data.name}: {recipe.epochs} epochs each, "
        f"seeds {', '.join(map(str, plan.seeds))}; the teacher is {external.titles(known)}"
    )
    seconds = _estimate(plan, waiting, data, teacher)
    kept = f", {len(plan.runs) - len(waiting)} finished before" if len(waiting) < len(plan.runs) else ""
    left = f"; about {clock(sum(seconds.values()))}, judged by two steps on this machine" if waiting else ""
    say(f"{len(plan.runs)} runs in {plan.output}{kept}{left}")
    began, reckoned = time.monotonic(), 0.0
    for done, (method, seed) in enumerate(waiting, 1):
        try:
            run = stages.distill(plan.recipe(method, seed), plan.path(method, seed), resume=True)
        except Interrupted as error:
            raise Interrupted(
                f"stopped in {plan.path(method, seed)}, all of it is saved; the same `toolkit compare` goes on"
            ) from error
        reckoned += seconds.pop((method, seed))
        slower = (time.monotonic() - began) / reckoned if reckoned else 1  # a run may lack no epoch, only its end
        left = clock(slower * sum(seconds.values()))
        say(f"{run.path} is finished, {done} of {len(waiting)} runs" + (f"; about {left} left" if seconds else ""))


def _waiting(plan: Plan, data: DataSet) -> list[tuple[str, int]]:
    """The runs that are not finished. Raises ``RunError`` where a directory holds another run, or other images."""
    from toolkit import stages

    waiting = []
    for method, seed in plan.runs:
        path = plan.path(method, seed)
        run = Run.at(path)
        if run is not None and (differences := run.recipe.differences(plan.recipe(method, seed))):
            raise RunError(
                f"{path} holds another run; differing: {'; '.join(differences)}. Choose another --output, or call the "
                "method otherwise."
            )
        if run is None or not run.finished:
            waiting.append((method, seed))
        else:
            digest = run.summary()["dataset_digest"]
            stages.check_unchanged(data, digest, path, "move it away, or choose another --output")
    return waiting


def _estimate(
    plan: Plan, waiting: Sequence[tuple[str, int]], data: DataSet, teacher: nn.Module
) -> dict[tuple[str, int], float]:
    """Seconds that each of these runs still takes, judged by a few images on this machine."""
    from toolkit import compute, learner

    base = plan.baseline
    learning = compute.seconds_an_image(learner.new_model(base, data), base, backward=True)
    teaching = compute.seconds_an_image(teacher, base, backward=False)
    found, kept = {}, set()
    for method, seed in waiting:
        recipe, run = plan.recipe(method, seed), Run.at(plan.path(method, seed))
        done = len(run.history()) if run else 0
        replayed = recipe.cached_epochs > 0 and _views(recipe) in kept
        taught = 0.0 if replayed else teaching
        found[method, seed] = training_seconds(recipe, recipe.epochs - done, len(data.train), learning, taught)
        if recipe.distils:
            kept.add(_views(recipe))
    return found


def training_seconds(recipe: Recipe, epochs: int, originals: int, learning: float, teaching: float) -> float:
    """Seconds of so many epochs on so many images.

    ``learning`` are those of one image in the student, forward and back, ``teaching`` those in the teacher.
    """
    samples = originals * recipe.augment.copies
    images = epochs * samples * _passes(recipe)
    return images * learning + _taught(recipe, epochs, images, samples) * teaching


def _passes(recipe: Recipe) -> int:
    """Forward and backward passes a step."""
    return 2 if recipe.optimizer.sam_radius else 1


def _taught(recipe: Recipe, epochs: int, images: int, samples: int) -> int:
    """Images that the teacher answers in so many epochs of ``samples``, in which the student is shown ``images``."""
    if not recipe.distils:
        return 0
    return min(recipe.cached_epochs, epochs) * samples if recipe.cached_epochs else images


# --- measuring it ------------------------------------------------------------------------------------------


def _measure(plan: Plan, data: DataSet, teacher: nn.Module, known: Teacher) -> Comparison:
    import torch

    from toolkit import compute, engine, external, learner, report

    device, test = compute.pick_device(plan.baseline.device), data.test
    teacher = teacher.to(device).to(memory_format=torch.channels_last)
    answers = engine.predict(teacher, test.images, device)
    student = learner.new_model(plan.baseline, data)
    student_macs = cache(partial(mac_count, student))
    teacher_macs = _macs(teacher, plan.baseline.data.image_size)
    shared: dict[Any, float] = {}  # the first of the runs with the same views fills the cache of logits for all
    for run in runs(plan.output):
        if run.finished:
            shared[_views(run.recipe)] = shared.get(_views(run.recipe), 0) + run.summary()["teacher_seconds"]
    results = []
    for method, seed in plan.runs:
        run = Run(plan.path(method, seed))
        model, _ = load_run(run)
        logits = engine.predict(model.to(device), test.images, device)
        metrics, summary = report.measure(logits, test.labels.numpy(), data.classes, answers), run.summary()
        samples = len(data.train) * run.recipe.augment.copies
        work = flops(run.recipe, run.history(), samples, student_macs, teacher_macs)
        results.append(
            Result(
                method=method,
                seed=seed,
                run=str(run.path),
                val_top1=summary["val_top1"],
                top1=metrics["top1"],
                agreement=metrics["agreement"],
                kl=metrics["kl"],
                ece=metrics["ece"],
                train_seconds=summary["train_seconds"],
                teacher_seconds=shared[_views(run.recipe)] if run.recipe.distils else 0.0,
                student_flops=work[0],
                teacher_flops=work[1],
            )
        )
    facts = {
        "recipe": plan.baseline.name,
        "student": plan.baseline.model.name,
        "parameters": parameter_count(student),
        "epochs": plan.baseline.epochs,
        "dataset": data.name,
        "train_images": len(data.train),
        "val_images": len(data.val or ()),
        "test_images": len(test),
        "teacher": " and ".join(one.name for one in (known, *known.also)),
        "teacher_checkpoint": external.titles(known),
        "teacher_top1": metrics["teacher_top1"],
        "device": summary["device"],
        "precision": summary["precision"],
    }
    return Comparison(plan, results, facts)


def _macs(teacher: nn.Module, image_size: int) -> int | None:
    """Multiply-accumulates of one image; None where a part of the teacher is an ONNX file: PyTorch sees none of its."""
    from toolkit.classifier import members
    from toolkit.external import External, OnnxNetwork

    if any(isinstance(one, External) and isinstance(one.network, OnnxNetwork) for one in members(teacher)):
        return None
    return mac_count(teacher, image_size)


def _views(recipe: Recipe) -> tuple[Any, ...]:
    """Runs in which this is equal share the cache of the teacher's logits."""
    return recipe.seed, recipe.augment, recipe.cached_epochs


def flops(
    recipe: Recipe,
    history: Sequence[Mapping[str, Any]],
    samples: int,
    student_macs: Callable[[int], int],
    teacher_macs: int | None,
) -> tuple[int, int | None]:
    """Floating point operations of student and teacher in a run, from its rows of metrics.jsonl.

    ``samples``: those of an epoch; ``student_macs``: multiply-accumulates of one image by its side in pixels;
    ``teacher_macs``: those of one whole image. Where they are not known (None), nor is what the teacher does, unless
    that is nothing. A multiply-accumulate is two operations. The student's forward and backward pass are three forward
    passes: the gradients of its inputs and of its weights take one each. The teacher's forward pass counts for each
    image of each step, or once for each view whose logits are cached. SAM takes all passes of a step twice. Not
    counted: evaluation on val, the loss itself, augmentation, the optimizer, and the training of the teacher.
    """
    student = images = step = 0
    for row in history:
        seen = _passes(recipe) * (row["step"] - step) * row["batch_size"]
        side = recipe.progressive.side((row["epoch"] - 1) / recipe.epochs, recipe.data.image_size)
        student += 3 * 2 * student_macs(side) * seen
        images += seen
        step = row["step"]
    taught = _taught(recipe, len(history), images, samples)
    if taught and teacher_macs is None:
        return student, None
    return student, 2 * (teacher_macs or 0) * taught
