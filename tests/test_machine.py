"""Cores that a process may use, and the memory that it gives back."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from toolkit import machine
from toolkit.machine import available_cores, peak_memory, total_memory


@pytest.fixture(autouse=True)
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups to be written here; nothing says yet which one is the process's own."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**18}.__getitem__)
    return tmp_path / "cgroup"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu.max": "nonsense\n"}, 8),
    ],
)
def test_available_cores_heeds_the_quota(files: dict[str, str], expected: int, cgroup: Path) -> None:
    write(cgroup, files)
    assert available_cores() == expected


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("memory.max", "1000000\n", 10**6),
        ("memory.max", "max\n", 2**30),
        ("memory.max", "nonsense\n", 2**30),
        ("memory/memory.limit_in_bytes", "1000000\n", 10**6),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", 2**30),  # no limit, in its words
        ("elsewhere", "1000000\n", 2**30),
    ],
)
def test_total_memory_heeds_the_limit_of_the_container(file: str, text: str, expected: int, cgroup: Path) -> None:
    write(cgroup, {file: text})
    assert total_memory() == expected


V1_CPU = {"user/cpu.cfs_quota_us": "300000\n", "user/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        ("0::/user/job\n", {"user/cpu.max": "300000 100000\n", "user/job/memory.max": "1000000\n"}),
        ("0::/user/job\n", {"user/job/cpu.max": "300000 100000\n", "user/memory.max": "1000000\n"}),
        (
            "5:cpu,cpuacct:/user/job\n4:memory:/user\n",
            {f"cpu/{name}": text for name, text in V1_CPU.items()} | {"memory/user/memory.limit_in_bytes": "1000000\n"},
        ),
    ],
    ids=["cores above", "memory above", "v1"],
)
def test_the_limits_of_the_groups_above_hold_too(
    membership: str, files: dict[str, str], cgroup: Path, tmp_path: Path
) -> None:
    """As systemd makes them; those of other groups do not."""
    write(cgroup, files | {"user/other/cpu.max": "1 1\n", "memory/user/other/memory.limit_in_bytes": "1000\n"})
    (tmp_path / "membership").write_text(f"{membership}3:cpuset:/user/other\n")
    assert (available_cores(), total_memory()) == (3, 10**6)


def test_the_most_memory_is_in_bytes() -> None:
    taken = np.ones(100 * 2**20, np.uint8)
    assert len(taken) < peak_memory() < 50 * 2**30


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="only glibc keeps memory")
def test_freed_memory_is_handed_back() -> None:
    """That of eight blocks as Pillow takes them, each with a small one above it that stays."""
    code = """
from toolkit.machine import hand_back_freed_memory
def held():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) // 1024
def grown():
    before, kept = held(), []
    for _ in range(2):  # by default glibc learns from the first blocks
        large = []
        for _ in range(8):
            large.append(bytearray(b"x") * 2**24)
            kept.append(bytearray(b"x") * 2**16)
        del large
    return held() - before
hand_back_freed_memory()
print(grown())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32
