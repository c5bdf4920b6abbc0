"""A folder of JPEGs: how long `toolkit data check` takes, and training from a file against training from memory.

    python benchmarks/folder.py FOLDER [--count 20000] [--side 256] [--epochs 2]

Makes the folder where it is not there: pieces of scikit-learn's two photographs, noisy, in ten classes. Then trains a
small student, in a process of its own for each turn, with images that stay in memory and with a limit of 1 GiB, beyond
which they stay in a file. The first turn decodes them. Memory is the process's own (RssAnon), without the file cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from toolkit.machine import available_cores

LIMITS = {"memory": 64.0, "file": 1.0}  # GiB


def make(folder: Path, count: int, side: int) -> None:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos, random = load_sample_images().images, np.random.default_rng(0)
    for i in range(count):
        photo, piece = photos[i % 2], int(random.integers(100, 400))
        top, left = (int(random.integers(0, size - piece)) for size in photo.shape[:2])
        image = Image.fromarray(photo[top : top + piece, left : left + piece]).resize((side, side))
        pixels = np.asarray(image) + random.integers(0, 16, (side, side, 3), np.uint8)
        path = folder / f"class{i % 10}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=85)


def train(folder: Path, limit: float, side: int, epochs: int) -> None:
    """One turn, in this process: prints images a second of each epoch and the most anonymous memory in bytes."""
    from toolkit import stages

    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            most = max(most, int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024)

    settings = {
        "data.dataset": f"folder:{folder}", "data.image_size": side, "data.val_size": 0, "data.memory": limit,
        "student.widths": [16, 32, 64], "loss.kd_weight": 0, "loss.ce_weight": 1, "epochs": epochs, "probe": False,
        "cached_epochs": 0, "schedule.warmup_epochs": 0,
    }  # fmt: skip
    thread = threading.Thread(target=watch, daemon=True)  # gone with a turn that fails
    thread.start()
    with tempfile.TemporaryDirectory() as run:
        rows: list[dict] = []
        stages.distill("own-images", Path(run, "run"), on_epoch=rows.append, settings=settings)
    over.set()
    thread.join()
    print(json.dumps({"rates": [row["images_per_second"] for row in rows], "memory": most}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", choices=["make", "check", *LIMITS])
    wanted = parser.parse_args()
    if not wanted.folder.is_dir():
        make(wanted.folder, wanted.count, wanted.side)
    if wanted.only == "make":
        return
    if wanted.only in LIMITS:
        train(wanted.folder, LIMITS[wanted.only], wanted.side, wanted.epochs)
        return
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "toolkit", "data", "check", str(wanted.folder)], check=False)
    print(f"data check: {time.monotonic() - began:.1f} s on {available_cores()} cores")
    if wanted.only == "check":
        return
    rates: dict[str, list[float]] = {name: [] for name in LIMITS}
    for _ in range(wanted.turns):
        for name in LIMITS:
            command = [sys.executable, __file__, str(wanted.folder), "--only", name, "--side", str(wanted.side),
                       "--epochs", str(wanted.epochs)]  # fmt: skip
            turn = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            rates[name] += turn["rates"]
            print(f"from {name}: {turn['rates']} images/s, {turn['memory'] / 2**30:.2f} GiB", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"medians {medians}: file over memory {medians['file'] / medians['memory']:.3f}")


if __name__ == "__main__":
    main()
