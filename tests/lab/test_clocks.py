"""Sessions where one host's clock is ten minutes wrong: leases hold, lapse and end in real time.

Each time one of store, hub and node differs from all others. What is a lease's or a session's
length is compared with the test's own monotonic clock.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kakehashi.session.keeper import WARNING_S
from tests.lab import clocks, faults, look
from tests.lab import portal as services
from tests.lab.client import Client
from tests.lab.hosts import wait_for
from tests.lab.lab import NODES, Lab
from tests.lab.test_faults import READ, reload_store

pytestmark = pytest.mark.lab

People = Callable[[str], Client]
SESSION = {"site": "slurm", "queue": "gpu", "gpus": 0, "hours": 1.0, "project": "lung-ct"}
ACCOUNTS = {"tanaka": "ka0001", "suzuki": "ka0002"}
WRONG_S = 10 * 60
LEASE_S = 9.0
# Longer than the hub is dead where a session is to outlive that.
OFFLINE_S = 60.0
# How long the store may take to close, and a clock's minute to be seen as such.
CLOSING_S = 5.0
ENDING_S = 10.0
SLACK_S = 45.0
LENGTH_S = 3600.0
AGE_S = 3600
RENEWALS = 3
HUB_RENEWALS = 2
# Renewals and a look at the data come before the end, also on a busy machine.
SHORT_S, LONGER_S = 45.0, 300.0
TIMES = "__import__('json').load(open('/run/kakehashi/lease.json'))"


@pytest.fixture(scope="module", autouse=True)
def _short_times(lab: Lab) -> Iterator[None]:
    """Shorten what is waited for, at a portal that was set up an hour ago.

    The certificates that it makes for itself at its first start are good from then on: to a clock
    that is behind by more than their age they are not valid yet.
    """
    login = lab["login"]
    text = login.path(services.CONFIG).read_text()
    section = "[sites.slurm]\n"
    assert section in text
    hours = f"offline_max_hours = {OFFLINE_S / 3600:.5f}\n"
    login.write(services.CONFIG, text.replace(section, section + hours))
    with clocks.wrong(login, -AGE_S):
        faults.kill_hub(lab)
        login.run(["rm", "-r", "/var/lib/kakehashi/hub/internal-ssl"])
        faults.start_hub(lab)
    restart_hub(lab)
    reload_store(lab, LEASE_S / 60)
    yield
    reload_store(lab, 15)
    login.write(services.CONFIG, text)
    restart_hub(lab)


def now(ahead_s: float = 0) -> dt.datetime:
    return dt.datetime.now(dt.UTC) + dt.timedelta(seconds=ahead_s)


def seconds(text: object, since: dt.datetime) -> float:
    return (dt.datetime.fromisoformat(str(text)) - since).total_seconds()


def records(lab: Lab, kind: str, session: str) -> list[dict[str, Any]]:
    return [one for one in look.audit(lab) if one["kind"] == kind and one["session"] == session]


def session_of(lab: Lab, person: str) -> str:
    query = f"SELECT id FROM sessions WHERE person = '{person}' AND state = 'granted'"
    return look.store_book(lab, query)


def values(client: Client, *expressions: str) -> list[Any]:
    with client.kernel() as kernel:
        return [kernel.value(expression) for expression in expressions]


def value(client: Client, expression: str) -> Any:
    return values(client, expression)[0]


def is_renewed(lab: Lab, *sessions: str, times: int = RENEWALS) -> None:
    """See leases renewed several times, in time and no more often than that."""
    goals = {one: len(records(lab, "lease.renewed", one)) + times for one in sessions}
    began = time.monotonic()
    wait_for(
        "renewed leases",
        lambda: all(len(records(lab, "lease.renewed", one)) >= goals[one] for one in goals),
        2 * LEASE_S,
    )
    least = (times - 1) * LEASE_S / 3 - 1
    assert time.monotonic() - began > least
    for session in sessions:
        # A lease that had lapsed in between would have cost its connections.
        assert not records(lab, "connection.closed", session)


def page_says_left(client: Client, ahead_s: float = 0) -> float:
    """Return how many seconds the portal's home page gives the session, by the hub's clock."""
    page = client.http.get(f"{client.url}/hub/home")
    ends = re.search(r'data-ends="([^"]+)"', page.text)
    assert ends, page.text[:2000]
    return seconds(ends[1], now(ahead_s))


def restart_hub(lab: Lab) -> None:
    faults.kill_hub(lab)
    faults.start_hub(lab)


@contextlib.contextmanager
def since_restart(
    lab: Lab, name: str, ahead_s: int, restart: Callable[[Lab], None]
) -> Iterator[None]:
    """Let a host's services run by a wrong clock, and by the right one again."""
    try:
        with clocks.wrong(lab[name], ahead_s):
            restart(lab)
            yield
    finally:
        restart(lab)


@contextlib.contextmanager
def only(lab: Lab, name: str) -> Iterator[None]:
    """Let Slurm start jobs on one node only."""
    others = [f"nodename={one}" for one in NODES if one != name]
    for other in others:
        lab["head"].run(["scontrol", "update", other, "state=drain", "reason=test"])
    try:
        yield
    finally:
        for other in others:
            lab["head"].run(["scontrol", "update", other, "state=resume"])


def shorten(lab: Lab, session: str, left_s: float) -> None:
    """Let a session end soon, by the store's book; its keeper hears of it at the next renewal."""
    query = f"UPDATE sessions SET ends_at = {int(time.time() + left_s)} WHERE id = '{session}'"
    book = "/srv/kakehashi/authority/book.sqlite"
    lab["store"].run(["sqlite3", book, query], user="kakehashi")


def until_idle(lab: Lab, name: str, person: str, patience_s: float) -> None:
    """Wait until a person has no process on a node."""
    account = ACCOUNTS[person]
    wait_for(
        "the wrapper's end",
        lambda: not look.processes(lab[name], account),
        patience_s + ENDING_S,
    )


def is_complete(lab: Lab, session: str) -> None:
    wait_for("a receipt", lambda: bool(records(lab, "receipt.written", session)), 60)
    wait_for("the receipt", lambda: look.receipt(lab, session)["state"] == "complete", 60)


@pytest.mark.parametrize("ahead_s", [WRONG_S, -WRONG_S])
def test_a_stores_clock(lab: Lab, person: People, ahead_s: int) -> None:
    with since_restart(lab, "store", ahead_s, faults.restart_store):
        assert clocks.all_ahead(lab) == {"store": ahead_s / 60}
        client = person("tanaka")
        client.start(SESSION)
        session = session_of(lab, "tanaka")
        # The authority, and whoever signs a certificate, really have that clock.
        (granted,) = records(lab, "session.granted", session)
        assert abs(seconds(granted["time"], now(ahead_s))) < SLACK_S
        size = value(client, READ)
        is_renewed(lab, session)
        again, times = values(client, READ, TIMES)
        assert again == size
        # What people are told is by the clock of who tells it.
        assert page_says_left(client) == pytest.approx(LENGTH_S, abs=SLACK_S)
        assert seconds(times["ends_at"], now()) == pytest.approx(LENGTH_S, abs=SLACK_S)

        faults.kill_hub(lab)
        try:
            began = time.monotonic()
            assert look.store_connections(lab)
            wait_for("closed connections", lambda: not look.store_connections(lab), LEASE_S + 10)
            lasted = time.monotonic() - began
        finally:
            faults.start_hub(lab)
        # The last renewal was at most a third of a lease before.
        assert LEASE_S * 2 / 3 - 1 < lasted < LEASE_S + CLOSING_S
        closed = records(lab, "connection.closed", session)
        assert closed
        assert {one["detail"]["reason"] for one in closed} == {"lease lapsed"}
        renewed = len(records(lab, "lease.renewed", session))
        wait_for("a renewal", lambda: len(records(lab, "lease.renewed", session)) > renewed, 90)
        again = person("tanaka")
        assert value(again, READ) == size
        again.stop()
        is_complete(lab, session)


@pytest.mark.parametrize("ahead_s", [WRONG_S, -WRONG_S])
def test_a_hubs_clock(lab: Lab, person: People, ahead_s: int) -> None:
    with since_restart(lab, "login", ahead_s, restart_hub):
        assert clocks.all_ahead(lab) == {"login": ahead_s / 60}
        # The provider keeps the right time, and gives a log-in by it.
        client = person("tanaka")
        client.start(SESSION)
        session = session_of(lab, "tanaka")
        size = value(client, READ)
        is_renewed(lab, session, times=HUB_RENEWALS)
        assert value(client, READ) == size
        # It counts by its own clock, as the store's lease is long.
        assert page_says_left(client, ahead_s) == pytest.approx(LENGTH_S, abs=SLACK_S)
        client.stop()
        is_complete(lab, session)


def test_clocks_of_nodes(lab: Lab, person: People) -> None:
    """One node's clock is ahead while the other's is behind; both sessions last as long."""
    nodes = {"tanaka": ("node1", WRONG_S), "suzuki": ("node2", -WRONG_S)}
    with contextlib.ExitStack() as stack:
        for name, ahead_s in nodes.values():
            stack.enter_context(clocks.wrong(lab[name], ahead_s))
        wrong = {name: ahead_s / 60 for name, ahead_s in nodes.values()}
        assert clocks.all_ahead(lab) == wrong
        clients: dict[str, Client] = {}
        sizes: dict[str, object] = {}
        for who, (name, ahead_s) in nodes.items():
            clients[who] = person(who)
            with only(lab, name):
                clients[who].start(SESSION)
            assert clocks.is_wrong(lab[name], look.keeper(lab[name], ACCOUNTS[who]))
            sizes[who], times = values(clients[who], READ, TIMES)
            # The keeper tells its payload the session's end by the clock that it has itself.
            assert seconds(times["ends_at"], now(ahead_s)) == pytest.approx(LENGTH_S, abs=SLACK_S)
        sessions = {who: session_of(lab, who) for who in nodes}
        # The end of the time that was asked for: early, late and not at all are told apart.
        began = time.monotonic()
        shorten(lab, sessions["suzuki"], SHORT_S)
        shorten(lab, sessions["tanaka"], LONGER_S)
        is_renewed(lab, *sessions.values())
        assert {who: value(client, READ) for who, client in clients.items()} == sizes
        until_idle(lab, "node2", "suzuki", SHORT_S)
        # The keeper leaves in order: ten seconds before the store would cut it off.
        assert SHORT_S - WARNING_S - 1 < time.monotonic() - began < SHORT_S
        is_complete(lab, sessions["suzuki"])
        items = look.receipt(lab, sessions["suzuki"])["items"]
        assert [one["detail"] for one in items if one["item"] == "end"] == [
            "the session's time is over"
        ]
        assert look.processes(lab["node1"], ACCOUNTS["tanaka"])

        # The longest time that a site lets a session be on its own.
        faults.kill_hub(lab)
        began = time.monotonic()
        try:
            until_idle(lab, "node1", "tanaka", OFFLINE_S)
            lasted = time.monotonic() - began
        finally:
            faults.start_hub(lab)
        assert lasted > OFFLINE_S - LEASE_S
        wait_for("the end", lambda: sessions["tanaka"] not in look.open_sessions(lab), 60)
