"""Two processes that share each step do what one does with the same batch."""

import os
import subprocess
import sys

import numpy as np
import pytest

from toolkit.run import Run

COMMON = ["distill", "--recipe", "digits", "--image-size", "16", "--batch-size", "100", "--seed", "3"]
COMMON += ["--epochs", "3", "--set", "schedule.warmup_epochs=0", "--set", "precision=fp32", "--run-dir", "run"]
COMMON += ["--set", "student.widths=[8, 16, 32]", "--set", "teacher.widths=[8, 16, 32]", "--set", "cached_epochs=2"]


def toolkit(folder, launcher, *more):
    """A run in a folder of its own: its rows, its teacher's answers, and what was said."""
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "toolkit", *COMMON, *more]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (cache,) = (folder / "teacher-logits").iterdir()
    return Run(folder / "run").history(), np.load(cache), done


def test_two_processes_train_as_one_does(tmp_path):
    """They train the teacher and then the student; one process repeats the latter.

    It takes each batch in the two halves of the two processes: the same batch statistics.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two, answers, done = toolkit(tmp_path / "two", launcher, "--train-teacher", "--set", "train.epochs=2")
    assert done.stdout.count("next: toolkit validate") == 1
    assert done.stderr.count("resnet9 3/3") == 1
    (teacher,) = (tmp_path / "two/runs").iterdir()
    halves = ("--teacher-checkpoint", str(teacher), "--set", "micro_batch=50")
    one, expected, _ = toolkit(tmp_path / "one", (), *halves)
    np.testing.assert_allclose(answers, expected, atol=2e-3)  # float16
    for key in ("train_loss", "train_top1"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-3), key
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert [row["val_top1"] for row in two] == pytest.approx([row["val_top1"] for row in one], abs=0.05)
