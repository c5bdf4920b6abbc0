"""The student that comes with the toolkit: small, what its card says, and what is taken where there is no run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Toolkit
from PIL import Image

from export.inspection import describe
from toolkit.machine import lacks_vnni
from toolkit.run import SHIPPED, newest_artifact

pytestmark = pytest.mark.usefixtures("no_pictures")
CARD = SHIPPED.with_name("README.md").read_text()
WEIGHTS = SHIPPED.with_suffix(".safetensors")


def as_told(column: int) -> dict[str, str]:
    """What the card's table says of the artifact (1) or of the weights (2)."""
    told: dict[str, str] = {}
    for line in CARD.splitlines():
        if len(cells := line.split("|")) == 5:
            values = re.sub(r"%? with flips| \(.*?\)", "", cells[column + 1]).replace("%", "").strip().split(", ")
            told |= zip(cells[1].strip().split(", "), values, strict=False)
    return told


def as_found(metrics: dict[str, Any]) -> dict[str, str]:
    """What ``toolkit validate`` measured, in the card's words."""
    return {
        "test top-1 (10,000 images)": f"{100 * metrics['top1']:.2f}",
        **{name: f"{100 * share:.1f}" for name, share in metrics["per_class"].items()},
        "top-5": f"{100 * metrics['top5']:.2f}",
        "NLL": f"{metrics['nll']:.3f}",
        "ECE": f"{metrics['ece']:.3f}",
    }


def test_it_is_small_and_describes_itself() -> None:
    assert max(SHIPPED.stat().st_size, WEIGHTS.stat().st_size) < 12e6
    about = describe(SHIPPED).metadata
    assert about is not None
    assert about.parameters < 5_000_000
    assert about.accuracy is not None
    assert as_told(1)["test top-1 (10,000 images)"] == f"{100 * about.accuracy:.2f}"
    assert b"/tmp/" not in SHIPPED.read_bytes()


def test_it_is_right_as_often_as_its_card_says(toolkit: Toolkit, real_cifar: Path, nowhere: Path) -> None:
    result = toolkit("validate", "--data-dir", real_cifar, "--provider", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert "the student that comes with the toolkit" in result.stderr
    metrics, about = json.loads(result.stdout), describe(SHIPPED).metadata
    assert about is not None
    if lacks_vnni():  # sums of U8S8 products may saturate, and some answers differ
        assert metrics["top1"] == pytest.approx(about.accuracy, abs=0.002)
    else:
        assert metrics["top1"] == about.accuracy
        assert as_found(metrics).items() <= as_told(1).items()


@pytest.mark.slow
def test_its_weights_are_right_as_often_as_the_card_says(toolkit: Toolkit, real_cifar: Path, nowhere: Path) -> None:
    result = toolkit("validate", WEIGHTS, "--data-dir", real_cifar, "--device", "cpu", "--tta", "flip", "--json")
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)
    found = as_found(metrics) | {"with test-time augmentation (mean of the logits)": f"{100 * metrics['tta_top1']:.2f}"}
    told = as_told(2)  # another CPU may round an image or two otherwise
    for name, value in found.items():
        assert float(value) == pytest.approx(float(told[name]), abs=0.11 if name in metrics["per_class"] else 0.02)


def test_it_answers_where_there_is_no_run(toolkit: Toolkit, nowhere: Path) -> None:
    assert newest_artifact() == SHIPPED
    Image.new("RGB", (40, 30), "skyblue").save("sky.png")
    result = toolkit("predict", "sky.png")
    assert result.exit_code == 0, result.output
    assert "the student that comes with the toolkit" in result.stderr
    assert re.match(r"sky.png: \w+ [\d.]+%", result.stdout)
