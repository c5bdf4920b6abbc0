"""Where and in which numbers a run computes: device, precision and memory format."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from toolkit import distributed
from toolkit.errors import DeviceError
from toolkit.files import write_text
from toolkit.machine import available_cores, keep_freed_memory
from toolkit.progress import say
from toolkit.recipe import DEVICES, Recipe
from toolkit.run import Run

JUDGED_IMAGES = 64  # in the one step that a step's time is judged by
PROBE_IMAGES = 16
PROBE_ROUNDS = 2
HOPELESS = 1.15  # a candidate this many times slower than the best is not timed again
WORTH = 1.1  # the usual choice stays unless another is this many times faster: small differences are noise


class Numbers(NamedTuple):
    """The dtype of convs and products, and the memory format of images and weights."""

    dtype: torch.dtype
    layout: torch.memory_format

    def __str__(self) -> str:
        layout = "channels_last" if self.layout == torch.channels_last else "contiguous"
        return f"{str(self.dtype).removeprefix('torch.')} {layout}"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """In which convs and products are computed in ``dtype``; fp32 is as it is."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to a device that is there, or ``DeviceError``."""
    if not re.fullmatch(DEVICES, name):
        raise DeviceError(f"--device {name} is no device: give auto, cpu, cuda or cuda:N")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # --deterministic needs it, before CUDA's first product
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= found:
        raise DeviceError(f"--device {name} was asked for, but PyTorch finds {found} CUDA devices here")
    return torch.device(name)


def settle(device: torch.device) -> None:
    """Before a CPU computes: let this process keep the memory it frees, and have as many threads as its share of cores.

    OMP_NUM_THREADS says otherwise, but for the 1 that torchrun gives each of several processes unasked.
    """
    if device.type != "cpu":
        return
    keep_freed_memory()
    told = os.environ.get("OMP_NUM_THREADS")
    if told is None or (told == "1" and distributed.LOCAL_SIZE > 1):
        torch.set_num_threads(max(1, available_cores() // distributed.LOCAL_SIZE))


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of convs and products; ``auto`` takes bf16 where the hardware computes in it."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """CUDA computes fp32 in full: what is measured and compared is not rounded to 10 bits of mantissa on the way."""
    conv, product = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = conv
        torch.set_float32_matmul_precision(product)


def candidates(recipe: Recipe, device: torch.device) -> list[Numbers]:
    """What the recipe leaves open, the usual choice first: bf16 where the hardware has it, channels_last."""
    dtypes, layouts = [pick_dtype(recipe.precision, device)], [torch.channels_last]
    if recipe.precision == "auto" and dtypes == [torch.bfloat16]:
        dtypes.append(torch.float32)
    if recipe.channels_last is None:
        layouts.append(torch.contiguous_format)
    elif not recipe.channels_last:
        layouts = [torch.contiguous_format]
    return [Numbers(dtype, layout) for dtype in dtypes for layout in layouts]


def usual(recipe: Recipe, device: torch.device) -> Numbers:
    return candidates(recipe, device)[0]


def chosen(model: nn.Module, recipe: Recipe, device: torch.device, run: Run) -> Numbers:
    """The numbers of this run: on a CPU the fastest by a probe, which the run directory keeps; else the usual ones.

    What a probe chooses may be another the next time: a deterministic run has none.
    The model is not changed, nor any generator. With several processes the first one's choice holds.
    """
    choices = candidates(recipe, device)
    if device.type != "cpu" or not recipe.probe or recipe.deterministic or len(choices) == 1:
        return choices[0]
    best = 0
    if distributed.RANK == 0:
        best = _kept_or_probed(model, recipe, device, run, choices)
    return choices[int(distributed.of_first([best], device)[0])]


def _kept_or_probed(model: nn.Module, recipe: Recipe, device: torch.device, run: Run, choices: list[Numbers]) -> int:
    path, names = run.path / "probe.json", [str(choice) for choice in choices]
    if path.is_file():
        kept = json.loads(path.read_text())["chosen"]
        if kept in names:
            return names.index(kept)
    rates = [1 / seconds for seconds in probe(model, recipe, device, choices)]
    best = max(range(len(rates)), key=rates.__getitem__)
    best = best if rates[best] > WORTH * rates[0] else 0
    speeds = dict(zip(names, rates, strict=True))
    write_text(path, json.dumps({"chosen": names[best], "images_per_second": speeds}, indent=2))
    others = ", ".join(f"{name} {rate:.0f}" for name, rate in speeds.items() if name != names[best])
    say(f"probe: {names[best]}, {rates[best]:.0f} images/s (against {others})")
    return best


def probe(model: nn.Module, recipe: Recipe, device: torch.device, choices: list[Numbers]) -> list[float]:
    """The least seconds an image of a few training steps with each choice, taken in turns."""
    best = [float("inf")] * len(choices)
    with torch.random.fork_rng(devices=[]):
        images = _random_images(recipe, PROBE_IMAGES, device)
        copies = [copy.deepcopy(model).to(device).to(memory_format=choice.layout).train() for choice in choices]
        for turn in range(1 + PROBE_ROUNDS):
            for index, (copied, choice) in enumerate(zip(copies, choices, strict=True)):
                if turn > 1 and best[index] > HOPELESS * min(best):
                    continue
                seconds = _step_seconds(copied, images, choice, backward=True)
                if turn:  # the first prepares the kernels
                    best[index] = min(best[index], seconds)
    return best


def seconds_an_image(model: nn.Module, recipe: Recipe, backward: bool, count: int = JUDGED_IMAGES) -> float:
    """Seconds that a step takes for each image on the recipe's device, judged by one of ``count``; forward, or both."""
    device = pick_device(recipe.device)
    numbers = usual(recipe, device)
    model = model.to(device).to(memory_format=numbers.layout).train(backward)
    images = _random_images(recipe, count, device)
    _step_seconds(model, images, numbers, backward)  # prepares the kernels
    return _step_seconds(model, images, numbers, backward)


def _random_images(recipe: Recipe, count: int, device: torch.device) -> Tensor:
    return torch.rand(count, 3, recipe.data.image_size, recipe.data.image_size, device=device)


def _step_seconds(model: nn.Module, images: Tensor, numbers: Numbers, backward: bool) -> float:
    device = images.device
    images = images.contiguous(memory_format=numbers.layout)
    began = time.monotonic()
    with torch.set_grad_enabled(backward), autocast(device, numbers.dtype):
        logits = model(images)
    if backward:
        logits.float().sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.monotonic() - began) / len(images)
