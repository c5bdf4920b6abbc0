"""The whole chain on the built-in digits, as a new user runs it: seconds and peak memory of ``toolkit pipeline``."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from toolkit.machine import available_cores


def main() -> None:
    toolkit = Path(sys.executable).with_name("toolkit")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run([toolkit, "pipeline"], cwd=folder, check=True)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cores = available_cores()
    print(f"toolkit pipeline: {seconds:.0f} s on {cores} cores (bar: 120 s on 2), at most {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
