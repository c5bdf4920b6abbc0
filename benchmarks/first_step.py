"""Seconds from the command to the end of the first training step on CIFAR-10: imports, loading, model, augmentation."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

# The command itself, which ends where the engine clears the first step's gradients, without tidying up.
COMMAND = """
import os, torch
def done(*_, **__): os._exit(0)
torch.optim.Optimizer.zero_grad = done
from toolkit.cli import main
main()
"""
BAR = 6.0


def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often.")] = 5,
    data_dir: Annotated[Path, typer.Option(envvar="TOOLKIT_DATA", help="Folder that holds CIFAR-10.")] = Path("data"),
) -> None:
    """Print the median and the extremes for the recipe cifar10-cpu."""
    seconds = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["train", "--recipe", "cifar10-cpu", "--data-dir", str(data_dir), "--run-dir", f"{folder}/run"]
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", COMMAND, *arguments], check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
    print(
        f"first step of resnet9_wide on CIFAR-10 after {statistics.median(seconds):.1f} s "
        f"(n = {rounds}, {min(seconds):.1f} to {max(seconds):.1f}; bar: {BAR:g} s on a CPU)"
    )


if __name__ == "__main__":
    typer.run(main)
