"""Leases under faults: what dies is cut by itself, what only lost its way comes back.

The lease is 20 s here instead of 15 min. An outage that is meant to be survived is one and a half
leases long, which is harder than five minutes of fifteen.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest

from tests.lab import faults, look
from tests.lab import portal as services
from tests.lab.client import Client, ClientError
from tests.lab.hosts import wait_for
from tests.lab.lab import Lab

pytestmark = pytest.mark.lab

People = Callable[[str], Client]
PLAIN = {"site": "slurm", "queue": "gpu", "gpus": 0, "hours": 1.0, "project": "lung-ct"}
TANAKA, NODE = "ka0001", "node1"
PLATFORM_HOSTS = ("login", "store")
LEASE_S = 20.0
OUTAGE_S = 1.5 * LEASE_S
READ = "len(open(__import__('kakehashi').Store().cohort[0].path, 'rb').read())"


def reload_store(lab: Lab, lease_minutes: float) -> None:
    """Change the longest lease that the store gives, as an operator does."""
    store = lab["store"]
    text = store.path(services.CONFIG).read_text()
    changed = re.sub(r"lease_minutes = \S+", f"lease_minutes = {lease_minutes}", text)
    assert changed != text
    store.write(services.CONFIG, changed)
    faults.restart_store(lab)


@pytest.fixture(scope="module", autouse=True)
def _short_lease(lab: Lab) -> Iterator[None]:
    reload_store(lab, LEASE_S / 60)
    yield
    reload_store(lab, 15)


@pytest.fixture
def tanaka(lab: Lab, person: People) -> Iterator[Client]:
    client = person("tanaka")
    client.start(PLAIN)
    assert look.processes(lab[NODE], TANAKA)
    yield client
    wait_for("the end of earlier sessions", lambda: _stopped(client), 90)


def _stopped(client: Client) -> bool:
    # The hub may just have been started again, and not know its people yet.
    try:
        if client.server() is None:
            return True
        client.stop()
    except (ClientError, OSError, ValueError, AttributeError):
        client.log_in()
    return False


def value(client: Client, expression: str) -> object:
    with client.kernel() as kernel:
        return kernel.value(expression)


def leases(lab: Lab) -> int:
    """Return how many leases were renewed so far."""
    return sum(record["kind"] == "lease.renewed" for record in look.audit(lab))


def test_a_node_that_is_cut_off_and_dies_with_its_hub_dead_is_cut_by_the_store(
    lab: Lab, tanaka: Client
) -> None:
    (session,) = look.open_sessions(lab)
    faults.kill_hub(lab)
    faults.cut(lab, NODE)
    try:
        lab[NODE].run(["kill", "-9", str(look.keeper(lab[NODE], TANAKA))])
        # No word of the end reaches the store: its connections seem to stand.
        assert look.store_connections(lab)
        began = time.monotonic()
        wait_for("closed connections", lambda: not look.store_connections(lab), LEASE_S + 10)
        assert time.monotonic() - began < LEASE_S + 5
    finally:
        faults.heal(lab, NODE)
        faults.start_hub(lab)
    wait_for("the end at the store", lambda: session not in look.open_sessions(lab), 120)


def test_a_session_outlives_a_restart_of_the_store(lab: Lab, tanaka: Client) -> None:
    size = value(tanaka, READ)
    faults.restart_store(lab)
    assert value(tanaka, READ) == size
    assert value(tanaka, "open('after-restart', 'w').write('x')") == 1
    kept = lab["store"].path("/srv/kakehashi/work/lung-ct/work/tanaka/after-restart")
    wait_for("the file at the store", kept.exists)
    kept.unlink()


@pytest.mark.parametrize("what", ["hub", "node"])
def test_a_session_outlives_an_outage_that_is_longer_than_its_lease(
    lab: Lab, person: People, tanaka: Client, what: str
) -> None:
    size = value(tanaka, READ)
    (session,) = look.open_sessions(lab)
    if what == "hub":
        faults.kill_hub(lab)
    else:
        # The way to the platform, not the one to its scheduler: a node that Slurm misses for as
        # long as this loses its jobs, whatever its lease.
        for other in PLATFORM_HOSTS:
            faults.cut(lab, NODE, other)
    until = time.monotonic() + OUTAGE_S
    wait_for("closed connections", lambda: not look.store_connections(lab), LEASE_S + 10)
    wait_for("the outage's end", lambda: time.monotonic() > until, OUTAGE_S + 1)
    renewed = leases(lab)
    if what == "hub":
        faults.start_hub(lab)
    else:
        for other in PLATFORM_HOSTS:
            faults.heal(lab, NODE, other)
    wait_for("a renewed lease", lambda: leases(lab) > renewed, 60)
    again = person("tanaka")
    assert value(again, READ) == size
    assert look.open_sessions(lab) == [session]


def test_offline_max_ends_what_nobody_renews(lab: Lab, person: People) -> None:
    login = lab["login"]
    text = login.path(services.CONFIG).read_text()
    limited = text.replace("[sites.slurm]\n", "[sites.slurm]\noffline_max_hours = 0.008\n")
    assert limited != text
    faults.kill_hub(lab)
    login.write(services.CONFIG, limited)
    faults.start_hub(lab)
    try:
        client = person("tanaka")
        client.start(PLAIN)
        (session,) = look.open_sessions(lab)
        faults.cut(lab, NODE, "login")
        try:
            wait_for("the wrapper's end", lambda: not look.processes(lab[NODE], TANAKA), 120)
        finally:
            faults.heal(lab, NODE, "login")
        wait_for("the end at the store", lambda: session not in look.open_sessions(lab), 120)
        assert not look.mounts(lab[NODE])
    finally:
        faults.kill_hub(lab)
        login.write(services.CONFIG, text)
        faults.start_hub(lab)
