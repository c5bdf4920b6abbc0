"""What a training shows: one line that fits the terminal, or one plain line an epoch."""

import io
import re

import pytest
from rich.console import Console

from toolkit import progress
from toolkit.progress import Display

ROW = {
    "epoch": 7, "train_loss": 0.5312, "train_top1": 0.8215, "val_loss": 0.6, "val_top1": 0.7931,
    "images_per_second": 1234.5,
}  # fmt: skip


@pytest.mark.parametrize("width", [60, 120])
def test_a_terminal_shows_one_line_that_fits(monkeypatch, width):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=width, color_system=None))
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Display("resnet18_256_dropout", 200, 6) as display:
        display.step(6.5, 0.5312, 0.8215, 1234.5)
        display.bar.refresh()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()))
    assert any("7/200" in line and "0.531" in line and "82" in line for line in lines)
    assert max(map(len, lines)) <= width


def test_a_log_file_gets_one_line_an_epoch(capsys):
    with Display("tpsnet", 200, 6) as display:
        display.step(6.5, 0.5, 0.8, 1000)
        display.epoch(ROW)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tpsnet 7/200  loss 0.531 top-1 82.15%  val loss 0.600 top-1 79.31%  1,23")
