"""A session whose site is far from the store."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.lab.client import Client
from tests.lab.hosts import wait_for
from tests.lab.lab import PLATFORM, Lab
from tests.lab.wan import Wan, namespace_of

pytestmark = pytest.mark.lab

People = Callable[[str], Client]
SLURM = {"site": "slurm", "queue": "gpu", "gpus": 0, "hours": 1.0, "project": "lung-ct"}
READ_ALL = """
import hashlib, threading
from kakehashi import Store

def read_all():
    # A store of its own each time: nothing of it is in memory yet.
    with Store() as store:
        return {s.uid: hashlib.sha256(s.read_packed()).hexdigest() for s in store.cohort}

rounds, failures, stopped = [], [], threading.Event()

def go_on():
    try:
        while not stopped.is_set():
            rounds.append(read_all())
    except Exception as error:
        failures.append(repr(error))

reading = threading.Thread(target=go_on)
"""


def carried(wan: Wan) -> int:
    """Return the bytes that came from the store."""
    return wan.figures().directions[1].bytes


def test_cuts_and_resets_of_a_long_line_show_as_nothing(lab: Lab, person: People) -> None:
    tanaka = person("tanaka")
    # The store lets the site in by its gateway's address, so the line begins there.
    with Wan(
        namespace_of(lab["gateway"].pid),
        namespace_of(lab["store"].pid),
        addresses=(PLATFORM["gateway"], PLATFORM["store"]),
        delay_ms=5,
        rate_mbit=200,
    ) as wan:
        tanaka.start(SLURM)
        assert carried(wan) > 0
        with tanaka.kernel() as kernel:
            kernel.run(READ_ALL)
            truth = kernel.value("read_all()")
            assert truth
            kernel.run("reading.start()")
            for _ in range(3):
                before = carried(wan)
                wait_for("it reads", lambda: carried(wan) > before, 60)  # noqa: B023 - called at once
                assert wan.reset(port=22) > 0
            wan.cut()
            gone = wan.figures().directions
            wait_for("the cut is felt", lambda: wan.figures().directions != gone, 60)
            wan.heal()
            so_far = kernel.value("len(rounds)")
            wait_for("it reads on", lambda: kernel.value("len(rounds)") > so_far + 1, 120)
            kernel.run("stopped.set(); reading.join()")
            rounds, failures = kernel.value("(rounds, failures)")
            assert failures == []
            assert all(read == truth for read in rounds)
        tanaka.stop()
