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
from toolkit.data import DataSet, at_once
from toolkit.files import DAY, remove_stale, write_atomic
from toolkit.recipe import Recipe
from toolkit.run import weights_digest

LARGEST = 65504.0  # float16's: infinity would make a loss of NaN


class TeacherCache:
    """Logits, float16 ``[R,N,K]`` in a file, of the views of epochs 0 to R-1 (``recipe.cached_epochs``).

    The file lies beside the run directories, under a digest of everything that decides its content: another
    teacher, data set, augmentation or seed has another file. Rows that are not computed yet are NaN.
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
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        samples = len(data.train) * recipe.augment.copies
        shape = (recipe.cached_epochs, samples, len(data.classes))
        self.path = folder / f"{digest[:16]}-{shape[0]}.npy"
        if distributed.RANK == 0 and not self.path.is_file():
            remove_stale(folder, ".*.npy.*", DAY)  # younger ones may be another run's
            write_atomic(self.path, lambda temporary: _write_empty(temporary, shape))
        distributed.wait()
        self.rows = npy.open_memmap(self.path, mode="r+")

    def epoch(self, epoch: int, augmenter: Augmenter, go_on: Callable[[], bool]) -> Tensor | None:
        """Logits, float16 ``[N,K]`` on the augmenter's device, of the views of ``epoch``; None unless ``go_on()``.

        What is missing is computed first and kept at once. The augmenter stands at this epoch.
        """
        rows = self.rows[epoch % len(self.rows)]
        missing = np.isnan(rows).any(1).nonzero()[0]  # any: a power cut may leave half a row
        distributed.wait()  # all look before any writes: they share the file
        mine = missing[distributed.RANK :: distributed.SIZE]
        count = at_once(augmenter.side)
        for start in range(0, len(mine), count):
            if not go_on():
                return None
            part = mine[start : start + count]
            images, _ = augmenter.batch(torch.from_numpy(part).to(augmenter.device))
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), autocast(images.device, self.dtype):
                rows[part] = self.teacher(images).float().clamp(-LARGEST, LARGEST).cpu().numpy()
        distributed.wait()
        return torch.from_numpy(rows.copy()).to(augmenter.device)


def _write_empty(path: Path, shape: tuple[int, int, int]) -> None:
    """Written out in full: a disk that is too small is told now, and not as a fault in mapped memory later."""
    with path.open("wb") as file:
        header = {"descr": npy.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        empty = np.full(shape[1:], np.nan, np.float16).tobytes()
        for _ in range(shape[0]):
            file.write(empty)
