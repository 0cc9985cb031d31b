"""Leases end at the store by themselves, whoever else is dead."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kakehashi.store.authority.guard import UNKNOWN_GRACE_S
from kakehashi.store.authority.supervisor import SILENCE_S
from tests.authority.real import SERVE, until

if TYPE_CHECKING:
    from tests.authority.real import RealStore

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")

CUT_S = 2.0
"""Seconds after which a connection without a lease must be gone."""


def hold_down(store: RealStore, service: str) -> None:
    """Stop a service so that it neither works nor is started anew."""
    os.kill(store.pid(service), signal.SIGSTOP)


def test_lapsed_lease_closes_the_connection_with_the_authority_dead(fresh: RealStore) -> None:
    session, node, _ = fresh.session()
    granted = time.time()
    hold_down(fresh, "authority")
    with node.connected(fresh.view()) as view, node.connected(fresh.work()) as work:
        # The control: while the lease lives, the connections do.
        view.ask()
        work.ask()
        view.closed_after(3 + CUT_S)
        work.closed_after(CUT_S)
        assert granted + 2 < time.time() < granted + 3 + CUT_S
    assert not node.admitted(fresh.view())
    closed = until(lambda: fresh.records(session, "connection.closed"), what="the guard's record")
    assert {record.detail["reason"] for record in closed} == {"lease lapsed"}
    os.kill(fresh.pid("authority"), signal.SIGCONT)


def test_renewed_lease_keeps_the_connection(fresh: RealStore) -> None:
    session, node, _ = fresh.session()
    granted = time.monotonic()
    counters = itertools.count(1)
    with node.connected(fresh.view()) as link:

        def renewed_and_answered() -> bool:
            fresh.hub.renew(session, node, next(counters)).ok()
            link.ask()
            # Twice as long as the lease of the grant.
            return time.monotonic() - granted > 6

        until(renewed_and_answered, what="six seconds")
        assert link.stands


def test_connection_made_with_the_new_certificate_after_a_lapse(fresh: RealStore) -> None:
    session, node, _ = fresh.session()
    until(lambda: not node.admitted(fresh.view()), what="the lapse")
    node.take(fresh.hub.renew(session, node, 1).ok())
    assert node.admitted(fresh.view())


def test_lease_taken_back_in_the_book_voids_a_certificate_that_is_still_good(
    store: RealStore,
) -> None:
    session, node, _ = store.session()
    assert node.admitted(store.view())
    _set_lease(store, session, time.time() - 1)
    # Refused by sshd, not let in and then cut by the guard.
    assert "Permission denied" in node.sftp(store.view(), "pwd").stderr
    _set_lease(store, session, time.time() + 60)
    assert node.admitted(store.view())


def test_revocation_closes_at_once_and_for_good(store: RealStore) -> None:
    session, node, _ = store.session()
    other, neighbour, _ = store.session(person="bob")
    with node.connected(store.view()) as link, neighbour.connected(store.view()) as unconcerned:
        store.hub.revoke(session).ok()
        link.closed_after(CUT_S)
        unconcerned.ask()
    assert not node.admitted(store.view())
    store.hub.renew(session, node, 1).refused(410, "ended")
    assert len(store.records(session, "session.revoked")) == 1
    assert len(store.records(session, "session.ended")) == 1
    assert not store.records(other, "session.ended")
    until(lambda: store.records(session, "connection.refused"), what="the refusal's record")


def test_end_closes_and_the_receipt_says_so(store: RealStore) -> None:
    session, node, _ = store.session()
    with node.connected(store.view()) as link:
        receipt = store.hub.end(session).ok()
        link.closed_after(CUT_S)
    assert receipt["state"] == "complete"
    (connection,) = [i for i in receipt["items"] if i["item"].startswith("connection ")]
    assert connection["witness"] == "store"
    assert connection["result"] == "gone"
    assert "by the store (stopped by the person)" in connection["detail"]


def test_replayed_ticket_ends_the_session_and_raises_an_alarm(store: RealStore) -> None:
    session, node, created = store.session()
    thief = store.node()
    with node.connected(store.view()) as link:
        store.hub.grant(created, thief).refused(409, "replayed")
        link.closed_after(CUT_S)
    assert not node.admitted(store.view())
    (alarm,) = store.records(session, "ticket.replayed")
    assert alarm.detail["alarm"] is True
    (ended,) = store.records(session, "session.ended")
    assert ended.detail["reason"] == "replayed"
    receipt = store.hub.end(session).ok()
    assert receipt["reason"] == "replayed"
    assert any("alarm" in item["detail"] for item in receipt["items"])


def test_connection_of_a_book_that_forgot_it_is_closed(fresh: RealStore) -> None:
    session, node, _ = fresh.session()
    with node.connected(fresh.view()) as link:
        _set_lease(fresh, session, time.time() + 3600)
        with contextlib.closing(sqlite3.connect(fresh.layout.book)) as book, book:
            book.execute("DELETE FROM connections")
        link.closed_after(UNKNOWN_GRACE_S + CUT_S)


@pytest.mark.parametrize("how", ["guard hangs", "book is damaged"])
def test_where_leases_cannot_be_confirmed_everything_closes(fresh: RealStore, how: str) -> None:
    session, node, _ = fresh.session()
    with node.connected(fresh.view()) as link:
        _set_lease(fresh, session, time.time() + 3600)
        link.ask()
        if how == "guard hangs":
            hold_down(fresh, "guard")
        else:
            fresh.layout.book.write_bytes(b"not a book" * 1000)
        link.closed_after(SILENCE_S + CUT_S)
    if how == "guard hangs":
        os.kill(fresh.pid("guard"), signal.SIGCONT)
        _, node, _ = fresh.session()
        assert node.admitted(fresh.view())
    else:
        assert not node.admitted(fresh.view())


def _set_lease(store: RealStore, session: str, end: float) -> None:
    with contextlib.closing(sqlite3.connect(store.layout.book)) as book, book:
        book.execute("UPDATE sessions SET lease_expires_at = ? WHERE id = ?", (end, session))


@pytest.mark.parametrize("service", ["sshd", "authority", "guard"])
def test_killed_service_comes_back_and_live_leases_survive(store: RealStore, service: str) -> None:
    session, node, _ = store.session()
    with node.connected(store.view()) as link:
        killed = store.pid(service)
        os.kill(killed, signal.SIGKILL)
        until(lambda: store.pid(service) not in {0, killed}, what=f"a new {service}")
        until(lambda: _alive(store), what="the store")
        node.take(store.hub.renew(session, node, 1).ok())
        until(lambda: node.admitted(store.view()), what="a new connection")
        link.ask()
        # And the guard knows the connection still.
        store.hub.revoke(session).ok()
        link.closed_after(CUT_S)


def _alive(store: RealStore) -> bool:
    try:
        return store.hub.call("GET", "/v1/version").status == 200
    except OSError:
        return False


def _status(store: RealStore) -> int:
    try:
        return store.hub.create().status
    except OSError:
        return 0


def test_nothing_outlives_the_supervisor(alone: RealStore) -> None:
    _, node, _ = alone.session()
    with node.connected(alone.view()) as link:
        alone.kill()
        link.closed_after(CUT_S)
    alone.start()
    # The lease lives on in the book: it was not its end that closed the connection.
    assert node.admitted(alone.view())


def test_stop_closes_all_and_leaves_no_process_or_mount(alone: RealStore) -> None:
    _, node, _ = alone.session()
    mounts = Path("/proc/self/mountinfo").read_text()
    with node.connected(alone.view()) as link:
        alone.stop()
        link.closed_after(CUT_S)
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert not (alone.layout.run / "ready").exists()
    assert str(alone.home) not in _command_lines()
    # The control: while it runs, its processes are found in this way.
    alone.start()
    assert str(alone.home) in _command_lines()


def _command_lines() -> str:
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return "\n".join(lines)


def test_second_server_on_the_same_store_is_refused(store: RealStore) -> None:
    second = subprocess.run(
        [sys.executable, "-I", "-c", SERVE, str(store.config_path)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert second.returncode != 0
    assert "already" in second.stderr
    assert _alive(store)


def test_projects_are_read_anew_and_only_who_lost_the_right_is_cut(store: RealStore) -> None:
    session, node, _ = store.session()
    _, other, _ = store.session(project="brain", groups=["g-brain"])
    with node.connected(store.view()) as link, other.connected(store.view("brain")) as unconcerned:
        text = store.config_path.read_text()
        store.config_path.write_text(text.replace('groups = ["g-lung"]', 'groups = ["g-other"]'))
        try:
            store.reload()
            until(
                lambda: _status(store) == 403,
                what="the changed project",
            )
            link.closed_after(5)
            store.hub.renew(session, node, 1).refused(410, "ended")
            unconcerned.ask()
        finally:
            store.config_path.write_text(text)
            store.reload()
            until(lambda: _status(store) == 200, what="the project")
