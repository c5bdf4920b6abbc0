"""The trials of a search: where their values come from, what came of them, and the table of both. No Ray here."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from toolkit import recipe as recipes
from toolkit.catalogue import ModelInfo
from toolkit.errors import RecipeError, SearchError, in_line, install
from toolkit.files import write_bytes, write_text
from toolkit.progress import say, told
from toolkit.recipe import Recipe
from toolkit.run import Run
from toolkit.space import MOST_POINTS, Domain, Plan, Space, Values, measure

DRAWS = 1000  # for one trial, until one meets the constraints

Status = Literal["planned", "running", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """A row of the table. ``val_top1`` is a fraction, ``seconds`` are those of training, ``run`` is its directory."""

    number: int
    values: Values
    parameters: int
    macs: int
    status: Status = "planned"
    val_top1: float | None = None
    epochs: int = 0
    seconds: float = 0.0
    run: str = ""
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """The trial with one column a field."""
        return {
            "trial": self.number,
            "status": self.status,
            "val_top1": self.val_top1,
            **self.values,
            "epochs_run": self.epochs,
            "seconds": self.seconds,
            "parameters": self.parameters,
            "macs": self.macs,
            "run": self.run,
            "error": self.error,
        }

    @property
    def told(self) -> str:
        return ", ".join(f"{path}={value}" for path, value in self.values.items())


class RandomSampler:
    """Independent draws, which depend on the seed, the trial's number and how many were refused for it alone."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed

    def draw(self, number: int, attempt: int) -> Values:
        """Values for a trial; ``attempt`` counts the draws that were refused for it."""
        rng = np.random.default_rng([self.seed % 2**32, number, attempt])
        return {path: domain.draw(rng) for path, domain in self.space.fields.items()}

    def learn(self, trial: Trial) -> None:
        """Take notice of a trial that has ended."""


class OptunaSampler:
    """Optuna's TPE. Trials that were given up count as pruned, those that failed are left out."""

    def __init__(self, space: Space, seed: int, kept: Sequence[Trial]) -> None:
        try:
            import optuna
        except ImportError as error:
            raise not_installed("--sampler optuna needs Optuna", error) from error
        self.optuna = optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # After --resume the generator must not repeat the draws that it began with.
        sampler = optuna.samplers.TPESampler(seed=(seed + len(kept)) % 2**32)
        self.space, self.study = space, optuna.create_study(direction="maximize", sampler=sampler)
        self.asked: dict[int, Any] = {}
        self.distributions = {path: self._distribution(domain) for path, domain in space.fields.items()}
        for trial in kept:
            self.learn(trial)

    def draw(self, number: int, attempt: int) -> Values:
        if number in self.asked:
            self.study.tell(self.asked[number], state=self.optuna.trial.TrialState.FAIL)
        self.asked[number] = asked = self.study.ask(self.distributions)
        found = asked.params
        return {
            path: domain.choices[found[path]] if domain.choices is not None else domain.rounded(found[path])
            for path, domain in self.space.fields.items()
        }

    def learn(self, trial: Trial) -> None:
        states = self.optuna.trial.TrialState
        state = {"finished": states.COMPLETE, "stopped": states.PRUNED}.get(trial.status, states.FAIL)
        if trial.val_top1 is None:
            state = states.FAIL
        value = trial.val_top1 if state == states.COMPLETE else None
        if trial.number in self.asked:
            asked = self.asked.pop(trial.number)
            if state == states.PRUNED:
                asked.report(trial.val_top1, trial.epochs)
            self.study.tell(asked, value, state)
        elif trial.val_top1 is not None and state != states.FAIL:
            known = self.optuna.trial.create_trial(
                state=state,
                value=value,
                params={path: self._parameter(path, found) for path, found in trial.values.items()},
                distributions=self.distributions,
                intermediate_values={trial.epochs: trial.val_top1} if state == states.PRUNED else None,
            )
            self.study.add_trial(known)

    def _distribution(self, domain: Domain) -> Any:
        kinds = self.optuna.distributions
        if domain.choices is not None:  # by their index: Optuna takes no lists
            return kinds.CategoricalDistribution(range(len(domain.choices)))
        kind = kinds.IntDistribution if domain.integer else kinds.FloatDistribution
        return kind(*domain.bounds, log=domain.log_range is not None)

    def _parameter(self, path: str, value: Any) -> Any:
        choices = self.space.fields[path].choices
        return value if choices is None else choices.index(value)


class Search:
    """The trials of a plan in an output directory: which comes next, and what came of the others."""

    def __init__(self, plan: Plan, output: Path, classes: int, trials: Sequence[Trial] = ()) -> None:
        self.plan, self.output, self.classes, self.base = plan, output, classes, plan.base
        self.trials = list(trials)
        for trial in self.trials:
            if trial.status not in ("finished", "stopped"):
                trial.status, trial.error = "planned", None
        self.bounds = plan.space.constraints.bounds()
        if self.base.role == "student":
            self.bounds.append(("parameters", "<", self.base.budget))
        self.kept = [trial for trial in self.trials if trial.status != "planned"]
        self.left_out = 0  # points of a grid that do not meet the constraints
        self.exhausted = False  # of trials by chance there are no more that differ
        seed = self.base.seed
        self.sampler = (
            OptunaSampler(plan.space, seed, self.kept) if plan.sampler == "optuna" else RandomSampler(plan.space, seed)
        )

    @property
    def total(self) -> int:
        return len(self.trials) if self.exhausted else max(self.plan.trials or 0, len(self.trials))

    @property
    def constraints(self) -> str:
        strictest = dict.fromkeys(f"{quantity} {comparison} {count:,}" for quantity, comparison, count in self.bounds)
        return " and ".join(strictest)

    def recipe(self, values: Values) -> Recipe:
        """The recipe of a trial with these values, or ``RecipeError``."""
        return recipes.resolve(self.plan.recipe, self.plan.space.stage, values)

    def prepare(self) -> None:
        """Draw all trials that can be drawn before any has run. Raises ``SearchError`` where none can be had."""
        if self.plan.sampler == "grid":
            if not self.trials:
                self._grid()
        elif self.plan.sampler == "random":
            while len(self.trials) < self.total:
                self._draw()
        elif not self.trials:
            self._draw()

    def next(self) -> Trial | None:
        """The next trial to run; None where there is none any more."""
        waiting = next((trial for trial in self.trials if trial.status == "planned"), None)
        if waiting is None and len(self.trials) < self.total:
            waiting = self._draw()
        if waiting is not None:
            waiting.status = "running"
            self.write()
        return waiting

    def _draw(self) -> Trial | None:
        """The next trial; None where chance brings nothing but the values of earlier ones."""
        number, chance = len(self.trials) + 1, self.plan.sampler == "random"
        nearest = Nearest(self)
        for attempt in range(DRAWS):
            values = self.sampler.draw(number, attempt)
            if chance and any(values == trial.values for trial in self.trials):
                self.exhausted = True
            elif (trial := self._try(values, nearest)) is not None:
                self.exhausted = False
                return trial
        if self.exhausted:
            say(
                f"the search has {len(self.trials)} trials, not {self.plan.trials}: {DRAWS:,} more draws brought no "
                "values that none of them has"
            )
            return None
        raise SearchError(f"none of {DRAWS:,} draws for trial {number} {nearest}")

    def axes(self) -> dict[str, list[Any]]:
        """The values that a grid takes of each field."""
        return {path: domain.grid() for path, domain in self.plan.space.fields.items()}

    def _grid(self) -> None:
        axes, nearest = self.axes(), Nearest(self)
        points = math.prod(map(len, axes.values()))
        if points > MOST_POINTS:
            sizes = " x ".join(f"{len(axis):,} {path}" for path, axis in axes.items())
            raise SearchError(
                f"the grid has {points:,} points ({sizes}), more than {MOST_POINTS:,}: take fewer values of a field, "
                "or --sampler random"
            )
        for point in told(itertools.product(*axes.values()), points, f"building {points:,} points of the grid"):
            self._try(dict(zip(axes, point, strict=True)), nearest)
        self.left_out = points - len(self.trials)
        if not self.trials:
            raise SearchError(f"none of the {points:,} points of the grid {nearest}")

    def _try(self, values: Values, nearest: Nearest) -> Trial | None:
        """The trial of these values where they meet the constraints."""
        try:
            size = measure(self.recipe(values), self.classes)
        except RecipeError as error:
            nearest.invalid(error)
            return None
        if (excess := self.excess(size)) > 0:
            nearest.missed(excess, size, values)
            return None
        number = len(self.trials) + 1
        trial = Trial(number, values, size.parameters, size.macs, run=f"trials/{number:04}")
        self.trials.append(trial)
        return trial

    def excess(self, size: ModelInfo) -> float:
        """By how much the worst constraint is missed, as a fraction of its count; 0 where all are met."""
        worst = 0.0
        for quantity, comparison, count in self.bounds:
            over = getattr(size, quantity) - count
            over = over if comparison[0] == "<" else -over
            if over > 0 or (over == 0 and "=" not in comparison):
                worst = max(worst, max(over, 1) / max(count, 1))
        return worst

    def ended(self, trial: Trial, failed: bool = False) -> None:
        """Read from the run directory what came of a trial, which failed where there is none."""
        run = Run.at(self.path(trial))
        if failed:
            file = error_file(self.path(trial))
            died = "its process died (out of memory, or killed)"
            trial.status, trial.error = "failed", file.read_text().partition("\n")[0] if file.is_file() else died
        elif run is None:
            lost = "its run directory is not here: all machines of a cluster must share this folder"
            trial.status, trial.error = "failed", lost
        else:
            trial.status = "finished" if run.finished else "stopped"
        self.read(trial)
        self.sampler.learn(trial)
        self.write()

    def read(self, trial: Trial) -> None:
        """Take epochs, seconds and val top-1 from the rows of the run directory."""
        run = Run.at(self.path(trial))
        if run is None:
            return
        history = run.history()
        trial.epochs = len(history)
        trial.seconds = round(sum(row["seconds"] for row in history), 1)
        trial.val_top1 = score(run.recipe, history)

    def path(self, trial: Trial) -> Path:
        return self.output / trial.run

    def best(self) -> Trial | None:
        """The finished trial with the highest val top-1, else the best of those that were given up."""
        return next(iter(self.ranked()), None)

    def ranked(self) -> list[Trial]:
        """The trials that have a result and did not fail, best first."""
        usable = [t for t in self.trials if t.status in ("finished", "stopped") and t.val_top1 is not None]
        return sorted(usable, key=_merit, reverse=True)

    def count(self, *statuses: Status) -> int:
        return sum(trial.status in statuses for trial in self.trials)

    def write(self) -> None:
        """The table, as it is now."""
        from toolkit.report import as_csv

        rows = [asdict(trial) for trial in self.trials]
        write_text(self.output / "trials.json", "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        write_bytes(self.output / "trials.csv", as_csv([trial.row() for trial in self.trials]))


class Nearest:
    """Why no draw was taken: the one that was nearest to the constraints, and the last that was no recipe."""

    def __init__(self, search: Search) -> None:
        self.constraints = search.constraints
        self.excess, self.missing, self.wrong, self.reason = math.inf, "", 0, ""

    def missed(self, excess: float, size: ModelInfo, values: Values) -> None:
        if excess < self.excess:
            told = ", ".join(f"{path}={value}" for path, value in values.items())
            self.excess = excess
            self.missing = f"the nearest has {size.parameters:,} parameters and {size.macs:,} MACs ({told})"

    def invalid(self, error: RecipeError) -> None:
        self.wrong += 1
        self.reason = in_line(error)

    def __str__(self) -> str:
        if not self.missing:
            return f"makes a valid recipe; the last: {self.reason}"
        also = f"; {self.wrong:,} made no valid recipe, the last: {self.reason}"
        return f"meets {self.constraints}; {self.missing}{also if self.wrong else ''}"


def score(recipe: Recipe, history: Sequence[Mapping[str, Any]]) -> float | None:
    """The val top-1 of the weights that the run keeps, or would keep if it ended here."""
    measured = [row["val_top1"] for row in history if row["val_top1"] is not None]
    if not measured:
        return None
    return measured[-1] if recipe.select == "last" else max(measured)


def _merit(trial: Trial) -> tuple[bool, float, int, int]:
    """Of equals the smaller one, then the earlier."""
    assert trial.val_top1 is not None
    return trial.status == "finished", trial.val_top1, -trial.parameters, -trial.number


def error_file(run: Path) -> Path:
    return run.with_name(f"{run.name}.error.txt")


def read_trials(output: Path) -> list[Trial]:
    file = output / "trials.json"
    try:
        return [Trial(**row) for row in json.loads(file.read_text())] if file.is_file() else []
    except (ValueError, TypeError) as error:
        raise SearchError(f"{file} is damaged: {error}") from error


def not_installed(what: str, error: ImportError) -> SearchError:
    """The error that names the extra."""
    name = error.name or error
    return SearchError(f"{what}, which is not installed ({name}): {install('tune')}")
