"""The student that comes with the toolkit: small, what its card says, and what is taken where there is no run."""

import json
import re
from pathlib import Path

import pytest
from conftest import Toolkit
from PIL import Image

from export.inspection import describe
from toolkit.machine import lacks_vnni
from toolkit.run import SHIPPED, newest_artifact

CARD = SHIPPED.with_name("README.md").read_text()


def test_it_is_small_and_describes_itself() -> None:
    assert SHIPPED.stat().st_size < 12e6
    about = describe(SHIPPED).metadata
    assert about is not None
    assert about.parameters < 5_000_000
    assert about.accuracy is not None
    assert f"| test top-1 (10,000 images) | {about.accuracy:.2%}" in CARD
    assert b"/tmp/" not in SHIPPED.read_bytes()


def test_it_is_right_as_often_as_its_card_says(toolkit: Toolkit, real_cifar: Path, nowhere: Path) -> None:
    result = toolkit("validate", "--data-dir", real_cifar, "--provider", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert "the student that comes with the toolkit" in result.stderr
    found, about = json.loads(result.stdout), describe(SHIPPED).metadata
    assert about is not None
    # Without VNNI sums of U8S8 products may saturate, and some answers differ; with it a tie or two may fall otherwise.
    assert found["top1"] == pytest.approx(about.accuracy, abs=0.002 if lacks_vnni() else 0.0002)
    if lacks_vnni():
        return
    told: dict[str, str] = {}
    for line in CARD.splitlines():
        if line.startswith("|"):
            names, values = (cell.strip().split(", ") for cell in line.split("|")[1:3])
            told |= zip(names, values, strict=False)
    percent = {name: 100 * share for name, share in found["per_class"].items()} | {"top-5": 100 * found["top5"]}
    assert {name: float(told[name].removesuffix("%")) for name in percent} == pytest.approx(percent, abs=0.25)
    errors = {"NLL": found["nll"], "ECE": found["ece"]}
    assert {name: float(told[name]) for name in errors} == pytest.approx(errors, abs=0.001)


def test_it_answers_where_there_is_no_run(toolkit: Toolkit, nowhere: Path) -> None:
    assert newest_artifact() == SHIPPED
    Image.new("RGB", (40, 30), "skyblue").save("sky.png")
    result = toolkit("predict", "sky.png")
    assert result.exit_code == 0, result.output
    assert "the student that comes with the toolkit" in result.stderr
    assert re.match(r"sky.png: \w+ [\d.]+%", result.stdout)
