"""Two processes that share each step do what one does with the same batch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from toolkit.run import Run

COMMON = ["distill", "--recipe", "digits", "--image-size", "16", "--batch-size", "100", "--seed", "3"]
COMMON += ["--epochs", "3", "--set", "schedule.warmup_epochs=0", "--set", "precision=fp32", "--run-dir", "run"]
COMMON += ["--set", "student.widths=[8, 16, 32]", "--set", "teacher.widths=[8, 16, 32]", "--set", "cached_epochs=2"]


def trained(folder):
    """The rows of the run there, and its teacher's answers."""
    (cache,) = (folder / "teacher-logits").iterdir()
    return Run(folder / "run").history(), np.load(cache)


def test_two_processes_train_as_one_does(toolkit, tmp_path, monkeypatch):
    """They train the teacher and then the student; one process repeats the latter.

    It takes each batch in the two halves of the two processes: the same batch statistics.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "toolkit")
    command = [*launcher, *COMMON, "--train-teacher", "--set", "train.epochs=2"]
    done = subprocess.run(command, cwd=tmp_path / "two", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: toolkit validate") == 1
    assert done.stderr.count("resnet9 3/3") == 1
    (teacher,) = (tmp_path / "two/runs").iterdir()
    monkeypatch.chdir(tmp_path / "one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several add up in another order
    try:
        result = toolkit(*COMMON, "--teacher-checkpoint", teacher, "--set", "micro_batch=50")
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    (two, answers), (one, expected) = (trained(tmp_path / name) for name in ("two", "one"))
    np.testing.assert_allclose(answers, expected, atol=2e-3)  # float16
    for key in ("train_loss", "train_top1"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-3), key
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert [row["val_top1"] for row in two] == pytest.approx([row["val_top1"] for row in one], abs=0.05)
