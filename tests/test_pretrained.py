"""The student that comes with the toolkit: small, what its card says, and what is taken where there is no run."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import Toolkit
from PIL import Image

from export.inspection import describe
from serve.session import Session
from toolkit.data import load
from toolkit.machine import lacks_vnni
from toolkit.recipe import Data
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


@pytest.mark.skipif("TOOLKIT_DATA" not in os.environ, reason="no CIFAR-10 at hand")
def test_it_is_right_as_often_as_its_card_says() -> None:
    data = load(Data(dataset="cifar10", offline=True))
    session = Session(SHIPPED, "cpu")
    logits, _ = session.run_batches(np.ascontiguousarray(data.test.images[:].permute(0, 2, 3, 1).numpy()))
    right = int((logits.argmax(1) == data.test.labels.numpy()).sum())
    assert session.metadata.accuracy is not None
    # Without VNNI sums of U8S8 products may saturate, and some answers differ.
    assert right == pytest.approx(round(10_000 * session.metadata.accuracy), abs=20 if lacks_vnni() else 0)


def test_it_answers_where_there_is_no_run(toolkit: Toolkit, nowhere: Path) -> None:
    assert newest_artifact() == SHIPPED
    Image.new("RGB", (40, 30), "skyblue").save("sky.png")
    result = toolkit("predict", "sky.png")
    assert result.exit_code == 0, result.output
    assert "the student that comes with the toolkit" in result.stderr
    assert re.match(r"sky.png: \w+ [\d.]+%", result.stdout)
