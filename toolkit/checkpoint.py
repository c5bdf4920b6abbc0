"""Where a run stands, and the file that it goes on from."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toolkit import distributed
from toolkit.errors import CheckpointError, in_line
from toolkit.files import UNFINISHED, remove_stale
from toolkit.progress import say
from toolkit.run import Run, load_tensors, save_tensors

if TYPE_CHECKING:
    from toolkit.learner import Learner


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

    def end_epoch(self, updates: int) -> None:
        """Move to the start of the next epoch, ``updates`` steps into the run."""
        self.updates = updates
        self.total_seconds += self.epoch_seconds
        self.epoch, self.step, self.loss_sum, self.correct, self.epoch_seconds = self.epoch + 1, 0, 0.0, 0.0, 0.0


class Checkpoint:
    """All of a run's training state as one safetensors file: a kill leaves the old one or the new one whole."""

    def __init__(self, run: Run, learner: Learner, header: dict[str, Any]) -> None:
        self.run, self.header, self.device = run, header, learner.device
        self.saved, self.seconds = time.monotonic(), 0.0  # when the last state was written, and how long that took
        self.optimizer = learner.optimizer
        self.modules: dict[str, nn.Module] = {"model": learner.model, "objective": learner.objective}
        if learner.average is not None:
            self.modules["average"] = learner.average
        # From newest to oldest. What the run was started with may be another number.
        self.names = ["last", *(f"last-{age}" for age in range(1, learner.recipe.keep_checkpoints))]
        self.parameters = learner.trained

    @property
    def age(self) -> float:
        """Seconds since the last ``save``."""
        return time.monotonic() - self.saved

    def save(self, at: Position) -> None:
        began = self.saved = time.monotonic()
        if distributed.RANK != 0:
            return
        tensors = {
            f"{part}.{name}": value
            for part, module in self.modules.items()
            for name, value in module.state_dict().items()
        }
        for index, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":  # asking for it opens the GPU
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        # Whole under a name of its own first: at no moment is there less than one good state.
        save_tensors(self.run.checkpoint("next"), tensors, self.header | {"position": asdict(at)})
        for newer, older in reversed(list(itertools.pairwise(self.names))):
            if self.run.checkpoint(newer).is_file():
                self.run.checkpoint(newer).replace(self.run.checkpoint(older))
        self.run.checkpoint("next").replace(self.run.checkpoint("last"))
        for path in self.run.states:
            if path.stem not in self.names:
                path.unlink()
        self.saved = time.monotonic()
        self.seconds = self.saved - began

    def load(self) -> Position:
        """Restore the newest whole state where there is one; the position from which to go on.

        What a kill left half written is removed: the caller holds the run's lock. A state whose header is another, or
        states of which none is whole, raise ``CheckpointError``.
        """
        if distributed.RANK == 0:
            for folder in (self.run.path, self.run.checkpoint("last").parent):
                remove_stale(folder, UNFINISHED, 0)
        paths = self.run.states
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
        # ``Run.start`` has compared the recipe; these two entries follow from it.
        differing = {key: f"{key}: {header.get(key)} there, {value} here" for key, value in self.header.items()
                     if header.get(key) != value and key not in ("recipe_digest", "split")}  # fmt: skip
        if differing.keys() == {"dataset_digest"}:
            raise CheckpointError(
                f"the images of {header['dataset']} have changed since {self.run.path} was begun, or are read or split "
                "in another way by this version: bring back what they were, or begin anew in another --run-dir"
            )
        if differing:
            raise CheckpointError(f"{path} is the state of another run: {in_line('; '.join(differing.values()))}")
        try:
            for part, module in self.modules.items():
                module.load_state_dict(_below(tensors, f"{part}."))
        except RuntimeError as error:
            raise CheckpointError(f"{path} belongs to another model: {in_line(error)}") from error
        for name, value in _below(tensors, "optimizer.").items():
            index, _, key = name.partition(".")
            parameter = self.parameters[int(index)]
            if value.shape == parameter.shape:  # with the parameter's own memory format
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            else:  # Adam's count of steps, which its fused form wants beside the parameter
                value = value.to(parameter.device)
            self.optimizer.state[parameter][key] = value.detach()
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        at = Position.of(header["position"])
        self._rewind(at.epoch)
        return at

    def _rewind(self, epochs: int) -> None:
        if distributed.RANK == 0:
            self.run.rewind(epochs)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
