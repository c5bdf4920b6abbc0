"""Every shipped recipe, and the rules of recipes. No training here."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from pydantic import BaseModel

from toolkit import cli, teaching
from toolkit import recipe as recipes
from toolkit.catalogue import build, check_budget, info, parameter_count
from toolkit.errors import RecipeError, TeacherError
from toolkit.objective import Objective
from toolkit.recipe import RECIPES, STAGES, read, resolve, shipped
from toolkit.space import make_plan, read_space

STUDENT = {"teacher": {"name": "wrn28"}, "student": {"name": "tpsnet"}, "loss": {"kd_weight": 0.9}}


NARROW = {"tpsnet": {"base": 4}, "wrn28": {"width": 1}}  # with the modules of the whole nets
REPORTS = [name for name in shipped() if "reported_top1" in read(name)]


def stages_of(name):
    """The stages that a recipe has: a report's system is a teacher alone, or a student without one."""
    tree = read(name)
    named = set(tree).union(*(tree.get(stage, {}) for stage in STAGES))
    return [stage for stage, role in (("train", "teacher"), ("distill", "student")) if role in named]


def header_of(name):
    return re.match(r"(#.*\n)+", (RECIPES / f"{name}.yaml").read_text())[0]


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("stage", STAGES)
def test_shipped_recipes_are_whole(name, stage):
    if stage not in stages_of(name):
        with pytest.raises(RecipeError, match=r"names no (student to distil|teacher to train)"):
            resolve(name, stage)
        return
    recipe = resolve(name, stage)
    assert resolve(yaml.safe_load(recipe.to_yaml()), stage) == recipe
    model = build(recipe.model.name, recipe.role, 10, **recipe.model.arguments)
    assert recipe.role == ("teacher" if stage == "train" else "student")
    if stage == "distill":
        assert recipe.distils == (recipe.teacher is not None)
        check_budget(recipe.model.name, parameter_count(model), recipe.budget, 10)


def check_command(line):
    """The command line takes it, its recipe its settings, and its nets its layers: the recipes of what it trains."""
    group = typer.main.get_command(cli.app)
    root = group.make_context("toolkit", ["models"])
    name, command, rest = group.resolve_command(root, shlex.split(line, comments=True))
    with command.make_context(name, rest, parent=root) as context:
        if name == "tune":
            given = context.params
            how = given["sampler"] or "random", given["scheduler"] or "none", given["trials"]
            return [make_plan(read_space(given["space"]), given["recipe"], cli._overrides(context), *how).base]
        if name not in ("train", "distill", "pipeline", "compare"):
            return []
        source, overrides = (
            context.params["recipe"] or ("digits" if name == "pipeline" else "cifar10"),
            cli._overrides(context),
        )
    stages = STAGES if name == "pipeline" else ["train" if name == "train" else "distill"]
    found = [resolve(source, stage, overrides) for stage in stages]
    for recipe in found:
        if any(getattr(method, "layers", None) for method in recipe.loss.methods.values()):
            student, teacher = recipe.student.name, recipe.teacher.name
            nets = build(student, "student", 10, **NARROW[student]), build(teacher, "teacher", 10, **NARROW[teacher])
            Objective(recipe, *nets)
    return found


@pytest.mark.parametrize("name", shipped())
def test_commands_of_the_header_are_right(name):
    lines = re.findall(r"^#   toolkit (.+?)(?: {2,}[\d.]+%)?$", header_of(name), re.MULTILINE)
    assert lines, "the header gives the command"
    for line in lines:
        check_command(line)


@pytest.mark.parametrize(
    "name", ["README.md", "docs/own-images.md", "docs/serving.md", "students/pretrained/README.md"]
)
def test_commands_of_the_documentation_are_right(name):
    text = (Path(__file__).parents[1] / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:    |\$ )(?:torchrun .* -m )?toolkit (.+)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        check_command(line)


@pytest.mark.parametrize("widths", [[4, 8, 16], [32, 64, 128]])
def test_commands_of_messages_find_the_recipe_and_the_teacher_again(tmp_path, monkeypatch, widths):
    monkeypatch.chdir(tmp_path)
    file = Path("my recipes/mine.yaml")
    file.parent.mkdir()
    file.write_text((RECIPES / "digits.yaml").read_text().replace("dataset: digits", "dataset: digits, image_size: 16"))
    chosen = {"teacher.widths": widths, "data.val_size": 0.2, "data.images": "some.json", "data.image_size": 32}
    wanted = resolve(file, "distill", chosen)
    with pytest.raises(TeacherError) as caught:
        teaching.find(wanted)
    assert f"with widths={widths}" in str(caught.value)
    command = re.search("`toolkit (.+?)`", str(caught.value))[1]
    assert ("teacher.widths" in command) == (widths == [4, 8, 16])  # else the recipe's own
    (trained,) = check_command(command)
    (again,) = check_command(f"distill {teaching.options(trained, 'distill')} --teacher resnet9_wide --student resnet9")
    for recipe in (trained, again):
        assert recipe.teacher == wanted.teacher
        assert recipe.data == wanted.data


def test_a_recipe_that_is_right_with_its_options_alone_is_named_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text((RECIPES / "digits.yaml").read_text().replace("dataset: digits", "dataset: photos"))
    wanted = resolve("mine.yaml", "distill", {"data.dataset": "folder:photos"})
    assert teaching.options(wanted, "distill").startswith("--recipe mine.yaml --dataset folder:photos")


@pytest.mark.parametrize("name", REPORTS)
def test_systems_of_reports_say_what_was_reported(name):
    (stage,) = stages_of(name)
    recipe = resolve(name, stage)
    claim = f"{recipe.reported_top1:.2%}"
    assert f"Reported test top-1: {claim}" in header_of(name)
    assert info(recipe.model.name, recipe.role).source.startswith(f"{recipe.source} ({claim} on CIFAR-10")


def test_contradictions_come_at_once_too():
    changes = {"early_stop.patience": 3, "data.val_size": 0, "progressive.start": 64, "swa_start": 999}
    with pytest.raises(RecipeError) as caught:
        resolve("cifar10", "train", changes)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert all(any(word in line for line in lines) for word in ("early_stop.patience", "swa_start", "progressive"))


def test_a_stage_may_be_another_recipes_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: cifar10-cpu\nepochs: 3\nstudent: {name: resnet9}\n")
    ours, theirs = resolve(file, "train"), resolve("cifar10-cpu", "train")
    assert not ours.differences(theirs)
    file.write_text("train: cifar10-gpu\nstudent: {name: resnet9}\n")  # whose stage is a name again
    assert not resolve(file, "train").differences(resolve("cifar10-gpu", "train"))
    file.write_text(f"train: {file}")
    with pytest.raises(RecipeError, match="name each other"):
        resolve(file, "train")
    file.write_text("distill: mine.yaml")
    with pytest.raises(RecipeError, match=r"cannot read the recipe mine.yaml"):
        resolve(file, "distill")
    file.write_text("distill: 30")
    with pytest.raises(RecipeError, match=r"distill \(=30\) must be a mapping"):
        resolve(file, "distill")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"views": "flip"}, "names no weights"),
        ({"name": "wrn28"}, "names no weights"),
        ({"checkpoint": "runs/a", "also": ["runs/b"]}, "belongs to the first teacher"),
        (3, "teacher.also.0"),
    ],
)
def test_another_teacher_needs_weights(entry, message):
    with pytest.raises(RecipeError, match=message):
        resolve("digits", "distill", {"teacher.also": [entry]})


def test_another_teacher_may_be_a_path_or_a_mapping():
    entries = ["runs/a", "big.onnx", {"checkpoint": "other.onnx", "views": None}, {"checkpoint": "runs/b"}]
    recipe = resolve("digits", "distill", {"teacher.also": entries, "teacher.views": "flip"})
    also = recipe.teacher.also
    assert [(one.name, str(one.checkpoint), one.views) for one in also] == [
        ("", "runs/a", "flip"), ("onnx", "big.onnx", "flip"), ("onnx", "other.onnx", None), ("", "runs/b", None),
    ]  # fmt: skip
    assert resolve(recipe.model_dump(mode="json"), "distill").teacher == recipe.teacher


def test_all_errors_come_at_once_with_field_value_and_what_is_allowed():
    tree = {
        "student": {"name": "tpsnat"},
        "teacher": {"name": "wrn"},
        "optimizer": {"lrr": 1, "lr": -1},
        "loss": {"temperature": 0},
        "epochs": "many",
        "data": {"dataset": "cifar"},
    }
    with pytest.raises(RecipeError) as caught:
        resolve(tree, "distill")
    lines = str(caught.value).splitlines()
    assert lines[0] == "the recipe is wrong in 7 places:"
    text = "\n".join(lines)
    for expected in (
        "student.name = 'tpsnat'",
        "did you mean 'tpsnet'?",
        "teacher.name = 'wrn'",
        "optimizer.lrr: there is no such field; did you mean 'lr'?",
        "optimizer.lr = -1: input should be greater than 0",
        "loss.temperature = 0: input should be greater than 0",
        "epochs = 'many'",
        "data.dataset = 'cifar': should be cifar10, cifar100, digits, or folder:PATH",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": None, "teacher": None}, "names no student to distil"),
        ({"teacher": None}, r"loss.kd_weight \(=0.9\) needs a teacher"),
        ({"loss": {"ce_weight": 0, "kd_weight": 0}}, "both 0"),
        ({"teacher": {"name": "a.onnx", "input": {"mean": [123.7, 116.3, 103.5]}}}, "of images in 0..255, divide by"),
        (
            {"teacher": {"name": "a.onnx", "input": {"std": "0.2,0,0.2"}}},
            "teacher.input.std: .* must be greater than 0",
        ),
        ({"start_from": "teacher", "loss": {}}, "start_from=teacher needs a student that learns from a teacher"),
        ({"start_from": "teacher", "teacher": {"name": "t.onnx"}}, "a teacher that was trained here"),
        ({"epochs": 3, "schedule": {"warmup_epochs": 5}}, r"warmup_epochs \(=5\) must be at most epochs \(=3\)"),
        ({"optimizer": {"momentum": 0}}, "nesterov"),
        ({"average_decay": 0.9, "swa_start": 3}, "average_decay and swa_start each average the weights"),
        ({"epochs": 3, "swa_start": 3}, r"swa_start \(=3\) must be less than epochs \(=3\)"),
        (
            {"average_decay": 0.9, "optimizer": {"lookahead_steps": 5}},
            "average_decay and optimizer.lookahead_steps each",
        ),
        ({"swa_start": 0, "optimizer": {"lookahead_steps": 5}}, "optimizer.lookahead_steps and swa_start each"),
        ({"progressive": {"start": 32}}, r"progressive.start \(=32\) must be less than data.image_size \(=32\)"),
    ],
)
def test_fields_that_contradict_each_other(change, message):
    with pytest.raises(RecipeError, match=message):
        resolve(STUDENT | change, "distill")


def test_what_means_the_same_is_the_same():
    """After a trip through a file, by a path with a slash at its end: the same run."""
    tree = STUDENT | {
        "data": {"dataset": "folder:photos/", "split_seed": 3},
        "student": {"name": "resnet9", "widths": (8, 8)},
    }
    one = resolve(tree, "distill")
    other = resolve(yaml.safe_load(one.to_yaml().replace("folder:photos", "folder:./photos")), "distill")
    assert one == other
    assert one.student.arguments == {"widths": [8, 8]}
    with pytest.raises(RecipeError, match=r"data.split_seed = -1: input should be greater than or equal to 0"):
        resolve(tree | {"data": {"split_seed": -1}}, "distill")


def test_a_misspelt_section_is_told_with_what_it_leaves_out(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("teacher: {name: wrn28}\ntarin: {epochs: 3}\ndistil: {student: {name: tpsnet}}\n")
    with pytest.raises(RecipeError) as caught:
        resolve(file, "distill")
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "it names no student to distil: give one by --student NAME",
        "tarin: there is no such field; did you mean 'train'?",
        "distil: there is no such field; did you mean 'distill'?",
    ]


def test_sections_and_overrides_count_for_their_stage():
    tree = STUDENT | {"epochs": 9, "train": {"epochs": 5, "loss": {"kd_weight": 0}}, "distill": {"batch_size": 64}}
    overrides = recipes.parse_settings(["optimizer.lr=1e-3", "train.seed=7", "student.blocks=[7,7,7]"])
    train, distill = resolve(tree, "train", overrides), resolve(tree, "distill", overrides)
    assert (train.epochs, train.batch_size, train.seed) == (5, 128, 7)
    assert (distill.epochs, distill.batch_size, distill.seed) == (9, 64, 0)
    assert train.optimizer.lr == distill.optimizer.lr == 1e-3
    assert train.student is None
    assert distill.model.arguments == {"blocks": [7, 7, 7]}
    looked_at = {"teacher.views": "flip", "teacher.also": ["runs/a"]}  # when it teaches: it is trained without
    assert resolve("digits", "train", looked_at) == resolve("digits", "train")


def test_the_shipped_student_enlarges_images_of_its_own_size_alone():
    photos = {"data.dataset": "folder:photos"}
    for size, resize in ((32, 40), (64, None)):
        student = resolve("fine-tune", "distill", photos | {"data.image_size": size}).student
        assert student.arguments.get("resize") == resize


def test_the_digest_knows_what_is_computed_and_not_where():
    recipe = resolve(STUDENT, "distill")
    elsewhere = resolve(STUDENT, "distill", {"data.data_dir": "/tmp/x", "device": "cpu", "teacher.checkpoint": "a",
                                           "checkpoint_minutes": 1, "data.offline": True,
                                           "data.memory": 2})  # fmt: skip
    assert elsewhere.digest() == recipe.digest()
    folders = [{"data.dataset": "folder", "data.data_dir": name} for name in "ab"]  # here it says which images
    assert len({resolve(STUDENT, "distill", each).digest() for each in folders}) == 2
    other = resolve(STUDENT, "distill", {"optimizer.lr": 0.2, "student.dropout": 0.1})
    assert recipe.differences(other) == ["optimizer.lr: 0.1 -> 0.2", "student.dropout: None -> 0.1"]


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "3", "", "name: 2024-13-01"])
def test_files_that_are_no_recipe(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=r"x\.yaml"):
        resolve(path, "train")


def test_every_field_says_what_it_means():
    """Fields whose name and choices say it all are exempt."""
    plain = {"name", "seed", "precision"}
    sections = [kind for kind in vars(recipes).values() if isinstance(kind, type) and issubclass(kind, BaseModel)]
    assert recipes.EarlyStop in sections
    for section in sections:
        for name, field in section.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, recipes.Section)
            assert field.description or nested or name in plain, f"{section.__name__}.{name}"


@pytest.mark.parametrize(
    ("given", "claimed"),
    [
        ({"seed": 3, "data.data_dir": "elsewhere", "precision": "fp32", "epochs": 300}, True),
        ({"data.val_size": 0, "select": "last"}, True),
        ({"epochs": 299}, False),
        ({"student.name": "resnet9"}, False),
        ({"optimizer.lr": 0.05}, False),
    ],
)
def test_another_run_than_the_reported_one_claims_nothing(given, claimed):
    recipe = resolve("rao-tpsnet", "distill", given)
    assert (recipe.reported_top1, recipe.source is not None) == ((0.9484, True) if claimed else (None, False))
