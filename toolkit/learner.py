"""What a training loop trains: a model, its teacher, its loss and its optimizer; and one step of them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit import distributed
from toolkit.augment import Augmenter
from toolkit.catalogue import PRETRAINED, build, check_budget, parameter_count, pretrained
from toolkit.classifier import Classifier
from toolkit.compute import autocast, chosen
from toolkit.data import DataSet, StoredImages, at_once
from toolkit.errors import CheckpointError, DeviceError, RecipeError, in_line
from toolkit.objective import Objective
from toolkit.optim import StochasticAverage, ascended, estimate_norms, lr_factor, make_average, make_optimizer, set_lr
from toolkit.progress import say
from toolkit.recipe import Recipe
from toolkit.rounding import Int8
from toolkit.run import Run, load_tensors, weights_of
from toolkit.teacher_cache import TeacherCache

PREPARE_IMAGES = 5000  # training images from which a net may take its first weights (``Classifier.prepare``)
RECOMPILED = 256  # nets and batch sizes that one process may compile
NORM_IMAGES = 5000  # training images that BN's statistics are measured anew on


class Learner:
    """A model on its device, with all that a step needs. ``kept`` is what is measured: the model, or its average.

    The caller seeds PyTorch's generator before. ``start_epoch`` comes before the first ``step`` of an epoch.
    """

    def __init__(
        self, recipe: Recipe, data: DataSet, run: Run, device: torch.device, teacher: nn.Module | None
    ) -> None:
        self.recipe, self.device = recipe, device
        self.model = new_model(recipe, data)
        count = min(len(data.train), at_once(recipe.data.image_size, PREPARE_IMAGES))
        some = torch.linspace(0, len(data.train) - 1, count).long()  # a folder's images come class by class
        self.model.prepare(data.train.images[some].float() / 255)
        if recipe.start_from is not None and not run.resumable:  # a state holds what it began with
            start_from(self.model, recipe, data.classes)
        self.dtype, self.layout = chosen(self.model, recipe, device, run)
        self.model = self.model.to(device).to(memory_format=self.layout)
        self.shared = distributed.share(self.model, device, recipe.sync_norm)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = not recipe.deterministic  # every batch of a run has the same shape
            torch.use_deterministic_algorithms(recipe.deterministic)
            torch.set_float32_matmul_precision("high")
        self.cache: TeacherCache | None = None
        if teacher is not None:
            teacher = teacher.to(device).to(memory_format=self.layout).eval().requires_grad_(False)
            if recipe.cached_epochs:
                self.cache = TeacherCache(run.path.parent / "teacher-logits", recipe, data, teacher, self.dtype)
        self.teacher = teacher
        self.average = make_average(self.model, recipe)
        self.kept = self.average.module if self.average is not None else self.model
        weights = class_weights(data.train.labels, len(data.classes)) if recipe.balance == "weights" else None
        # After the copy that is averaged: its hooks are for the trained weights.
        self.objective = Objective(recipe, self.model, teacher, weights).to(device)
        self.optimizer = make_optimizer(recipe.optimizer, self.model, self.dtype)
        self.loss: nn.Module = self.objective
        if own := list(self.objective.parameters()):  # not a part of the model: neither averaged nor kept
            self.optimizer.add_param_group({"params": own, "lr_factor": 1.0, "orthogonal": False, "weight_decay": 0.0})
            self.loss = distributed.share(self.objective, device, recipe.sync_norm)
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        images, labels = on_device(data.train.images, device), data.train.labels.to(device)
        balanced = recipe.balance == "sampling"
        self.augmenter = Augmenter(images, labels, len(data.classes), recipe.augment, recipe.seed, balanced)
        self.micro_batch = recipe.micro_batch or self.augmenter.count
        self.replayed: Tensor | None = None  # the teacher's logits of this epoch's views, [N,K]
        self.side = self.augmenter.side  # of the images that the model sees in this epoch
        self.rounding = Int8 if recipe.int8 else contextlib.nullcontext

    def compile(self, batch_size: int) -> None:
        """Let PyTorch compile model and teacher, on CUDA and where the recipe has nothing that forbids it."""
        if self.device.type != "cuda" or not self.recipe.compile or self.recipe.int8:
            return
        if self.objective.hooked:
            say("not compiled: the loss reads features within the nets")
            return
        count = min(batch_size // distributed.SIZE, self.micro_batch)
        example, _ = self.augmenter.batch(torch.arange(count, device=self.device))
        example = example.contiguous(memory_format=self.layout)
        self.shared = compiled(self.shared, example, self.dtype)
        if self.teacher is not None and self.cache is None:
            self.teacher = compiled(self.teacher, example, self.dtype)

    def lr(self, done: float) -> float:
        """The learning rate ``done`` epochs into the run."""
        return self.recipe.optimizer.lr * lr_factor(self.recipe.schedule, done, self.recipe.epochs)

    def start_epoch(self, epoch: int, go_on: Callable[[], bool]) -> bool:
        """Draw the epoch's views; False where ``go_on`` ended the teacher's pass over them."""
        self.augmenter.start_epoch(epoch if self.cache is None else epoch % self.recipe.cached_epochs)
        self.order = self.augmenter.order(epoch)
        self.side = self.recipe.progressive.side(epoch / self.recipe.epochs, self.augmenter.side)
        if self.cache is None:
            return True
        self.replayed = self.cache.epoch(epoch, self.augmenter, go_on)
        return self.replayed is not None

    def step(self, index: Tensor, done: float) -> Tensor:
        """Learn from these samples; their mean loss and the share that is right, float64 [2], on the device."""
        set_lr(self.optimizer, self.lr(done))
        self.objective.progress = done / self.recipe.epochs
        while (sums := self._gradients(index)) is None:
            self.optimizer.zero_grad()
            self.micro_batch = smaller(min(self.micro_batch, len(index)))
        if clip := self.recipe.optimizer.grad_clip:
            nn.utils.clip_grad_norm_(self.trained, clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return sums

    def _gradients(self, index: Tensor) -> Tensor | None:
        """What ``step`` returns, with the gradients to step by; None where the device's memory does not hold it."""
        radius = self.recipe.optimizer.sam_radius
        try:
            sums = self._backward(index)
            if radius:
                with ascended(self.model, self.trained, radius):
                    self._backward(index)
        except torch.OutOfMemoryError:
            return None
        return sums

    def _backward(self, index: Tensor) -> Tensor:
        """Add up the gradients of these samples; what ``step`` returns."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for part in index.tensor_split(math.ceil(len(index) / self.micro_batch)):  # BN is to see no single image
            images, labels = self.augmenter.batch(part)
            images = images.contiguous(memory_format=self.layout)
            with autocast(self.device, self.dtype):
                if self.replayed is not None:
                    teacher_logits = self.replayed[part]
                elif self.teacher is not None:
                    with torch.no_grad():
                        teacher_logits = self.teacher(images)
                else:
                    teacher_logits = None
                with self.rounding():
                    logits = self.shared(resized(images, self.side))
            loss = self.loss(logits, labels, teacher_logits) * (len(part) / len(index))
            loss.backward()
            correct = (logits.detach().argmax(1) == labels.argmax(1)).sum()
            sums += torch.stack([loss.detach().double(), correct / len(index)])
        return sums

    def is_finite(self) -> bool:
        """Whether all that is trained, and BN's statistics, are numbers still: waits for the device."""
        parts = [parameter.detach() for parameter in self.trained]
        parts += [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        return bool(nn.utils.get_total_norm(parts).isfinite())  # infinite beyond 1e19 too

    def end_epoch(self, epoch: int) -> None:
        """Take an average over epochs, and measure its BN statistics anew."""
        if not isinstance(self.average, StochasticAverage):
            return
        self.average.end_epoch(self.model, epoch + 1)
        if epoch >= self.average.start:
            order = self.order[:NORM_IMAGES]
            # At least as many at once as in training: of fewer large images the variance would be too small.
            most = max(at_once(self.augmenter.side), min(self.recipe.batch_size // distributed.SIZE, self.micro_batch))
            parts = order.tensor_split(math.ceil(len(order) / most))  # all count alike
            views = (self.augmenter.batch(part)[0].contiguous(memory_format=self.layout) for part in parts)
            with autocast(self.device, self.dtype):
                estimate_norms(self.kept, views)


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


def on_device(images: Tensor | StoredImages, device: torch.device) -> Tensor | StoredImages:
    """The images where training wants them: on the device, or in host memory where the device's is too small."""
    if isinstance(images, StoredImages):
        return images
    # The augmentation holds a copy, and the nets want room beside it.
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


def first_weights(recipe: Recipe) -> Path:
    """The file that ``recipe.start_from`` names. Raises ``RunError`` for a run that is not finished."""
    path = recipe.start_from
    if str(path) == PRETRAINED:
        return pretrained(recipe.model.name)[0]
    if recipe.starts_from_teacher:
        path = recipe.teacher.checkpoint if recipe.teacher else None
    assert path is not None
    return weights_of(path)


def start_from(model: nn.Module, recipe: Recipe, classes: Sequence[str]) -> None:
    """Give a new model the weights that ``recipe.start_from`` names, but for its last layer where classes are others.

    Normalisation is theirs too. ``CheckpointError`` where they do not fit.
    """
    path = first_weights(recipe)
    tensors, header = load_tensors(path)
    if header["classes"] != list(classes):
        tensors |= {name: value for name, value in model.state_dict().items() if name.startswith("network.head.")}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the model cannot start from {path}: {in_line(error)}") from error


def compiled(model: nn.Module, example: Tensor, dtype: torch.dtype) -> nn.Module:
    """The model compiled by PyTorch for batches like ``example``, or itself where that fails. Its state stays."""
    began, before = time.monotonic(), {name: value.clone() for name, value in model.state_dict().items()}
    torch._dynamo.config.recompile_limit = RECOMPILED  # beyond it PyTorch would go on in eager mode without a word
    # For each size anew: kernels for any size are slower, and a second model of a process would get those.
    fast: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]  # a module for a module
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
        say(f"torch.compile failed, going on without: {in_line(error, 200)}")
        return model
    finally:
        model.zero_grad()
        model.load_state_dict(before)
    say(f"compiled in {time.monotonic() - began:.0f} s (not counted as training)")
    return fast


def smaller(images: int) -> int:
    """Half as many images in memory at once, or ``DeviceError`` where that is no batch any more."""
    torch.cuda.empty_cache()
    if images < 4:
        raise DeviceError("the device's memory does not hold a step of 2 images: take a smaller model or image size")
    say(f"out of memory with {images} images at once: going on with {images // 2}, their gradients added up")
    return images // 2
