"""What this machine can do, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any


def examine(data_dir: Path | None = None) -> dict[str, Any]:
    """``{"facts": {name: value}, "problems": [line, ...]}``; each problem says what to do."""
    import onnxruntime
    import torch

    from toolkit.compute import pick_dtype
    from toolkit.machine import available_cores, total_memory
    from toolkit.run import environment, runs

    facts: dict[str, Any] = dict(environment()["versions"])
    problems: list[str] = []
    facts["machine"] = platform.platform()
    facts["cores"] = available_cores()
    facts["memory GiB"] = round(total_memory() / 2**30, 1)
    facts["free disk GiB"] = round(shutil.disk_usage(Path.cwd()).free / 2**30, 1)
    if facts["free disk GiB"] < 1:
        problems.append(f"only {facts['free disk GiB']} GiB are free in {Path.cwd()}: checkpoints may not fit")

    facts["cpu precision"] = str(pick_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    cuda = torch.cuda.is_available()
    facts["cuda (PyTorch)"] = torch.cuda.get_device_name() if cuda else "none"
    if Path("/dev/nvidia0").exists() and not cuda:
        problems.append("there is an NVIDIA device, but PyTorch cannot use it: check the driver (nvidia-smi)")

    providers, problem = _providers()
    facts["providers (ONNX Runtime)"] = ", ".join(providers)
    if problem and cuda:
        problems.append(f"ONNX Runtime cannot use CUDA: {problem}")
    if not providers:
        problems.append(f"ONNX Runtime {onnxruntime.__version__} runs nothing here: {problem}")

    facts["cifar10"] = _cifar10(data_dir)
    facts["runs"] = f"{sum(run.finished for run in runs())} finished of {len(runs())} in ./runs"
    return {"facts": facts, "problems": problems}


def _providers() -> tuple[list[str], str]:
    """The providers that really run a graph here, and why CUDA is not among them."""

    import torch
    from torch import nn

    from export.artifact import Metadata
    from export.onnx_export import build, to_bytes
    from serve.session import Session
    from toolkit.choices import Provider
    from toolkit.errors import UserError

    working, reason = [], ""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    about = Metadata(
        model="probe",
        labels=("a", "b"),
        image_size=8,
        parameters=sum(p.numel() for p in model.parameters()),
        recipe_digest="",
        dataset="none",
        dataset_digest="",
    )
    names: tuple[Provider, ...] = ("cuda", "cpu")
    with torch.no_grad():
        artifact = to_bytes(build(model, about), about)
    for name in names:
        try:
            working.append(Session(artifact, name).provider)
        except UserError as error:
            reason = reason or str(error)
    return working, reason


def _cifar10(data_dir: Path | None) -> str:
    from toolkit.cifar import CIFARS, places

    kind = CIFARS["cifar10"]
    for place in places(data_dir):
        if os.path.isdir(place / kind.folder):  # noqa: PTH112  # also of a place that may not be looked at
            return f"in {place}"
    for place in places(data_dir):
        if os.path.isfile(place / kind.archive[0]):  # noqa: PTH113
            return f"in {place}, still packed: it is unpacked when first used"
    return "not here yet: it is downloaded when first used, or give --data-dir"
