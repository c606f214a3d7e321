"""glibc is told to keep what is freed, unless its settings were given; the effect is seen in a process of its own."""

import platform
import subprocess
import sys

import pytest


GLIBC = platform.libc_ver()[0] == "glibc"
FAULTS = """
import resource, sys
from hnml_hf.common.allocator import keep_freed_memory
print(keep_freed_memory())
def use():
    bytearray(2**26)[::4096] = bytes(2**14)  # 64 MiB, each page written to
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
before = faults()
for _ in range(8):
    use()
print(faults() - before)
"""


def page_faults(**environment: str) -> tuple[str, int]:
    clean = {"PATH": "/usr/bin", "PYTHONPATH": ":".join(filter(None, sys.path))} | environment
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=clean)
    told, count = done.stdout.split()
    return told, int(count)


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_freed_memory_is_used_again():
    told, count = page_faults()
    assert told == "True"
    assert count < 1000  # of 8 x 16,384 pages


@pytest.mark.skipif(not GLIBC, reason="another C library")
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_settings_of_the_user_stay(name):
    told, count = page_faults(**{name: "1"})
    assert told == "False"
    assert count > 100_000


def test_other_systems_are_left_alone(monkeypatch):
    from hnml_hf.common import allocator

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)  # it would not even be asked
    assert allocator.keep_freed_memory() is False
