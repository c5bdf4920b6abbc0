"""Start of the command line: ``toolkit --help`` against a Typer program of one command, and no torch in it."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 10
TOOLKIT = [str(Path(sys.executable).with_name("toolkit")), "--help"]
BARE = """\
import typer

app = typer.Typer()


@app.command()
def hello(name: str) -> None:
    print(name)


app()
"""


def seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def imported(arguments: list[str]) -> set[str]:
    """The modules that the program imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    traced = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return {line.rpartition("|")[2].strip() for line in traced.stderr.splitlines()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "bare.py")
        program.write_text(BARE)
        bare = [str(program), "--help"]
        seconds(bare), seconds(TOOLKIT)  # once, to have the files in memory and compiled
        pairs = [(seconds(bare), seconds(TOOLKIT)) for _ in range(ROUNDS)]
    theirs, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"bare Typer program {1000 * theirs:.0f} ms, toolkit {1000 * ours:.0f} ms: {ratio:.2f} times (bar: 2.5)")
    modules = imported(TOOLKIT)
    assert "toolkit.cli" in modules
    print(f"torch is {'' if 'torch' in modules else 'not '}imported")
    sys.exit("torch" in modules)


if __name__ == "__main__":
    main()
