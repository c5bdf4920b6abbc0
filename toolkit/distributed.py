"""Several processes that share one run, as torchrun starts them. In a single process all of this does nothing.

Every process draws the same order and views and takes its part of each batch; gradients are averaged by PyTorch's
DistributedDataParallel; the process of rank 0 alone writes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from toolkit.errors import DeviceError, RecipeError

RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", SIZE))  # of them on this machine


def join(device: torch.device) -> None:
    """Make the group of all processes: NCCL on GPUs, Gloo on CPUs."""
    if SIZE == 1 or dist.is_initialized():  # a second group of the same processes would find the first one's addresses
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)


def own_device(device: torch.device) -> torch.device:
    """This process's GPU among those of its machine."""
    if device.type != "cuda":
        return device
    if SIZE == 1:
        if device.index is not None:  # else generators and waiting are the first GPU's
            torch.cuda.set_device(device)
        return device
    if torch.cuda.device_count() <= LOCAL_RANK:
        raise DeviceError(f"{LOCAL_RANK + 1} processes on a machine of {torch.cuda.device_count()} GPUs: start fewer")
    torch.cuda.set_device(LOCAL_RANK)
    return torch.device("cuda", LOCAL_RANK)


def share(model: nn.Module, device: torch.device, sync_norm: bool) -> nn.Module:
    """The model whose gradients are averaged over all processes; its parameters are the given model's."""
    if SIZE == 1:
        return model
    if sync_norm:
        if device.type != "cuda":
            raise DeviceError("sync_norm needs GPUs: PyTorch synchronises batch statistics on CUDA alone")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def own_part(index: Tensor) -> Tensor:
    """This process's samples of a batch."""
    if len(index) % SIZE:
        raise RecipeError(f"batch_size (={len(index)}) must be divisible by the number of processes (={SIZE})")
    return index.chunk(SIZE)[RANK]


def total(values: Tensor) -> Tensor:
    """The sum over the processes."""
    if SIZE > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def mean(values: Tensor) -> Tensor:
    """The mean over the processes."""
    return total(values) / SIZE


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    if SIZE == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def from_first(values: Tensor) -> Tensor:
    """What rank 0 has in place of the values, which are overwritten."""
    if SIZE > 1:
        dist.broadcast(values, 0)
    return values


def of_first(values: Sequence[float], device: torch.device) -> Sequence[float]:
    """Numbers as rank 0 has them."""
    return from_first(torch.tensor(values, dtype=torch.float64, device=device)).tolist()


def wait() -> None:
    """Until every process is here."""
    if SIZE > 1:
        dist.barrier()
