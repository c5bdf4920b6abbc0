"""``fit`` and ``predict``: the only training loop, and the only loop over images that does not train."""

from __future__ import annotations

import contextlib
import ctypes
import math
import resource
import shlex
import signal
import sys
import textwrap
import time
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.augment import Augmenter
from toolkit.catalogue import build, check_budget, parameter_count
from toolkit.classifier import Classifier
from toolkit.data import DataSet
from toolkit.errors import CheckpointError, DeviceError, DivergedError, Interrupted
from toolkit.losses.soft_targets import SoftTargets
from toolkit.optim import lr_factor, make_average, make_optimizer, set_lr
from toolkit.progress import Display
from toolkit.recipe import Loss, Recipe
from toolkit.run import Run, load_tensors, save_tensors

EVAL_BATCH = 500
PREPARE_IMAGES = 5000
READ_SECONDS = 0.5  # the loss is read from the device this often: each reading waits for the device


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to a device that is there, or ``DeviceError``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise DeviceError(f"--device {name} was asked for, but PyTorch finds {found} CUDA devices here")
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of convs and products; ``auto`` takes bf16 where the hardware computes in it."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def memory_format(recipe: Recipe) -> torch.memory_format:
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


def new_model(recipe: Recipe, data: DataSet) -> Classifier:
    """The untrained model of a recipe; a student over the budget raises ``BudgetError``."""
    name, arguments = recipe.model.name, recipe.model.arguments
    model = build(name, recipe.role, len(data.classes), data.mean, data.std, **arguments)
    if recipe.role == "student":
        check_budget(name, parameter_count(model), recipe.budget, len(data.classes))
    return model


class Objective(nn.Module):
    """The loss of a recipe: cross entropy with soft labels ``[B,K]``, plus the distillation term."""

    def __init__(self, config: Loss) -> None:
        super().__init__()
        self.config = config
        self.soft_targets = SoftTargets(config.temperature)

    def forward(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
        logits = logits.float()
        loss = logits.new_zeros(())
        if self.config.ce_weight:
            smoothing = self.config.label_smoothing
            loss = loss + self.config.ce_weight * F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if teacher_logits is not None:
            loss = loss + self.config.kd_weight * self.soft_targets(logits, teacher_logits)
        return loss


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Logits, float32 ``[N,K]``, of uint8 images ``[N,3,H,W]``; the model is on ``device`` and in eval mode after."""
    model.eval()
    logits = []
    for batch in images.split(EVAL_BATCH):
        pixels = batch.to(device).float().div_(255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits.append(model(pixels).float())
    return torch.cat(logits).cpu().numpy()


@dataclass
class Position:
    """Where a run stands: ``step`` steps into ``epoch``, both from 0, with the sums of that epoch so far."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    epoch_seconds: float = 0.0
    total_seconds: float = 0.0
    best_top1: float = -1.0
    best_epoch: int = 0


def fit(recipe: Recipe, data: DataSet, run: Run, teacher: nn.Module | None = None) -> dict[str, Any]:
    """Train the recipe's model in the run directory, from its last checkpoint where there is one.

    ``teacher`` maps images in [0,1] to logits and is not changed; without one this is plain training.
    Returns the summary that the run directory then holds. Raises ``DivergedError`` where the loss is no longer
    finite and ``Interrupted`` where a signal stopped it, both after the last good state was saved.
    """
    if run.finished:
        return run.summary()
    device, layout = pick_device(recipe.device), memory_format(recipe)
    dtype = pick_dtype(recipe.precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(recipe.seed)
    model = new_model(recipe, data)
    model.prepare(data.train.images[:PREPARE_IMAGES].float() / 255)
    model = model.to(device).to(memory_format=layout)
    if teacher is not None:
        teacher = teacher.to(device).to(memory_format=layout).eval().requires_grad_(False)
    objective = Objective(recipe.loss)
    optimizer = make_optimizer(recipe.optimizer, model, dtype)
    average = make_average(model, recipe.average_decay) if recipe.average_decay else None
    kept = average.module if average is not None else model

    train = data.train
    augmenter = Augmenter(
        train.images.to(device), train.labels.to(device), len(data.classes), recipe.augment, recipe.seed
    )
    batch_size = min(recipe.batch_size, len(train.labels))
    steps = len(train.labels) // batch_size  # the ragged rest of the shuffled order is left out

    def lr_at(step: int) -> float:
        return recipe.optimizer.lr * lr_factor(recipe.schedule, step, recipe.epochs * steps, steps)

    state = Checkpoint(run, model, optimizer, average)
    header = describe(recipe, data)
    at = state.load(header)

    with StopSignal() as stop, Display(recipe.model.name, recipe.epochs, steps, at.epoch * steps + at.step) as display:
        saved = time.monotonic()
        for epoch in range(at.epoch, recipe.epochs):
            began = read = time.monotonic()
            before = at.epoch_seconds
            augmenter.start_epoch(epoch)
            order = augmenter.order(epoch)
            model.train()
            sums = torch.tensor([at.loss_sum, at.correct], dtype=torch.float64, device=device)
            for step in range(at.step, steps):
                done = epoch * steps + step
                set_lr(optimizer, lr_at(done))
                images, labels = augmenter.batch(order[step * batch_size : (step + 1) * batch_size])
                images = images.contiguous(memory_format=layout)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    with torch.no_grad():
                        teacher_logits = teacher(images) if teacher is not None else None
                    logits = model(images)
                loss = objective(logits, labels, teacher_logits)
                loss.backward()
                if recipe.optimizer.grad_clip:
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
                if average is not None:
                    average.update_parameters(model)
                correct = (logits.detach().argmax(1) == labels.argmax(1)).sum()
                sums += torch.stack([loss.detach().double(), correct / batch_size])

                now = time.monotonic()
                if now - read < READ_SECONDS and step < steps - 1 and not stop.asked:
                    continue
                read = now
                at.epoch, at.step = epoch, step + 1
                at.loss_sum, at.correct = sums.tolist()
                at.epoch_seconds = before + time.monotonic() - began
                if not math.isfinite(at.loss_sum):
                    raise DivergedError(diverged(run, epoch, done + 1))
                rate = at.step * batch_size / at.epoch_seconds
                display.step(done + 1, at.loss_sum / at.step, at.correct / at.step, rate)
                stopping = stop.asked  # read once: a signal may come at any time
                if stopping or now - saved > recipe.checkpoint_minutes * 60:
                    state.save(at, header)
                    saved = time.monotonic()
                if stopping:
                    raise Interrupted(stopped(run, epoch, step, steps))

            val_loss = val_top1 = None
            if data.val is not None and ((epoch + 1) % recipe.eval_epochs == 0 or epoch + 1 == recipe.epochs):
                val_logits = torch.from_numpy(predict(kept, data.val.images, device, dtype))
                val_loss = F.cross_entropy(val_logits, data.val.labels).item()
                val_top1 = (val_logits.argmax(1) == data.val.labels).float().mean().item()
            if recipe.select == "last" or val_top1 is None:
                better = epoch + 1 == recipe.epochs and (recipe.select == "last" or data.val is None)
            else:
                better = val_top1 > at.best_top1
            if better:
                at.best_top1, at.best_epoch = -1.0 if val_top1 is None else val_top1, epoch + 1
                save_tensors(run.checkpoint("best"), kept.state_dict(), header | {"epoch": epoch + 1})
            row = {
                "epoch": epoch + 1,
                "step": (epoch + 1) * steps,
                "train_loss": at.loss_sum / steps,
                "train_top1": at.correct / steps,
                "val_loss": val_loss,
                "val_top1": val_top1,
                "lr": lr_at((epoch + 1) * steps - 1),
                "batch_size": batch_size,
                "images_per_second": steps * batch_size / at.epoch_seconds,
                "seconds": at.epoch_seconds,
            }
            at.total_seconds += at.epoch_seconds
            at.epoch, at.step, at.loss_sum, at.correct, at.epoch_seconds = epoch + 1, 0, 0.0, 0.0, 0.0
            run.append(row)
            state.save(at, header)
            saved = time.monotonic()
            display.epoch(row)

    summary = header | {
        "epochs": recipe.epochs,
        "steps": recipe.epochs * steps,
        "train_seconds": at.total_seconds,
        "kept_epoch": at.best_epoch,
        "val_top1": at.best_top1 if at.best_top1 >= 0 else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": peak_memory(),
    }
    run.finish(summary)
    return summary


def describe(recipe: Recipe, data: DataSet) -> dict[str, Any]:
    """What a file of weights says of itself: enough to build the model again and to know its data."""
    return {
        "model": recipe.model.name,
        "role": recipe.role,
        "arguments": recipe.model.arguments,
        "classes": list(data.classes),
        "image_size": recipe.data.image_size,
        "dataset": data.name,
        "dataset_digest": data.digest,
        "recipe_digest": recipe.digest(),
        "teacher": recipe.teacher.name if recipe.distils and recipe.teacher else None,
    }


class Checkpoint:
    """All of a run's training state as one safetensors file: a kill leaves the old one or the new one whole."""

    def __init__(self, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None) -> None:
        self.run, self.model, self.optimizer, self.average = run, model, optimizer, average
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def save(self, at: Position, header: dict[str, Any]) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        save_tensors(self.run.checkpoint("last"), tensors, header | {"position": asdict(at)})

    def load(self, expected: dict[str, Any]) -> Position:
        """Restore the last state where there is one; the position from which to go on.

        A state whose header says other than ``expected`` raises ``CheckpointError``.
        """
        path = self.run.checkpoint("last")
        if not path.is_file():
            return Position()
        tensors, header = load_tensors(path)
        if "position" not in header:
            raise CheckpointError(f"{path} holds weights alone, not the state of a run")
        differing = [f"{key}: {header.get(key)} there, {value} here" for key, value in expected.items()
                     if header.get(key) != value]  # fmt: skip
        if differing:
            raise CheckpointError(f"{path} is the state of another run: {textwrap.shorten('; '.join(differing), 300)}")
        try:
            self.model.load_state_dict(_below(tensors, "model."))
            if self.average is not None:
                self.average.load_state_dict(_below(tensors, "average."))
        except RuntimeError as error:
            reason = textwrap.shorten(str(error), 300)
            raise CheckpointError(f"{path} belongs to another model: {reason}") from error
        for name, value in _below(tensors, "optimizer.").items():
            index, _, key = name.partition(".")
            parameter = self.parameters[int(index)]
            if value.shape == parameter.shape:  # with the parameter's own memory format
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            self.optimizer.state[parameter][key] = value.detach()
        torch.set_rng_state(tensors["rng.cpu"])
        if torch.cuda.is_available() and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        at = Position(**header["position"])
        self.run.rewind(at.epoch)
        return at


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class StopSignal(contextlib.AbstractContextManager["StopSignal"]):
    """Ctrl-C or SIGTERM sets ``asked``; a second Ctrl-C stops at once. Only in the main thread."""

    def __init__(self) -> None:
        self.asked = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def stopped(run: Run, epoch: int, step: int, steps: int) -> str:
    command = f"toolkit {'distill' if run.recipe.role == 'student' else 'train'}"
    return (
        f"stopped in epoch {epoch + 1} after step {step + 1} of {steps}; all of it is saved. Go on with: "
        f"{command} --run-dir {shlex.quote(str(run.path))} --resume"
    )


def diverged(run: Run, epoch: int, step: int) -> str:
    path = run.checkpoint("last")
    kept = f"the last good checkpoint is {path}" if path.is_file() else "no checkpoint had been written yet"
    return f"the loss is not finite any more at step {step} (epoch {epoch + 1}); {kept}."


def keep_freed_memory() -> None:
    """Let glibc keep the large blocks that each step frees and takes again.

    By default it hands them back to the system, and every step then pays for zeroing fresh pages. Elsewhere
    than on glibc nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold, never = -1, -3, 2**31 - 1  # M_* of malloc.h
        libc.mallopt(mmap_threshold, never)
        libc.mallopt(trim_threshold, never)


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
