"""Metrics of a run for tools that watch trainings, beside metrics.jsonl, which is always written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.errors import UserError, install


def summary_writer() -> Any:
    """TensorBoard's class, or ``UserError`` without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--log tensorboard needs TensorBoard: {install('log')}") from error
    return SummaryWriter


def tensorboard(folder: Path) -> Callable[[dict[str, Any]], None]:
    """What writes each epoch's row as TensorBoard scalars into ``folder``."""
    writer = summary_writer()(folder)

    def write(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if value is not None and name != "epoch":
                writer.add_scalar(name, value, row["epoch"])  # type: ignore[no-untyped-call]
        writer.flush()  # type: ignore[no-untyped-call]

    return write
