"""Teachers from elsewhere, their classes, images without labels, and students that do not start from nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from colour_net import COLOURS, SIDE, colour_net, loaded
from conftest import Chain, Toolkit, refused
from onnx import TensorProto, numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from toolkit import compare, engine, external, features, recipe, stages, teaching
from toolkit import data as datasets
from toolkit.catalogue import build, parameter_count, pretrained
from toolkit.classifier import Ensemble, with_views
from toolkit.errors import DeviceError, TeacherError
from toolkit.losses import fitnets
from toolkit.objective import Objective
from toolkit.recipe import Teacher
from toolkit.run import load_model, load_run

pytestmark = pytest.mark.usefixtures("no_pictures")
COUNT = 12
TINY = ("--recipe", "own-images", "--image-size", "32", "--set", "student.widths=[8,8,8]", "--device", "cpu",
        "--no-probe", "--epochs", "2", "--batch-size", "16", "--set", "schedule.warmup_epochs=0")  # fmt: skip


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy pictures of one colour each, in folders named after it."""
    folder, random = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(COUNT):
            pixels = np.clip(random.normal(colour, 30, (40, 50, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def top1(teacher: nn.Module, folder: Path) -> float:
    data = datasets.load(recipe.Data(dataset=f"folder:{folder}", val_size=0))
    return engine.evaluate(teacher, data.train, torch.device("cpu"), torch.float32)[1]


# --- ONNX files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "nhwc", "kind": TensorProto.UINT8, "white": 255.0},
        {"batch": 4, "softmax": True},
        {"kind": TensorProto.FLOAT16},
        {"white": 255.0, "scale": "255"},
        {"order": ("red", "blue", "green"), "names": "{0: 'red', 1: 'blue', 2: 'green'}"},
        {"order": ("red", "green", "grey", "blue"), "classes": '["red", "green", "grey", "blue"]'},
    ],
    ids=["plain", "bytes nhwc", "fixed batch, probabilities", "half", "scale told", "another order", "more classes"],
)
def test_onnx_files_of_many_kinds(coloured: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    teacher = loaded(colour_net(tmp_path / "t.onnx", **options))
    assert top1(teacher, coloured) == 1
    images = torch.rand(5, 3, 32, 32)
    whole, single = teacher(images), torch.cat([teacher(image[None]) for image in images])
    torch.testing.assert_close(whole.softmax(1), single.softmax(1), rtol=1e-3, atol=1e-3)
    assert whole.shape == (5, 3)


def test_flags_win_over_what_a_file_says(coloured: Path, tmp_path: Path) -> None:
    path = colour_net(tmp_path / "t.onnx", scale="1/255")
    assert top1(loaded(path, input={"scale": 1}), coloured) == 1


@pytest.mark.parametrize(
    ("pixels", "axes", "scale"),
    [
        ("float[B,3,16,16]", "2, 3", 2),
        ("float[B,H,W,C]", "1, 2", 2),
        ("float[B,16,16,3]", "1, 2", None),
        ("uint8[B,16,16,3]", "1, 2", None),
    ],
)
@pytest.mark.parametrize("where", ["flags", "metadata"])
def test_a_file_gets_images_by_mean_std_and_scale(
    tmp_path: Path, pixels: str, axes: str, scale: float | None, where: str
) -> None:
    """One that answers with the mean of each channel of what it gets."""
    model = f"""<ir_version: 10, opset_import: ["": 20]> means ({pixels} pixels) => (float[B,3] means) {{
        values = Cast<to: int = 1>(pixels)
        axes = Constant<value_ints: ints = [{axes}]>()
        means = ReduceMean<keepdims: int = 0>(values, axes)
    }}"""
    proto, mean, std = onnx.parser.parse_model(model), (0.1, 0.2, 0.3), (0.5, 0.8, 1)
    given = {"mean": mean, "std": std, "image_size": SIDE, "layout": "nhwc" if axes == "1, 2" else "nchw"}
    given |= {"scale": scale} if scale else {}
    if where == "metadata":
        onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in given.items()})
    onnx.save(proto, tmp_path / "t.onnx")
    teacher = loaded(tmp_path / "t.onnx", input=given if where == "flags" else {})
    images = torch.rand(4, 3, SIDE, SIDE)
    expected = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    expected = (expected * 255).round().clamp(0, 255) if "uint8" in pixels else expected * (scale or 1)
    torch.testing.assert_close(teacher.outputs(images), expected.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_a_network_of_others_has_no_weights_of_its_own(tmp_path: Path) -> None:
    model = loaded(colour_net(tmp_path / "t.onnx"))
    assert parameter_count(model) == 0
    own = nn.Conv2d(3, 4, 1, bias=False)
    assert compare._macs(own, 32) == 12 * 32 * 32
    both = Ensemble([with_views(own, "flip"), with_views(model, "flip")])
    assert compare._macs(both, 32) is None  # of its arithmetic nothing is known


def test_a_file_s_threads_do_not_spin_beside_pytorch_s(tmp_path: Path) -> None:
    options = loaded(colour_net(tmp_path / "t.onnx")).network.sessions["cpu"].get_session_options()
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "20"
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_file_runs_on_the_cpu_only_where_no_gpu_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    def missing() -> None:
        raise RuntimeError("no CUDA in this ONNX Runtime")

    network = loaded(colour_net(tmp_path / "t.onnx")).network
    network.device = device
    monkeypatch.setattr("serve.session.need_cuda", missing)
    if device == "cuda":
        with pytest.raises(DeviceError, match=r"cannot run .* on CUDA: no CUDA in this"):
            network._session(torch.device("cuda"))
    else:
        assert network._session(torch.device("cuda")) is network.sessions["cpu"]
        assert "runs on the CPU: no CUDA in this" in capsys.readouterr().err


def test_titles(chain: Chain) -> None:
    also = ["t.onnx", {"name": "timm:test_resnet", "checkpoint": "w.safetensors"}, str(chain.teacher)]
    teacher = Teacher.model_validate({"name": "timm:test_vit", "also": also})
    assert external.titles(teacher) == f"timm:test_vit and t.onnx and timm:test_resnet and {chain.teacher}"


def test_a_mapping_makes_another_teacher_of_one_of_our_own(chain: Chain) -> None:
    wanted, found = stages.Run(chain.student).recipe, set()
    for mapping in ("{0: even, 1: odd}", "{0: odd, 1: even}"):  # a mistake that was put right
        Path("classes.yaml").write_text(mapping)
        own = {"name": "resnet9_wide", "checkpoint": chain.teacher, "classes": "classes.yaml"}
        mapped = wanted.model_copy(update={"teacher": Teacher.model_validate(own)})
        found.add(teaching.load(mapped, ("even", "odd"))[1].weights)
    assert len(found) == 2


def test_our_own_artifact_teaches(chain: Chain) -> None:
    path = chain.folder / chain.artifact
    teacher, names = external.load(Teacher(name=str(path)), None, "cpu", True)
    assert names == list("0123456789")
    images = torch.randint(0, 256, (3, 3, 32, 32)).float() / 255
    model, _ = load_run(stages.Run(chain.folder / chain.student))
    torch.testing.assert_close(teacher(images), model(images), rtol=1e-3, atol=1e-3)


def test_digests_tell_teachers_apart(tmp_path: Path) -> None:
    one, other = colour_net(tmp_path / "a.onnx"), colour_net(tmp_path / "b.onnx", ("red", "green", "blue"))
    digests = {loaded(one).hex_digest, loaded(other).hex_digest, loaded(one, input={"scale": 2}).hex_digest}
    assert len(digests) == 3
    assert loaded(one).hex_digest in digests
    for mapping in ("{0: red, 1: green, 2: blue}", "{0: blue, 1: green, 2: red}"):  # a mistake that was put right
        (tmp_path / "classes.yaml").write_text(mapping)
        digests.add(loaded(one, classes=tmp_path / "classes.yaml").hex_digest)
    assert len(digests) == 5
    assert Ensemble([loaded(one)]).state_dict()["members.0.digest"].shape == (32,)


def test_weights_beside_the_graph_are_a_part_of_its_digest(tmp_path: Path) -> None:
    colour_net(tmp_path / "whole.onnx")
    digests = set()
    for scale in (1, 2):
        model = onnx.load(tmp_path / "whole.onnx")
        weights = next(value for value in model.graph.initializer if value.name == "weights")
        weights.CopyFrom(numpy_helper.from_array(scale * numpy_helper.to_array(weights), "weights"))
        onnx.save(model, tmp_path / "t.onnx", save_as_external_data=True, location="t.data", size_threshold=60)
        digests.add(loaded(tmp_path / "t.onnx").hex_digest)
        (tmp_path / "t.data").unlink()
    assert len(digests) == 2


def test_a_teacher_of_our_own_gets_images_of_its_size(chain: Chain) -> None:
    wanted = stages.Run(chain.student).recipe
    model, _ = load_model(chain.teacher / "checkpoints/best.safetensors")
    larger = wanted.model_copy(update={"data": wanted.data.model_copy(update={"image_size": 48})})
    resized, _, _ = teaching.load(larger, tuple("0123456789"))
    images = torch.rand(2, 3, 48, 48)
    small = torch.nn.functional.interpolate(images, size=32, mode="bilinear", antialias=True)
    torch.testing.assert_close(resized(images), model(small))
    shapes = features.output_shapes(resized, images, resized.network)
    assert shapes == features.output_shapes(model, small)  # features by the same paths
    by_maps = wanted.loss.model_copy(update={"methods": {"fitnets": fitnets.Params()}})
    student = build("resnet9", "student", 10, image_size=48, widths=[8, 8, 8])
    objective = Objective(larger.model_copy(update={"loss": by_maps}), student, resized)
    assert all(theirs.startswith("network.stages") for _, theirs in objective.pairs["fitnets"])
    assert external.images_at_once(resized, 16) == 500  # as many as at 32 pixels, which it enlarges them to
    assert external.images_at_once(resized, 64) == external.images_at_once(model, 64) == 125
    resized.set_input(recipe.TeacherInput(image_size=320))
    assert external.images_at_once(Ensemble([with_views(model, "flip"), with_views(resized, "flip")]), 16) == 5


@pytest.mark.parametrize(
    ("options", "fields", "words"),
    [
        (
            {"scale": "1/255"},
            {},
            "says scale = '1/255' of its input, which is not understood: say it by --teacher-scale",
        ),
        ({"image_size": "[16, 16]"}, {}, "says image_size = [16, 16] of its input"),
        ({"size": "side"}, {}, "takes images of any size: say which it was trained with by --teacher-image-size"),
        ({}, {"input": {"image_size": 32}}, "takes images of 16 pixels, not of 32"),
        ({"size": (16, 24)}, {}, "takes images of 16 x 24 pixels, and only square ones are given"),
        ({"size": (16, 24), "layout": "nhwc"}, {}, "takes images of 16 x 24 pixels"),
        ({"order": ("red", "blue")}, {}, "answers with 2 classes, the data has 3"),
        ({"order": ("red",)}, {}, "has one output: one for each of at least two classes is needed"),
        ({"names": '["a", "b"]'}, {}, "has 3 outputs, but 2 names of classes: a, b"),
        ({"names": '["cat", "red", "blue"]'}, {}, "do not map to the data's (1 are not mapped to: green)"),
    ],
)
def test_onnx_files_that_cannot_teach(
    tmp_path: Path, options: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    path = colour_net(tmp_path / "t.onnx", **options)
    with pytest.raises(TeacherError) as error:
        loaded(path, **fields)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_classes_by_a_file(coloured: Path, tmp_path: Path) -> None:
    order = ("red", "green", "blue", "grey")
    path, file = colour_net(tmp_path / "t.onnx", order), tmp_path / "classes.yaml"
    for content in (
        list(order),
        {0: "red", 1: "green", 2: "blue", 3: None},
        {0: "red", 3: "red", 1: "green", 2: "blue"},
    ):
        file.write_text(yaml.safe_dump(content))
        assert top1(loaded(path, classes=file), coloured) == 1
    file.write_text("{0: no, 1: 010, 2: 0, 3: ~}")  # texts, whatever YAML takes them for
    assert external.load(Teacher(name=str(path), classes=file), None, "cpu", True)[1] == ["no", "010", "0"]
    file.write_text(yaml.safe_dump({"rot": "red", 1: "green", 2: "blau"}))
    with pytest.raises(TeacherError, match=r"1 are no outputs of the teacher: rot; 1 are no classes of the data: blau"):
        loaded(path, classes=file)
    file.write_text("[red")
    with pytest.raises(TeacherError, match="is not YAML"):
        loaded(path, classes=file)
    file.write_bytes("grün: green".encode("latin-1"))
    with pytest.raises(TeacherError, match=r"classes.yaml is not text in UTF-8: 'utf-8' codec can't decode byte 0xfc"):
        loaded(path, classes=file)
    with pytest.raises(TeacherError, match=r"cannot read the classes in .*none.yaml: No such file"):
        loaded(path, classes=tmp_path / "none.yaml")


def test_outputs_of_the_same_name_are_of_the_same_class(tmp_path: Path) -> None:
    theirs, file = ["cat", "crane", "dog", "crane"], tmp_path / "classes.yaml"
    file.write_text(yaml.safe_dump(theirs))
    for names, given in ((theirs, None), (None, file)):
        merged = external.match_classes("t", names, 4, ["crane", "dog"], given)
        assert merged == (["crane", "dog"], [[1, 3], [2]])
        assert external.match_classes("t", names, 4, None, given) == (["cat", "crane", "dog"], [[0], [1, 3], [2]])


def test_a_mapping_to_one_class_teaches_nothing(tmp_path: Path) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text("{tabby: cat, siamese: cat}")
    with pytest.raises(TeacherError, match="leaves one class, cat: at least two are needed"):
        external.match_classes("t", ["tabby", "siamese", "pug"], 3, None, file)


def test_sides_of_minus_one_are_free(tmp_path: Path) -> None:
    proto = onnx.load(colour_net(tmp_path / "t.onnx", size="side"))
    for side in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
        side.dim_value = -1
    onnx.save(proto, tmp_path / "free.onnx")
    assert loaded(tmp_path / "free.onnx", input={"image_size": 24})(torch.rand(2, 3, 24, 24)).shape == (2, 3)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_probabilities_that_a_file_rounds_to_8_bits(classes: int) -> None:
    class Rounded(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            logits = pixels.flatten(1)[:, :classes] * 20
            return (logits.softmax(1) * 256).round() / 256 if self.training else logits

    network = Rounded()
    teacher = external.External(network, recipe.TeacherInput(image_size=8), None, "", stated=True)
    assert teacher.probe() == classes
    assert teacher.probabilities
    network.eval()
    teacher.probe()
    assert not teacher.probabilities


def test_an_onnx_teacher_without_a_file() -> None:
    with pytest.raises(TeacherError, match=r"give it by --teacher FILE\.onnx"):
        external.load(Teacher(name="onnx"), None, "cpu", True)


def test_a_teacher_at_chance_is_refused_with_what_would_help(toolkit: Toolkit, coloured: Path, nowhere: Path) -> None:
    colour_net(Path("white.onnx"), white=255.0)
    command = ("distill", *TINY, "--dataset", f"folder:{coloured}")
    words = "the teacher white.onnx has nothing to teach: it gets ", "with --teacher-scale 255 it would get 100.0%"
    refused(toolkit(*command, "--teacher", "white.onnx"), *words)
    assert not list(Path("runs").glob("*"))
    result = toolkit(*command, "--teacher", "white.onnx", "--teacher-scale", 255, "--run-dir", "run")
    assert result.exit_code == 0, result.stderr
    assert "the teacher white.onnx gets 100.0%" in result.stderr
    found = stages.Run(Path("run")).recipe.teacher
    assert found is not None
    assert (found.name, found.input.scale) == ("onnx", 255)
    assert found.weights
    again = toolkit("distill", "--run-dir", "run", "--resume")
    assert "is finished already" in again.stderr
    metrics = stages.validate(Path("run"))[0]
    assert metrics["teacher_top1"] == 1
    train = ("train", *TINY, "--teacher", "white.onnx", "--dataset", f"folder:{coloured}")
    refused(toolkit(*train), "white.onnx is not trained here")
    Path("white.onnx").write_bytes(Path("white.onnx").read_bytes()[:-9])
    result = toolkit(*command, "--teacher", "white.onnx")
    assert result.stderr == (
        "error: the teacher cannot be loaded: white.onnx is not an ONNX file, or it is cut short\n"
    )
    assert "teacher_top1" not in stages.validate(Path("run"))[0]


# --- timm ----------------------------------------------------------------------------------------------------


@pytest.fixture
def timm_weights(tmp_path: Path) -> Path:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_timm_and_an_ensemble_of_all(timm_weights: Path, tmp_path: Path, chain: Chain) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(yaml.safe_dump({str(i): list(COLOURS)[i % 3] for i in range(10)}))
    colours = colour_net(tmp_path / "t.onnx")
    mixed = {
        "name": "timm:test_resnet",
        "checkpoint": str(timm_weights),
        "input": {"image_size": 32},
        "also": [str(colours), {"name": "", "checkpoint": str(chain.folder / chain.teacher), "classes": str(file)}],
    }
    wanted = recipe.resolve({"student": {"name": "resnet9"}, "teacher": mixed, "loss": {"kd_weight": 1}}, "distill")
    model, known, _ = teaching.load(wanted, tuple(COLOURS))
    assert isinstance(model, Ensemble)
    first, second, third = model.members
    assert isinstance(first, external.External)
    assert (first.input.image_size, first.input.mean) == (32, (0.5, 0.5, 0.5))
    images = torch.rand(2, 3, 32, 32)
    shares = sum(member(images).softmax(1) for member in (first, second, third)) / 3
    torch.testing.assert_close(model(images).exp(), shares)
    assert recipe.validate(yaml.safe_load(wanted.model_copy(update={"teacher": known}).to_yaml())).teacher == known


def test_timm_weights_of_other_classes_than_the_data_s(timm_weights: Path, tmp_path: Path) -> None:
    tensors = load_file(timm_weights)
    teacher = Teacher(name="timm:test_resnet", checkpoint=timm_weights)
    loaded = [external.load(teacher, None, "cpu", True)]
    save_file({name: value + 1 for name, value in tensors.items()}, timm_weights)
    loaded.append(external.load(teacher, None, "cpu", True))
    assert [names for _, names in loaded] == [["0", "1", "2"]] * 2
    assert loaded[0][0].hex_digest != loaded[1][0].hex_digest


def test_timm_is_strict(timm_weights: Path, tmp_path: Path) -> None:
    tensors = load_file(timm_weights)
    first = next(iter(tensors))
    wrong = {f"more.{first}": tensors.pop(first).clone()} | {
        name: value[:1].clone() if name == "layer1.0.conv1.weight" else value for name, value in tensors.items()
    }
    save_file(wrong, tmp_path / "wrong.safetensors")

    def load(path: Path, name: str = "test_resnet") -> None:
        external.load(Teacher(name=f"timm:{name}", checkpoint=path), tuple(COLOURS), "cpu", True)

    with pytest.raises(TeacherError) as error:
        load(tmp_path / "wrong.safetensors")
    for words in (f"1 missing: {first}", f"1 not of this model: more.{first}", "1 of another shape: layer1.0.conv1"):
        assert words in str(error.value)
    with pytest.raises(TeacherError, match="timm has no model 'test_resnett'; did you mean 'test_resnet'"):
        load(timm_weights, "test_resnett")
    (tmp_path / "w.pth").write_bytes(b"PK")
    with pytest.raises(TeacherError, match="is not a safetensors file"):
        load(tmp_path / "w.pth")
    with pytest.raises(TeacherError, match=r"timm cannot build test_resnet with \{'widht': 3\}"):
        external.load(
            Teacher.model_validate({"name": "timm:test_resnet", "checkpoint": timm_weights, "widht": 3}),
            tuple(COLOURS),
            "cpu",
            True,
        )
    with pytest.raises(TeacherError, match="no weights without the network"):
        external.load(Teacher(name="timm:test_resnet"), tuple(COLOURS), "cpu", True)


def test_a_teacher_that_would_get_more_right_by_a_flag_does_not_teach_until_it_is_said(
    coloured: Path, tmp_path: Path
) -> None:
    file = colour_net(tmp_path / "t.onnx", white=3.8)  # so dark that it sees no green
    teacher = loaded(file)
    data = datasets.load(recipe.Data(dataset=f"folder:{coloured}", val_size=0))
    wanted = recipe.resolve({"teacher": {"name": "t.onnx"}, "student": {"name": "resnet9"}}, "distill")
    with pytest.raises(TeacherError) as refusal:
        teaching.preflight(teacher, Teacher(name="t.onnx"), data, wanted)
    share = top1(teacher, coloured)  # it is left as it was given
    assert share < 0.7
    for words in (
        "with mean 0, std 1, scale 1",
        f"gets {share:.1%} of 29 training images right, a guess 34.5%",
        "--teacher-scale 255 it would get 100.0%",
        "--teacher-scale 1 leaves it",
    ):
        assert words in str(refusal.value)
    teacher = loaded(file, input={"scale": 1})
    assert teaching.preflight(teacher, Teacher(name="t.onnx"), data, wanted)["top1"] == pytest.approx(share)


def test_a_teacher_that_finds_the_rare_class_has_something_to_teach(monkeypatch: pytest.MonkeyPatch) -> None:
    """95 of 100 parts are good; it is right in 94 and takes some for bad; one that always says good in 95."""
    labels = torch.arange(1000).ge(950).long()
    split = datasets.Split(torch.zeros(1000, 3, 32, 32, dtype=torch.uint8), labels)
    data = datasets.DataSet("parts", ("good", "bad"), split, split, split, (0, 0, 0), (1, 1, 1), "")
    wanted = recipe.resolve({"teacher": {"name": "timm:x"}, "student": {"name": "resnet9"}}, "distill")
    assert wanted.teacher is not None
    monkeypatch.setattr(external, "hint", lambda *_: None)
    answers = torch.cat([torch.zeros(895), torch.ones(100), torch.zeros(5)]).long()
    monkeypatch.setattr(engine, "predict", lambda *_: np.eye(2)[answers])
    assert teaching.preflight(nn.Identity(), wanted.teacher, data, wanted)["top1"] == 0.94
    answers = torch.zeros(1000).long()
    with pytest.raises(TeacherError, match=r"has nothing to teach: it gets 95\.0% of 1,000 val images right"):
        teaching.preflight(nn.Identity(), wanted.teacher, data, wanted)


# --- without labels, and not from nothing --------------------------------------------------------------------


def test_images_without_labels(
    toolkit: Toolkit, coloured: Path, nowhere: Path, few_batches: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, path in enumerate(sorted(coloured.rglob("*.png"))):
        Path("loose").mkdir(exist_ok=True)
        Path(f"loose/{i:02}.png").write_bytes(path.read_bytes())
    colour_net(Path("t.onnx"), ("red", "green", "blue"), names='["red", "green", "blue"]')
    command = ("distill", *TINY, "--epochs", 8, "--dataset", "folder:loose", "--teacher", "t.onnx", "--run-dir", "run")
    assert "36 images lie beside the class folders (--unlabelled" in toolkit(*command).stderr
    result = toolkit(*command, "--unlabelled")
    assert result.exit_code == 0, result.stderr
    metrics, _ = stages.validate(Path("run"))
    assert metrics["dataset"] == "folder:loose, labelled by the teacher"
    assert metrics["top1"] == metrics["agreement"] > 0.5
    assert list(metrics["per_class"]) == ["red", "green", "blue"]
    labelled, _ = stages.validate(Path("run"), dataset=f"folder:{coloured}")
    assert labelled["top1"] == labelled["agreement"] > 0.5
    assert labelled["dataset"] == f"folder:{coloured.name}"  # which has labels of its own
    shutil.copytree(coloured, "elsewhere/loose")  # one of the same name, too
    capsys.readouterr()
    same = stages.validate(Path("run"), dataset="folder:elsewhere/loose")[0]
    assert (same["dataset"], same["top1"]) == ("folder:loose", labelled["top1"])
    assert "was trained, or are split in another way: where it was trained" in capsys.readouterr().err
    exported = toolkit("export", "run")
    assert exported.exit_code == 0, exported.stderr
    wrong = toolkit(*command, "--unlabelled", "--set", "loss.ce_weight=1", "--run-dir", "other")
    assert "data.unlabelled leaves no labels to learn from" in wrong.stderr


def test_a_shipped_student_learns_other_classes(toolkit: Toolkit, coloured: Path, nowhere: Path) -> None:
    file, arguments = pretrained("resnet9")
    command = ("distill", "--recipe", "fine-tune", "--dataset", f"folder:{coloured}", "--epochs", 1, "--set",
               "schedule.warmup_epochs=0", "--image-size", 32, "--no-probe", "--run-dir")  # fmt: skip
    result = toolkit(*command, "run")
    assert result.exit_code == 0, result.stderr
    taught = toolkit(*command, "taught", "--teacher", colour_net(Path("t.onnx")), "--set", "loss.kd_weight=0.9")
    assert taught.exit_code == 0, taught.stderr
    assert "agreement" in stages.validate(Path("taught"))[0]  # with its teacher
    tuned, shipped = load_file("run/checkpoints/best.safetensors"), load_file(file)
    assert stages.Run(Path("run")).recipe.student.arguments == arguments
    assert torch.equal(tuned["mean"], shipped["mean"].float())
    assert torch.equal(tuned["network.first.weight"], shipped["network.first.weight"].float())
    assert len(tuned["network.head.weight"]) == 3
    assert "did you mean 'resnet9'" in toolkit(*command, "x", "--student", "resnet_9x", "--init", "pretrained").stderr
    assert "no weights of 'tpsnet' are shipped" in toolkit(*command, "x", "--student", "tpsnet").stderr
    wide = toolkit(*command, "x", "--set", "student.widths=[8,8,8]")
    assert "the model cannot start from" in wide.stderr


# --- plain Python --------------------------------------------------------------------------------------------


def test_plain_python() -> None:
    code = (
        "import sys, toolkit; assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys(); from toolkit import data"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import toolkit

    with pytest.raises(ValueError, match="resolved"):
        toolkit.distill(toolkit.resolve("digits", "distill"), settings={"epochs": 3})
    with pytest.raises(AttributeError):
        toolkit.nothing  # noqa: B018


def test_a_student_goes_on_from_its_teacher(toolkit: Toolkit, chain: Chain) -> None:
    command = ("distill", "--recipe", "digits", "--teacher-checkpoint", chain.teacher, "--init",
               "teacher", "--epochs", 1, "--set", "schedule.warmup_epochs=0", "--set", "optimizer.lr=1e-9",
               "--run-dir")  # fmt: skip
    assert "the model cannot start from" in toolkit(*command, "other", "--set", "student.widths=[8,8,8]").stderr
    result = toolkit(*command, "run", "--set", "student.widths=[32,64,128]", "--set", "student.resize=36")
    assert result.exit_code == 0, result.stderr
    begun, ended = (load_file(Path(run) / "checkpoints/best.safetensors") for run in (chain.teacher, "run"))
    for name in ("network.first.weight", "network.stages.2.conv3.weight", "network.head.weight"):
        torch.testing.assert_close(ended[name], begun[name])
    alone = stages.without_teacher(stages.Run(Path("run")).recipe)
    assert alone.start_from is None


# --- names of classes in a file's metadata -------------------------------------------------------------------

TWELVE = [f"class {chr(97 + i)}" for i in range(12)]


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("{2: 'blue', 0: 'red', 1: 'green'}", ["red", "green", "blue"]),
        (json.dumps({str(i): TWELVE[i] for i in range(12)}, sort_keys=True), TWELVE),  # "10" stands before "2"
        ('{"green": 1, "blue": 2, "red": 0}', ["red", "green", "blue"]),
        ('{"0": 0, "1": 1}', ["0", "1"]),
        ("{0: 10, 1: 20}", ["10", "20"]),
        (" red, green,blue ", ["red", "green", "blue"]),
        ("tench, Tinca tinca\ngoldfish\n", ["tench, Tinca tinca", "goldfish"]),
    ],
)
def test_class_names_come_in_the_order_of_the_outputs(tmp_path: Path, said: str, names: list[str]) -> None:
    path = colour_net(tmp_path / "t.onnx", tuple(names), names=said)
    assert external.load(Teacher(name=str(path)), None, "cpu", True)[1] == names


@pytest.mark.parametrize(
    "said",
    [
        "red,green",
        "{1: 'red', 2: 'green', 3: 'blue'}",
        '{"0": 1, "1": 2, "2": 0}',  # either could be the number
        "{'red': 0, 'green': 0, 'blue': 1}",
        "[{'name': 'red'}, {'name': 'green'}, {'name': 'blue'}]",
        "3",
    ],
)
def test_class_names_that_are_not_understood_are_refused(coloured: Path, tmp_path: Path, said: str) -> None:
    path, file = colour_net(tmp_path / "t.onnx", labels=said), tmp_path / "classes.yaml"
    with pytest.raises(TeacherError) as error:
        external.load(Teacher(name=str(path)), None, "cpu", True)
    said = said.replace('"', "'")
    for words in (f"{path} are not understood (labels = {said})", "name its 3 outputs by --teacher-classes FILE"):
        assert words in str(error.value)
    file.write_text(yaml.safe_dump(list(COLOURS)))
    assert top1(loaded(path, classes=file), coloured) == 1
    assert top1(loaded(colour_net(path, labels=said, names=str(list(COLOURS)))), coloured) == 1
