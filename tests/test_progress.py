"""What a training shows: one line that fits the terminal, or one plain line an epoch."""

import io
import re

import pytest
from rich.console import Console

from toolkit import progress
from toolkit.progress import Display, clock

ROW = {
    "epoch": 7, "train_loss": 0.5312, "train_top1": 0.8215, "val_loss": 0.6, "val_top1": 0.7931,
    "images_per_second": 1234.5,
}  # fmt: skip


@pytest.mark.parametrize("width", [60, 120])
def test_a_terminal_shows_one_line_that_fits(monkeypatch, width):
    screen, seconds = io.StringIO(), [0.0]
    console = Console(file=screen, force_terminal=True, width=width, color_system=None, get_time=lambda: seconds[0])
    monkeypatch.setattr(progress, "console", console)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Display("resnet18_256_dropout", 200, 6) as display:
        display.step(6.375, 0.6, 0.8, 1000)
        seconds[0] = 2.0
        display.step(6.5, 0.5312, 0.8215, 1234.5)
        display.bar.refresh()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()))
    words = ["7/200", "0.531", "82", "51:36"]  # an eighth of an epoch in 2 seconds: 193.5 epochs take 3096
    assert any(all(word in line for word in words) for line in lines)
    assert any("1,234 img/s" in line for line in lines) == (width == 120)
    assert max(map(len, lines)) <= width


def test_names_that_look_like_markup(capsys):
    progress.say("folder:dog: [red]")
    assert capsys.readouterr().err == "folder:dog: [red]\n"


@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
def test_a_reader_that_is_gone_ends_nothing(monkeypatch, error):
    class Gone(io.StringIO):
        def write(self, _):
            raise error

    monkeypatch.setattr(progress, "console", progress._Console(file=Gone()))
    for _ in range(2):
        progress.say("a line")


def test_a_log_file_gets_one_line_an_epoch(monkeypatch, capsys):
    seconds = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    with Display("tpsnet", 200, 5.5) as display:
        display.step(6.5, 0.5, 0.8, 1000)
        seconds[0] += 30
        display.epoch(ROW | {"epoch": 6})
        display.epoch(ROW)
    begun, *lines = capsys.readouterr().err.splitlines()
    said = "tpsnet 7/200  loss 0.531 top-1 82.15%  val loss 0.600 top-1 79.31%  1,234 img/s"
    assert begun.endswith("1,234 img/s")  # the rest of an epoch tells nothing of the others
    assert lines == [f"{said}  1:04:20 left"]  # one and a half epochs in 30 seconds: 193 take 3860


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723.2, "1:02:03"), (90000, "25:00:00")]
)
def test_a_clock(seconds, shown):
    assert clock(seconds) == shown
