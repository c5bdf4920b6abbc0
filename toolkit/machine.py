"""What this machine gives to a process: cores and memory. A leaf, without torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUP, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
ARM = ("arm64", "aarch64")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_* of malloc.h


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the quotas of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu"):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError):
                quota, period = " ".join((group / file).read_text() for file in files).split()
                if quota not in ("max", "-1"):
                    cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, and the limits of its control groups."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows
        total = 4 * 2**30
    for group in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                total = min(total, int((group / name).read_text()))
    return total


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups that hold this process, up to the root: of cgroup v2 and v1."""
    yield from (CGROUP, CGROUP / controller)  # in a container its own group, whatever it is called outside
    with contextlib.suppress(OSError, ValueError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                root = CGROUP / controller if controllers else CGROUP
                own = root / path.strip("/")
                yield from (group for group in (own, *own.parents) if group.is_relative_to(root))


def lacks_vnni(machine: str | None = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU is an x86 that does not say it has VNNI: without it sums of 8-bit products may overflow."""
    if (machine or platform.machine()).lower() in ARM:
        return False
    try:
        return "vnni" not in cpuinfo.read_text()
    except OSError:
        return True


def keep_freed_memory() -> None:
    """Let glibc keep the large blocks that each step frees and takes again.

    By default it hands them back to the system, and every step then pays for zeroing fresh pages. Elsewhere
    than on glibc nothing happens.
    """
    never, largest = 2**31 - 1, 2**25  # older versions take no more; a refusal would leave some 128 KiB
    _mallopt(MMAP_THRESHOLD, never) or _mallopt(MMAP_THRESHOLD, largest)
    _mallopt(TRIM_THRESHOLD, never)


def hand_back_freed_memory() -> None:
    """Let glibc hand back large blocks as soon as they are free, for a process that decodes pictures now and then.

    By default the first large block that is freed makes glibc keep the next ones of its size, and each thread's
    share of them stays with the process. Elsewhere than on glibc nothing happens.
    """
    _mallopt(MMAP_THRESHOLD, 4 * 2**20)  # Pillow takes 16 MB at a time


def _mallopt(parameter: int, value: int) -> bool:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # the last on Windows
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    return False


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    import resource  # not on Windows, where serving works and training does not

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
