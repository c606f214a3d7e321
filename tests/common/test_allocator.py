"""glibc keeps freed memory, unless the user has set its options. A separate process counts the page faults."""

import os
import platform
import subprocess
import sys

import options
import pytest
from commands import load_script

from hnml_hf.common import allocator


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


def test_what_glibc_is_told(monkeypatch):
    told = []

    class Library:
        gnu_get_libc_version = None

        def mallopt(self, what, value):
            told.append((what, value))
            return 1

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(sys, "platform", "linux")
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    assert allocator.keep_freed_memory() is True
    assert told == [(-1, 2**31 - 1), (-4, 0)]  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h


@pytest.mark.skipif(not GLIBC, reason="another C library")
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_settings_of_the_user_stay(name):
    told, count = page_faults(**{name: "1"})
    assert told == "False"
    assert count > 100_000


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)  # it would not even be asked
    assert allocator.keep_freed_memory() is False


def test_a_training_on_a_cpu_keeps_memory(monkeypatch, tmp_path):
    train, called = load_script("train"), []
    monkeypatch.setattr(train, "keep_freed_memory", lambda: called.append("kept"))
    monkeypatch.setattr(train, "train", lambda *given: called.append("trained"))
    train.run(["--use_cpu", "true", "--output_dir", str(tmp_path / "run")])
    assert called == ["kept", "trained"]


def test_predictions_on_a_cpu_keep_memory_and_a_wrong_device_is_named(monkeypatch):
    called = []
    monkeypatch.setattr(options, "keep_freed_memory", lambda: called.append("kept"))
    assert options.inference_device("cpu").type == "cpu" and called == ["kept"]
    for name in ("nonsense", "meta"):
        with pytest.raises(SystemExit, match=f"error: --device {name} cannot be used here: "):
            options.inference_device(name)
