"""``fit`` and ``predict``: the only training loop, and the loop that measures."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit import distributed
from toolkit.checkpoint import Checkpoint, Plateau, Position
from toolkit.compute import autocast, pick_device, settle, without_tf32
from toolkit.data import DataSet, Split, StoredImages
from toolkit.errors import DivergedError, Interrupted
from toolkit.external import images_at_once
from toolkit.learner import Learner
from toolkit.machine import peak_memory
from toolkit.progress import Display
from toolkit.recipe import BatchGrowth, FeatureMethod, Recipe, peak
from toolkit.run import Run, save_tensors

CHANCE_EPOCHS = 10  # some deep nets answer at chance for the first few epochs
CHANCE_STEPS = 300  # and any net for the first few steps, which are many epochs where images are few
MOSTLY = 0.5  # share of the commonest class beyond which top-1 does not tell a net that learns from a guess
READ_SECONDS = 0.5  # the loss is read from the device this often: each reading waits for the device
READ_STEPS = 10  # by several processes, which must agree on when, every so many steps
SAVE_SHARE = 0.05  # of a GPU's time that writing states at the ends of epochs may take


@torch.inference_mode()
@without_tf32()
def predict(
    model: nn.Module, images: Tensor | StoredImages, device: torch.device, dtype: torch.dtype = torch.float32
) -> np.ndarray:
    """Logits, float32 ``[N,K]``, of uint8 images ``[N,3,H,W]``. The model must be on ``device``; eval mode stays."""
    settle(device)
    model.eval()
    logits = []
    for batch in images.split(images_at_once(model, images.shape[-1])):
        pixels = batch.to(device).float().div_(255).contiguous(memory_format=torch.channels_last)
        with autocast(device, dtype):
            logits.append(model(pixels).float())
    return torch.cat(logits).cpu().numpy()


def evaluate(model: nn.Module, split: Split, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Mean cross entropy (nats) and top-1 on a split, of the model as ``predict`` runs it."""
    logits = torch.from_numpy(predict(model, split.images, device, dtype))
    top1 = (logits.argmax(1) == split.labels).float().mean().item()
    return F.cross_entropy(logits, split.labels).item(), top1


def fit(
    recipe: Recipe,
    data: DataSet,
    run: Run,
    teacher: nn.Module | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train the recipe's model in the run directory, from its last checkpoint where there is one.

    ``teacher`` maps images in [0,1] to logits and is not changed; without one this is plain training.
    ``on_epoch`` gets each row of metrics.jsonl. Returns the summary that the run directory then holds. Raises
    ``DivergedError`` where loss, val loss or weights are no longer finite, or top-1 stays at a guess (states that were
    written before stay); ``Interrupted`` where a signal stopped it, once all was saved, or came when nothing was left
    to stop; ``RunError`` where another process writes the directory; ``CheckpointError`` for a state that is not this
    run's.
    """
    if run.finished:
        return run.summary()
    device = distributed.own_device(pick_device(recipe.device))
    distributed.join(device)
    alone = run.lock() if distributed.RANK == 0 else contextlib.nullcontext()
    with alone, torch.random.fork_rng([device] if device.type == "cuda" else []):  # the caller's stays as it is
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
    if first:
        run.begin(recipe, data.files)
    settle(device)
    torch.manual_seed(recipe.seed)
    learner = Learner(recipe, data, run, device, teacher)
    header = describe(recipe, data)
    state = Checkpoint(run, learner, header)
    at = state.load()
    at.batch_size = at.batch_size or min(recipe.batch_size, learner.augmenter.count)
    distributed.own_part(torch.arange(at.batch_size))  # tells a batch that cannot be divided before all else
    learner.compile(at.batch_size)
    done = at.epoch + at.step / (learner.augmenter.count // at.batch_size)
    with StopSignal() as stop, Display(recipe.model.name, recipe.epochs, done) as display:
        while at.epoch < recipe.epochs and not at.stopped:
            row = _epoch(learner, state, at, stop, display)
            learner.end_epoch(at.epoch)
            if data.val is not None and ((at.epoch + 1) % recipe.eval_epochs == 0 or at.epoch + 1 == recipe.epochs):
                with learner.rounding():
                    measured = evaluate(learner.kept, data.val, device, learner.dtype)
                row["val_loss"], row["val_top1"] = distributed.of_first(measured, device)
                if not math.isfinite(row["val_loss"]):
                    raise DivergedError(diverged_message(run, "val loss is", row["epoch"], row["step"]))
                value = row["val_loss"] if recipe.early_stop.metric == "val_loss" else -row["val_top1"]
                at.early_stop.update(value, at.epoch + 1)
                patience = recipe.early_stop.patience
                at.stopped = patience is not None and at.epoch + 1 - at.early_stop.epoch >= patience
            if recipe.select == "last" or data.val is None:
                better = at.epoch + 1 == recipe.epochs or at.stopped
            else:
                better = row["val_top1"] is not None and row["val_top1"] > at.best_top1
            if better:
                at.best_top1, at.best_epoch = -1.0 if row["val_top1"] is None else row["val_top1"], at.epoch + 1
                if first:
                    save_tensors(run.checkpoint("best"), learner.kept.state_dict(), header | {"epoch": at.epoch + 1})
            if gives_up(recipe, [*run.history(), row], data):
                raise DivergedError(
                    f"the training top-1 is {row['train_top1']:.1%} after {row['epoch']} epochs, and never was better "
                    f"than a guess: the learning rate is too high, or {row['step']} steps are too few (a smaller "
                    f"--batch-size makes more); the states are kept in {run.path / 'checkpoints'}."
                )
            at.batch_size = next_batch(recipe.batch_growth, at, row, learner.augmenter.count)
            at.end_epoch(row["step"])
            if first:
                run.append(row)
            # A GPU may take longer to write its state than to train an epoch.
            due = device.type == "cpu" or state.seconds <= SAVE_SHARE * state.age
            if due or better or at.stopped or at.epoch == recipe.epochs:
                state.save(at)
            display.epoch(row)
            if on_epoch is not None and first:
                on_epoch(row)

    summary = header | {
        "epochs": at.epoch,
        "stopped": at.stopped,  # early
        "steps": at.updates,
        "train_seconds": at.total_seconds,
        "teacher_seconds": at.teacher_seconds,  # of the pass that fills the cache of logits
        "kept_epoch": at.best_epoch,
        "val_top1": at.best_top1 if at.best_top1 >= 0 else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(learner.dtype).removeprefix("torch."),
        "memory_format": str(learner.layout).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": peak_memory(),
    }
    if first:
        run.finish(summary)
    distributed.wait()
    if distributed.any_of(stop.asked, device):  # while the last epoch was measured
        raise Interrupted(f"{run.path} is finished; stopped before what comes after it")
    return summary


def _epoch(learner: Learner, state: Checkpoint, at: Position, stop: StopSignal, display: Display) -> dict[str, Any]:
    """Train the rest of an epoch; its row of metrics.jsonl, without what val says."""
    recipe, run = learner.recipe, state.run
    began, before, taught = time.monotonic(), at.epoch_seconds, at.teacher_seconds
    steps = learner.augmenter.count // at.batch_size  # the ragged rest of the shuffled order is left out
    whole = learner.start_epoch(at.epoch, lambda: not distributed.any_of(stop.asked, learner.device))
    if learner.cache is not None:
        at.teacher_seconds += time.monotonic() - began
        began = time.monotonic()
    if not whole:
        state.save(at)
        raise Interrupted(stop_message(run, at, steps))
    read = began
    learner.model.train()
    sums = torch.tensor([at.loss_sum, at.correct], dtype=torch.float64, device=learner.device)
    for step in range(at.step, steps):
        index = learner.order[step * at.batch_size : (step + 1) * at.batch_size]
        sums += learner.step(distributed.own_part(index), at.epoch + step / steps)

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
        broken = None if math.isfinite(at.loss_sum) else "loss is"
        if broken is None and distributed.any_of(not learner.is_finite(), learner.device):  # by this step's update
            broken = "weights are"
        if broken is not None:
            raise DivergedError(diverged_message(run, broken, at.epoch + 1, at.updates + at.step))
        rate = at.step * at.batch_size / at.epoch_seconds
        display.step(at.epoch + at.step / steps, at.loss_sum / at.step, at.correct / at.step, rate)
        stopping = distributed.any_of(stop.asked, learner.device)  # read once: a signal may come at any time
        if stopping or state.age > recipe.checkpoint_minutes * 60:
            state.save(at)
        if stopping:
            raise Interrupted(stop_message(run, at, steps))
    return {
        "epoch": at.epoch + 1,
        "step": at.updates + steps,
        "train_loss": at.loss_sum / steps,
        "train_top1": at.correct / steps,
        "val_loss": None,
        "val_top1": None,
        "lr": learner.lr(at.epoch + (steps - 1) / steps),
        "batch_size": at.batch_size,
        "images_per_second": steps * at.batch_size / at.epoch_seconds,
        "seconds": at.epoch_seconds,
        "teacher_seconds": at.teacher_seconds - taught,
    }


def gives_up(recipe: Recipe, rows: Sequence[dict[str, Any]], data: DataSet) -> bool:
    """Whether labels were never answered better than by the commonest class, long after the warm-up.

    ``rows`` are those of metrics.jsonl. Of mixed images the label is that of the larger share, which a net that learns
    answers more often than by chance.
    """
    row = rows[-1]
    if row["epoch"] < recipe.schedule.warmup_epochs + CHANCE_EPOCHS or row["step"] < CHANCE_STEPS:
        return False
    methods = [method for method in recipe.loss.methods.values() if peak(method.weight)]
    by_labels = bool(recipe.loss.ce_weight)
    by_features = bool(methods) and all(isinstance(method, FeatureMethod) for method in methods)
    if recipe.data.unlabelled or (by_features and not by_labels):  # which leave the last layer as it is
        return False
    count = len(data.train.labels)
    chance = data.train.labels.bincount().max().item() / count
    # The commonest class is then no better an answer than another, or the teacher may find rare ones at its expense.
    if recipe.balance != "none" or not by_labels:
        chance = 1 / len(data.classes)
    if chance > MOSTLY:
        return False
    best = max(row["train_top1"] for row in rows)
    return best < chance + 2 * math.sqrt(chance * (1 - chance) / count)


def next_batch(config: BatchGrowth, at: Position, row: dict[str, Any], most: int) -> int:
    """The batch size after this epoch's row: it grows at milestones, and when the training loss has stopped falling.

    It stays one that all processes can share, of at most so many samples.
    """
    epoch, size = row["epoch"], row["batch_size"]
    at.train_loss.update(row["train_loss"], epoch)
    stalled = config.patience is not None and epoch - at.train_loss.epoch >= config.patience
    if epoch not in config.milestones and not stalled:
        return size
    at.train_loss = Plateau()
    size = max(size, min(size * config.factor, config.ceiling, most))
    return size - size % distributed.SIZE


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
        "split": recipe.data.split,
        "recipe_digest": recipe.digest(),
        "teacher": recipe.teacher.name if recipe.distils and recipe.teacher else None,
    }


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


def stop_message(run: Run, at: Position, steps: int) -> str:
    where = f"epoch {at.epoch + 1} after step {at.step} of {steps}"
    return f"stopped in {where}; all of it is saved. Go on with: {run.going_on}"


def diverged_message(run: Run, broken: str, epoch: int, step: int) -> str:
    path = run.checkpoint("last")
    kept = f"the last good checkpoint is {path}" if path.is_file() else "no checkpoint had been written yet"
    return f"the {broken} not finite any more at step {step} (epoch {epoch}); {kept}."
