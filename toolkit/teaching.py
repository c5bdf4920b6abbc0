"""The teachers of a recipe: found, loaded, and looked at before they teach."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from toolkit import compute, distributed, engine, external, recipe
from toolkit.catalogue import argument_names, closest
from toolkit.choices import Stage
from toolkit.classifier import Ensemble, members, with_views
from toolkit.data import DataSet
from toolkit.errors import TeacherError, UserError
from toolkit.progress import say
from toolkit.recipe import SPLIT, Data, Recipe, Teacher, TeacherInput
from toolkit.run import RUNS, load_header, load_model, runs, weights_of

LOOKED_AT = 1000  # images on which a teacher is measured before it teaches
TOO_FEW = 100  # val images to tell its top-1 from a guess by
SEEDED = ("val_size", "split_seed", "group_by")  # what decides which images are val, where the test is the same


# --- finding and loading -----------------------------------------------------------------------------------


def find(wanted: Recipe) -> Path | None:
    """The weights of the recipe's teacher, or a ``TeacherError`` that names the command that makes them.

    None for one of timm's models that brings its own.
    """
    assert wanted.teacher is not None
    teacher = wanted.teacher
    if teacher.checkpoint is not None:
        return _weights(teacher.checkpoint)
    if teacher.external:
        return None
    for run in runs():
        same = run.recipe.model.name == teacher.name and run.recipe.model.arguments == teacher.arguments
        if run.finished and run.recipe.role == "teacher" and same and same_images(run.recipe.data, wanted.data):
            return run.checkpoint("best")
    built = " and ".join(f"{key}={value}" for key, value in teacher.arguments.items())
    none = f"there is no trained {teacher.name} for {wanted.data.dataset} under {RUNS}/"
    none += f" with {built}" if built else ""
    if wanted.data.unlabelled:
        raise TeacherError(f"{none}, and images without labels train none: name one by --teacher-checkpoint")
    raise TeacherError(
        f"{none}. Train one with `toolkit train {options(wanted, 'train')} --teacher {teacher.name}`, add "
        "--train-teacher, or name one by --teacher-checkpoint."
    )


def _weights(path: Path) -> Path:
    """The weights in a finished run directory, or the file itself. Raises ``TeacherError`` or ``RunError``."""
    weights = weights_of(path)
    if not weights.is_file():
        raise TeacherError(f"there are no weights of a teacher at {weights}: give another --teacher-checkpoint")
    return weights


def options(wanted: Recipe, stage: Stage, file: str | None = None) -> str:
    """The options that name the recipe (by its ``file``, where that is known), its data and teacher again to a stage.

    They are quoted for a shell. The teacher's name is not among them.
    """
    file = file or wanted.name
    given = ["--recipe", file, "--dataset", wanted.data.dataset]
    data, teacher = wanted.data, wanted.teacher
    try:
        tree = recipe.of_stage(recipe.read(file), stage)
        named = Data.model_validate(tree.get("data") or {})
    except (UserError, ValidationError):  # of a file that is elsewhere, or right with other options alone
        tree, named = {}, Data()
    if data.kind == "folder" or data.image_size != named.image_size:
        given += ["--image-size", str(data.image_size)]
    given += ["--group-by", data.group_by] if data.group_by else []
    given += ["--skip-broken"] * data.skip_broken + ["--skip-leaks"] * data.skip_leaks
    if data.data_dir is not None and data.kind.startswith("cifar"):
        given += ["--data-dir", str(data.data_dir)]
    if stage == "distill" and tree and not (tree.get("loss") or {}).get("kd_weight"):  # one that trains teachers alone
        given += ["--set", "loss.kd_weight=0.9"]
    for key in ("val_size", "split_seed", "images"):
        if getattr(data, key) != getattr(named, key):
            given += ["--set", f"data.{key}={getattr(data, key)}"]
    if teacher is not None:
        own = tree.get("teacher") or {}
        own = own if own.get("name") == teacher.name else {}  # --teacher drops the arguments of another one
        differing = {key: value for key, value in teacher.arguments.items() if own.get(key) != value}
        for key, value in differing.items():
            given += ["--set", f"teacher.{key}={json.dumps(value)}"]
    return shlex.join(given)


def same_images(one: Data, other: Data) -> bool:
    """Whether two recipes' data are the same images, held out alike."""
    keys = ("dataset", "image_size", "images", *SPLIT)
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def load(wanted: Recipe, classes: Sequence[str] | None) -> tuple[nn.Module, Teacher, list[str]]:
    """The recipe's teacher, with those of ``teacher.also`` as an ensemble; what it was; and its logits' classes.

    These are ``classes``, or with None those of the (first) teacher. Raises ``TeacherError``, also where it is not the
    one whose name, or SHA-256, the recipe has; ``CheckpointError`` for a damaged file, ``RunError`` for an unfinished
    run.
    """
    assert wanted.teacher is not None
    first = wanted.teacher.model_copy(update={"checkpoint": find(wanted)})
    others = [one.model_copy(update={"checkpoint": one.checkpoint and _weights(one.checkpoint)}) for one in first.also]
    loaded: list[tuple[nn.Module, Teacher]] = []
    for member in (first, *others):
        model, known, own = _load_member(member, classes, wanted)
        if member is not first and member.weights not in (None, known.weights):
            raise TeacherError(f"{external.title(known)} is another teacher than the one that the recipe asks for")
        loaded.append((model, known))
        classes = classes if classes is not None else own
    (model, known), digests = loaded[0], [f"{known.weights}{known.views or ''}" for _, known in loaded]
    if len(loaded) > 1:
        model = Ensemble([member for member, _ in loaded])
        digest = hashlib.sha256("".join(digests).encode()).hexdigest()
        known = known.model_copy(update={"weights": digest, "also": tuple(one for _, one in loaded[1:])})
    if first.weights not in (None, known.weights):
        raise TeacherError(
            f"{known.checkpoint} has SHA-256 {str(known.weights)[:12]}, the recipe asks for {first.weights[:12]}: it "
            "is another teacher. Give the right one by --teacher-checkpoint."
        )
    if known.name != first.name:
        raise TeacherError(
            f"{known.checkpoint} holds {known.name}, the recipe asks for {first.name}: give --teacher {known.name}, or "
            "another --teacher-checkpoint."
        )
    return model, known, list(classes or ())


def _load_member(
    teacher: Teacher, classes: Sequence[str] | None, wanted: Recipe
) -> tuple[nn.Module, Teacher, list[str]]:
    if teacher.external:
        if teacher.name == "onnx":
            _check_arguments(teacher, str(teacher.checkpoint), [])
        other, names = external.load(teacher, classes, wanted.device, wanted.data.offline)
        external_known = teacher.model_copy(update={"weights": other.hex_digest, "also": ()})
        return with_views(other, teacher.views), external_known, names
    assert teacher.checkpoint is not None
    model, header = load_model(teacher.checkpoint)
    where, theirs = f"the teacher {teacher.checkpoint}", header["classes"]
    if teacher.name in ("", header["model"]):  # else it is another teacher, which `load` says
        _check_arguments(teacher, header["model"], argument_names(header["model"], header["role"]))
    digest = hashlib.sha256(teacher.checkpoint.read_bytes()).hexdigest()
    if classes is not None and teacher.classes is None and set(theirs) != set(classes):
        differing = next(
            (f"{a!r} where the data has {b!r}" for a, b in zip(theirs, classes, strict=False) if a != b), ""
        )
        raise TeacherError(
            f"{where} knows {len(theirs)} classes of {header['dataset']}, the data has {len(classes)} of "
            f"{wanted.data.title}{'; first difference: ' + differing if differing else ''}; --teacher-classes FILE "
            "maps one to the other"
        )
    names, columns = external.match_classes(where, theirs, len(theirs), classes, teacher.classes)
    module: nn.Module = model
    side = header["image_size"]
    if columns is not None or side != wanted.data.image_size:
        if teacher.classes is not None:  # the mapping makes another teacher of it
            digest = hashlib.sha256(f"{digest}{columns}".encode()).hexdigest()
        module = external.External(model, TeacherInput(image_size=side), columns, digest, stated=True).eval()
    known = Teacher(
        name=header["model"],
        checkpoint=teacher.checkpoint,
        weights=digest,
        classes=teacher.classes,
        views=teacher.views,
        **header["arguments"],
    )
    return with_views(module, teacher.views), known, names


def _check_arguments(teacher: Teacher, title: str, known: Sequence[str]) -> None:
    """Raise ``TeacherError`` for a setting that neither a teacher nor its builder has: it is misspelt."""
    for key in teacher.arguments:
        if key not in known:
            settings = [*(field for field in Teacher.model_fields if field != "weights"), *known]
            raise TeacherError(f"teacher.{key}: {title} takes no such setting{closest(key, settings)}")


# --- looking at it before it teaches -----------------------------------------------------------------------


def preflight(teacher: nn.Module, known: Teacher, data: DataSet, wanted: Recipe) -> dict[str, Any]:
    """``top1`` of a teacher on up to 1,000 val ``images``, or training images where they are few; and which ``split``.

    The classes and their order were compared by ``load``. Raises ``TeacherError`` where the answers are hardly better
    than the commonest class, or clearly better with another normalisation than that of a file that states none.
    """
    few = data.val is None or len(data.val) < TOO_FEW
    name, split = ("training", data.train) if few or data.val is None else ("val", data.val)
    count = min(len(split), LOOKED_AT)
    index = torch.linspace(0, len(split) - 1, count).long()
    some = split.select(index)
    device = distributed.own_device(compute.pick_device(wanted.device))
    teacher = teacher.to(device).to(memory_format=compute.usual(wanted, device).layout)
    dtype = compute.pick_dtype(wanted.precision, device)
    right = engine.predict(teacher, some.images, device, dtype).argmax(1) == some.labels.numpy()
    chance = data.train.labels.bincount().max().item() / len(data.train)
    said = f"{right.mean():.1%} of {count:,} {name} images right, a guess {chance:.1%}"
    every = max(1, count // 200)
    part = some.select(torch.arange(0, count, every))
    hint = external.hint(members(teacher), lambda: engine.evaluate(teacher, part, device, dtype)[1], len(part))
    for one in (known, *known.also):
        if one.checkpoint is not None and not one.external:
            tell_what_it_knows(one.checkpoint, data, wanted)
    if not _can_teach(right, some.labels.numpy(), chance):
        raise TeacherError(
            f"the teacher {external.title(known)} has nothing to teach: it gets {said}. "
            + (hint or _why(known, members(teacher), data, wanted))
        )
    if hint:
        raise TeacherError(
            f"the teacher {external.title(known)} does not say how its images are normalised, and was given "
            f"{members(teacher)[0]}: it gets {said}; {hint}. Say which is right: --teacher-scale 1 leaves it as it is."
        )
    say(f"the teacher {external.title(known)} gets {said}")
    return {"top1": float(right.mean()), "images": count, "split": name}


def _can_teach(right: np.ndarray, labels: np.ndarray, chance: float) -> bool:
    """Whether answers, of which these are ``right``, are well above guesses: by top-1 or by the classes' mean recall.

    One that finds the rare classes may be right less often than one that always says the commonest.
    """
    present, counts = np.unique(labels, return_counts=True)
    recall, blind = float(np.mean([right[labels == label].mean() for label in present])), 1 / len(present)
    doubt = (blind * (1 - blind) * (1 / counts).sum()) ** 0.5 / len(present)
    by_chance = (chance * (1 - chance) / len(labels)) ** 0.5
    return is_better(float(right.mean()), chance, by_chance) or is_better(recall, blind, doubt)


def is_better(share: float, guess: float, deviation: float) -> bool:
    """Whether a share of right answers is well above that of a guess, by more than chance and enough to teach."""
    needed = max(0.1 * (1 - guess), 3 * deviation)
    return share >= guess + min(needed, (1 - guess) / 2)  # where few images of unequal classes were looked at


def _why(known: Teacher, plain: Sequence[nn.Module], data: DataSet, wanted: Recipe) -> str:
    """What may be the matter with a teacher that answers no better than a guess."""
    if known.external or known.checkpoint is None:
        given = "; ".join(str(member) for member in plain if isinstance(member, external.External))
        return (
            f"It was given {given or 'images as they are'}. --teacher-mean, --teacher-std, --teacher-scale and "
            "--teacher-classes say it otherwise."
        )
    header = load_header(known.checkpoint)
    ours = {"dataset": data.name, "dataset_digest": data.digest, "image_size": wanted.data.image_size}
    others = "; ".join(f"{key} {header[key]} there, {ours[key]} here" for key in ours if header[key] != ours[key])
    return f"It was trained on {f'other images: {others}' if others else 'these images'}."


def tell_what_it_knows(weights: Path, data: DataSet, wanted: Recipe) -> None:
    """Say where weights were trained on images that are held out here."""
    header = load_header(weights)
    if header["dataset"] != data.name:
        return
    ours, theirs = wanted.data.split, header.get("split", {})
    keys = [key for key in ours if theirs.get(key, ours[key]) != ours[key]]
    same_size = header["image_size"] == wanted.data.image_size
    if not data.files or (same_size and header["dataset_digest"] == data.digest):  # the test images are the same
        keys = [key for key in keys if key in (SEEDED if data.files else SEEDED[:2]) and data.val is not None]
        count = len(data.train) + len(data.val or ())
        held = [size * count if size < 1 else size for size in (theirs.get("val_size", 0), ours["val_size"])]
        if not data.files and keys == ["val_size"] and held[0] >= held[1]:  # then what is held out here was there too
            return
    if keys:
        differing = "; ".join(f"{key} {theirs[key]} there, {ours[key]} here" for key in keys)
        why = f"{weights} was trained on another split of {data.name} ({differing})"
    elif same_size and header["dataset_digest"] != data.digest:
        why = f"the images of {data.name} have changed since {weights} was trained, or are split in another way"
    else:
        return
    say(f"warning: {why}: it may know some of the images that are held out here, and be measured too high")
