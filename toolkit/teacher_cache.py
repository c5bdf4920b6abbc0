"""The teacher's logits, computed once for each view of each sample and replayed: distilling then costs little more
than training. Possible because a view is a pure function of (seed, epoch, sample index)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor, nn

from toolkit import distributed
from toolkit.augment import VIEWS, Augmenter
from toolkit.compute import autocast
from toolkit.data import DataSet
from toolkit.external import images_at_once
from toolkit.files import DAY, UNFINISHED, remove_stale, write_atomic, writing
from toolkit.recipe import Recipe
from toolkit.run import weights_digest

LARGEST = 65504.0  # float16's: infinity would make a loss of NaN


class TeacherCache:
    """Logits, float16 ``[R,N,K]`` in a file, of the views of epochs 0 to R-1 (``recipe.cached_epochs``).

    The file lies beside the run directories, under a digest of everything that decides its content: another
    teacher, data set, augmentation or seed has another file. Rows that are not computed yet are NaN. Of several
    processes rank 0 alone opens it.
    """

    def __init__(self, folder: Path, recipe: Recipe, data: DataSet, teacher: nn.Module, dtype: torch.dtype) -> None:
        self.teacher, self.dtype = teacher, dtype
        content = {
            "teacher": weights_digest(teacher),
            "data": data.digest,
            "split": [recipe.data.val_size, recipe.data.split_seed, recipe.data.group_by],
            "augment": [VIEWS, recipe.augment.model_dump(mode="json")],
            "seed": recipe.seed,
            "dtype": str(dtype),
        }
        mixes = recipe.augment.mixup or recipe.augment.cutmix
        if recipe.balance == "sampling" and mixes:  # it draws what an image is mixed with
            content["balance"] = recipe.balance
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        samples = len(data.train) * recipe.augment.copies
        self.shape = (recipe.cached_epochs, samples, len(data.classes))
        self.path = folder / f"{digest[:16]}-{self.shape[0]}.npy"
        if distributed.RANK:
            return
        if not _is_whole(self.path):
            remove_stale(folder, UNFINISHED, DAY)  # younger ones may be another run's
            write_atomic(self.path, lambda temporary: _write_empty(temporary, self.shape))
        with writing(self.path):
            self.rows = npy.open_memmap(self.path, mode="r+")

    def epoch(self, epoch: int, augmenter: Augmenter, go_on: Callable[[], bool]) -> Tensor | None:
        """Logits, float16 ``[N,K]`` on the augmenter's device, of the views of ``epoch``; None unless ``go_on()``.

        What is missing is computed first and kept at once. The augmenter stands at this epoch. ``go_on`` says the same
        in all processes.
        """
        device, first = augmenter.device, distributed.RANK == 0
        rows = self.rows[epoch % len(self.rows)] if first else np.empty(self.shape[1:], np.float16)
        logits = distributed.from_first(torch.from_numpy(rows.copy()).to(device))
        missing = logits.isnan().any(1).nonzero().flatten()  # any: a power cut may leave half a row
        count = images_at_once(self.teacher, augmenter.side) * distributed.SIZE
        for part in missing.split(count) if len(missing) else ():
            if not go_on():
                return None
            answers = torch.zeros(len(part), self.shape[2], device=device)
            mine = slice(distributed.RANK, None, distributed.SIZE)
            if len(part[mine]):
                images, _ = augmenter.batch(part[mine])
                images = images.contiguous(memory_format=torch.channels_last)
                with torch.no_grad(), autocast(device, self.dtype):
                    answers[mine] = self.teacher(images).float().clamp(-LARGEST, LARGEST)
            logits[part] = distributed.total(answers).half()
            if first:
                rows[part.cpu().numpy()] = logits[part].cpu().numpy()
        return logits


def _is_whole(path: Path) -> bool:
    """A copy that was cut short would be read as one that ends in zeros, were it opened to be written."""
    try:
        npy.open_memmap(path, mode="r")
    except (FileNotFoundError, ValueError):
        return False
    return True


def _write_empty(path: Path, shape: tuple[int, int, int]) -> None:
    """Written out in full: a disk that is too small is told now, and not as a fault in mapped memory later."""
    with path.open("wb") as file:
        header = {"descr": npy.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        empty = np.full(shape[1:], np.nan, np.float16).tobytes()
        for _ in range(shape[0]):
            file.write(empty)
