"""A run that is killed at any moment, also while a checkpoint is written, ends as the run that was not."""

import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import safetensors.torch
from small_run import TREE, small_digits

from toolkit import engine
from toolkit.learner import Learner
from toolkit.recipe import resolve
from toolkit.run import Run


def train(run: Run, moment: int | None) -> None:
    """In a process of its own: train, or die at a moment, counted in steps, writes and renamings."""
    left = -1 if moment is None else moment

    def deadly(function):
        def called(*arguments, **more):
            nonlocal left
            left -= 1
            if left == 0:
                if function is save:  # in the middle of it
                    tensors, path = arguments
                    Path(path).write_bytes(safetensors.torch.save(tensors, more["metadata"])[:5000])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)

        return called

    save = safetensors.torch.save_file
    safetensors.torch.save_file = deadly(save)
    Path.replace, Run.append, Learner.step = deadly(Path.replace), deadly(Run.append), deadly(Learner.step)
    engine.READ_SECONDS = 0.0  # a state every step
    engine.fit(run.recipe, small_digits(), run)


@pytest.mark.parametrize("most", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path, most):
    """As many kills as epochs, of four steps each: five such moments a step, and a few at an epoch's end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toolkit.engine", "small_run", "sklearn.datasets", "torch._dynamo"])
    moments, states = random.Random(0), set()

    def trained(run, moment):
        process = context.Process(target=train, args=(run, moment))
        process.start()
        process.join(120)
        return process.exitcode

    changes = {"epochs": most, "checkpoint_minutes": 1e-9, "optimizer.lookahead_steps": 3}
    recipe = resolve(TREE, "distill", changes)
    whole, killed = (Run.start(tmp_path / name, recipe, resume=True) for name in ("whole", "killed"))
    assert trained(whole, None) == 0
    for _ in range(most):
        assert trained(killed, moments.randint(1, 20)) == -signal.SIGKILL
        state = killed.checkpoint("last")
        states.add(state.read_bytes() if state.is_file() else b"")
    assert len(states) > most / 2  # it came further between the kills
    assert trained(killed, None) == 0
    assert killed.checkpoint("best").read_bytes() == whole.checkpoint("best").read_bytes()
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k} for row in run.history()] for run in (whole, killed)
    ]
    assert timeless[0] == timeless[1]
    assert sorted(path.stem for path in state.parent.iterdir()) == ["best", "last", "last-1"]
