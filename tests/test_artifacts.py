"""`toolkit export` and `toolkit inspect` on a small finished run."""

import json
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Chain, Toolkit, files, module_at, refused
from google.protobuf import text_format
from onnx import numpy_helper
from PIL import Image
from pydantic import ValidationError
from small_net import LABELS, small_images, small_metadata, small_net

from export import inspection, onnx_export, parity, quantise, triton
from export.artifact import read
from export.preprocess import fit, nhwc
from serve.session import Session
from toolkit import artifacts, bench, engine, stages
from toolkit import data as datasets
from toolkit.classifier import with_views
from toolkit.errors import ParityError
from toolkit.recipe import validate
from toolkit.run import Run, load_run

pytestmark = pytest.mark.usefixtures("no_pictures")
SHIP = ("--even-if-slower", "--max-drop", 100, "--calibration-images", 64)  # a small net is no faster in INT8


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TURN_SECONDS", 0.01)


@pytest.fixture
def tolerant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A net of three epochs is not sure of its answers: INT8 may change some of them."""
    monkeypatch.setattr(parity, "MIN_AGREEMENT", 0.8)


def test_everything_at_once(toolkit: Toolkit, chain: Chain, tolerant: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def raced(candidates: Sequence[artifacts.Candidate]) -> list[artifacts.Candidate]:
        """As where fp16 is the fastest."""
        return [replace(one, milliseconds={1: 1.0}, speed=s) for one, s in zip(candidates, (1, 2, 0.5), strict=True)]

    monkeypatch.setattr(artifacts, "raced", raced)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    result = toolkit(
        "export", "--precision", "auto", "--tta", "flip", "--accept-any-size", "--calibrate", "--license", "CC0-1.0",
        "--triton", "models", "--output", "out/any.onnx", "--provider", "cpu", "--calibration-images", 64,
        "--max-drop", 3,  # of so small a net: one image is 0.28 points
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    about = read(Path("out/any.onnx"))
    assert about.any_size
    assert about.calibrated
    assert about.views == 2
    assert about.licence == "CC0-1.0"
    assert about.created == "1970-01-01T00:00:00+00:00"
    assert about.temperature is not None
    assert about.ece is not None
    assert about.macs is not None
    assert about.dataset_digest

    report = json.loads(Path("out/any.parity.json").read_text())
    assert report["ok"]
    assert [row["precision"] for row in report["precisions"]] == ["fp32", "fp16", "int8"]
    assert report["precision"] == about.precision == "fp16"
    assert any(case["images"] == "real 64x96" and case["batch"] == 64 for case in report["cases"]), report["cases"]
    assert report["precisions"][2]["refused"].startswith("0.50 times as fast")  # and nothing else, of any size
    for row in report["precisions"]:
        assert any(line.startswith(row["precision"]) for line in result.stdout.splitlines())

    image = np.asarray(Image.open(chain.example).convert("RGB").resize((90, 50)))
    session = Session(Path("out/any.onnx"), "cpu")
    whole, square = (session.run(each[None])[0] for each in (image, fit(image, about.image_size)))
    np.testing.assert_allclose(whole, square, atol=5e-2)

    inspected = toolkit("inspect", "out/any.onnx").stdout
    for words in ("resnet9", "CC0-1.0", "1970-01-01", "applied in the graph", about.dataset_digest, "2 views"):
        assert words in inspected
    measured = toolkit("validate", "out/any.onnx").stdout
    assert "with test-time augmentation in the graph (2 views)" in measured
    assert "the graph averages 2 views of each image" in Path("out/any.report/report.md").read_text()
    card = toolkit("inspect", "out/any.onnx", "--card").stdout
    assert card == Path("out/any.md").read_text()
    assert card.startswith("# resnet9, an image classifier for digits\n")
    document = json.loads(toolkit("inspect", "out/any.onnx", "--json").stdout)
    assert document["metadata"]["labels"] == list(about.labels)

    config = text_format.Parse(Path("models/any/config.pbtxt").read_text(), _triton().ModelConfig())
    assert config.max_batch_size > 1
    assert config.HasField("dynamic_batching")
    assert [list(value.dims) for value in config.input] == [[-1, -1, 3]]
    assert {value.name: list(value.dims) for value in config.output} == {"probabilities": [10], "logits": [10]}
    assert Path("models/any/labels.txt").read_text().splitlines() == list(about.labels)
    assert Path("models/any/1/model.onnx").read_bytes() == Path("out/any.onnx").read_bytes()


@pytest.mark.parametrize("calibrated", [False, True])
def test_what_an_artifact_says_of_itself_in_words(calibrated: bool) -> None:
    told = {"temperature": 2.0, "calibrated": calibrated, "views": 2, "plain_accuracy": 0.9}
    facts = inspection.facts_of(small_metadata().model_copy(update=told))
    assert facts["multiply-accumulates"] == "200,000 an image"
    assert (facts["test top-1"], facts["test top-1 in PyTorch, fp32, one view"]) == ("93.75%", "90.00%")
    assert facts["expected calibration error"] == "2.13%"
    applied = "applied in the graph" if calibrated else "not applied in the graph (serve and predict apply it)"
    assert facts["temperature"] == f"2.000 (fitted on val), {applied}"


def test_a_repository_for_triton() -> None:
    config = text_format.Parse(triton.config(small_metadata(), "a"), _triton().ModelConfig())
    (given,), given_back = config.input, config.output
    assert (given.name, given.data_type, list(given.dims)) == ("image", _triton().TYPE_UINT8, [16, 16, 3])
    for output in given_back:
        assert (output.data_type, list(output.dims)) == (_triton().TYPE_FP32, [len(LABELS)])
        assert output.label_filename == triton.LABELS


def _triton() -> ModuleType:
    """``tritonclient``'s messages of a model's configuration, without the clients around them."""
    package = util.find_spec("tritonclient")
    assert package is not None
    assert package.submodule_search_locations
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # protobuf's, of code generated by its last major version
        return module_at(Path(package.submodule_search_locations[0]) / "grpc/model_config_pb2.py")


def test_int8_is_fine_tuned_from_the_run_says_what_it_is_and_holds_no_path(
    toolkit: Toolkit, chain: Chain, few_batches: None, tolerant: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, int8, taken = (chain.student / "checkpoints/best.safetensors").read_bytes(), quantise.int8, []
    monkeypatch.setattr(quantise, "int8", lambda graph, *given: taken.append(graph) or int8(graph, *given))
    command = ("export", "--precision", "int8", "--fine-tune", 1, "--tta", "flip", *SHIP)
    result = toolkit(*command, "--output", "a/student.onnx", "--json")
    assert result.exit_code == 0, result.output
    assert all(f"INT8 calibrated by {method}: val top-1" in result.stderr for method in quantise.METHODS)
    document = json.loads(result.stdout, parse_constant=pytest.fail)  # Infinity is no JSON
    assert document["parity"]["tolerance"]["logits"] == "Infinity"
    first = Path("a/student.onnx").read_bytes()
    for trace in (str(chain.folder), "/tmp", "/home", '.py"', "site-packages"):
        assert trace.encode() not in first
    assert not list(Path().rglob("*candidate*"))
    about = read(Path("a/student.onnx"))
    assert about.precision == "int8"
    assert about.quantisation is not None
    assert about.quantisation.startswith(quantise.scheme_for(gpu=False).name)
    assert "after 1 epochs of fine-tuning" in about.quantisation
    # What it says of itself is what is found.
    found = json.loads(toolkit("validate", "a/student.onnx", "--provider", "cpu", "--json").stdout)
    assert found["top1"] == pytest.approx(about.accuracy)
    assert found["ece"] == pytest.approx(about.ece)
    plain = json.loads(toolkit("validate", chain.student, "--json").stdout)
    assert about.plain_accuracy == pytest.approx(plain["top1"])

    (tuned,) = chain.student.glob("int8-1-*")
    recipe = Run(tuned).recipe
    model = with_views(load_run(Run(tuned))[0], "flip")
    built = onnx_export.build(model, small_metadata().model_copy(update={"labels": about.labels, "image_size": 32}))
    assert _weights(taken[0]) == _weights(built)
    assert recipe.int8
    assert recipe.distils
    assert recipe.start_from == chain.student / "checkpoints/best.safetensors"
    assert recipe.teacher is not None
    assert recipe.teacher.checkpoint == chain.student / "checkpoints/best.safetensors"  # its answers are held to
    assert (chain.student / "checkpoints/best.safetensors").read_bytes() == weights
    monkeypatch.setattr(engine, "_fit", None)  # which training would call
    images = Run(chain.student).recipe.data
    assert artifacts.fine_tuned(Run(chain.student), images, 1, "cpu").path == tuned  # found again


def _weights(graph: onnx.ModelProto) -> list[bytes]:
    return [tensor.raw_data for tensor in graph.graph.initializer]


def test_fine_tuning_takes_nothing_that_belongs_to_the_whole_training(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "distill", lambda recipe, folder, resume: recipe)
    run, tree = Run(chain.student), Run(chain.student).recipe.model_dump(mode="json")
    tree |= {"epochs": 30, "swa_start": 20, "cached_epochs": 3, "early_stop": {"patience": 4}, "select": "last"}
    tree |= {"progressive": {"start": 16}, "batch_growth": {"milestones": [9]}}
    run.recipe = validate(tree)
    tuning: Any = artifacts.fine_tuned(run, run.recipe.data, 2, "cpu")
    assert (tuning.epochs, tuning.optimizer.lr, tuning.loss.temperature) == (2, artifacts.TUNING_LR, 1)
    assert (tuning.loss.ce_weight, tuning.loss.kd_weight) == (0, 1)
    plain = validate({"teacher": tree["teacher"], "student": tree["student"]})
    for field in ("swa_start", "cached_epochs", "early_stop", "select", "progressive", "batch_growth"):
        assert getattr(tuning, field) == getattr(plain, field) != getattr(run.recipe, field)


def test_the_temperature_is_the_best_on_val_and_applied_by_flag(
    chain: Chain, toolkit: Toolkit, few_batches: None
) -> None:
    run = Run(chain.student)
    model, _ = load_run(run)
    data = stages.load_data(run.recipe.data)
    assert data.val is not None
    temperature = artifacts.fitted_temperature(model, data)
    assert temperature is not None
    with torch.inference_mode():
        logits = model(data.val.images[:] / 255)

    def nll(divisor: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / divisor, data.val.labels))

    assert nll(temperature) <= min(nll(temperature * 1.02), nll(temperature / 1.02), nll(1.0))
    assert read(chain.artifact).temperature == temperature
    assert toolkit("export", "--calibrate", "--output", "calibrated.onnx", "--provider", "cpu").exit_code == 0
    images = nhwc(data.test.images[:9])
    plain, divided = (Session(path, "cpu").run(images)[0] for path in (chain.artifact, Path("calibrated.onnx")))
    np.testing.assert_allclose(divided, plain / temperature, atol=1e-4)


def test_what_is_fitted_on_val_sees_all_of_it() -> None:
    """A folder's images come class by class."""
    split = datasets.Split(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.tensor([0] * 6 + [1] * 4))
    images, labels = artifacts.spread(split, 5)
    assert (images.flatten().tolist(), labels.tolist()) == ([0, 2, 4, 6, 8], [0, 0, 0, 1, 1])
    assert artifacts.spread(split, 20)[0].flatten().tolist() == list(range(10))


def test_few_large_images_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "HELD", 40)
    split = datasets.Split(torch.zeros(30, 3, 64, 64, dtype=torch.uint8), torch.arange(30))
    assert artifacts.spread(split, 20)[1].tolist() == list(range(0, 30, 3))  # four times as large, a quarter of 40


class Fixed(torch.nn.Module):
    """Logits that lie in the images' first pixels, 0 to 255."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, 0, 0] * 255


def test_where_all_of_val_is_right_the_temperature_does_not_make_it_certain(chain: Chain) -> None:
    data = stages.load_data(Run(chain.student).recipe.data)
    images = torch.eye(3, dtype=torch.uint8).repeat(20, 1)[:, :, None, None].expand(-1, 3, 8, 8)
    val = datasets.Split(images * 20, torch.tensor([0, 1, 2] * 20))
    temperature = artifacts.fitted_temperature(Fixed(), replace(data, val=val))
    assert temperature is not None
    assert 1 < temperature < 10  # exp(-4) is what the search ends with else


def test_a_teacher_is_exported_without_a_budget(toolkit: Toolkit, chain: Chain, few_batches: None) -> None:
    recipe = chain.teacher / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("budget: 5000000", "budget: 1000"))
    refused(toolkit("export", chain.teacher, "--budget", 9), "--budget is for students", "is a teacher")
    result = toolkit("export", chain.teacher, "--provider", "cpu")
    assert result.exit_code == 0, result.output
    about = read(chain.teacher / "export/teacher.onnx")
    assert (about.model, about.teacher) == ("resnet9_wide", None)
    assert about.parameters > 1000


def test_the_flags_are_the_options(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[object, ...]] = []
    monkeypatch.setattr(artifacts, "export", lambda *given: taken.append(given) or 1 / 0)
    flags = (
        "--precision", "int8", "--max-drop", 0.5, "--opset", 19, "--accept-any-size", "--calibrate", "--tta", "flip",
        "--calibration-images", 99, "--fine-tune", 2, "--even-if-slower", "--tf32", "--license", "MIT", "--budget", 7,
        "--triton", "models", "--force",
    )  # fmt: skip
    for arguments in ((), ("run", "-o", "a.onnx", "--data-dir", "data", "--provider", "cpu", *flags)):
        with pytest.raises(ZeroDivisionError):
            toolkit("export", *arguments)
    options = artifacts.Options(
        precision="int8", max_drop=0.005, opset=19, any_size=True, calibrated=True, views="flip",
        calibration_images=99, tuning_epochs=2, even_if_slower=True, tf32=True, licence="MIT", budget=7,
        triton=Path("models"), force=True,
    )  # fmt: skip
    assert taken[0] == (None, None, None, "auto", artifacts.Options())
    assert taken[1] == (Path("run"), Path("a.onnx"), Path("data"), "cpu", options)


@pytest.mark.parametrize("misspelt", [{"precision": "FP16"}, {"views": "flips"}, {"calibrate": True}])
def test_an_option_that_is_misspelt_is_not_passed_over(misspelt: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(misspelt))):
        artifacts.Options(**misspelt)


def _edited(graph: onnx.ModelProto, length: int, edit: Callable[[np.ndarray], np.ndarray]) -> onnx.ModelProto:
    """A copy of the graph, with other values in the weights of so many rows."""
    edited = onnx.ModelProto()
    edited.CopyFrom(graph)
    for tensor in edited.graph.initializer:
        if list(tensor.dims[:1]) == [length]:
            rows = edit(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(rows.astype(np.float32), tensor.name))
    return edited


def test_int8_is_calibrated_by_the_method_that_answers_val_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here each method names the classes in another order, and the first is right on the training images."""
    images = small_images(160)
    with torch.inference_mode():
        answers = small_net().eval()(images / 255).argmax(1)

    def quantised(graph: onnx.ModelProto, some: np.ndarray, method: str, _: object) -> onnx.ModelProto:
        assert _same(some, nhwc(images[:80])) == 64
        return _edited(graph, len(LABELS), lambda rows: np.roll(rows, quantise.METHODS.index(method), axis=0))

    monkeypatch.setattr(quantise, "int8", quantised)
    graph = onnx_export.build(small_net(), small_metadata())
    for shift, method in enumerate(quantise.METHODS):
        train = datasets.Split(images[:80], answers[:80])
        val = datasets.Split(images[80:], (answers[80:] + shift) % len(LABELS))
        data = datasets.DataSet("ramps", LABELS, train, val, train, (0.5,) * 3, (0.2,) * 3, "0")
        options = artifacts.Options(precision="int8", calibration_images=64)
        _, about = artifacts.best_int8(graph, small_metadata(), data, quantise.X86, "cpu", options)
        assert about.quantisation == f"{quantise.X86.name} QDQ, per channel, {method} on 64 training images"


def _same(some: np.ndarray, others: np.ndarray) -> int:
    """How many of some images are among others."""
    return len({image.tobytes() for image in some} & {image.tobytes() for image in others})


def test_without_val_the_method_is_chosen_on_images_that_calibrated_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, calibrating, choosing = small_images(150), [], []
    split = datasets.Split(images, torch.arange(150) % len(LABELS))
    data = datasets.DataSet("ramps", LABELS, split, None, split, (0.5,) * 3, (0.2,) * 3, "0")

    def answered(some: np.ndarray, _: int) -> tuple[np.ndarray]:
        choosing.append(some)
        return (np.zeros((len(some), len(LABELS)), np.float32),)

    monkeypatch.setattr(quantise, "int8", lambda graph, some, *_: calibrating.append(some))
    monkeypatch.setattr(artifacts, "opened", lambda *_: (SimpleNamespace(run_batches=answered), 0))
    options = artifacts.Options(precision="int8", calibration_images=64)
    artifacts.best_int8(onnx.ModelProto(), small_metadata(), data, quantise.X86, "cpu", options)
    assert [(len(some), len(others)) for some, others in zip(calibrating, choosing, strict=True)] == [(64, 86)] * 3
    for some, others in zip(calibrating, choosing, strict=True):
        assert _same(some, others) == 0
        assert _same(np.concatenate([some, others]), nhwc(images)) == 150


def test_speed_is_to_fp32_in_the_sessions_calls() -> None:
    batches: list[int] = []

    def candidate(seconds: float) -> artifacts.Candidate:
        def run(images: np.ndarray) -> None:
            batches.append(len(images))
            time.sleep(seconds)

        return artifacts.Candidate(None, small_metadata(), SimpleNamespace(run=run), 0, None, {})

    fp32, faster = artifacts.raced([candidate(0.003), candidate(0.001)])
    assert set(batches) == set(fp32.milliseconds) == set(artifacts.SPEED_BATCHES)
    assert all(value >= 3 for value in fp32.milliseconds.values())
    assert fp32.speed == 1 < 1.5 < faster.speed < 4


# --- what is not shipped -----------------------------------------------------------------------------------


def test_a_graph_that_computes_something_else_is_not_written(
    toolkit: Toolkit, chain: Chain, few_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = chain.student / "export"
    damaged = _edited(onnx.load(chain.artifact), 10, lambda rows: rows + 0.01 * (rows == rows.max()))  # one weight

    before, report = files(folder), folder / "refused.json"
    assert chain.artifact in before
    with monkeypatch.context() as patch:
        patch.setattr(onnx_export, "build", lambda *_: damaged)
        refused(toolkit("export", "--provider", "cpu"), "does not compute what PyTorch computes", "logits differ by")
        assert json.loads(report.read_text())["ok"] is False
        assert files(folder) == before | {report: report.read_bytes()}  # above all its own parity.json
        shutil.rmtree(folder)
        with pytest.raises(ParityError, match="does not compute what PyTorch computes"):
            artifacts.export(provider="cpu")
        assert list(folder.iterdir()) == [report]
    artifacts.export(provider="cpu")
    assert not report.exists()


def test_a_lower_precision_may_lose_so_much_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "MIN_AGREEMENT", 0)
    images, about = small_images(300), small_metadata().model_copy(update={"precision": "int8"})
    with torch.inference_mode():
        labels = small_net().eval()(images / 255).argmax(1)
    reference = parity.Reference(onnx_export.deployed(small_net(), about), images, labels, (1,))
    graph = _edited(onnx_export.build(small_net(), about), len(LABELS), lambda rows: (rows.T * np.linspace(1, 2, 7)).T)

    def measured(most: float) -> parity.ParityReport:
        return artifacts.measured(graph, about, reference, "cpu", artifacts.Options(max_drop=most)).parity

    lost = measured(1).drop
    assert 0 < lost < 1
    assert measured(lost).ok
    assert "test top-1" in measured(lost - 1e-6).failures[0]


def test_a_precision_that_changes_answers_is_not_shipped(
    toolkit: Toolkit, chain: Chain, few_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "MIN_AGREEMENT", 1.01)
    before = chain.artifact.read_bytes()
    result = toolkit("export", "--precision", "int8", *SHIP)
    refused(
        result, "int8 is not shipped: the artifact gives PyTorch's answer for", "--fine-tune", "refused.json", lines=9
    )
    report = json.loads((chain.student / "export/refused.json").read_text())
    assert report["ok"] is False
    assert report["precision"] == "int8"
    assert chain.artifact.read_bytes() == before


def test_a_precision_that_cannot_be_made(
    toolkit: Toolkit, chain: Chain, few_batches: None, tolerant: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: onnx.ModelProto) -> onnx.ModelProto:
        edited = _edited(graph, 0, np.asarray)
        edited.graph.node[-1].op_type = "Nonsense"
        return edited

    monkeypatch.setattr(quantise, "half", broken)
    words = "fp16 is not shipped: it cannot be made of this model: No Op registered for Nonsense"
    refused(toolkit("export", "--precision", "fp16", "--provider", "cpu"), words)
    result = toolkit("export", "--precision", "auto", "--calibration-images", 64, "--provider", "cpu")
    assert result.exit_code == 0, result.output
    assert words in result.stdout
    rows = json.loads((chain.student / "export/parity.json").read_text())["precisions"]
    assert [(row["precision"], row["bytes"] is None) for row in rows] == [
        ("fp32", False), ("int8", False), ("fp16", True)
    ]  # fmt: skip
    monkeypatch.setattr(quantise, "half", lambda graph: graph.nothing)
    with pytest.raises(AttributeError):  # a mistake of ours is no property of the model
        toolkit("export", "--precision", "auto", "--provider", "cpu")


def test_a_precision_that_is_no_faster_is_not_shipped_unless_that_is_wanted(
    toolkit: Toolkit, chain: Chain, few_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "FASTER", 1e9)
    command = ("export", "--precision", "fp16", "--provider", "cpu", "--output", "x.onnx")
    refused(toolkit(*command), "times as fast as fp32 here", "--even-if", "x.refused.json")
    assert not Path("x.onnx").exists()
    assert toolkit(*command, "--even-if-slower").exit_code == 0
    assert read(Path("x.onnx")).precision == "fp16"
    Path("x.md").unlink()
    shutil.rmtree("x.examples")
    before = Path("x.parity.json").read_bytes()
    refused(toolkit(*command), "x.onnx exists", "--force")
    assert Path("x.parity.json").read_bytes() == before


def test_a_file_of_a_run_is_not_the_run(toolkit: Toolkit, chain: Chain) -> None:
    weights = chain.student / "checkpoints/best.safetensors"
    refused(toolkit("export", weights), f"{weights} is a file", f"{chain.student}, in which it lies")
    shutil.copy(weights, "w.safetensors")
    refused(toolkit("export", "w.safetensors"), "w.safetensors is a file", "takes a run directory")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--opset", 17], ["--opset 17 cannot be written", "18 to"]),
        (["--output", "there.onnx"], ["there.onnx exists", "--force"]),
        (["--output", "other.onnx"], ["other.md exists", "--force"]),
        (["--output", "third.onnx"], ["third.examples exists", "--force"]),
        (["--output", "fourth.onnx"], ["fourth.parity.json exists", "--force"]),
        (["--output", "folder.onnx", "--force"], ["cannot write folder.onnx"]),
        (["--output", "student.bin"], ["student.bin must end in .onnx"]),
        (["--output", "there.onnx/in.onnx"], ["cannot write there.onnx/in.onnx"]),
        (["--fine-tune", 1], ["--fine-tune has no use for fp32", "--precision int8 or auto"]),
        (["--precision", "fp16", "--calibration-images", 64], ["--calibration-images has no use for fp16"]),
        (["--triton", "models"], ["models/student exists", "--force"]),
        (["--budget", 1000], ["parameters", "too many", "fewer than 1,000"]),
        (["--precision", "int8", "--calibration-images", 10], ["--calibration-images 10", "between 64 and"]),
        (["--precision", "int8", "--calibration-images", 10**6], ["--calibration-images 1000000", "digits has"]),
    ],
)
def test_what_cannot_be(toolkit: Toolkit, chain: Chain, options: list[object], words: list[str]) -> None:
    Path("there.onnx").write_text("there")
    Path("other.md").write_text("there")
    Path("third.examples").mkdir()
    Path("fourth.parity.json").touch()
    Path("folder.onnx").mkdir()
    Path("models/student").mkdir(parents=True)
    before = files(chain.folder)
    refused(toolkit("export", "--provider", "cpu", *options), *words)
    after = {path: content for path, content in files(chain.folder).items() if path.suffix != ".json"}
    assert after == {path: content for path, content in before.items() if path.suffix != ".json"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_tensorrt_that_is_not_there(toolkit: Toolkit, chain: Chain) -> None:
    refused(toolkit("export", "--provider", "tensorrt"), "tensorrt is not available", "doctor")


@pytest.mark.parametrize("date", ["today", "99999999999999999999"])
def test_a_date_that_is_none(toolkit: Toolkit, chain: Chain, monkeypatch: pytest.MonkeyPatch, date: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", date)
    refused(toolkit("export", "--provider", "cpu"), f"SOURCE_DATE_EPOCH (={date!r})", "seconds since 1970")


def test_there_is_nothing_to_fit_a_temperature_on(toolkit: Toolkit, chain: Chain) -> None:
    recipe = chain.student / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("val_size: ", "val_size: 0 # "))
    refused(toolkit("export", "--calibrate", "--provider", "cpu"), "--calibrate needs a validation split")
    result = toolkit("export", "--precision", "int8", "--calibration-images", 10**6)
    refused(result, "--calibration-images 1000000")


# --- other tools' files ------------------------------------------------------------------------------------


def test_another_tools_file_is_told_for_what_it_is(toolkit: Toolkit, tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20], producer_name: "sculptor", producer_version: "3">
    stone (float[n, 4] marble) => (float[n, 4] statue) { statue = Relu (marble) }"""
    model = onnx.parser.parse_model(text)
    onnx.helper.set_model_props(model, {"artist": "unknown"})
    path = tmp_path / "foreign.onnx"
    onnx.save(model, path)
    result = toolkit("inspect", path)
    assert result.exit_code == 0
    for words in ("sculptor 3", "marble: float [n, 4]", "1 Relu", "artist", "is not an artifact of this toolkit"):
        assert words in result.stdout
    assert json.loads(toolkit("inspect", path, "--json").stdout)["metadata"] is None
    assert "sculptor 3" in toolkit("inspect", path, "--card").stdout
    said = ("foreign.onnx is not an artifact of this toolkit: sculptor 3 made it, it takes marble float [n, 4]",)
    refused(toolkit("bench", path), *said)
    refused(toolkit("serve", path), *said)
    refused(toolkit("predict", "--artifact", path, path), "foreign.onnx")
    path.write_bytes(b"\x08\x0a")
    refused(toolkit("inspect", path), "foreign.onnx", "holds no graph")
