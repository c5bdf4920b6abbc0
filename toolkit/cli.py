"""The command line: parse, make one call, print. Heavy imports stand inside the commands.

Results go to stdout, everything else to stderr. Exit code 0: success, 1: a clear error, 2: wrong usage.
"""

from __future__ import annotations

import functools
import io
import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from typer.core import TyperGroup

from toolkit import __version__
from toolkit.catalogue import BUDGET
from toolkit.choices import Balance, Precision, Provider, Sampling, Scheduling, Views
from toolkit.errors import ImageError, UserError, next_step
from toolkit.files import is_full


class Commands(TyperGroup):
    """Shows the errors that a user can put right as one line, and lets bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(str(error), next_step(error))
        except KeyboardInterrupt:
            _fail("interrupted")
        except OSError as error:
            if is_full(error):
                _fail(f"the disk is full: {error.filename or 'a file'} could not be written")
            if isinstance(error, PermissionError) and error.filename is not None:
                _fail(f"{error.filename}: permission denied; choose another place, or change who may use it")
            raise


def _fail(message: str, hint: str = "") -> None:
    print(f"error: {message}" + (f"\n{hint}" if hint and hint not in message else ""), file=sys.stderr)
    raise typer.Exit(1)


UNASKED = "this recipe asks no teacher (loss.kd_weight is 0): add --set loss.kd_weight=0.9"

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil a large image classifier into a small one, prove it, export it to ONNX and serve it.",
)


# Options that several commands share. Those of a recipe are named after the field that they set.
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="A name from toolkit/recipes/, such as own-images, or a YAML file; else that of --run-dir, or cifar10.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY.PATH=VALUE", help="Set any field of the recipe; toolkit/recipe.py describes them."
    ),
]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training images.")]
BatchSize = Annotated[int | None, typer.Option(help="Images per step.")]
LearningRate = Annotated[
    float | None, typer.Option("--lr", help="Peak learning rate; with muon, of all but the conv filters.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of weights, order and augmentation.")]
Dataset = Annotated[
    str | None, typer.Option(metavar="NAME", help="cifar10, cifar100, digits or folder:PATH.", show_default=False)
]
DataDir = Annotated[Path | None, typer.Option(help="Folder of the data set; then $TOOLKIT_DATA and ./data are tried.")]
ImageSize = Annotated[
    int | None, typer.Option(help="Side of the images, 16 to 512 pixels; else by the recipe, mostly 32.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Never download.")]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave unreadable images of a folder out.")]
SkipLeaks = Annotated[bool, typer.Option("--skip-leaks", help="Leave training images out that are in val or test too.")]
GroupBy = Annotated[
    str | None,
    typer.Option("--group-by", metavar="PATTERN", help="Images whose paths match alike stay on one side of a split."),
]
BalanceOption = Annotated[
    Balance | None, typer.Option("--balance", help="For classes of unequal size: weights in the loss, or sampling.")
]
Device = Annotated[
    str | None,
    typer.Option(metavar="auto|cpu|cuda|cuda:N", help="auto takes CUDA where PyTorch finds it; cuda fails without."),
]
RunDir = Annotated[Path | None, typer.Option(help="Run directory; else one in runs/, by model, data and recipe.")]
DataMemory = Annotated[
    float | None,
    typer.Option(help="GiB for a folder's images and a copy, else half of the memory; beyond it they stay on disk."),
]
Budget = Annotated[int | None, typer.Option(help="A student has fewer parameters than this; else 5,000,000.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Repeat to the last bit: no probe, and CUDA kernels that do, but are slower."),
]
NoProbe = Annotated[
    bool, typer.Option("--no-probe", help="Do not time precision and memory format first; take bf16 where it is fast.")
]
Extend = Annotated[
    bool, typer.Option("--extend", help="Go on with the run in --run-dir, for more --epochs than it began with.")
]
Keep = Annotated[int | None, typer.Option("--keep", help="Newest training states that are kept; else 2.")]
Log = Annotated[Literal["tensorboard"] | None, typer.Option("--log", help="Also write the metrics for TensorBoard.")]
Baseline = Annotated[bool, typer.Option("--baseline", help="Train the student without a teacher too, and compare.")]
TeacherName = Annotated[
    str | None, typer.Option("--teacher", metavar="NAME", help="Architecture of the teacher (`toolkit models`).")
]
AnyTeacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="NAME|FILE.onnx|timm:NAME",
        help="One of `toolkit models` (its newest run), an ONNX file, or a model of timm.",
    ),
]
TeacherCheckpoint = Annotated[
    Path | None,
    typer.Option(
        "--teacher-checkpoint", "--teacher-weights", help="Run directory or weights of a teacher; else the newest run."
    ),
]
TeacherSize = Annotated[
    int | None,
    typer.Option(help="Side of the images in pixels that a teacher from elsewhere takes; else by its file."),
]
TeacherLayout = Annotated[
    str | None, typer.Option(metavar="nchw|nhwc", help="Axes of its input; else by the input's shape.")
]
TeacherScale = Annotated[
    float | None, typer.Option(help="What it takes for white: 1 or 255; else its file's, or 1 (uint8: 255).")
]
TeacherMean = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Its mean, of images in 0..1; else its file's, or 0.")
]
TeacherStd = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Its standard deviation, of images in 0..1; else its file's, or 1.")
]
TeacherClasses = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="YAML: names of its outputs in order, or a mapping from outputs to classes."),
]
Init = Annotated[
    str | None,
    typer.Option("--init", metavar="pretrained|teacher|RUN|FILE", help="Weights that the student starts from."),
]
Unlabelled = Annotated[
    bool, typer.Option("--unlabelled", help="A folder without classes: the teacher's answers are all there is.")
]
TrainTeacher = Annotated[
    bool,
    typer.Option(
        "--train-teacher", help="Train the teacher first, for as long as the recipe says (--set train.epochs=N)."
    ),
]
StudentName = Annotated[
    str | None, typer.Option("--student", metavar="NAME", help="Architecture of the student (`toolkit models`).")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
TtaOption = Annotated[
    Views | None,
    typer.Option(
        "--tta", help="Also average over flip (2 views) or flip_and_shift (6 views) of each image: a figure of its own."
    ),
]
Tf32 = Annotated[bool, typer.Option("--tf32", help="Let CUDA round to 10 bits of mantissa.")]
ProviderOption = Annotated[
    Provider, typer.Option("--provider", help="ONNX Runtime's provider; auto takes CUDA where it works, else the CPU.")
]

# Each flag that sets a field of the recipe: the field, and the option.
FIELDS: dict[str, tuple[str, Any]] = {
    "epochs": ("epochs", Epochs),
    "batch_size": ("batch_size", BatchSize),
    "lr": ("optimizer.lr", LearningRate),
    "seed": ("seed", Seed),
    "dataset": ("data.dataset", Dataset),
    "data_dir": ("data.data_dir", DataDir),
    "image_size": ("data.image_size", ImageSize),
    "offline": ("data.offline", Offline),
    "skip_broken": ("data.skip_broken", SkipBroken),
    "skip_leaks": ("data.skip_leaks", SkipLeaks),
    "group_by": ("data.group_by", GroupBy),
    "balance": ("balance", BalanceOption),
    "device": ("device", Device),
    "budget": ("budget", Budget),
    "deterministic": ("deterministic", Deterministic),
    "data_memory": ("data.memory", DataMemory),
    "keep": ("keep_checkpoints", Keep),
    "teacher": ("teacher.name", AnyTeacher),
    "teacher_checkpoint": ("teacher.checkpoint", TeacherCheckpoint),
    "teacher_image_size": ("teacher.input.image_size", TeacherSize),
    "teacher_layout": ("teacher.input.layout", TeacherLayout),
    "teacher_scale": ("teacher.input.scale", TeacherScale),
    "teacher_mean": ("teacher.input.mean", TeacherMean),
    "teacher_std": ("teacher.input.std", TeacherStd),
    "teacher_classes": ("teacher.classes", TeacherClasses),
    "init": ("start_from", Init),
    "unlabelled": ("data.unlabelled", Unlabelled),
    "student": ("student.name", StudentName),
    "no_probe": ("probe", NoProbe),
}
# What every command that trains takes.
COMMON = (
    "epochs", "batch_size", "lr", "seed", "dataset", "data_dir", "image_size", "offline", "skip_broken", "skip_leaks",
    "group_by", "balance", "device",
)  # fmt: skip
TEACHER = tuple(flag for flag in FIELDS if flag.startswith("teacher_"))


def takes(*flags: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take ``COMMON``, these flags of ``FIELDS`` and --set, after its own: ``_overrides`` reads them."""
    options = {flag: FIELDS[flag][1] for flag in (*COMMON, *flags)} | {"settings": Settings}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = signature(command, eval_str=True)

        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(**{name: given[name] for name in own.parameters})

        added = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=_default(option), annotation=option)
            for name, option in options.items()
            if name not in own.parameters
        ]
        whole = own.replace(parameters=[*own.parameters.values(), *added])
        run.__signature__ = whole  # type: ignore[attr-defined]
        run.__annotations__ = {name: each.annotation for name, each in whole.parameters.items()}
        return run

    return decorate


def _default(option: Any) -> bool | None:
    return False if get_args(option)[0] is bool else None


def _overrides(ctx: typer.Context) -> dict[str, Any]:
    """Recipe fields that the command line sets; ``--set`` comes last and wins."""
    from toolkit.recipe import parse_settings

    given = {
        path: str(value) if isinstance(value, Path) else value
        for flag, (path, _) in FIELDS.items()
        if (value := ctx.params.get(flag)) is not None and value is not False
    }
    if ctx.params.get("no_probe"):
        given["probe"] = False
    if ctx.params.get("unlabelled"):
        given["loss.ce_weight"] = 0
    return given | parse_settings(ctx.params["settings"] or [])


def _source(recipe: str | None, run_dir: Path | None) -> str | Path:
    """The recipe that is named, else the one in an existing --run-dir, else cifar10."""
    if recipe is None and run_dir is not None and (own := run_dir / "recipe.yaml").is_file():
        return own
    return recipe or "cifar10"


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
@takes("data_memory", "deterministic", "no_probe", "keep")
def train(
    ctx: typer.Context,
    teacher: TeacherName = None,
    recipe: RecipeOption = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    extend: Extend = False,
    log: Log = None,
) -> None:
    """Train a teacher, with no limit on its size."""
    from toolkit.recipe import resolve

    _check_extend(extend, run_dir)
    wanted = resolve(_source(recipe, run_dir), "train", _overrides(ctx))
    from toolkit import stages  # imports torch: a misspelt name is told before that
    from toolkit.teaching import options as same_options

    run = stages.train(wanted, run_dir, resume, extend=extend, log=log)
    if stages.distributed.RANK:  # one of several processes, and not the one that speaks
        return
    _print_run(run)
    given = same_options(run.recipe, "distill", recipe)
    named = f"--teacher {run.recipe.model.name} --teacher-checkpoint {shlex.quote(str(run.path))}"
    print(f"next: toolkit distill {given} {named} --student NAME")


def _check_extend(extend: bool, run_dir: Path | None) -> None:
    """A longer recipe has another default directory, where it would begin anew."""
    if extend and run_dir is None:
        raise typer.BadParameter("which run is to go on? Give its --run-dir", param_hint="--extend")


@app.command()
@takes(*TEACHER, "init", "unlabelled", "data_memory", "deterministic", "no_probe", "budget", "keep")
def distill(
    ctx: typer.Context,
    teacher: AnyTeacher = None,
    student: StudentName = None,
    train_teacher: TrainTeacher = False,
    baseline: Baseline = False,
    recipe: RecipeOption = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    extend: Extend = False,
    log: Log = None,
) -> None:
    """Distil a student from a trained teacher; where the recipe asks none, train it on the labels alone."""
    from toolkit.recipe import resolve

    _check_extend(extend, run_dir)
    source, overrides = _source(recipe, run_dir), _overrides(ctx)
    wanted = resolve(source, "distill", overrides)
    if baseline and wanted.data.unlabelled:
        raise typer.BadParameter("images without labels have no baseline without a teacher", param_hint="--baseline")
    if baseline and not wanted.distils:
        raise typer.BadParameter("the recipe has no teacher: this run is the baseline", param_hint="--baseline")
    taught = any(path.startswith(("teacher.", "loss.methods")) for path in overrides)
    if (train_teacher or taught) and not wanted.distils:
        raise typer.BadParameter(f"{UNASKED}, or leave teacher and methods out", param_hint="--teacher")
    from toolkit import stages  # imports torch: a misspelt name is told before that

    if train_teacher and wanted.teacher is not None and wanted.teacher.checkpoint is None:
        wanted = stages.from_teacher(wanted, stages.train_teacher(wanted, source, overrides))
    with stages.within("distill` and --resume") if baseline else nullcontext():
        run = stages.distill(wanted, run_dir, resume, extend=extend, log=log)
    if baseline:
        beside = run_dir and Path(f"{os.path.normpath(run_dir.absolute())}-baseline")
        with stages.within("distill`"):
            alone = stages.train_baseline(wanted, run, beside, resume=True, extend=extend)
    if stages.distributed.RANK:  # one of several processes, and not the one that speaks
        return
    _print_run(run)
    if baseline:
        ours, theirs = (stages.validate(path, device=wanted.device)[0]["top1"] for path in (run.path, alone.path))
        print(
            f"test top-1 with the teacher {ours:.2%}, without {theirs:.2%}"
            f"{' from random weights' if wanted.starts_from_teacher else ''}: {100 * (ours - theirs):+.2f} points "
            "(one seed each: `toolkit compare` says whether that is more than chance)"
        )
    path = shlex.quote(str(run.path))
    print(f"next: toolkit validate {path}, toolkit export {path}")


@app.command()
@takes(*TEACHER, "data_memory", "deterministic", "budget", "keep")
def compare(
    ctx: typer.Context,
    methods: Annotated[
        list[str],
        typer.Argument(
            metavar="METHOD",
            help="Distillation losses by name, or YAML files with the recipe fields that make a method.",
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method: --seed and the ones after it.")] = 3,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the runs; else runs/compare-STUDENT-DATA-DIGEST.")
    ] = None,
    teacher: AnyTeacher = None,
    student: StudentName = None,
    train_teacher: TrainTeacher = False,
    recipe: RecipeOption = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods with each other and with no teacher: the same student, data and steps, several seeds.

    The same command goes on where it was stopped, and may name more methods or --seeds; finished runs are kept.
    """
    from toolkit import compare as comparing
    from toolkit.recipe import resolve

    source, overrides = recipe or "cifar10", _overrides(ctx)
    plan = comparing.make_plan(methods, source, overrides, seeds, output)
    base = resolve(source, "distill", overrides)
    if train_teacher and base.teacher is not None and base.teacher.checkpoint is None:
        from toolkit import stages  # imports torch: a misspelt name is told before that

        run = stages.train_teacher(base, source, overrides)
        plan = comparing.make_plan(methods, source, overrides | {"teacher.checkpoint": str(run.path)}, seeds, output)
    comparison = comparing.compare(plan)
    from toolkit import compare_report, distributed

    if distributed.RANK:  # one of several processes, and not the one that speaks
        return
    page = compare_report.write(comparison)
    if as_json:
        _print_json(compare_report.document(comparison) | {"report": str(page)})
        return
    compare_report.show(comparison)
    print(f"report    {page}")


@app.command()
@takes("data_memory", "deterministic", "no_probe", "budget")
def pipeline(
    ctx: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="NAME|FILE", help="One of toolkit/recipes/, or a YAML file; else digits."),
    ] = None,
    teacher: TeacherName = None,
    student: StudentName = None,
    baseline: Baseline = False,
    run_dir: Annotated[Path | None, typer.Option(help="Folder for the run directories; else runs/.")] = None,
    resume: Resume = False,
) -> None:
    """The whole chain: teacher, student, report, ONNX artifact, parity. By default on built-in digits, offline.

    --set train.KEY=VALUE and --set distill.KEY=VALUE set a field of one of the two stages.
    """
    from toolkit.recipe import resolve

    source, overrides = recipe or "digits", _overrides(ctx)
    resolve(source, "train", overrides)
    resolve(source, "distill", overrides)
    from toolkit import stages  # imports torch: a misspelt name is told before that
    from toolkit.machine import peak_memory

    chain = stages.pipeline(source, overrides, run_dir, resume, baseline)
    _print_metrics(chain.metrics)
    _print_export(chain.exported)
    print(f"report    {chain.student.report / 'report.md'}")
    print(f"took      {chain.seconds:,.0f} s, at most {peak_memory() / 2**30:.2f} GiB of memory")
    print(f"next: toolkit serve {shlex.quote(str(chain.exported.path))}")


@app.command()
@takes(*TEACHER, "budget")
def tune(
    ctx: typer.Context,
    space: Annotated[
        str | None, typer.Option("--space", metavar="NAME|FILE", help="Shipped space or YAML file: what is searched.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="NAME|FILE", help="Shipped recipe or YAML file; else the space's own."),
    ] = None,
    sampler: Annotated[Sampling | None, typer.Option(help="Where trials come from; random where not given.")] = None,
    scheduler: Annotated[
        Scheduling | None, typer.Option(help="asha gives poor trials up early; none where not given.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials to run; else 10, and all points of a grid.")] = None,
    gpus_per_trial: Annotated[
        float | None, typer.Option(min=0, help="GPUs of a trial, also a fraction; else 1 where there is CUDA.")
    ] = None,
    cpus_per_trial: Annotated[int, typer.Option(min=1, help="CPU cores of a trial.")] = 1,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT|auto", help="Address of a Ray cluster; else one on this machine, for itself."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the search; else runs/tune-SPACE-DIGEST.")
    ] = None,
    teacher: AnyTeacher = None,
    student: StudentName = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the draws, and of each trial's weights, order and augmentation.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted search.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search over recipe fields with Ray Tune (the extra `tune`); val selects, the test set is not touched.

    With --resume and --output alone, the search goes on with the space and recipe that it began with; --trials may ask
    for more.
    """
    from toolkit import space as spaces
    from toolkit import tune as tuning

    overrides = _overrides(ctx)
    wanted = None
    if space is not None:
        wanted = spaces.make_plan(
            spaces.read_space(space),
            recipe,
            overrides,
            sampler or "random",
            scheduler or "none",
            trials,
        )
        output = output or tuning.default_output(wanted)
        if (
            wanted.space.stage == "distill"
            and not wanted.base.distils
            and any(path.startswith("teacher.") for path in overrides)
            and not any(path.startswith("loss") for path in wanted.space.fields)
        ):
            raise typer.BadParameter(f"{UNASKED}, or leave the teacher out", param_hint="--teacher")
    elif not resume or output is None:
        raise typer.BadParameter("give --space, or --resume with --output", param_hint="--space")
    elif recipe or overrides or sampler or scheduler:
        raise typer.BadParameter(
            "without --space a search goes on as it was begun: give --space too, or no option of the recipe, no "
            "--sampler and no --scheduler",
            param_hint="--resume",
        )
    plan = tuning.resumed(output, wanted, trials, overrides) if resume else wanted
    assert plan is not None
    search = tuning.tune(plan, output, resume, cpus_per_trial, gpus_per_trial, address)
    from toolkit import tune_report

    tune_report.show(search)
    if as_json:
        _print_json(tune_report.document(search))
        return
    best = search.best()
    assert best is not None
    print(f"best      trial {best.number}: val top-1 {best.val_top1:.2%} with {best.told}")
    print(f"search    {output / 'trials.csv'}, {output / 'scatter.png'}")
    run, file = shlex.quote(str(search.path(best))), shlex.quote(str(output / "best.yaml"))
    print(f"next: toolkit validate {run}, toolkit {plan.space.stage} --recipe {file}")


@app.command()
def validate(
    target: Annotated[
        Path | None,
        typer.Argument(help="Run directory, weights (.safetensors) or artifact (.onnx); else the newest student."),
    ] = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Where PyTorch computes.")] = "auto",
    provider: ProviderOption = "auto",
    tta: TtaOption = None,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy, calibration and fidelity on the test set, and write the report."""
    from toolkit import stages

    metrics, folder = stages.validate(target, dataset, data_dir, device, provider, tta)
    if as_json:
        _print_json(metrics | {"report": str(folder)})
        return
    _print_metrics(metrics)
    print(f"report    {folder / 'report.md'}")


@app.command()
def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN]...", help="Run directories; else the newest finished ones under runs/."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the comparison.")] = Path("comparison"),
    as_json: AsJson = False,
) -> None:
    """Compare finished runs: one table and their curves, as an HTML page, Markdown and CSV."""
    from toolkit.side_by_side import compare_runs

    compared = compare_runs(runs, output)
    if as_json:
        from dataclasses import asdict

        left_out = [{"run": path, "reason": reason} for path, reason in compared.left_out.items()]
        rows = [asdict(row) for row in compared.rows]
        _print_json({"runs": rows, "left_out": left_out, "page": str(compared.page)})
        return
    for row in compared.rows:
        accuracies = {"val": row.val_top1, "test": row.test_top1, "reported": row.reported_top1}
        known = "".join(f", {name} top-1 {top1:.2%}" for name, top1 in accuracies.items() if top1 is not None)
        print(f"{row.run}: {row.model}, {row.parameters:,} parameters{known}")
    print(f"comparison  {compared.page}")


@app.command()
def export(
    target: Annotated[Path | None, typer.Argument(help="Run directory; else the newest student.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The .onnx file to write.")] = None,
    precision: Annotated[
        Literal[Precision, "auto"], typer.Option(help="auto makes all, and ships the fastest that loses too little.")
    ] = "fp32",
    max_drop: Annotated[
        float, typer.Option(min=0, max=100, help="Percentage points of test top-1 that a lower precision may lose.")
    ] = 0.2,
    even_if_slower: Annotated[
        bool, typer.Option("--even-if-slower", help="Ship the precision for another machine, where it is slower here.")
    ] = False,
    calibration_images: Annotated[
        int, typer.Option(help="Training images that INT8's ranges are taken from, at least 64.")
    ] = 512,
    fine_tune: Annotated[int, typer.Option(min=0, help="Epochs of quantisation-aware fine-tuning before INT8.")] = 0,
    tta: Annotated[
        Views | None, typer.Option("--tta", help="Average over these views of each image, in the graph.")
    ] = None,
    accept_any_size: Annotated[
        bool, typer.Option("--accept-any-size", help="Images of any size; the graph crops and resizes them.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Divide the logits by the temperature that was fitted on val.")
    ] = False,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 25.")] = 20,
    licence: Annotated[str | None, typer.Option("--license", help="What the weights may be used for.")] = None,
    triton: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write a model repository for Triton.")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="A student has fewer parameters; else the run's budget.")] = None,
    data_dir: DataDir = None,
    provider: ProviderOption = "auto",
    tf32: Tf32 = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the ONNX artifact and hold its outputs against PyTorch's."""
    from toolkit import artifacts

    options = artifacts.Options(
        precision=precision,
        max_drop=max_drop / 100,
        opset=opset,
        any_size=accept_any_size,
        calibrated=calibrate,
        views=tta,
        calibration_images=calibration_images,
        tuning_epochs=fine_tune,
        even_if_slower=even_if_slower,
        tf32=tf32,
        licence=licence,
        budget=budget,
        triton=triton,
        force=force,
    )
    exported = artifacts.export(target, output, data_dir, provider, options)
    if as_json:
        _print_json(
            {
                "artifact": str(exported.path),
                "bytes": exported.path.stat().st_size,
                "metadata": exported.metadata.model_dump(mode="json"),
                "parity": exported.parity.document(),
                "parity_report": str(exported.report),
                "precisions": exported.rows,
                "card": str(exported.card),
                "triton": exported.triton and str(exported.triton),
            }
        )
        return
    _print_export(exported)
    print(f"next: toolkit serve {shlex.quote(str(exported.path))}")


@app.command()
def inspect(
    file: Annotated[
        Path | None, typer.Argument(help="An ONNX file, whoever made it; else the newest artifact.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="A model card, in Markdown.")] = False,
    as_json: AsJson = False,
) -> None:
    """What an artifact states about itself, and what can be said of any other ONNX file."""
    from export.inspection import describe, facts_of, file_facts, model_card

    description = describe(file or _newest_artifact("inspecting"))
    if as_json:
        _print_json(description.model_dump(mode="json"))
    elif card:
        print(model_card(description), end="")
    else:
        facts = facts_of(description.metadata) if description.metadata else {}
        facts |= file_facts(description)
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:<{width}}  {value}")
        if description.reason:
            print(f"{description.reason}; serve, predict, validate and bench do not take it")


def _provider(name: str) -> str:
    """One of ``Provider``, or wrong usage: Typer takes no list of literals."""
    if name not in get_args(Provider):
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(get_args(Provider))}")
    return name


@app.command()
def bench(
    artifacts: Annotated[
        list[Path] | None, typer.Argument(metavar="[ARTIFACT]...", help="ONNX artifacts; else the newest one.")
    ] = None,
    providers: Annotated[
        list[str] | None,
        typer.Option(
            "--provider",
            metavar="|".join(get_args(Provider)),
            callback=lambda names: [_provider(name) for name in names or []],
            help="ONNX Runtime's provider; may be given again.",
        ),
    ] = None,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Batch size; else 1, 8, 64 and 256.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contestant at each batch size.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads, and cores; else all that there are.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Whether torch.compile takes part: minutes to begin.")
    ] = True,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for bench.json and bench.png.")] = Path(
        "bench"
    ),
    as_json: AsJson = False,
) -> None:
    """Latency and images per second of artifacts, beside PyTorch where they lie in their run directories."""
    from toolkit import bench as timing
    from toolkit.files import write_bytes, write_text

    names: Any = providers or ["auto"]
    artifacts = artifacts or [_newest_artifact("timing")]
    rows, used = timing.bench(artifacts, names, batches or (1, 8, 64, 256), rounds, threads, compiled)
    document = timing.document(rows, used)
    if as_json:
        _print_json(document)
    else:
        print(
            f"{used} threads, {rounds} turns, all in one process; peak: of a large matrix product, in GOP/s; speed: "
            "to the first line of the batch size"
        )
        print(timing.table(rows))
    write_text(output / "bench.json", json.dumps(document, indent=2))
    write_bytes(output / "bench.png", timing.plot(rows))
    if not as_json:
        print(f"bench     {output / 'bench.json'}, {output / 'bench.png'}")


@app.command()
def serve(
    artifacts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=]ONNX", help="Artifacts; the first is the default. Else the newest one."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 7860,
    provider: ProviderOption = "auto",
    max_batch: Annotated[int, typer.Option(min=1, help="Most images that run together.")] = 32,
    max_queue: Annotated[int, typer.Option(min=64, help="Images that may wait; more are refused.")] = 256,
    deadline: Annotated[float, typer.Option(min=0.001, max=86400, help="Seconds that a request may take.")] = 10,
    grace: Annotated[int, typer.Option(min=0, help="Seconds that requests have to end after SIGTERM.")] = 10,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes behind the port, each with its own copy of the artifacts.")
    ] = 1,
    tf32: Tf32 = False,
    reload: Annotated[bool, typer.Option("--reload", help="Reload artifacts that change on disk.")] = False,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that clients must show; the page asks for it too.")
    ] = None,
) -> None:
    """Serve the page and the HTTP API (/docs) on ONNX Runtime. PyTorch is not loaded."""
    from serve import server
    from serve.engine import named

    paths = named(artifacts or [str(_newest_artifact("serving"))])
    first = next(iter(paths.values())).resolve()
    own = first.with_suffix(".examples")  # of an artifact outside of a run
    if not own.is_dir() and (first.parent.parent / "recipe.yaml").is_file():
        own = first.parent / "examples"
    settings = server.Settings(
        artifacts=paths,
        host=host,
        port=port,
        provider=provider,
        max_batch=max_batch,
        max_queue=max_queue,
        deadline=deadline,
        grace=grace,
        workers=workers,
        tf32=tf32,
        reload=reload,
        key=None if api_key_file is None else server.read_key(api_key_file),
        examples=tuple(sorted(own.glob("*.png"))),
    )
    if not settings.private:
        print(f"anybody who reaches {host} may use this server: --api-key-file sets a key", file=sys.stderr)
    server.run(
        settings,
        started=lambda url, where: print(
            f"{', '.join(map(str, paths.values()))} on {where}: {url} (Ctrl-C stops)", flush=True
        ),
    )


@app.command()
def predict(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|FOLDER", help="Image files, or folders with images in them.")
    ],
    artifact: Annotated[Path | None, typer.Option(help="ONNX artifact; else the newest one.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to show.")] = 5,
    provider: ProviderOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Classify images from the shell."""
    from serve.decode import FORMATS_IN_WORDS, read_image
    from serve.session import Session
    from toolkit import folders

    session = Session(artifact or _newest_artifact("predicting with"), provider)
    document: list[dict[str, Any]] = []

    def broken(path: str | Path, error: str) -> None:  # the others have their answers
        print(f"error: {error}", file=sys.stderr)
        document.append({"image": str(path), "error": error})

    def closed(error: OSError) -> None:
        broken(error.filename, f"cannot read {error.filename}: {error.strerror}")

    files = [file for path in images for file in (folders.images(path, closed) if path.is_dir() else [path])]
    if not files and not document:
        raise UserError(f"no {FORMATS_IN_WORDS} files in {', '.join(map(str, images))}")
    for path in files:  # one at a time: many photos in full size take more than the memory
        try:
            answer = session.predict(read_image(path), top_k)
        except ImageError as error:
            broken(path, str(error))
            continue
        document.append({"image": str(path), **answer.model_dump(mode="json")})
        if not as_json:
            best = ", ".join(f"{n} {p:.1%}" for n, p in zip(answer.labels, answer.probabilities, strict=True))
            print(f"{path}: {best}  ({answer.milliseconds:.1f} ms, {session.provider})")
    if as_json:
        _print_json(document)
    if any("error" in row for row in document):
        raise typer.Exit(1)


data_commands = typer.Typer(no_args_is_help=True, help="Look at images before they are trained on.")
app.add_typer(data_commands, name="data")


@data_commands.command("check")
def data_check(
    path: Annotated[Path, typer.Argument(help="Folder of images, or a CSV file of paths and labels.")],
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="The images have no classes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Classes, sizes, broken files, copies and near copies, leaks across parts; suggests image size and recipe.

    Exit code 1 where something should be put right first.
    """
    from toolkit import data_check as checking

    report = checking.check(path, unlabelled)
    if as_json:
        _print_json(vars(report))
    else:
        print("\n".join(checking.show(report)))
    if report.problems:
        raise typer.Exit(1)


@app.command()
def models(
    budget: Annotated[int, typer.Option(help="Parameters that a student must stay under.")] = BUDGET,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=16, max=512, help="Side of the images in pixels; then images per second and memory are measured here."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The catalogue: parameters and multiply-accumulates at 32x32 with 10 classes, and which models fit the budget.

    With --image-size at that size; each model is run too: images per second in training and in inference, and the
    memory that training takes for each image.
    """
    from dataclasses import asdict

    from toolkit.catalogue import ROLES, info, names
    from toolkit.errors import RecipeError

    rows, left_out = [], []  # each with what was measured
    for role in ROLES:
        for name in names(role):
            try:
                row, measured = info(name, role, image_size or 32, budget=budget), None
                if image_size is not None:
                    from toolkit.footprint import footprint

                    measured = footprint(name, role, image_size)
                rows.append((row, measured))
            except RecipeError as error:
                left_out.append(f"{name}: {error}")
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    if as_json:
        _print_json([asdict(row) | (asdict(measured) if measured else {}) for row, measured in rows])
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    device = next((measured.device for _, measured in rows if measured), None)
    title = f"budget: fewer than {budget:,} parameters" + (f"; {device}, {image_size} pixels" if device else "")
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("name", no_wrap=True)
    for heading in () if device else ("role", "source"):
        table.add_column(heading)
    for heading in ("parameters", "MACs", "fits", *(("train\nimg/s", "infer\nimg/s", "MiB\n/ img") if device else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row, measured in rows:
        if before not in (None, row.role):
            table.add_section()  # teachers, then students
        before = row.role
        cells = [row.name, *(() if measured else (row.role, row.source))]
        cells += [f"{row.parameters:,}", f"{row.macs / 1e6:,.0f} M", "yes" if row.fits_budget else "no"]
        if measured:
            cells += [f"{measured.training:,.0f}", f"{measured.inference:,.0f}", f"{measured.memory / 2**20:.1f}"]
        table.add_row(*cells)
    Console(markup=False).print(table)


@app.command()
def doctor(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """What this machine can do, and what is wrong with it."""
    from toolkit.doctor import examine

    findings = examine(data_dir)
    if as_json:
        _print_json(findings)
    else:
        for name, value in findings["facts"].items():
            print(f"{name:<18} {value}")
        for problem in findings["problems"]:
            print(f"problem: {problem}")
        print("nothing is wrong" if not findings["problems"] else f"{len(findings['problems'])} to put right")
    if findings["problems"]:
        raise typer.Exit(1)


def _newest_artifact(doing: str) -> Path:
    from toolkit.run import SHIPPED, newest_artifact, runs

    path = newest_artifact()
    what = "the student that comes with the toolkit" if path == SHIPPED else "the newest artifact"
    print(f"{doing} {what}, {path}", file=sys.stderr)
    if path == SHIPPED and any(run.finished for run in runs()):
        print("of the runs under runs/ none is exported yet: `toolkit export` makes an artifact", file=sys.stderr)
    return path


def _print_run(run: Any) -> None:
    summary = run.summary()
    val = "" if summary["val_top1"] is None else f"val top-1 {summary['val_top1']:.2%}, "
    print(
        f"{summary['model']}: {val}{summary['epochs']} epochs in {summary['train_seconds']:,.0f} s on "
        f"{summary['device']} ({summary['precision']}), in {run.path}"
    )


def _print_metrics(metrics: dict[str, Any]) -> None:
    print(f"model     {metrics['model']} on {metrics['dataset']} ({metrics['n']:,} test images, {metrics['provider']})")
    top5 = f", top-5 {metrics['top5']:.2%}" if "top5" in metrics else ""
    views = f", with test-time augmentation in the graph ({metrics['views']} views)" if "views" in metrics else ""
    print(f"accuracy  top-1 {metrics['top1']:.2%}{top5}{views}")
    if "tta_top1" in metrics:
        print(f"          top-1 {metrics['tta_top1']:.2%} with test-time augmentation ({metrics['tta_views']})")
    print(f"calibration  NLL {metrics['nll']:.4f}, ECE {metrics['ece']:.4f}")
    if "teacher_top1" in metrics:
        print(
            f"fidelity  agrees with the teacher ({metrics['teacher_top1']:.2%}) on {metrics['agreement']:.2%}, "
            f"KL {metrics['kl']:.4f}"
        )
    if "baseline_top1" in metrics:
        gain = 100 * (metrics["top1"] - metrics["baseline_top1"])
        print(f"baseline  without a teacher {metrics['baseline_top1']:.2%}: {gain:+.2f} points (one seed each)")


def _print_export(exported: Any) -> None:
    about, parity = exported.metadata, exported.parity
    if len(exported.rows) > 1:
        print(f"{'':<9} {'MB':>6} {'top-1':>7} {'drop':>6} {'agrees':>7} {'ms, batch 1 and 64':>19} {'speed':>6}")
        for row in exported.rows:
            if row["bytes"] is None:  # it could not be made
                continue
            times = " ".join(f"{value:.2f}" for value in row["milliseconds"].values())
            print(
                f"{row['precision']:<9} {row['bytes'] / 1e6:>6.1f} {row['top1']:>7.2%} {100 * row['drop']:>6.2f} "
                f"{row['agreement']:>7.2%} {times:>19} {row['speed']:>6.2f}"
            )
        for row in exported.rows:
            if row["refused"]:
                print(f"{row['precision']} is not shipped: {row['refused']}")
    print(f"artifact  {exported.path} ({exported.path.stat().st_size / 1e6:.1f} MB, {about.precision})")
    if about.quantisation:
        print(f"INT8      {about.quantisation}")
    if about.views > 1:
        print(f"accuracy  top-1 {about.accuracy:.2%} over {about.views} views, {about.plain_accuracy:.2%} on one")
    if about.temperature:
        applied = "applied in the graph" if about.calibrated else "applied by serve and predict, not in the graph"
        print(f"calibration  ECE of the graph {about.ece:.4f}; temperature {about.temperature:g}, {applied}")
    worst = max(case.max_logit_difference for case in parity.cases)
    same = (
        "as PyTorch's" if parity.drop == 0 else f"PyTorch's {parity.top1_torch:.2%}, agreement {parity.agreement:.2%}"
    )
    print(
        f"parity    {len(parity.cases)} batches, logits differ by at most {worst:.1e}; test top-1 "
        f"{parity.top1_artifact:.2%} {same} (n = {parity.n:,}, {parity.provider})"
    )
    print(f"card      {exported.card}")
    if exported.triton:
        print(f"triton    {exported.triton}")


def main() -> None:
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold what the terminal has no character for
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
