"""Cores that a process may use, and the memory that it gives back."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.machine import available_cores, total_memory


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
def test_available_cores_heeds_the_quota(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert available_cores(tmp_path) == expected


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
def test_total_memory_heeds_the_limit_of_the_container(
    file: str, text: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    monkeypatch.setattr("toolkit.machine.CGROUP", tmp_path)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**18}.__getitem__)
    assert total_memory() == expected


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
