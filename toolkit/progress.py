"""What a training shows while it runs, on stderr: a line that changes on a terminal, else a line an epoch."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

TELL_SECONDS = 20.0  # between two lines of ``told``
FIRST = os.environ.get("RANK", "0") == "0"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more: Rich would end the process."""
        self.quiet = True


console = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

T = TypeVar("T")


def say(text: str) -> None:
    """A line for the user, on stderr; stdout belongs to results. Of several processes the first speaks."""
    if FIRST:
        with suppress(OSError):  # the terminal is gone, or the log's disk full: that ends no training
            console.print(text, markup=False)


def told(steps: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The steps; where they take long, lines for the user say of ``what`` how far it is."""
    last = time.monotonic()
    for done, step in enumerate(steps):
        if time.monotonic() - last > TELL_SECONDS:
            last = time.monotonic()
            say(f"{what}: {done / total:.0%}")
        yield step


class Display:
    """Progress of one run of ``epochs``, of which ``done`` are done before, with the fraction of a begun one."""

    def __init__(self, title: str, epochs: int, done: float = 0) -> None:
        self.title, self.epochs, self.done = title, epochs, done
        self.live = FIRST and console.is_terminal and sys.stderr.isatty()  # CI may call a file a terminal
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[live]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self.live,
            refresh_per_second=4,
        )
        self.task = self.bar.add_task(title, total=epochs, completed=done, live="")  # type: ignore[arg-type]
        self.start = time.monotonic()

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.bar.stop()

    def step(self, done: float, loss: float, top1: float, rate: float) -> None:
        """``done``: epochs of the whole run, with the fraction of this one; the rest are means of this epoch."""
        epoch = math.ceil(done)
        narrow = console.width < 80
        self.bar.update(
            self.task,
            completed=done,
            description=f"{self.title} {epoch}/{self.epochs}",
            live=f"{loss:.3f} {top1:.0%}" if narrow else f"loss {loss:.3f}  top-1 {top1:.1%}  {rate:,.0f} img/s",
        )

    def epoch(self, row: Mapping[str, Any]) -> None:
        done, left = row["epoch"] - self.done, ""
        if done >= 1:  # the rest of an epoch that was begun before tells nothing of the others
            each = (time.monotonic() - self.start) / done
            left = f"  {clock(each * (self.epochs - row['epoch']))} left"
        val = "" if row["val_top1"] is None else f"  val loss {row['val_loss']:.3f} top-1 {row['val_top1']:.2%}"
        say(
            f"{self.title} {row['epoch']}/{self.epochs}  loss {row['train_loss']:.3f} "
            f"top-1 {row['train_top1']:.2%}{val}  {row['images_per_second']:,.0f} img/s{left}"
        )


def clock(seconds: float) -> str:
    """``1:02:03``, or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
