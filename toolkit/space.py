"""The space of a search: which fields of which recipe are searched, where, and under which constraints. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator

from toolkit import recipe as recipes
from toolkit.catalogue import ModelInfo, closest, info
from toolkit.choices import Sampling, Scheduling, Stage
from toolkit.errors import RecipeError, SpaceError, UserError, listing
from toolkit.recipe import Recipe, Section

SPACES = Path(__file__).parent / "spaces"
MOST_POINTS = 100_000  # of a grid: to measure them takes minutes
DIGITS = 4  # significant ones of a drawn number, or of its place in a narrow range
# They decide what a trial is measured on: results with different values of these cannot be compared.
FIXED = ("data", "data.dataset", "data.images", "data.unlabelled", *(f"data.{field}" for field in recipes.SPLIT))

Values = dict[str, Any]  # recipe path to value


class Domain(Section):
    """Where one field is searched. A range of two integers holds integers, its ends among them."""

    choices: tuple[Any, ...] | None = Field(None, min_length=1, description="the values themselves")
    range: tuple[int | float, int | float] | None = Field(None, description="uniform between low and high")
    log_range: tuple[int | float, int | float] | None = Field(None, description="uniform in the logarithm")
    points: int | None = Field(
        None, ge=2, le=MOST_POINTS, description="values that a grid takes from a range, evenly spaced in it"
    )

    @field_validator("choices", mode="before")
    @classmethod
    def _numbers(cls, choices: Any) -> Any:
        return [recipes.as_number(choice) for choice in choices] if isinstance(choices, list) else choices

    @model_validator(mode="after")
    def _one_kind(self) -> Domain:
        given = [kind for kind in ("choices", "range", "log_range") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"takes one of choices, range and log_range, not {' and '.join(given) or 'none of them'}")
        if self.choices is not None:
            if self.points is not None:
                raise ValueError("points belongs to a range; choices are taken as they are")
            return self
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"the range from {low:g} to {high:g} is empty: low must be less than high")
        if self.log_range is not None and low <= 0:
            raise ValueError(f"log_range starts at {low:g}: it must be above 0")
        return self

    @property
    def bounds(self) -> tuple[int | float, int | float]:
        bounds = self.range or self.log_range
        assert bounds is not None
        return bounds

    @property
    def integer(self) -> bool:
        return self.choices is None and all(isinstance(bound, int) for bound in self.bounds)

    def ends(self) -> Sequence[Any]:
        """All choices, or the two ends of a range."""
        return self.choices if self.choices is not None else self.bounds

    def draw(self, rng: np.random.Generator) -> Any:
        if self.choices is not None:
            return self.choices[int(rng.integers(len(self.choices)))]
        low, high = self.bounds
        if self.integer and self.range is not None:
            return int(rng.integers(int(low), int(high), endpoint=True))
        margin = 0.5 if self.integer else 0  # so that the integers at the ends come as often as their neighbours
        if self.range is not None:
            return self.rounded(rng.uniform(low, high))
        return self.rounded(math.exp(rng.uniform(math.log(low - margin), math.log(high + margin))))

    def grid(self) -> list[Any]:
        """All choices, or ``points`` values of a range; of integers, those that differ."""
        if self.choices is not None:
            return list(self.choices)
        assert self.points is not None
        spaced = np.linspace if self.range is not None else np.geomspace
        return list(dict.fromkeys(self.rounded(value) for value in spaced(*self.bounds, self.points).tolist()))

    def rounded(self, value: float) -> int | float:
        """A number of the range with few digits: it is to be read, too."""
        low, high = self.bounds
        size = min(abs(value), high - low) or 1
        return min(max(round(value, None if self.integer else DIGITS - 1 - math.floor(math.log10(size))), low), high)


def _is_bound(text: str) -> str:
    if not re.fullmatch(r"\s*[<>]=?\s*\d[\d_,]*\s*", text):
        raise ValueError(f"{text!r} should be a comparison with a count, such as '< 5000000'")
    return text


Bound = Annotated[str, AfterValidator(_is_bound)]


class Constraints(Section):
    """What a model must meet before its trial is started."""

    parameters: Bound | None = None
    macs: Bound | None = Field(None, description="multiply-accumulates of one image")

    def bounds(self) -> list[tuple[str, str, int]]:
        """``(quantity, comparison, count)`` of each."""
        found = []
        for quantity, text in self.model_dump(exclude_none=True).items():
            comparison = re.sub(r"[^<>=]", "", text)
            found.append((quantity, comparison, int(re.sub(r"\D", "", text))))
        return found


class Space(Section):
    """Which fields of which recipe are searched."""

    name: str = Field("space", description="the file it came from")
    stage: Stage = Field("distill", description="what a trial runs: of a student, or of a teacher")
    recipe: str | dict[str, Any] = Field("cifar10", description="recipe of all trials: a name, a file or its fields")
    set: dict[str, Any] = Field({}, description="recipe path to the value that all trials have there")
    fields: dict[str, Domain] = Field(min_length=1, description="recipe path to where it is searched")
    constraints: Constraints = Constraints()


def read_space(source: str | Path) -> dict[str, Any]:
    """The tree of a shipped space (by name) or of a file (by path). Raises ``SpaceError``."""
    return {"name": Path(source).stem, **recipes.read_mapping(source, SPACES, "space", SpaceError)}


class Plan(Section):
    """What is searched, and how. ``recipe`` is the whole recipe that all trials have in common."""

    space: Space
    recipe: dict[str, Any]
    sampler: Sampling
    scheduler: Scheduling
    trials: int | None = Field(None, ge=1, description="trials to run; null: all points of a grid")

    @property
    def base(self) -> Recipe:
        return recipes.validate(self.recipe)

    def differences(self, other: Plan) -> list[str]:
        """One line ``what: mine -> theirs`` for each difference that makes it another search."""
        return self.base.differences(other.base) + recipes.differing(self.drawn(), other.drawn())

    def drawn(self) -> dict[str, Any]:
        """What decides the trials, beside the recipe."""
        space = self.space.model_dump(mode="json", exclude_none=True)
        chosen = {"sampler": self.sampler, "scheduler": self.scheduler}
        return {**chosen, "stage": space["stage"], "constraints": space["constraints"], **space["fields"]}


def make_plan(
    tree: Mapping[str, Any],
    source: str | Path | None,
    overrides: Values,
    sampler: Sampling,
    scheduler: Scheduling,
    trials: int | None,
) -> Plan:
    """A plan from the tree of a space, or a ``SpaceError`` that lists everything that is wrong with it.

    ``source`` is a recipe that takes the place of the space's own, ``overrides`` are recipe fields.
    """
    problems: list[str] = []
    space = base = None
    try:
        space = Space.model_validate(tree)
    except ValidationError as error:
        problems = list(dict.fromkeys(_explain(item) for item in error.errors()))
    stage: Stage = "train" if tree.get("stage") == "train" else "distill"
    fields = tree.get("fields")
    searched = fields if isinstance(fields, Mapping) else {}
    given = {**recipes.as_overrides(space.set if space is not None else {}), **overrides}
    for path, value in given.items():
        plain = path.removeprefix(f"{stage}.")
        if above := next((field for field in searched if f"{plain}.".startswith(f"{field}.")), None):
            where = "" if path == above else f" by {above}"
            problems.append(f"{path}: is searched{where}, and given the value {value!r} too")
    try:
        base = recipes.resolve(source or tree.get("recipe") or "cifar10", stage, given)
        recipes.check_length(base)
        base = base.model_copy(update={"source": None, "reported_top1": None})  # what is searched is another run
    except RecipeError as error:
        problems += [line.strip() for line in str(error).splitlines() if not line.endswith(":")]
    except TypeError:  # recipe is neither a name nor a mapping, and told so above
        pass
    if base is not None:
        for path, domain in searched.items():
            problems += _check_field(str(path), domain, base, stage, searched, sampler)
        if not base.data.val_size:
            problems.append("data.val_size = 0: val selects among the trials, so some images must be held out")
    if sampler == "grid" and trials is not None:
        problems.append(f"--trials {trials}: a grid has as many trials as points, leave it out")
    if problems or space is None or base is None:
        raise SpaceError(listing("the space is wrong", problems))
    count = None if sampler == "grid" else trials or 10
    tree = base.model_dump(mode="json")
    return Plan(space=space, recipe=tree, sampler=sampler, scheduler=scheduler, trials=count)


def _explain(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        models: list[type[BaseModel]] = [Space, Constraints, Domain]  # by depth: constraints.KEY, fields.PATH.KEY
        known = models[len(item["loc"]) - 1].model_fields
        return f"{path}: there is no such key{closest(str(item['loc'][-1]), known)}"
    return recipes.explained(path, item)


def _check_field(
    path: str, domain: Any, base: Recipe, stage: Stage, searched: Mapping[str, Any], sampler: str
) -> list[str]:
    """What is wrong with a searched field for the recipe, told by the recipe's own rules."""
    labels = base.data.unlabelled and f"{path}.".startswith("teacher.")  # they are its answers
    if path in FIXED or labels:
        return [f"{path}: decides what a trial is measured on, so it cannot be searched"]
    try:
        known = Domain.model_validate(domain)
    except ValidationError:
        return []  # told already
    problems = []
    if sampler == "grid" and known.choices is None and known.points is None:
        problems.append(f"{path}: a grid takes choices, or a range with points")
    tree = base.model_dump(mode="json")
    for value in known.ends():
        try:
            recipe = recipes.resolve(tree, stage, {path: value})
            if recipes.at_path(recipe.model_dump(mode="json"), path) is None and value is not None:
                problems.append(f"{path}: there is no such field in the recipe of `toolkit {stage}`")
        except RecipeError as error:
            # Other lines speak of fields that do not go together: other trials may have them otherwise.
            lines = [line.strip() for line in str(error).splitlines()]
            problems += [line for line in lines if re.match(rf"{re.escape(path)}(:|\.| = )", line)]
    role, _, argument = path.partition(".")
    if not problems and role == base.role and argument != "name" and f"{role}.name" not in searched:
        try:
            measure(recipes.resolve(tree, stage, {path: known.ends()[0]}), 10)
        except UserError as error:  # others speak of a value that needs another one beside it
            problems += [str(error)] if str(error).startswith(f"{path}:") else []
    return list(dict.fromkeys(problems))


def measure(recipe: Recipe, classes: int) -> ModelInfo:
    """Counts of the recipe's model. Raises ``RecipeError`` where it cannot be built."""
    return info(recipe.model.name, recipe.role, recipe.data.image_size, classes, **recipe.model.arguments)
