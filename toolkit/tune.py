"""A search over recipe fields, on Ray Tune.

A space says which fields of a recipe are searched, and where. Each trial is a run of the one training loop in a run
directory of its own, and val alone selects. The output directory holds

search.yaml                  what is searched, and how: enough to go on
trials.json  trials.csv      one row a trial: the truth of the search, whatever ran it
trials/0001/ ...             the run directories; trials/0001.error.txt where one failed
scatter.png  heatmap.png     val top-1 over the fields
best.yaml                    the recipe of the best trial

Ray decides where trials run and, with ASHA, when one is given up. It keeps no state that is needed again. Nothing
here imports it, or torch, before a search begins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import yaml

from toolkit import recipe as recipes
from toolkit.choices import Stage
from toolkit.errors import Interrupted, SearchError, UserError, in_line
from toolkit.files import locked, one_at_a_time, write_bytes, write_text
from toolkit.machine import available_cores
from toolkit.progress import clock, say
from toolkit.recipe import Section
from toolkit.space import Plan
from toolkit.trials import Search, Trial, error_file, not_installed, read_trials

if TYPE_CHECKING:
    from toolkit.data import DataSet
    from toolkit.recipe import Recipe, Teacher

ASHA_FACTOR = 3  # one in so many trials goes on from a rung to the next
ASHA_GRACE = 0.1  # share of the epochs before which no trial is given up


# --- the search ---------------------------------------------------------------------------------------------


def tune(
    plan: Plan,
    output: Path,
    resume: bool = False,
    cpus: int = 1,
    gpus: float | None = None,
    address: str | None = None,
) -> Search:
    """Run the plan's trials in the output directory, and write table, figures and ``best.yaml``.

    A trial takes ``cpus`` and ``gpus`` (None: one where the recipe's device is a GPU) of the cluster at ``address``
    (None: of this machine). Raises ``SearchError`` where the directory holds another search, or an unfinished one
    without ``resume``; ``Interrupted`` after Ctrl-C or SIGTERM.
    """
    from toolkit import compute, stages, teaching
    from toolkit.run import Run

    started = (output / "search.yaml").is_file()
    if started and not resume:
        raise SearchError(f"{output} holds a search already: add --resume to go on with it, or choose another --output")
    # A search that could not write its first file has left its lock.
    if not started and output.exists() and (not output.is_dir() or {*output.iterdir()} - {output / ".lock"}):
        raise SearchError(f"{output} exists and holds no search; choose another --output")
    base = plan.base
    if gpus is None:
        gpus = 1 if compute.pick_device(base.device).type == "cuda" else 0
    if not gpus and base.device.startswith("cuda"):
        raise SearchError(f"--device {base.device} was asked for, but a trial gets no GPU: give --gpus-per-trial")
    ray = _ray(address)
    data = stages.load_data(base.data, base, base.device)
    searched = plan.space.fields
    taught = base.distils or any(path == "loss" or path.startswith("loss.kd_weight") for path in searched)
    others = any(f"{path}.".startswith("teacher.") for path in searched)
    if base.student is not None and taught and base.teacher is not None and not others:
        # All trials, and those after --resume, learn from the same teacher.
        teacher = base.teacher.model_copy(update={"checkpoint": teaching.find(base)})
        pinned = base.model_copy(update={"teacher": teacher})
        if not started and not base.data.unlabelled:  # a poor teacher is told before the first trial
            model, known, _ = teaching.load(pinned, data.classes)
            teaching.preflight(model, known, data, pinned)
        plan = plan.model_copy(update={"recipe": pinned.model_dump(mode="json")})
    search = Search(plan, output, len(data.classes), read_trials(output))
    for trial in search.kept:
        path = search.path(trial)
        run = Run.at(path)  # it may have been removed
        # A search over fields of the data has trials on other images.
        if run is not None and run.finished and teaching.same_images(run.recipe.data, base.data):
            stages.check_unchanged(data, run.summary()["dataset_digest"], path, "choose another --output")
    if search.bounds and not search.trials:
        say(f"drawing trials with {search.constraints}")
    search.prepare()
    problem: UserError | None = None
    with contextlib.ExitStack() as stack:
        slots = 0
        if search.count("planned") or len(search.trials) < search.total:
            slots = stack.enter_context(cluster(ray, address, cpus, gpus))
        stack.enter_context(locked(output, SearchError))
        for lock in (output / "trials").glob("*/.lock"):  # of a killed search: Ray's processes notice that later
            with one_at_a_time(lock, lambda: say("waiting for processes of the search that was killed")):
                pass
        write_text(output / "search.yaml", yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False))
        search.write()
        if slots:
            _announce(search, slots, data, cpus)
            try:
                problem = _run(search, cpus, gpus, slots)
            except KeyboardInterrupt:
                done = search.count("finished", "stopped", "failed")
                raise Interrupted(
                    f"stopped with {done} of {search.total} trials done; the others go on from their last checkpoints "
                    f"by: toolkit tune --output {shlex.quote(str(output))} --resume --cpus-per-trial {cpus} "
                    f"--gpus-per-trial {gpus:g}{f' --address {address}' if address else ''}"
                ) from None
        if problem is not None and search.best() is None:
            raise problem
        finish(search)
    if problem is not None:
        raise problem
    return search


def resumed(output: Path, wanted: Plan | None, trials: int | None, overrides: Mapping[str, Any] | None = None) -> Plan:
    """The plan of an output directory, with more trials where they are asked for.

    ``wanted`` is what the command line asks for, if it names a space, and ``overrides`` the recipe fields that it
    gives: of these the search may go on with the data in another place, and on another device. Raises ``SearchError``
    where anything else differs, and where ``wanted`` names another teacher.
    """
    file = output / "search.yaml"
    if not file.is_file():
        if wanted is not None:
            return wanted  # it was interrupted before it began
        raise SearchError(f"{output} holds no search to go on with: it has no search.yaml")
    try:
        plan = Plan.model_validate(yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist, or a plan that is none
        raise SearchError(f"{file} is damaged: {in_line(error)}") from error
    if wanted is not None:
        differences, known = plan.differences(wanted), _named_teacher(plan)
        for key, value in _named_teacher(wanted).items():
            if value != known.get(key):
                differences.append(f"teacher.{key}: {known.get(key)} -> {value}")
        if differences:
            raise SearchError(
                f"{output} holds a different search; differing: {'; '.join(differences)}. "
                "Choose another --output, or repeat that search's options."
            )
    if plan.sampler == "grid" and trials is not None:
        raise SearchError(f"--trials {trials}: a grid has as many trials as points, leave it out")
    places = {path: value for path, value in (overrides or {}).items() if path in recipes.PLACES}
    # The plan names the teacher that all trials learn from.
    moved = {path: value for path, value in places.items() if not path.startswith("teacher.")}
    recipe = recipes.with_settings(plan.recipe, moved)
    return plan.model_copy(update={"recipe": recipe, "trials": trials or plan.trials})


def default_output(plan: Plan) -> Path:
    """``runs/tune-<space>-<digest>``: the same search finds its directory again."""
    from toolkit.run import RUNS

    identity: list[Any] = [plan.base.identity(), plan.drawn()]
    if teacher := _named_teacher(plan):
        identity.append(teacher)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return RUNS / f"tune-{plan.space.name}-{digest[:8]}"


def _named_teacher(plan: Plan) -> dict[str, Any]:
    """What the recipe says of its teacher beyond the recipe's identity: which files, and which more teachers."""

    def named(teacher: Teacher) -> dict[str, Any]:
        tree = teacher.model_dump(mode="json", exclude_defaults=True)
        if teacher.checkpoint is not None:  # a run directory stands for its best weights
            path = teacher.checkpoint
            tree["checkpoint"] = os.path.relpath(path / "checkpoints/best.safetensors" if path.is_dir() else path)
        if teacher.classes is not None:
            tree["classes"] = os.path.relpath(teacher.classes)
        if teacher.also:
            tree["also"] = [named(one) for one in teacher.also]
        return tree

    tree = named(plan.base.teacher) if plan.base.teacher is not None else {}
    return {key: tree[key] for key in ("checkpoint", "classes", "also") if key in tree}


def _announce(search: Search, slots: int, data: DataSet, cpus: int) -> None:
    plan = search.plan
    kept = f" ({len(search.kept)} done before)" if search.kept else ""
    say(
        f"{search.total:,} trials of {search.base.epochs} epochs{kept} in {search.output}, at most {slots} at a time; "
        f"sampler {plan.sampler}, scheduler {plan.scheduler}"
    )
    if plan.sampler == "grid" and not search.kept:
        sizes = " x ".join(f"{len(axis)} {path}" for path, axis in search.axes().items())
        out = f"; {search.left_out} points left out, which miss {search.constraints}" if search.left_out else ""
        estimate = Estimate(search, slots)
        # The base recipe itself need not be one of the points, nor meet the constraints.
        recipe = search.recipe(search.trials[0].values)
        try:
            estimate.rate, taught = _probe(recipe, data, cpus)
            estimate.taught = taught * (1 if recipe.cached_epochs else search.total)  # what is kept, all trials replay
            said = f"{estimate.told()}, judged by a few steps on this machine"
        except UserError as error:  # another point may have a teacher
            said = f"no estimate: {error}"
        say(f"the grid: {sizes}{out}; {said}")


def _probe(recipe: Recipe, data: DataSet, cpus: int) -> tuple[float, float]:
    """Seconds of a student for one multiply-accumulate of one epoch, and of the teacher in a trial: by steps here."""
    import torch

    from toolkit import compute, learner, teaching
    from toolkit.catalogue import mac_count
    from toolkit.compare import training_seconds

    model, threads = learner.new_model(recipe, data), torch.get_num_threads()
    torch.set_num_threads(cpus)
    try:
        learns, teaches = compute.seconds_an_image(model, recipe, backward=True), 0.0
        if recipe.distils:
            teacher, _, _ = teaching.load(recipe, data.classes)
            teaches = compute.seconds_an_image(teacher, recipe, backward=False)
    finally:
        torch.set_num_threads(threads)
    rate = training_seconds(recipe, 1, len(data.train), learns, 0) / mac_count(model, recipe.data.image_size)
    return rate, training_seconds(recipe, recipe.epochs, len(data.train), 0, teaches)


class Estimate:
    """How long the rest takes: training goes by multiply-accumulates times epochs, and each trial takes time beside."""

    def __init__(self, search: Search, slots: int) -> None:
        self.search, self.slots = search, slots
        self.began: dict[int, tuple[float, int, float]] = {}  # clock, epochs and seconds at the start, by trial
        self.rate: float | None = None  # seconds of training for one multiply-accumulate of one epoch
        self.taught = 0.0  # seconds of the teacher, where the rate does not hold them
        self.work = self.trained = 0.0  # of the trials that ended since this search was started
        self.beside: list[float] = []  # their seconds beside training: starting, reading data, val

    def started(self, trial: Trial) -> None:
        self.began[trial.number] = time.monotonic(), trial.epochs, trial.seconds

    def ended(self, trial: Trial) -> None:
        if (start := self.began.pop(trial.number, None)) is None:
            return  # its process died before it started
        clock, epochs, seconds = start
        self.beside.append(max(time.monotonic() - clock - (trial.seconds - seconds), 0))
        self.trained += trial.seconds - seconds
        self.work += trial.macs * (trial.epochs - epochs)
        if self.work:
            self.rate = self.trained / self.work

    def left(self) -> float | None:
        """Seconds, if no trial is given up; None before the first epoch."""
        if self.rate is None:
            return None
        trials, epochs = self.search.trials, self.search.base.epochs
        undone = [trial for trial in trials if trial.status in ("planned", "running")]
        undrawn = self.search.total - len(trials)
        work = sum(trial.macs * max(trial.values.get("epochs", epochs) - trial.epochs, 0) for trial in undone)
        work += undrawn * epochs * sum(trial.macs for trial in trials) / len(trials)
        count = len(undone) + undrawn
        beside = count * sum(self.beside) / max(len(self.beside), 1)
        return (self.rate * work + self.taught + beside) / max(1, min(self.slots, count))

    def told(self) -> str:
        left = self.left()
        if left is None:
            return ""
        most = "at most " if self.search.plan.scheduler == "asha" else ""
        return f"{most}about {clock(left)}"


def finish(search: Search) -> None:
    """Write figures and ``best.yaml``. Raises ``SearchError`` where no trial has a result."""
    best = search.best()
    if best is None:
        failed = next(trial for trial in search.trials if trial.error)
        file = error_file(search.path(failed))
        raise SearchError(
            f"all {len(search.trials)} trials failed, the first by: {str(failed.error).rstrip('.')}. All of it is in "
            f"{search.output / 'trials.csv'}{f' and {file}' if file.is_file() else ''}."
        )
    from toolkit.report import as_image
    from toolkit.run import Run
    from toolkit.tune_report import heatmap, scatter

    write_bytes(search.output / "scatter.png", as_image(scatter(search)))
    if search.plan.sampler == "grid" and len(search.plan.space.fields) == 2:
        write_bytes(search.output / "heatmap.png", as_image(heatmap(search)))
    # The run's own recipe says which teacher it learnt from; its directory may have been removed.
    run = Run.at(search.path(best))
    recipe = run.recipe if run else search.recipe(best.values)
    recipe = recipe.model_copy(update={"name": "best", "device": search.base.device})  # not that of a worker
    file = search.output / "best.yaml"
    header = (
        f"# Trial {best.number} of {search.total} of the search {search.plan.space.name}: val top-1 "
        f"{best.val_top1:.2%} after {best.epochs} epochs (the best of many on val, so it flatters).\n#\n"
        f"#   toolkit {search.plan.space.stage} --recipe {shlex.quote(str(file))}\n"
    )
    write_text(file, header + recipe.to_yaml())


# --- one trial ----------------------------------------------------------------------------------------------


class Job(Section):
    """All that the process of a trial needs. ``folder`` is where the search was started: paths are relative to it."""

    number: int
    recipe: dict[str, Any]
    stage: Stage
    run: Path
    folder: Path
    threads: int
    data_dir: str | None


def train_trial(job: Job, report: Callable[[dict[str, Any]], None]) -> None:
    """Run a trial, from its last checkpoint where there is one.

    ``report`` gets ``epoch`` (from 1), ``val_top1`` and ``seconds`` after each epoch that was measured on val; the
    last one when the run is finished. An error is written beside the run directory and raised again.
    """
    from toolkit import stages

    error_file(job.run).unlink(missing_ok=True)
    recipe = recipes.validate(job.recipe)

    def told(row: Mapping[str, Any]) -> dict[str, Any]:
        return {key: row[key] for key in ("epoch", "val_top1", "seconds")}

    def on_epoch(row: dict[str, Any]) -> None:
        if row["val_top1"] is not None and row["epoch"] < recipe.epochs:
            report(told(row))

    try:
        stage = stages.distill if job.stage == "distill" else stages.train
        run = stage(recipe, job.run, resume=True, on_epoch=on_epoch)
    except Exception as error:
        line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        write_text(error_file(job.run), f"{' '.join(line.split())}\n\n{traceback.format_exc()}")
        raise
    report(told(run.history()[-1]))


# --- Ray ----------------------------------------------------------------------------------------------------


def _ray(address: str | None) -> Any:
    """The module ``ray`` with ``ray.tune``, told to be quiet, or ``SearchError``."""
    if address is not None:  # of the 20 attempts that Ray makes, each takes most of a minute where no cluster answers
        os.environ["RAY_NUM_REDIS_GET_RETRIES"] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # its own default to come; else it warns
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints to stdout, whatever its verbosity
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the table is ours
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C is ours
    try:
        import ray
        import ray.tune
    except ImportError as error:
        raise not_installed("a search needs Ray Tune", error) from error
    return ray


@contextlib.contextmanager
def cluster(ray: Any, address: str | None, cpus: int, gpus: float) -> Iterator[int]:
    """A Ray cluster of this machine, or a connection to one; how many trials it runs at a time.

    Raises ``SearchError`` where it does not answer, or has less than one trial takes.
    """
    if address is None:
        # Of this machine alone: nothing listens on its other addresses. No object of a search is large.
        mine = {"num_cpus": available_cores(), "_node_ip_address": "127.0.0.1", "object_store_memory": 2**27}
        where = {"address": "local", "include_dashboard": False, **mine}
    else:
        _answers(address)
        where = {"address": address}
    previous = signal.getsignal(signal.SIGTERM)  # Ray sets one of its own
    try:
        ray.init(**where, logging_level=logging.CRITICAL, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = in_line(error, 200)
        if address is None:
            raise SearchError(f"Ray does not start on this machine: {reason}") from error
        raise SearchError(
            f"--address {address}: {reason}. A cluster that asks for a token wants RAY_AUTH_MODE=token set."
        ) from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        have = ray.cluster_resources()
        slots = [have.get("CPU", 0) // cpus] + ([have.get("GPU", 0) // gpus] if gpus else [])
        if min(slots) < 1:
            raise SearchError(
                f"a trial takes {cpus} CPUs and {gpus:g} GPUs, the cluster has {have.get('CPU', 0):g} and "
                f"{have.get('GPU', 0):g}: give other --cpus-per-trial or --gpus-per-trial"
            )
        yield int(min(slots))
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, previous)


def _answers(address: str) -> None:
    """Raise ``SearchError`` unless something listens there: Ray itself tries for long, and says much."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise SearchError(f"--address {address}: should be HOST:PORT of a cluster with this machine in it, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise SearchError(
            f"--address {address}: no Ray cluster answers there ({error}). `ray start --head` starts one; without "
            "--address the search runs on this machine."
        ) from error


def _run(search: Search, cpus: int, gpus: float, slots: int) -> UserError | None:
    """Let Ray Tune run the trials that are left; why the last ones could not be drawn, if so."""
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    estimate = Estimate(search, slots)
    problems: list[UserError] = []

    class Draws(Searcher):
        """Gives Ray the trials of the search, one at a time."""

        def suggest(self, trial_id: str) -> Any:
            try:
                trial = search.next()
            except UserError as error:  # those that run are not to be lost
                problems.append(error)
                return self.FINISHED
            if trial is None:
                return self.FINISHED
            return {"job": _job(search, trial, cpus, gpus).model_dump_json()}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            pass  # Results hears of it

        def save(self, checkpoint_path: str) -> None:
            pass  # the table is what a search is resumed from

    class Results(tune.Callback):
        """Takes what Ray hears of the trials."""

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **rest: Any) -> None:
            estimate.started(mine(trial))

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **rest: Any) -> None:
            found = mine(trial)
            if estimate.rate is None and result.get("seconds"):
                estimate.rate = result["seconds"] / found.macs
                say(
                    f"{estimate.told()} for all: an epoch of trial {found.number} took {result['seconds']:.1f} s, "
                    "the others are reckoned by their multiply-accumulates; starting them comes on top"
                )
            search.read(found)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **rest: Any) -> None:
            self.end(trial, False)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **rest: Any) -> None:
            self.end(trial, True)

        def end(self, trial: Any, failed: bool) -> None:
            found = mine(trial)
            search.ended(found, failed)
            estimate.ended(found)
            result = found.error or f"val top-1 {found.val_top1:.2%} after {found.epochs} epochs"
            done = search.count("finished", "stopped", "failed")
            left = f", {estimate.told()} left" if done < search.total and estimate.told() else ""
            say(f"trial {found.number} {found.status}: {result} ({found.told}); {done} of {search.total} done{left}")

    def mine(trial: Any) -> Trial:
        return search.trials[Job.model_validate_json(trial.config["job"]).number - 1]

    storage = search.output / ".ray"
    shutil.rmtree(storage, ignore_errors=True)
    scheduler = _asha(search) if search.plan.scheduler == "asha" else FIFOScheduler()
    try:
        tune.Tuner(
            tune.with_resources(_trainable, {"cpu": cpus, "gpu": gpus}),
            tune_config=tune.TuneConfig(
                search_alg=Draws(),
                scheduler=scheduler,
                num_samples=search.total,
                max_concurrent_trials=slots,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(storage.resolve()), verbose=0, callbacks=[Results()]
            ),
        ).fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    return problems[0] if problems else None


def _trainable(config: dict[str, Any]) -> None:
    """A trial in a process that Ray started for it."""
    import torch
    from ray import tune

    job = Job.model_validate_json(config["job"])
    if job.folder.is_dir():
        os.chdir(job.folder)
    if job.data_dir is not None:
        os.environ["TOOLKIT_DATA"] = job.data_dir
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    torch.set_num_threads(job.threads)
    train_trial(job, tune.report)


def _job(search: Search, trial: Trial, cpus: int, gpus: float) -> Job:
    recipe = search.recipe(trial.values).model_copy(update={"probe": False})  # the same for all
    if not gpus:  # Ray hides no GPU from a trial that asked for none
        recipe = recipe.model_copy(update={"device": "cpu"})
    elif recipe.device.startswith("cuda"):  # Ray shows a trial its own GPUs alone
        recipe = recipe.model_copy(update={"device": "cuda"})
    return Job(
        number=trial.number,
        recipe=recipe.model_dump(mode="json"),
        stage=search.plan.space.stage,
        run=search.path(trial),
        folder=Path.cwd(),
        threads=cpus,
        data_dir=os.environ.get("TOOLKIT_DATA"),
    )


def _asha(search: Search) -> Any:
    """ASHA (arXiv 1810.05934) that knows the trials that ended before."""
    from ray.tune.schedulers import ASHAScheduler

    from toolkit.run import Run

    searched = search.plan.space.fields.get("epochs")
    epochs = max(searched.ends()) if searched is not None else search.base.epochs
    grace = max(1, int(epochs * ASHA_GRACE))
    scheduler: Any = ASHAScheduler(
        "epoch", "val_top1", "max", max_t=epochs, grace_period=grace, reduction_factor=ASHA_FACTOR
    )
    for trial in search.kept:
        stand_in = SimpleNamespace(trial_id=f"kept-{trial.number}")
        scheduler.on_trial_add(None, stand_in)
        run = Run.at(search.path(trial))  # where it was removed, the table still knows the last epoch
        for row in run.history() if run else [{"epoch": trial.epochs, "val_top1": trial.val_top1}]:
            if row["val_top1"] is not None:
                scheduler.on_trial_result(None, stand_in, row)
    return scheduler
