"""``fit`` and ``predict``: the only training loop, and the only loop over images that does not train."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shlex
import signal
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit import distributed
from toolkit.augment import Augmenter
from toolkit.catalogue import PRETRAINED, build, check_budget, parameter_count, pretrained
from toolkit.classifier import Classifier
from toolkit.compute import autocast, chosen, pick_device, without_tf32
from toolkit.data import DataSet, Split, StoredImages, at_once
from toolkit.errors import CheckpointError, DeviceError, DivergedError, Interrupted, RecipeError
from toolkit.machine import available_cores, keep_freed_memory, peak_memory
from toolkit.objective import Objective
from toolkit.optim import StochasticAverage, ascended, estimate_norms, lr_factor, make_average, make_optimizer, set_lr
from toolkit.progress import Display, say
from toolkit.recipe import BatchGrowth, Recipe
from toolkit.rounding import Int8
from toolkit.run import Run, load_tensors, save_tensors
from toolkit.teacher_cache import TeacherCache

PREPARE_IMAGES = 5000
NORM_IMAGES = 5000  # training images that BN's statistics are measured anew on
CHANCE_EPOCHS = 10  # some deep nets answer at chance for the first few epochs
READ_SECONDS = 0.5  # the loss is read from the device this often: each reading waits for the device
READ_STEPS = 10  # or, where several processes must agree, this often


def new_model(recipe: Recipe, data: DataSet) -> Classifier:
    """The untrained model of a recipe; a student over the budget raises ``BudgetError``.

    One that does not take the small images of progressive resizing raises ``RecipeError``.
    """
    name, arguments = recipe.model.name, recipe.model.arguments
    model = build(name, recipe.role, len(data.classes), data.mean, data.std, recipe.data.image_size, **arguments)
    if recipe.role == "student":
        check_budget(name, parameter_count(model), recipe.budget, len(data.classes))
    if side := recipe.progressive.start:
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(2, 3, side, side))
        except RuntimeError as error:
            raise RecipeError(f"progressive.start (={side}): {name} does not take images of this size") from error
    return model.train()


@torch.inference_mode()
@without_tf32()
def predict(
    model: nn.Module, images: Tensor | StoredImages, device: torch.device, dtype: torch.dtype = torch.float32
) -> np.ndarray:
    """Logits, float32 ``[N,K]``, of uint8 images ``[N,3,H,W]``. The model must be on ``device``; eval mode stays."""
    if device.type == "cpu":
        keep_freed_memory()
    model.eval()
    logits = []
    for batch in images.split(at_once(images.shape[-1])):
        pixels = batch.to(device).float().div_(255).contiguous(memory_format=torch.channels_last)
        with autocast(device, dtype):
            logits.append(model(pixels).float())
    return torch.cat(logits).cpu().numpy()


def evaluate(model: nn.Module, split: Split, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Mean cross entropy (nats) and top-1 on a split, of the model as ``predict`` runs it."""
    logits = torch.from_numpy(predict(model, split.images, device, dtype))
    top1 = (logits.argmax(1) == split.labels).float().mean().item()
    return F.cross_entropy(logits, split.labels).item(), top1


@dataclass
class Plateau:
    """The best value so far of a metric that should fall, and the epoch (from 1) that reached it."""

    best: float | None = None
    epoch: int = 0

    def update(self, value: float, epoch: int) -> None:
        if self.best is None or value < self.best:
            self.best, self.epoch = value, epoch


@dataclass
class Position:
    """Where a run stands: ``step`` steps into ``epoch``, both from 0, with the sums of that epoch so far."""

    epoch: int = 0
    step: int = 0
    updates: int = 0
    batch_size: int = 0
    stopped: bool = False
    loss_sum: float = 0.0
    correct: float = 0.0
    epoch_seconds: float = 0.0
    total_seconds: float = 0.0
    teacher_seconds: float = 0.0
    best_top1: float = -1.0
    best_epoch: int = 0
    train_loss: Plateau = field(default_factory=Plateau)
    early_stop: Plateau = field(default_factory=Plateau)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Position:
        plateaus = {name: Plateau(**saved[name]) for name in ("train_loss", "early_stop")}
        return cls(**saved | plateaus)


def fit(
    recipe: Recipe,
    data: DataSet,
    run: Run,
    teacher: nn.Module | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train the recipe's model in the run directory, from its last checkpoint where there is one.

    ``teacher`` maps images in [0,1] to logits and is not changed; without one this is plain training.
    ``on_epoch`` gets each row of metrics.jsonl after the state was saved. Returns the summary that the run
    directory then holds. Raises ``DivergedError`` where the loss is no longer finite and ``Interrupted`` where a
    signal stopped it, both after the last good state was saved.
    """
    if run.finished:
        return run.summary()
    device = distributed.own_device(pick_device(recipe.device))
    with run.lock() if distributed.RANK == 0 else contextlib.nullcontext(), distributed.joined(device):
        return _fit(recipe, data, run, device, teacher, on_epoch)


def _fit(
    recipe: Recipe,
    data: DataSet,
    run: Run,
    device: torch.device,
    teacher: nn.Module | None,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    first = distributed.RANK == 0
    if device.type == "cpu":
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(available_cores() // distributed.SIZE or 1)
    torch.manual_seed(recipe.seed)
    model = new_model(recipe, data)
    count = min(len(data.train), at_once(recipe.data.image_size, PREPARE_IMAGES))
    some = torch.linspace(0, len(data.train) - 1, count).long()  # a folder's images come class by class
    model.prepare(data.train.images[some].float() / 255)
    if recipe.start_from is not None and not Checkpoint.exists(run):  # a state holds what it began with
        start_from(model, recipe, data.classes)
    dtype, layout = numbers = chosen(model, recipe, device, run)
    model = model.to(device).to(memory_format=layout)
    shared = distributed.share(model, device, recipe.sync_norm)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not recipe.deterministic  # every batch of a run has the same shape
        if recipe.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("high")
    cache: TeacherCache | None = None
    if teacher is not None:
        teacher = teacher.to(device).to(memory_format=layout).eval().requires_grad_(False)
        if recipe.cached_epochs:
            cache = TeacherCache(run.path.parent / "teacher-logits", recipe, data, teacher, dtype)
    average = make_average(model, recipe)
    kept = average.module if average is not None else model
    weights = class_weights(data.train.labels, len(data.classes)) if recipe.balance == "weights" else None
    objective = Objective(recipe, model, teacher, weights).to(
        device
    )  # after the copy: its hooks are for the trained weights
    optimizer = make_optimizer(recipe.optimizer, model, dtype)
    measured: nn.Module = objective
    if trained := list(objective.parameters()):  # not a part of the model: neither averaged nor kept
        optimizer.add_param_group({"params": trained, "lr_factor": 1.0, "orthogonal": False})
        measured = distributed.share(objective, device, recipe.sync_norm)

    images = on_device(data.train.images, device)
    balanced = recipe.balance == "sampling"
    labels = data.train.labels.to(device)
    augmenter = Augmenter(images, labels, len(data.classes), recipe.augment, recipe.seed, balanced)
    micro_batch = recipe.micro_batch or augmenter.count
    state = Checkpoint(run, model, objective, optimizer, average)
    header = describe(recipe, data)
    at = state.load(header)
    at.batch_size = at.batch_size or min(recipe.batch_size, augmenter.count)

    taught = teacher
    if device.type == "cuda" and recipe.compile and objective.hooked:
        say("not compiled: the loss reads features within the nets")
    elif device.type == "cuda" and recipe.compile and not recipe.int8:
        example, _ = augmenter.batch(torch.arange(min(at.batch_size, micro_batch), device=device))
        example = distributed.own_part(example).contiguous(memory_format=layout)
        shared = compiled(shared, example, dtype)
        if teacher is not None and cache is None:
            taught = compiled(teacher, example, dtype)

    def lr_at(done: float) -> float:
        return recipe.optimizer.lr * lr_factor(recipe.schedule, done, recipe.epochs)

    replayed: Tensor | None = None  # the teacher's logits of this epoch's views, [N,K]
    side = augmenter.side  # of the images that the model sees in this epoch

    rounding = Int8 if recipe.int8 else contextlib.nullcontext

    def backward(index: Tensor) -> Tensor:
        """Add up the gradients of these samples; their mean loss and the share that is right, float64 [2]."""
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for part in index.chunk(math.ceil(len(index) / micro_batch)):  # equal parts: BN sees no single image
            images, labels = augmenter.batch(part)
            images = images.contiguous(memory_format=layout)
            with numbers.autocast(device):
                if replayed is not None:
                    teacher_logits = replayed[part]
                elif taught is not None:
                    with torch.no_grad():
                        teacher_logits = taught(images)
                else:
                    teacher_logits = None
                with rounding():
                    logits = shared(resized(images, side))
            loss = measured(logits, labels, teacher_logits) * (len(part) / len(index))
            loss.backward()
            correct = (logits.detach().argmax(1) == labels.argmax(1)).sum()
            sums += torch.stack([loss.detach().double(), correct / len(index)])
        return sums

    with StopSignal() as stop, Display(recipe.model.name, recipe.epochs, at.epoch) as display:
        saved = time.monotonic()
        while at.epoch < recipe.epochs and not at.stopped:
            began = read = time.monotonic()
            before = at.epoch_seconds
            epoch, batch_size = at.epoch, at.batch_size
            steps = augmenter.count // batch_size  # the ragged rest of the shuffled order is left out
            augmenter.start_epoch(epoch % recipe.cached_epochs if recipe.cached_epochs else epoch)
            order = augmenter.order(epoch)
            side = recipe.progressive.side(epoch / recipe.epochs, augmenter.side)
            teaching = at.teacher_seconds
            if cache is not None:
                replayed = cache.epoch(epoch, augmenter, lambda: not stop.asked)
                at.teacher_seconds += time.monotonic() - began
                began = read = time.monotonic()
                if replayed is None:
                    state.save(at, header)
                    raise Interrupted(stop_message(run, epoch, at.step - 1, steps))
            model.train()
            sums = torch.tensor([at.loss_sum, at.correct], dtype=torch.float64, device=device)
            for step in range(at.step, steps):
                set_lr(optimizer, lr_at(epoch + step / steps))
                objective.progress = (epoch + step / steps) / recipe.epochs
                index = distributed.own_part(order[step * batch_size : (step + 1) * batch_size])
                while True:
                    try:
                        step_sums = backward(index)
                        if recipe.optimizer.sam_radius:
                            with ascended(model, optimizer, recipe.optimizer.sam_radius):
                                backward(index)
                        break
                    except torch.OutOfMemoryError:
                        micro_batch = smaller(min(micro_batch, len(index)))
                        optimizer.zero_grad()
                sums += step_sums
                if recipe.optimizer.grad_clip:
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
                if average is not None:
                    average.update_parameters(model)

                now = time.monotonic()
                if distributed.SIZE > 1:  # the same steps in every process
                    due = (step + 1) % READ_STEPS == 0
                else:
                    due = now - read >= READ_SECONDS or stop.asked
                if not due and step < steps - 1:
                    continue
                read = now
                at.step = step + 1
                at.loss_sum, at.correct = distributed.mean(sums).tolist()
                at.epoch_seconds = before + time.monotonic() - began
                if not math.isfinite(at.loss_sum):
                    raise DivergedError(diverged_message(run, epoch, at.updates + at.step))
                rate = at.step * batch_size / at.epoch_seconds
                display.step(epoch + at.step / steps, at.loss_sum / at.step, at.correct / at.step, rate)
                stopping = distributed.any_of(stop.asked, device)  # read once: a signal may come at any time
                if stopping or now - saved > recipe.checkpoint_minutes * 60:
                    state.save(at, header)
                    saved = time.monotonic()
                if stopping:
                    raise Interrupted(stop_message(run, epoch, step, steps))

            if isinstance(average, StochasticAverage):
                average.end_epoch(model, epoch + 1)
                if epoch >= average.start:
                    views = (augmenter.batch(part)[0] for part in order[:NORM_IMAGES].split(at_once(augmenter.side)))
                    with numbers.autocast(device):
                        estimate_norms(kept, (images.contiguous(memory_format=layout) for images in views))
            val_loss = val_top1 = None
            if data.val is not None and ((epoch + 1) % recipe.eval_epochs == 0 or epoch + 1 == recipe.epochs):
                with rounding():
                    val_loss, val_top1 = distributed.of_first(evaluate(kept, data.val, device, dtype), device)
                at.early_stop.update(val_loss if recipe.early_stop.metric == "val_loss" else -val_top1, epoch + 1)
                patience = recipe.early_stop.patience
                at.stopped = patience is not None and epoch + 1 - at.early_stop.epoch >= patience
            if recipe.select == "last" or data.val is None:
                better = epoch + 1 == recipe.epochs or at.stopped
            else:
                better = val_top1 is not None and val_top1 > at.best_top1
            if better:
                at.best_top1, at.best_epoch = -1.0 if val_top1 is None else val_top1, epoch + 1
            if better and first:
                save_tensors(run.checkpoint("best"), kept.state_dict(), header | {"epoch": epoch + 1})
            at.updates += steps
            row = {
                "epoch": epoch + 1,
                "step": at.updates,
                "train_loss": at.loss_sum / steps,
                "train_top1": at.correct / steps,
                "val_loss": val_loss,
                "val_top1": val_top1,
                "lr": lr_at(epoch + (steps - 1) / steps),
                "batch_size": batch_size,
                "images_per_second": steps * batch_size / at.epoch_seconds,
                "seconds": at.epoch_seconds,
                "teacher_seconds": at.teacher_seconds - teaching,
            }
            if gives_up(recipe, row, data):
                raise DivergedError(
                    f"the training top-1 is {row['train_top1']:.1%} after {epoch + 1} epochs, no better than a guess; "
                    f"the states are kept in {run.path / 'checkpoints'}."
                )
            at.batch_size = min(next_batch(recipe.batch_growth, at, row), augmenter.count)
            at.total_seconds += at.epoch_seconds
            at.epoch, at.step, at.loss_sum, at.correct, at.epoch_seconds = epoch + 1, 0, 0.0, 0.0, 0.0
            if first:
                run.append(row)
            state.save(at, header)
            saved = time.monotonic()
            display.epoch(row)
            if on_epoch is not None and first:
                on_epoch(row)

    summary = header | {
        "epochs": at.epoch,
        "steps": at.updates,
        "train_seconds": at.total_seconds,
        "teacher_seconds": at.teacher_seconds,  # of the pass that fills the cache of logits
        "kept_epoch": at.best_epoch,
        "val_top1": at.best_top1 if at.best_top1 >= 0 else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(dtype).removeprefix("torch."),
        "memory_format": str(layout).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": peak_memory(),
    }
    if first:
        run.finish(summary)
    distributed.wait()
    return summary


def on_device(images: Tensor | StoredImages, device: torch.device) -> Tensor | StoredImages:
    """The images where training wants them: on the device, or in host memory where the device's is too small."""
    if isinstance(images, StoredImages):
        return images
    # The augmentation pads them, for which several copies are there for a moment.
    if device.type == "cuda" and 4 * images.nbytes > torch.cuda.mem_get_info(device)[0]:
        say("the images do not fit the GPU's memory: each batch is sent there")
        return StoredImages(images, torch.arange(len(images)))
    return images.to(device)


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """What makes each class weigh the same, and the mean over the images 1: N / (K n) for n of N images, [K]."""
    counts = labels.bincount(minlength=num_classes).clamp(min=1)
    return len(labels) / (num_classes * counts.float())


def resized(images: Tensor, side: int) -> Tensor:
    """Images ``[B,3,S,S]`` at another size."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=side, mode="bilinear", antialias=True)


def start_from(model: nn.Module, recipe: Recipe, classes: Sequence[str]) -> None:
    """Give a new model the weights that ``recipe.start_from`` names, but for its last layer where classes are others.

    Normalisation is theirs too. ``CheckpointError`` where they do not fit.
    """
    path = recipe.start_from
    assert path is not None
    if str(path) == PRETRAINED:
        path = pretrained(recipe.model.name)[0]
    tensors, header = load_tensors(Run(path).checkpoint("best") if path.is_dir() else path)
    if header["classes"] != list(classes):
        tensors |= {name: value for name, value in model.state_dict().items() if name.startswith("network.head.")}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the model cannot start from {path}: {textwrap.shorten(str(error), 300)}") from error


def compiled(model: nn.Module, example: Tensor, dtype: torch.dtype) -> nn.Module:
    """The model compiled by PyTorch for batches like ``example``, or itself where that fails. Its state stays."""
    began, before = time.monotonic(), {name: value.clone() for name, value in model.state_dict().items()}
    fast: nn.Module = torch.compile(model)  # type: ignore[assignment]  # a module for a module
    trained = any(parameter.requires_grad for parameter in model.parameters())
    try:
        # As in training: what another mode compiles would be thrown away. The generators stay as they are.
        with (
            torch.random.fork_rng(devices=[example.device] if example.is_cuda else []),
            torch.set_grad_enabled(trained),
            autocast(example.device, dtype),
        ):
            logits = fast(example)
        if trained:
            logits.float().sum().backward()
    except torch.OutOfMemoryError:  # the first step takes the batch in parts
        return fast
    except Exception as error:  # whatever the compiler throws, the model itself can run
        say(f"torch.compile failed, going on without: {textwrap.shorten(str(error), 200)}")
        return model
    finally:
        model.zero_grad()
        model.load_state_dict(before)
    say(f"compiled in {time.monotonic() - began:.0f} s (not counted as training)")
    return fast


def gives_up(recipe: Recipe, row: dict[str, Any], data: DataSet) -> bool:
    """Whether labels are still answered no better than by the commonest class, long after the warm-up."""
    if not recipe.loss.ce_weight or row["epoch"] < recipe.schedule.warmup_epochs + CHANCE_EPOCHS:
        return False
    count = len(data.train.labels)
    chance = data.train.labels.bincount().max().item() / count
    if recipe.balance != "none":  # then the commonest class is no better an answer than another
        chance = 1 / len(data.classes)
    return row["train_top1"] < chance + 2 * math.sqrt(chance * (1 - chance) / count)


def next_batch(config: BatchGrowth, at: Position, row: dict[str, Any]) -> int:
    """The batch size after this epoch's row: it grows at milestones, and when the training loss has stopped falling."""
    epoch, size = row["epoch"], row["batch_size"]
    at.train_loss.update(row["train_loss"], epoch)
    stalled = config.patience is not None and epoch - at.train_loss.epoch >= config.patience
    if epoch not in config.milestones and not stalled:
        return size
    at.train_loss = Plateau()
    return max(size, min(size * config.factor, config.ceiling))


def smaller(images: int) -> int:
    """Half as many images in memory at once, or ``DeviceError`` where that is no batch any more."""
    torch.cuda.empty_cache()
    if images < 4:
        raise DeviceError("the device's memory does not hold a step of 2 images: take a smaller model or image size")
    say(f"out of memory with {images} images at once: going on with {images // 2}, their gradients added up")
    return images // 2


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

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: nn.Module | None,
    ) -> None:
        self.run, self.model, self.objective, self.optimizer, self.average = run, model, objective, optimizer, average
        # From newest to oldest; "next" is there only after a kill while the names moved on.
        self.names = ["next", "last", *(f"last-{age}" for age in range(1, run.recipe.keep_checkpoints))]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    @staticmethod
    def exists(run: Run) -> bool:
        """Whether the run has a state to go on from."""
        return any(run.checkpoint(name).is_file() for name in ("next", "last"))

    def save(self, at: Position, header: dict[str, Any]) -> None:
        if distributed.RANK != 0:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"objective.{name}": value for name, value in self.objective.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        # Whole under a name of its own first: at no moment is there less than one good state.
        save_tensors(self.run.checkpoint("next"), tensors, header | {"position": asdict(at)})
        for newer, older in reversed(list(itertools.pairwise(self.names[1:]))):
            if self.run.checkpoint(newer).is_file():
                self.run.checkpoint(newer).replace(self.run.checkpoint(older))
        self.run.checkpoint("next").replace(self.run.checkpoint("last"))

    def load(self, expected: dict[str, Any]) -> Position:
        """Restore the newest whole state where there is one; the position from which to go on.

        A state whose header says other than ``expected``, or states of which none is whole, raise
        ``CheckpointError``.
        """
        paths = [path for name in self.names if (path := self.run.checkpoint(name)).is_file()]
        distributed.wait()  # what is read here, the first process changes below
        if not paths:
            self._rewind(0)
            return Position()
        for path in paths:
            try:
                tensors, header = load_tensors(path)
                break
            except CheckpointError as error:
                if path == paths[-1]:
                    raise
                say(f"warning: {error}; going on with the state before it")
        if "position" not in header:
            raise CheckpointError(f"{path} holds weights alone, not the state of a run")
        expected = {key: value for key, value in expected.items() if key != "recipe_digest"}  # held to by Run.start
        differing = [f"{key}: {header.get(key)} there, {value} here" for key, value in expected.items()
                     if header.get(key) != value]  # fmt: skip
        if differing:
            raise CheckpointError(f"{path} is the state of another run: {textwrap.shorten('; '.join(differing), 300)}")
        try:
            self.model.load_state_dict(_below(tensors, "model."))
            self.objective.load_state_dict(_below(tensors, "objective."))
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
            else:  # Adam's count of steps, which its fused form wants beside the parameter
                value = value.to(parameter.device)
            self.optimizer.state[parameter][key] = value.detach()
        torch.set_rng_state(tensors["rng.cpu"])
        if torch.cuda.is_available() and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        at = Position.of(header["position"])
        self._rewind(at.epoch)
        return at

    def _rewind(self, epochs: int) -> None:
        if distributed.RANK == 0:
            self.run.rewind(epochs)


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


def stop_message(run: Run, epoch: int, step: int, steps: int) -> str:
    command = f"toolkit {'distill' if run.recipe.role == 'student' else 'train'}"
    return (
        f"stopped in epoch {epoch + 1} after step {step + 1} of {steps}; all of it is saved. Go on with: "
        f"{command} --run-dir {shlex.quote(str(run.path))} --resume"
    )


def diverged_message(run: Run, epoch: int, step: int) -> str:
    path = run.checkpoint("last")
    kept = f"the last good checkpoint is {path}" if path.is_file() else "no checkpoint had been written yet"
    return f"the loss is not finite any more at step {step} (epoch {epoch + 1}); {kept}."
