"""What the README and the documentation state of the toolkit: their tables, their code, the rules of its design."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import typer
import yaml
from served import Served
from test_every_recipe import REPORTS, stages_of

from export import parity
from export.preprocess import fit
from serve.decode import read_image
from serve.session import Session
from toolkit import cli, losses
from toolkit.catalogue import info
from toolkit.recipe import resolve, shipped
from toolkit.run import SHIPPED
from toolkit.space import make_plan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first row begins so."""
    lines = iter(text.splitlines())
    assert any(line.startswith(heading) for line in lines), heading
    next(lines)
    rows = takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def in_code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def code(name: str) -> list[str]:
    """The Python of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


# --- tables ------------------------------------------------------------------------------------------------


def test_the_recipes() -> None:
    patterns = []
    for names, _ in table(README, "| recipe | for |"):
        first, *others = in_code(names)
        start = first.rpartition("-")[0]
        patterns += [first, *(start + name if name.startswith("-") else name for name in others)]
    matches = {pattern: [name for name in shipped() if fnmatch(name, pattern)] for pattern in patterns}
    assert all(matches.values()), matches
    assert sorted(name for found in matches.values() for name in found) == shipped()


def test_the_systems_of_the_five_reports() -> None:
    listed = []
    for names, networks, parameters, _, claims in table(README, "| recipe | network | parameters | report |"):
        counts = re.findall(r"\d[\d,]*\d", parameters)
        for name, *said in zip(in_code(names), in_code(networks), counts, claims.split(", "), strict=True):
            (stage,) = stages_of(name)
            recipe = resolve(name, stage)
            about = info(recipe.model.name, recipe.role)
            assert said == [recipe.model.name, f"{about.parameters:,}", f"{recipe.reported_top1:.2%}"]
            listed.append(name)
    assert sorted(listed) == sorted(REPORTS)


def test_the_methods() -> None:
    assert sorted(in_code(row[0])[0] for row in table(README, "| `loss.methods` |")) == losses.names()


def test_the_commands_and_which_print_json() -> None:
    commands = typer.main.get_command(cli.app).commands
    flat = {name: getattr(command, "commands", {"": command}) for name, command in commands.items()}
    named = {f"{name} {sub}".strip(): command for name, subs in flat.items() for sub, command in subs.items()}
    written = [re.sub(r"^toolkit| \[?[A-Z].*", "", in_code(row[0])[0]).strip() for row in table(README, "| command |")]
    assert sorted(written) == sorted(named)
    without = re.search(r"All\s+commands\s+but\s(.+?)\sprint", README, re.DOTALL)
    assert without is not None
    silent = {name for name, command in named.items() if not any("--json" in each.opts for each in command.params)}
    assert silent == set(in_code(without[1]))


def test_the_limits_of_parity() -> None:
    """In each precision, on the CPU and on a GPU."""
    amounts = {"none": 0.0, "no limit": float("inf"), "`--max-drop`": parity.MAX_DROP}

    def amount(cell: str) -> float:
        number = cell.removesuffix("%").removesuffix(" points")
        return amounts[cell] if cell in amounts else float(number) / (1 if number == cell else 100)

    held: dict[str, list[Any]] = {
        "fp32, CPU": [parity.tolerance("fp32", tf32=False, gpu=False)],
        "fp32, GPU, TF32 off": [parity.tolerance("fp32", tf32=False, gpu=True)],
        "fp16, or TF32": [
            parity.tolerance("fp16", tf32=False, gpu=False),
            parity.tolerance("fp16", tf32=False, gpu=True),
            parity.tolerance("fp32", tf32=True, gpu=True),
        ],
        "INT8": [parity.tolerance("int8", tf32=False, gpu=gpu) for gpu in (False, True)],
    }
    rows = {name: cells for name, *cells in table((ROOT / "docs/export.md").read_text(), "| | logits (over")}
    assert rows.keys() == held.keys()
    for name, cells in rows.items():
        for limits in held[name]:
            found = [limits.logits, limits.probabilities, limits.drop, limits.agreement]
            assert found == pytest.approx([amount(cell) for cell in cells]), name
            assert limits.softmax == 1e-5
            assert limits.resized == (1e-2 if name.startswith("fp32") else limits.logits)


# --- code --------------------------------------------------------------------------------------------------


def test_the_readmes_python_and_that_weights_and_artifact_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("students").symlink_to(ROOT / "students")
    Path("student.onnx").symlink_to(SHIPPED)
    Path("ship.png").symlink_to(ROOT / "serve/examples/ship.png")
    section = README.partition("\n## From Python")[2].partition("\n## ")[0]
    given: dict[str, Any] = {}
    exec("\n".join(re.findall(r"^    (.+)", section, re.MULTILINE)), given)
    assert set(given) >= {"train", "distill", "validate", "export"}
    model, header, session = given["model"], given["header"], Session(SHIPPED, "cpu")
    for path in (ROOT / "serve/examples").glob("*.png"):
        pixels = read_image(path)
        batch = torch.tensor(fit(pixels, 32)).permute(2, 0, 1)[None] / 255
        with torch.inference_mode():
            label = header["classes"][model(batch).argmax()]
        assert label == session.predict(pixels).labels[0] == (label if path.stem == "something_else" else path.stem)


def test_the_program_that_asks_a_server(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ship.png").symlink_to(ROOT / "serve/examples/ship.png")
    (program,) = code("docs/serving.md")
    exec(program.replace("http://127.0.0.1:7860/", server.url), {})
    expected = Session(server.artifact, "cpu").predict(read_image(Path("ship.png")), top_k=3)
    assert [each["label"] for each in ast.literal_eval(capsys.readouterr().out)] == list(expected.labels)


@pytest.mark.usefixtures("few_batches", "no_pictures")
def test_plain_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    epochs = '"epochs": 4'
    narrow = f'{epochs}, "teacher.widths": [8, 16, 32]'
    given: dict[str, Any] = {}
    for cell in code("docs/python.md"):
        capsys.readouterr()
        exec(cell.replace(epochs, narrow), given)
    assert given["exported"].parity.ok
    assert [row["epoch"] for row in given["rows"]] == [1, 2, 3, 4]
    (printed,) = re.findall(r"```text\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)[-1:]
    assert capsys.readouterr().out == printed


# --- design ------------------------------------------------------------------------------------------------


def imports(path: Path) -> Iterator[str]:
    """Full names of what the module imports, at its top or anywhere."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_the_architecture_lists_each_module() -> None:
    _, tree = README.split("\n    toolkit/  ")
    ours, _, tree = tree.partition("\n    teachers/")
    assert set(re.findall(r"\b(\w+)\.py\b", ours)) == {path.stem for path in (ROOT / "toolkit").glob("[!_]*.py")}
    export, serve = (re.search(rf"\n    {name}/ +(.+(?:\n     .+)*)", tree)[1] for name in ("export", "serve"))
    for package, listed in (("export", export), ("serve", serve)):
        assert {path.stem for path in (ROOT / package).glob("[!_]*.py")} <= set(re.findall(r"\w+", listed))


def test_who_imports_what() -> None:
    leaves = re.search(r"leaf\s+modules\s+of\s+`toolkit`\s+\((.+?)\)", README)
    assert leaves is not None
    own = [ROOT / f"toolkit/{name}.py" for name in leaves[1].split(", ")]
    allowed = {"", "__version__", *(path.stem for path in own)}
    for path in (*modules("serve"), *modules("export"), *own):
        for name in imports(path):
            package, _, module = name.partition(".")
            assert package not in ("students", "teachers"), (path, name)
            assert package != "toolkit" or module.partition(".")[0] in allowed, (path, name)
    for package in ("students", "teachers"):
        for path in modules(package):
            for name in imports(path):
                known = (package, "torch", *sys.stdlib_module_names)
                assert name.partition(".")[0] in known or name.startswith("students.blocks."), (path, name)


def test_no_pickle_is_loaded_but_cifars() -> None:
    loading = []
    for package in ("toolkit", "serve", "export", "students", "teachers"):
        for path in modules(package):
            known = {name.partition(".")[0] for name in imports(path)} & {"pickle", "joblib", "dill", "cloudpickle"}
            if known or re.search(b"torch.load|_pickle", path.read_bytes()):
                loading.append(path)
    assert loading == [ROOT / "toolkit/cifar.py"]


def test_the_search_space_of_the_readme_can_be_searched() -> None:
    example = README.partition("    recipe: cifar10  ")
    text = "\n".join(takewhile(lambda line: line.startswith("    "), (example[1] + example[2]).splitlines()))
    tree = yaml.safe_load(dedent(text))
    plan = make_plan(tree, None, {}, "random", "none", 3)
    assert plan.base.student is not None
    assert (plan.base.epochs, plan.base.student.name) == (30, "tpsnet")
    assert plan.space.constraints.bounds() == [("parameters", "<", 5_000_000)]
    assert plan.space.fields.keys() == tree["fields"].keys()


def test_packages_are_typed_for_those_who_install_them() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert all((ROOT / package / "py.typed").is_file() for package in packages["packages"])


def test_the_dockerfile_wants_what_the_package_wants() -> None:
    """Of what serving needs: the rest would bring PyTorch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {each.partition(";")[0] for each in project["dependencies"]}
    text = (ROOT / "serve/Dockerfile").read_text()
    installed = set(re.findall(r"[\"']([\w$-]+>=[\w.]+)[\"']", text))
    assert len(installed) == text.count(">=")
    assert {each.replace("$RUNTIME", "onnxruntime-gpu[cuda,cudnn]") for each in installed} <= wanted
