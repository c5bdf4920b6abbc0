"""What users get wrong, and what goes wrong around them: a clear line, exit code 1, and nothing lost.

The fixture ``toolkit`` lets every exception through that the command line does not turn into a line, so each
test here also says: no traceback.
"""

import errno
import json
import os
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Chain, Toolkit, files, refused
from PIL import Image

from toolkit.files import is_full
from toolkit.run import SHIPPED

pytestmark = pytest.mark.usefixtures("no_pictures")
SMALL = ("--recipe", "digits", "--epochs", 2, "--set", "teacher.widths=[8, 16, 32]")


# --- names, recipes, sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --teacher wrn82", ["teacher.name = 'wrn82'", "did you mean 'wrn28'"]),
        ("distill --student tpsnett", ["student.name = 'tpsnett'", "did you mean 'tpsnet'"]),
        ("distill --student qqqqqq", ["'qqqqqq'", "there are: resnet18_242_k3, resnet18_242_k7"]),
        ("distill --teacher resnet9", ["teacher.name = 'resnet9' is a student", "--teacher-checkpoint"]),
        ("train --teacher resnet9", ["there is no such teacher", "did you mean 'resnet9_wide'"]),
        ("pipeline --student resnet", ["'resnet'", "did you mean 'resnet9'"]),
        ("train --dataset cifar11", ["data.dataset = 'cifar11'", "cifar10, cifar100, digits, or folder:PATH"]),
        ("pipeline --recipe digit", ["'digit'", "did you mean 'digits'"]),
        ("train --recipe nothing.yaml", ["nothing.yaml", "No such file"]),
        ("train --set optimizer.lrr=1", ["optimizer.lrr", "did you mean 'lr'"]),
        ("train --set epoch=3", ["epoch", "did you mean 'epochs'"]),
        ("train --set lr=3", ["lr", "did you mean 'optimizer.lr'"]),
        ("train --set train=3", ["train: there is no such field"]),
        ("train --set tain.epochs=3", ["tain: there is no such field", "did you mean 'train'"]),
        ("train --lr inf", ["optimizer.lr = inf", "finite number"]),
        ("train --seed 99999999999999999999", ["seed = 99999999999999999999"]),
        ("train --dataset folder:~nobody-here/photos", ["data.dataset", "no such home directory"]),
        (
            "distill --teacher a.onnx --teacher-checkpoint b.onnx",
            ["name (=a.onnx)", "checkpoint (=b.onnx)", "give one"],
        ),
        ("train --epochs 0", ["epochs = 0"]),
        ("train --set epochs", ["--set takes key.path=value", "'epochs'"]),
        ("train --set =3", ["--set takes key.path=value", "'=3'"]),
        ("train --set epochs=[1", ["--set takes key.path=value", "'epochs=[1'"]),
        ("train --dataset folder:photos", ["there is no folder photos"]),
        ("train --device gpu", ["device = 'gpu'", "auto, cpu, cuda or cuda:N"]),
        ("train --recipe digits --set teacher.width=3", ["teacher.width", "did you mean 'widths'"]),
        ("distill --recipe digits --set student.widths=wide", ["resnet9 cannot be built", "'wide'"]),
        ("distill --recipe digits --budget 100000", ["too many"]),
        ("distill --recipe digits --budget 100000 --train-teacher", ["too many"]),
        (
            "distill --recipe digits --train-teacher --teacher-mean 0.5,0.5,0.5",
            ["teacher.input (--teacher-mean and the like) is for teachers from elsewhere"],
        ),
        ("export --precision auto --even-if-slower", ["--even-if-slower has no use for auto"]),
        (
            "distill --recipe digits --balance weights --set loss.ce_weight=0",
            ["balance=weights weighs the cross entropy, and loss.ce_weight is 0"],
        ),
        (
            "train --recipe digits --image-size 128 --set progressive.start=16",
            ["progressive.start (=16): resnet9_wide does not take images of this size"],
        ),
        (
            "distill --recipe digits --set student.resize=40 --set progressive.start=16",
            ["progressive.start and resize exclude each other"],
        ),
        ("pipeline --set distill.loss.kd_weight=0", ["pipeline distils", "distill.loss.kd_weight=0.9"]),
        ("pipeline --set teacher.checkpoint=there", ["pipeline trains the teacher", "`toolkit distill`"]),
        ("pipeline --set loss.ce_weight=0 --set loss.kd_weight=1", ["no teacher is asked", "distill.loss.ce_weight"]),
        (
            "pipeline --set student.widths=[512,1024,2048]",
            [
                "122,836,280 parameters",
                "117,836,281 too many",
                "nearest that fit: resnet18_256_dropout (4,996,866), resnet18_242_k7",
                "--budget",
            ],
        ),
        ("distill --recipe digits --set student.widths=[8,8,8,8,8]", ["must be 1 to 4 for images of 32 pixels"]),
        ("distill --recipe digits --set student.widths=[]", ["widths (=[]) must be 1 to 4"]),
        ("distill --recipe digits --set student.image_size=64", ["resnet9 takes no such argument; the data"]),
        (
            "distill --recipe digits --student resnet18_42 --set student.blocks=[0,2,2,2]",
            ["blocks (=[0, 2, 2, 2])", "at least 1"],
        ),
        ("train --recipe cifar10 --offline --data-dir here", ["cifar10 is not in here", "--offline", "--data-dir"]),
        ("validate nowhere", ["nowhere"]),
        (f"validate {SHIPPED} --dataset photos", ["--dataset photos: should be", "folder:PATH"]),
        ("export", ["no finished run under runs", "toolkit distill"]),
    ],
)
def test_names_and_values(toolkit: Toolkit, nowhere: Path, arguments: str, words: list[str]) -> None:
    refused(toolkit(*arguments.split()), *words)
    assert files(nowhere) == {}


def test_all_mistakes_come_at_once(toolkit: Toolkit, nowhere: Path) -> None:
    result = toolkit("train", "--teacher", "wrn82", "--dataset", "cifar11", "--batch-size", 1, "--set", "seeds=3")
    refused(result, "wrong in 4 places", "'wrn82'", "'cifar11'", "batch_size = 1", "did you mean 'seed'", lines=5)


def test_a_mistake_found_when_training_begins_leaves_no_run(toolkit: Toolkit, nowhere: Path) -> None:
    padding = ("--set", "augment.padding_mode=reflect", "--set", "augment.crop_padding=40")
    refused(toolkit("train", *SMALL, *padding), "augment.crop_padding (=40) must be less than", "(=32)")
    assert not any(Path("runs").iterdir())


def test_a_training_that_diverges_says_what_to_try(toolkit: Toolkit, nowhere: Path) -> None:
    refused(toolkit("train", *SMALL, "--lr", 1e30), "not finite any more", "Try a lower learning rate")


def test_the_whole_chain_is_for_one_process(toolkit: Toolkit, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.distributed.SIZE", 2)
    refused(toolkit("pipeline"), "pipeline is for one process", "`toolkit distill` by torchrun")
    assert files(nowhere) == {}


# --- devices -----------------------------------------------------------------------------------------------

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")


@without_cuda
@pytest.mark.parametrize("command", ["train", "pipeline"])
def test_cuda_that_is_not_there(toolkit: Toolkit, nowhere: Path, command: str) -> None:
    refused(toolkit(command, "--recipe", "digits", "--device", "cuda"), "--device cuda", "0 CUDA devices", "doctor")
    assert files(nowhere) == {}


@without_cuda
@pytest.mark.parametrize("command", ["validate {artifact}", "predict {example}", "serve", "export"])
def test_a_cuda_provider_that_cannot_be_had(toolkit: Toolkit, chain: Chain, command: str) -> None:
    before = files(chain.folder)
    arguments = command.format(artifact=chain.artifact, example=chain.example).split()
    refused(toolkit(*arguments, "--provider", "cuda"), "cuda is not available", "doctor")
    assert files(chain.folder) == before


# --- data --------------------------------------------------------------------------------------------------


def test_no_data_and_no_network(toolkit: Toolkit, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "_opener", None)  # it holds the proxies of its first use
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        for variable in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{closed.getsockname()[1]}")
        refused(toolkit("train", "--recipe", "cifar10"), "downloading cifar10 from https://", "failed", "--data-dir")
    assert not any(path.is_file() for path in files(nowhere))
    assert not Path("runs").exists()


def test_wrong_md5(toolkit: Toolkit, nowhere: Path) -> None:
    folder = nowhere / "data/cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"not what was published")
    before = files(nowhere)
    result = toolkit("train", "--recipe", "cifar10")
    refused(result, "data_batch_1 is damaged: its MD5 is", "c99cafc152244af753f735de768cd75f", "delete")
    assert files(nowhere) == before


@pytest.fixture
def photos(nowhere: Path) -> Path:
    """A folder with twelve images of each of two classes."""
    noise = np.random.default_rng(0)
    for name, low in (("day", 128), ("night", 0)):
        (nowhere / "photos" / name).mkdir(parents=True)
        for index in range(12):
            pixels = noise.integers(low, low + 128, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(nowhere / f"photos/{name}/{index}.png")
    return nowhere / "photos"


FOLDER = ("train", *SMALL, "--dataset", "folder:photos", "--set", "data.val_size=2")


def test_broken_images_are_named_and_counted_and_can_be_left_out(toolkit: Toolkit, photos: Path) -> None:
    (photos / "day/3.png").write_bytes((photos / "day/3.png").read_bytes()[:100])
    (photos / "night/7.png").write_text("not an image")
    before = files(photos)
    refused(toolkit(*FOLDER), "2 of 24 images in photos", "day/3.png, night/7.png", "--skip-broken")
    assert not Path("runs").exists()
    result = toolkit(*FOLDER, "--skip-broken", "--set", "batch_size=8")
    assert result.exit_code == 0, result.output
    assert "unreadable files left out: 2 (day/3.png, night/7.png)" in result.stderr
    assert files(photos) == before


def test_a_folder_whose_images_changed_is_not_the_same_run(toolkit: Toolkit, photos: Path) -> None:
    arguments = (*FOLDER, "--set", "batch_size=8")
    assert toolkit(*arguments).exit_code == 0
    before = files(Path("runs"))
    (run,) = Path("runs").iterdir()
    (photos / "day/3.png").unlink()
    refused(toolkit(*arguments), "photos have changed since", "--run-dir")
    extend = ("--extend", "--run-dir", run, "--epochs", 9)
    for command, words in (
        ((*arguments, *extend), "photos have changed since"),
        (("validate", run), "1 are gone: day/3.png; bring them back"),
        (("export", run), "1 are gone: day/3.png; bring them back"),
    ):
        refused(toolkit(*command), "photos have changed since", words)
    assert files(Path("runs")) == before
    result = toolkit("validate", run, "--dataset", "folder:photos/")
    assert result.exit_code == 0
    assert "warning: " in result.stderr
    assert "measured too high" in result.stderr
    aside = (run / "summary.json").rename("summary.json")  # as if it had been interrupted
    refused(toolkit(*arguments, "--resume"), f"the images of folder:photos have changed since {run} was begun")
    aside.rename(run / "summary.json")
    (photos / "night").rename(photos / "evening")
    refused(toolkit("export", run), "photos have changed since", "13 are gone: day/3.png, night/0.png")
    of_weights = toolkit("validate", run, "--dataset", "folder:photos")
    refused(of_weights, "knows the classes day, night... (2), folder:photos has day, evening... (2)")


def test_a_photo_that_came_later_is_no_part_of_a_run(toolkit: Toolkit, photos: Path, few_batches: None) -> None:
    arguments = (*FOLDER, "--set", "batch_size=8")
    assert toolkit(*arguments).exit_code == 0
    (run,) = Path("runs").iterdir()
    before = json.loads(toolkit("validate", run, "--json").stdout)
    (photos / "dusk").mkdir()
    for name in ("day", "dusk"):
        Image.effect_noise((30, 20), 50).save(photos / name / "new.png")
    after = toolkit("validate", run, "--json")
    assert "images in photos that are not in" in after.stderr
    assert "images.json: 2 (they came later" in after.stderr
    assert [json.loads(after.stdout)[key] for key in ("n", "nll")] == [before["n"], before["nll"]]
    assert toolkit("export", run).exit_code == 0
    shutil.rmtree(photos / "dusk")
    refused(toolkit(*arguments), "photos have changed since", "--run-dir")


def test_weights_are_measured_on_the_images_that_were_held_out_from_them(toolkit: Toolkit, photos: Path) -> None:
    split = ("--group-by", r"(\d)\.png", "--set", "data.split_seed=3", "--set", "batch_size=8")
    result = toolkit(*FOLDER, *split, "--run-dir", "run")
    assert result.exit_code == 0, result.stderr
    shutil.copy("run/checkpoints/best.safetensors", "alone.safetensors")
    of_weights = ("alone.safetensors", "--dataset", "folder:photos")
    reports = [toolkit("validate", *what, "--json") for what in (("run",), of_weights)]
    inside, alone = (json.loads(report.stdout) for report in reports)
    assert (alone["n"], alone["nll"]) == (inside["n"], inside["nll"])
    assert "warning" not in reports[1].stderr
    photos.rename("moved")
    moved = json.loads(toolkit("validate", "run", "--data-dir", "moved", "--json").stdout)
    assert (moved["n"], moved["nll"]) == (inside["n"], inside["nll"])
    for name in ("a", "b"):  # another folder, in whose names the pattern finds nothing
        for image in Path("moved").rglob("*.png"):
            copy = Path("other", image.parent.name, f"{image.stem}{name}.png")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, copy)
    elsewhere = toolkit("validate", "run", "--dataset", "folder:other", "--json")
    assert elsewhere.exit_code == 0, elsewhere.stderr
    Path("moved").rename(photos)
    other = (*FOLDER, "--set", "batch_size=8", "--run-dir", "again", "--set")
    refused(toolkit(*other, "start_from=missing.safetensors"), "there is no checkpoint missing.safetensors")
    again = toolkit(*other, "start_from=alone.safetensors")
    assert again.exit_code == 0, again.stderr
    assert "was trained on another split of folder:photos (split_seed 3 there, 0 here; group_by" in again.stderr


# --- runs and checkpoints ----------------------------------------------------------------------------------


def test_a_run_directory_that_holds_a_different_run(toolkit: Toolkit, chain: Chain) -> None:
    before = files(chain.folder)
    result = toolkit("train", "--recipe", "digits", "--epochs", 5, "--lr", 0.3, "--run-dir", chain.teacher)
    refused(result, chain.teacher, "different run", "epochs: 2 -> 5", "optimizer.lr: 0.4 -> 0.3", "--run-dir")
    assert files(chain.folder) == before


@pytest.mark.parametrize("content", ["", "{"])
def test_a_damaged_summary_of_a_run(toolkit: Toolkit, chain: Chain, content: str) -> None:
    (chain.student / "summary.json").write_text(content)
    refused(toolkit("validate", chain.student), chain.student / "summary.json", "is damaged")


def test_a_directory_that_is_not_a_run(toolkit: Toolkit, nowhere: Path) -> None:
    Path("letters").mkdir()
    Path("letters/mum.txt").write_text("dear")
    before = files(nowhere)
    refused(toolkit("train", *SMALL, "--run-dir", "letters"), "letters", "not a run directory")
    refused(toolkit("validate", "letters"), "letters", "not a run directory")
    refused(toolkit("train", *SMALL, "--run-dir", "letters/mum.txt/run"), "letters/mum.txt")
    assert files(nowhere) == before


@pytest.mark.parametrize("arguments", ["distill --recipe digits --teacher-checkpoint", "validate", "export"])
def test_a_place_that_may_not_be_looked_at(
    toolkit: Toolkit, nowhere: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    """In another user's home. Where the tests run as root, all may be looked at."""
    stat = Path.stat

    def closed(path: Path, **options: bool) -> os.stat_result:
        if "alice" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", closed)
    refused(toolkit(*arguments.split(), "/home/alice/run"), "/home/alice/run", "permission denied")
    assert files(nowhere) == {}


@pytest.mark.parametrize("content", ["epochs: [3\nseed", "", "name: 2024-13-01", "\xff"])
def test_a_damaged_recipe_of_a_run(toolkit: Toolkit, chain: Chain, content: str) -> None:
    (chain.student / "recipe.yaml").write_text(content, encoding="latin-1")
    refused(toolkit("validate", chain.student), chain.student / "recipe.yaml", "damaged")
    assert toolkit("validate").exit_code == 0  # the newest run that is whole


def test_a_run_of_another_version(toolkit: Toolkit, chain: Chain) -> None:
    file = chain.student / "recipe.yaml"
    file.write_text(file.read_text() + "sparkle: 3\n")
    refused(toolkit("validate", chain.student), file, "of another version", "sparkle: there is no such field")


def test_a_run_that_is_not_finished_teaches_nobody(toolkit: Toolkit, chain: Chain) -> None:
    (chain.teacher / "summary.json").unlink()
    distil = ("distill", "--recipe", "digits", "--run-dir", "new")
    words = (f"{chain.teacher} is not finished", f"`toolkit train --run-dir {chain.teacher} --resume`")
    weights = chain.teacher / "checkpoints/best.safetensors"
    refused(toolkit(*distil, "--teacher-checkpoint", chain.teacher), *words, weights)
    refused(toolkit(*distil, "--teacher-checkpoint", weights, "--set", f"teacher.also=[{chain.teacher}]"), *words)
    refused(toolkit(*distil, "--set", "loss={kd_weight: 0}", "--init", chain.teacher), *words)
    assert not Path("new").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("command", ["validate", "export"])
def test_weights_cut_short_or_of_another_model(toolkit: Toolkit, chain: Chain, command: str) -> None:
    weights = chain.student / "checkpoints/best.safetensors"
    cut(weights)
    cut_short = files(chain.folder)
    refused(toolkit(command, chain.student), weights, "not a whole safetensors file")
    assert files(chain.folder) == cut_short
    shutil.copy(chain.teacher / "checkpoints/best.safetensors", weights)
    before = files(chain.folder)
    refused(toolkit(command, chain.student), weights, "resnet9_wide", "the run's recipe has student resnet9")
    assert files(chain.folder) == before


def test_the_state_of_a_run_is_not_weights(toolkit: Toolkit, chain: Chain) -> None:
    result = toolkit("validate", chain.student / "checkpoints/last.safetensors")
    refused(result, "last.safetensors", "its weights are in best.safetensors")


@pytest.mark.parametrize("words", ["not a whole safetensors file", "is the state of another run"])
def test_a_state_that_cannot_be_resumed_from(toolkit: Toolkit, chain: Chain, words: str) -> None:
    state = chain.student / "checkpoints/last.safetensors"
    (chain.student / "summary.json").unlink()
    if "whole" in words:
        cut(state)
        state = state.with_name("last-1.safetensors")  # what it falls back to
        cut(state)
    else:
        shutil.copy(chain.teacher / "checkpoints/last.safetensors", state)
    before = files(chain.folder)
    refused(toolkit("distill", "--run-dir", chain.student, "--resume"), state, words)
    assert files(chain.folder) == before


def test_a_teacher_that_is_damaged_or_another(toolkit: Toolkit, chain: Chain) -> None:
    weights = chain.teacher / "checkpoints/best.safetensors"
    student = chain.student / "checkpoints/best.safetensors"
    distil = ("distill", "--recipe", "digits", "--run-dir", "new", "--teacher-checkpoint")
    refused(toolkit(*distil, student), student, "holds resnet9", "asks for resnet9_wide", "--teacher resnet9")
    refused(toolkit(*distil, "nothing"), "no weights of a teacher at nothing")
    again = toolkit(
        "distill", "--recipe", chain.student / "recipe.yaml", "--run-dir", "new", "--teacher-checkpoint", student
    )
    refused(again, student, "another teacher", "--teacher-checkpoint")
    misspelt = toolkit(*distil, chain.teacher, "--set", "teacher.veiws=flip")
    refused(misspelt, "teacher.veiws: resnet9_wide takes no such setting; did you mean 'views'?")
    Path("file.onnx").write_bytes(b"")
    refused(
        toolkit(*distil, "file.onnx", "--teacher", "onnx", "--set", "teacher.widths=[8]"), "teacher.widths", "file.onnx"
    )
    cut(weights)
    refused(toolkit(*distil, weights), weights, "not a whole safetensors file")
    assert not Path("new").exists()


def test_a_recipe_that_asks_no_teacher_has_no_use_for_one_and_no_baseline(toolkit: Toolkit, nowhere: Path) -> None:
    for option, words in (
        (("--baseline",), "this run is the baseline"),
        (("--teacher", "wrn28"), "add --set loss.kd_weight=0.9"),
        (("--teacher", "wrn28", "--train-teacher"), "add --set loss.kd_weight=0.9"),
    ):
        result = toolkit("distill", "--recipe", "rao-tpsnet", *option)
        assert result.exit_code == 2
        assert words in " ".join(result.stderr.replace("│", "").split())
    assert not list(nowhere.iterdir())


def test_a_teacher_of_other_classes(toolkit: Toolkit, chain: Chain, photos: Path) -> None:
    os.chdir(chain.folder)
    folder = f"folder:{photos}"
    distil = ("distill", "--recipe", "digits", "--dataset", folder, "--set", "data.val_size=2", "--run-dir", "new")
    refused(toolkit(*distil, "--teacher-checkpoint", chain.teacher), "knows 10 classes of digits", "2 of folder:photos")
    assert not Path("new").exists()
    refused(toolkit("validate", "--dataset", folder), "0, 1, 2, 3, 4", "day, night", "must be the same")


# --- artifacts and images ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["validate artifact.onnx", "serve artifact.onnx", "predict --artifact artifact.onnx cat.png"]
)
@pytest.mark.parametrize(("content", "words"), [("", "is empty"), (None, "No such file")])
def test_artifacts(toolkit: Toolkit, nowhere: Path, command: str, content: str | None, words: str) -> None:
    Image.new("RGB", (8, 8)).save("cat.png")
    if content is not None:
        Path("artifact.onnx").write_text(content)
    before = files(nowhere)
    refused(toolkit(*command.split()), "artifact.onnx", words, "toolkit export")
    assert files(nowhere) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"Just a text.\n" * 100, "is not a PNG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "broken"),
    ],
    ids=["missing", "empty", "text", "broken"],
)
def test_images(toolkit: Toolkit, chain: Chain, content: bytes | None, words: str) -> None:
    if content is not None:
        Path("cat.png").write_bytes(content)
    result = toolkit("predict", "cat.png", chain.example, "--json")
    assert result.exit_code == 1
    assert "error: cat.png" in result.stderr
    assert words in result.stderr
    bad, good = json.loads(result.stdout)
    assert (bad["image"], words in bad["error"]) == ("cat.png", True)
    assert len(good["labels"]) == 5  # the others are answered


def test_a_port_in_use(toolkit: Toolkit, chain: Chain) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(toolkit("serve", "--port", port, "--provider", "cpu"), f"port {port}", "in use", "--port")


# --- a full disk -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["validate", "export", "train"])
def test_a_write_that_finds_the_disk_full(
    toolkit: Toolkit, chain: Chain, few_batches: None, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = files(chain.folder)
    refused(toolkit(command, *(SMALL if command == "train" else ())), "the disk is full", "Free some space")
    assert is_full(RuntimeError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"))
    assert files(chain.folder) == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system in memory, whose size is what it is called with."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(size: str) -> Path:
        options = f"size={size}" + (",remount" if place.is_mount() else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs root")
        return place

    yield resize
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def test_a_training_on_a_full_disk_goes_on_when_there_is_room(
    toolkit: Toolkit, nowhere: Path, disk: Callable[[str], Path]
) -> None:
    command = ("train", *SMALL, "--run-dir", disk("100k") / "run")
    refused(toolkit(*command), "the disk is full", "safetensors")
    assert files(disk("20m")) == {}
    result = toolkit(*command)
    assert result.exit_code == 0, result.output
