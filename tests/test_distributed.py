"""Two processes that share each step do what one does with the same batch."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

COMMON = ["distill", "--recipe", "digits", "--batch-size", "100", "--epochs", "3", "--seed", "3"]
COMMON += ["--set", "loss={kd_weight: 0}", "--set", "teacher=", "--set", "student.widths=[8, 16, 32]"]
COMMON += ["--set", "precision=fp32", "--run-dir", "run"]


def toolkit(folder, *launcher, extra=()):
    """A run in a folder of its own; its metrics.jsonl."""
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "toolkit", *COMMON, *extra]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return rows, done


def test_two_processes_train_teacher_and_student_and_share_the_cache(tmp_path):
    """Two trainings one after the other in the same processes, the second with the teacher's cached answers."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    taught = ("--set", "loss={kd_weight: 0.9}", "--set", "teacher={name: resnet9_wide, widths: [8, 16, 32]}")
    extra = (*taught, "--set", "cached_epochs=2", "--train-teacher", "--set", "schedule.warmup_epochs=0")
    extra += ("--set", "train.epochs=2")
    rows, _ = toolkit(tmp_path / "two", *launcher, extra=extra)
    assert len(rows) == 3
    (cache,) = (tmp_path / "two" / "teacher-logits").iterdir()
    assert not np.isnan(np.load(cache)).any()


def test_two_processes_have_the_loss_curve_of_one(tmp_path):
    """One process takes each batch in the two halves of the two processes: the same batch statistics."""
    one, _ = toolkit(tmp_path / "one", extra=("--set", "micro_batch=50"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two, done = toolkit(tmp_path / "two", *launcher)
    for key in ("train_loss", "train_top1"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-3), key
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert [row["val_top1"] for row in two] == pytest.approx([row["val_top1"] for row in one], abs=0.05)
    assert done.stdout.count("next: toolkit validate") == 1
    assert done.stderr.count("resnet9 3/3") == 1
