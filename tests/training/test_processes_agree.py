"""Processes that were started differently say so; in two real ones: resume/test_kills.py."""

from types import SimpleNamespace

import pytest

from hnml_hf.training import distributed


@pytest.fixture
def processes(monkeypatch):
    """Facts of the other processes of the run."""
    others = []
    state = SimpleNamespace(num_processes=2)
    monkeypatch.setattr(distributed, "PartialState", lambda: state)
    monkeypatch.setattr(distributed, "gather_object", lambda mine: [*mine, *others])
    return others


def test_processes_that_agree_go_on(processes):
    processes.append({"seed": 1, "names": ["a", "b"]})
    distributed.require_same_on_all_processes({"seed": 1, "names": ["a", "b"]})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 2, "steps": 9}, "`seed` is 1 on process 0 and 2 on process 1. Start all of them with one command"),
        ({"seed": 1}, "`steps` is 9 on process 0 and None on process 1"),
        ({"seed": 1, "steps": 9, "torch": "2.14"}, "`torch` is None on process 0 and 2.14 on process 1"),
        ({"seed": 1, "steps": 9, **dict.fromkeys("abcdefg", 1)}, "`e` is .*, and 2 more"),
    ],
)
def test_what_differs_is_named(other, message, processes):
    processes.append(other)
    with pytest.raises(ValueError, match=message):
        distributed.require_same_on_all_processes({"seed": 1, "steps": 9})
