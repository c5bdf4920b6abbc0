"""The command line: what it lists, what its flags set, how fast it starts."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import Chain, Toolkit
from PIL import Image

from toolkit import __version__, cli
from toolkit.errors import UserError
from toolkit.run import Run

COMMANDS = (
    "train", "distill", "compare", "pipeline", "tune", "validate", "report", "export", "inspect", "bench", "serve",
    "predict", "data", "models", "doctor",
)  # fmt: skip


def test_help_lists_the_commands(toolkit: Toolkit) -> None:
    result = toolkit("--help")
    assert result.exit_code == 0
    assert all(f" {command} " in result.stdout for command in COMMANDS)
    assert toolkit("--version").stdout == f"{__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_for_each_option(toolkit: Toolkit, command: str) -> None:
    result = toolkit(command, "--help")
    assert result.exit_code == 0
    found = cli.typer.main.get_command(cli.app).commands[command]
    for each in getattr(found, "commands", {"": found}).values():
        described = {p.name: p.help for p in each.params}
        assert described
        assert all(described.values()), described


@pytest.mark.parametrize(
    "command", ["--help", "train --teacher wrn82", "compare dkdd", "predict missing.png", "tune --space tpsnet-randon"]
)
def test_what_needs_no_torch_imports_none(command: str, nowhere: Path) -> None:
    script = (
        "import sys; from toolkit.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: assert not {'torch', 'sklearn', 'matplotlib', 'ray', 'optuna'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", script, *command.split()], capture_output=True, text=True)
    assert result.returncode == (0 if command == "--help" else 1), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["train", "--epoch"],
        ["train", "--epochs", "many"],
        ["predict"],
        ["compare", "soft_targets", "--seeds", "0"],
        ["serve", "--port", "99999"],
        ["validate", "--provider", "tpu"],
        ["bench", "a.onnx", "--provider", "cpu", "--provider", "tpu"],
    ],
)
def test_wrong_usage_is_exit_code_2(toolkit: Toolkit, nowhere: Path, arguments: list[str]) -> None:
    result = toolkit(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


FLAGS = [
    (["--epochs", 30], "epochs", 30),
    (["--batch-size", 64], "batch_size", 64),
    (["--lr", 0.05], "optimizer.lr", 0.05),
    (["--seed", 7], "seed", 7),
    (["--dataset", "digits"], "data.dataset", "digits"),
    (["--data-dir", "here"], "data.data_dir", Path("here")),
    (["--image-size", 48], "data.image_size", 48),
    (["--offline"], "data.offline", True),
    (["--skip-broken"], "data.skip_broken", True),
    (["--skip-leaks"], "data.skip_leaks", True),
    (["--group-by", "(.*)_"], "data.group_by", "(.*)_"),
    (["--data-memory", 1.5], "data.memory", 1.5),
    (["--unlabelled"], "data.unlabelled", True),
    (["--balance", "sampling"], "balance", "sampling"),
    (["--deterministic"], "deterministic", True),
    (["--no-probe"], "probe", False),
    (["--keep", 5], "keep_checkpoints", 5),
    (["--init", "pretrained"], "start_from", Path("pretrained")),
    (["--device", "cpu"], "device", "cpu"),
    (["--budget", 6_000_000], "budget", 6_000_000),
    (["--teacher", "resnet9_wide"], "teacher.name", "resnet9_wide"),
    (["--teacher-checkpoint", "there"], "teacher.checkpoint", Path("there")),
    (["--teacher-weights", "there"], "teacher.checkpoint", Path("there")),
    (["--teacher-image-size", 64], "teacher.input.image_size", 64),
    (["--teacher-layout", "nhwc"], "teacher.input.layout", "nhwc"),
    (["--teacher-scale", 255], "teacher.input.scale", 255),
    (["--teacher-mean", "0.1,0.2,0.3"], "teacher.input.mean", (0.1, 0.2, 0.3)),
    (["--teacher-std", "0.1,0.2,0.3"], "teacher.input.std", (0.1, 0.2, 0.3)),
    (["--teacher-classes", "names.yaml"], "teacher.classes", Path("names.yaml")),
    (["--student", "resnet9"], "student.name", "resnet9"),
    (["--set", "optimizer.lr=1e-3"], "optimizer.lr", 1e-3),
    (["--lr", 0.05, "--set", "optimizer.lr=0.2"], "optimizer.lr", 0.2),
    (["--set", "distill.epochs=30", "--set", "train.epochs=40"], "epochs", 30),
]


def test_every_flag_of_a_field_is_tried() -> None:
    tried = {str(flags[0]).removeprefix("--").replace("-", "_") for flags, *_ in FLAGS}
    assert tried == {*cli.FIELDS, "set", "teacher_weights"}


@pytest.mark.parametrize(("flags", "field", "value"), FLAGS)
def test_flags_set_fields_of_the_recipe(
    toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch, flags: list[object], field: str, value: object
) -> None:
    taken = []
    monkeypatch.setattr("toolkit.stages.distill", lambda recipe, *rest, **more: taken.append(recipe) or 1 / 0)
    other = ("--teacher", "t.onnx") if field.startswith("teacher.input") else ()
    with pytest.raises(ZeroDivisionError):  # what is not the user's fault keeps its traceback
        toolkit("distill", "--student", "resnet9", *other, *flags)
    found = taken[0]
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value


def test_another_model_drops_the_arguments_of_the_recipes_own(
    toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr("toolkit.stages.distill", lambda recipe, *rest, **more: taken.append(recipe) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toolkit("distill", "--recipe", "digits", "--student", "tpsnet", "--set", "student.width=32")
    assert taken[0].student.arguments == {"width": 32}  # and not the widths of resnet9
    assert taken[0].teacher.arguments == {"widths": [32, 64, 128]}


def test_a_chain_that_is_stopped_while_its_teacher_is_measured_trains_no_student(
    toolkit: Toolkit, nowhere: Path, monkeypatch: pytest.MonkeyPatch, few_batches: None, no_pictures: None
) -> None:
    def measured(*_: object) -> tuple[float, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return 1.0, 0.5

    short = ("--epochs", 1, "--set", "schedule.warmup_epochs=0", "--set", "teacher.widths=[8, 16, 32]")
    with monkeypatch.context() as patch:
        patch.setattr("toolkit.engine.evaluate", measured)
        result = toolkit("pipeline", *short, "--run-dir", "both")
    assert result.exit_code == 1
    assert "both/teacher is finished; stopped before what comes after it; all of it goes on" in result.stderr
    assert [path.name for path in Path("both").iterdir()] == ["teacher"]
    assert "pipeline` and --resume" in result.stderr
    result = toolkit("pipeline", *short, "--run-dir", "both", "--resume", "--baseline")
    assert result.exit_code == 0, result.output
    assert {path.name for path in Path("both").iterdir()} == {"teacher", "student", "baseline"}
    ours, theirs = (
        json.loads(Path("both", name, "report/metrics.json").read_text())["top1"] for name in ("student", "baseline")
    )
    assert f"without a teacher {theirs:.2%}: {100 * (ours - theirs):+.2f} points" in result.stdout


def test_a_name_that_the_terminal_cannot_show(tmp_path: Path, path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "fine.png")
    try:
        (tmp_path / "fine.png").rename(tmp_path / os.fsdecode(b"f\xfcr.png"))
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    command = [sys.executable, "-m", "toolkit", "predict", tmp_path, "--artifact", path]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{tmp_path}/f\\udcfcr.png: " in result.stdout


def test_models_is_a_table_of_the_catalogue(toolkit: Toolkit) -> None:
    table = toolkit("models").stdout
    assert all(name in table for name in ("wrn28", "resnet9_wide", "tpsnet", "resnet9", "36,479,194", "4,959,770"))


def test_models_knows_the_budget(toolkit: Toolkit) -> None:
    rows = json.loads(toolkit("models", "--json", "--budget", 4_000_000).stdout)
    assert {row["role"] for row in rows} == {"teacher", "student"}
    for row in rows:
        assert row.keys() == {"name", "role", "parameters", "macs", "fits_budget", "source"}
        assert row["fits_budget"] == (row["parameters"] < 4_000_000)
        assert row["macs"] > 1_000_000
        assert row["source"]
    assert {row["name"]: row["fits_budget"] for row in rows if row["role"] == "student"}["tpsnet"] is False


def test_models_of_an_image_size_are_timed_and_those_that_refuse_it_left_out(
    toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {"teacher": ["batch_doubling_resnet"], "student": ["resnet9"]}
    monkeypatch.setattr("toolkit.catalogue.names", two.__getitem__)
    result = toolkit("models", "--image-size", 16)
    assert result.stderr.startswith("left out: batch_doubling_resnet: ")
    assert "images of 32 pixels alone, not of 16" in result.stderr
    heading = result.stdout.partition("resnet9")[0].split()
    assert "16 pixels" in " ".join(heading)
    assert all(word in heading for word in ("train", "infer", "MiB", "parameters", "MACs", "fits"))
    assert "role" not in heading
    (row,) = json.loads(toolkit("models", "--image-size", 16, "--json").stdout)
    assert (row["name"], row["role"]) == ("resnet9", "student")
    assert row["macs"] < 50_000_000  # 160 at 32x32
    assert min(row["training"], row["inference"], row["memory"]) > 0


def test_doctor_says_what_is_wrong_and_fails(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise UserError("no session opens")

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr("serve.session.Session", broken)
    result = toolkit("doctor", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    full, nothing = found["problems"]
    assert full.startswith(f"only 0.0 GiB are free in {Path.cwd()}: ")
    assert re.fullmatch(r"ONNX Runtime \S+ runs nothing here: no session opens", nothing)
    assert found["facts"]["providers (ONNX Runtime)"] == ""
    result = toolkit("doctor")
    assert result.exit_code == 1
    assert result.stdout.endswith(f"problem: {full}\nproblem: {nothing}\n2 to put right\n")


def test_a_written_recipe_holds_every_field(pipeline: Chain) -> None:
    written = yaml.safe_load((pipeline.folder / pipeline.student / "recipe.yaml").read_text())
    assert written == Run(pipeline.folder / pipeline.student).recipe.model_dump(mode="json")
    assert written["epochs"] == 3
