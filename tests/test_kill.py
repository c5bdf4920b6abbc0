"""A run that is killed at any moment, also while a checkpoint is written, ends as the run that was not."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch

from toolkit import data as datasets
from toolkit import engine
from toolkit.data import DataSet, Split
from toolkit.recipe import resolve
from toolkit.run import Run

EPOCHS = 3  # for each kill: it must not come to its end before the last one
TREE = {
    "data": {"dataset": "digits", "image_size": 16},
    "student": {"name": "tpsnet", "blocks": [1, 1, 1], "base": 4, "dropout": 0.2},
    "optimizer": {"lr": 0.05, "lookahead_steps": 3},
    "checkpoint_minutes": 1e-9,
    "probe": False,  # two runs might choose differently
    "precision": "fp32",
    "batch_size": 50,
}


def train(folder: Path, epochs: int, started, half_a_write: bool) -> None:
    """In a process of its own: train, or die in the middle of writing the third state."""
    engine.READ_SECONDS = 0.0  # a state every step
    recipe = resolve(TREE, "distill", {"epochs": epochs})
    whole = datasets.load(recipe.data)
    parts = ((whole.train, 200), (whole.val, 100), (whole.test, 100))
    some = (Split(part.images[:n], part.labels[:n]) for part, n in parts)
    data = DataSet("digits", whole.classes, *some, whole.mean, whole.std, "d")
    if half_a_write:
        save, left = safetensors.torch.save_file, [2]

        def cut_short(tensors, path, metadata=None):
            if not left[0]:
                Path(path).write_bytes(safetensors.torch.save(tensors, metadata)[:5000])
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            save(tensors, path, metadata)

        safetensors.torch.save_file = cut_short
    run = Run.start(folder, recipe, resume=True)
    started.set()
    engine.fit(recipe, data, run)


@pytest.mark.parametrize("most", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path, most):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toolkit.engine", "toolkit.data", "sklearn.datasets", "torch._dynamo"])
    moments = random.Random(0)

    def start(folder, half_a_write=False):
        started = context.Event()
        process = context.Process(target=train, args=(tmp_path / folder, EPOCHS * most, started, half_a_write))
        process.start()
        assert started.wait(120)
        return process

    start("whole").join()
    whole, killed = Run(tmp_path / "whole"), tmp_path / "killed"
    kills, states = 0, set()

    def written():
        state = killed / "checkpoints/last.safetensors"
        return state.stat().st_mtime_ns if state.is_file() else 0

    while not (killed / "summary.json").is_file():
        writing = kills < most and kills % 3 == 2
        process = start("killed", writing)
        if kills < most and not writing:
            before = written()
            while kills % 2 and written() == before and process.is_alive():  # it gets somewhere on slow machines too
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3))
            process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        state = Run(killed).checkpoint("last")
        states.add(state.read_bytes() if state.is_file() else b"")
    assert kills >= most
    assert len(states) > most / 2  # it came further between the kills
    assert Run(killed).checkpoint("best").read_bytes() == whole.checkpoint("best").read_bytes()
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k} for row in run.history()] for run in (whole, Run(killed))
    ]
    assert timeless[0] == timeless[1]
