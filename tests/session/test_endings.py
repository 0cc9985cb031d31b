"""However a session ends, nothing of it stays: no process, port, mount or connection."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kakehashi.store.authority import rotation
from tests.authority.real import RealStore, until
from tests.session.real import SERIES, World
from tests.session.test_session import STAY, STUBBORN, items

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.session.real import Person, Session, Software

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")

WRAPPER = ("keeper", "entering", "warden", "middle", "init")


@pytest.fixture(scope="module")
def brief(person: Person, software: Software) -> Iterator[World]:
    """A store whose leases last three seconds."""
    store = RealStore(sessions_per_person=64, lease_minutes=0.05)
    try:
        store.start()
        yield World(store, person, software)
    finally:
        store.remove()


def connections(world: World) -> list[str]:
    """Return the store's processes that serve a connection of this store's accounts."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text.startswith("sshd: ") and world.store.prefix in text:
                found.append(text)
    return found


def port_open(session: Session) -> bool:
    port = session.portal.called("enrol")[0]["port"]
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def assert_nothing_left(session: Session) -> None:
    # The kernel ends them all at once; how soon it gets to it depends on what else there is to do.
    until(session.all_gone, seconds=30, what="the end of all processes")
    until(lambda: not port_open(session), seconds=30, what="the end of the port")
    until(lambda: not connections(session.world), seconds=30, what="the end of all connections")
    assert session.world.listing() == session.before


@pytest.mark.parametrize("victim", WRAPPER)
def test_kill_of_any_part_of_the_wrapper_ends_all(world: World, victim: str) -> None:
    with world.session(STAY) as session:
        session.file("up")
        tree = session.tree()
        assert port_open(session)
        assert connections(world)
        os.kill(tree[victim], signal.SIGKILL)
        assert_nothing_left(session)
        session.wait(10)
        if victim == "keeper":
            assert not session.portal.called("leave")
        else:
            assert items(session)["processes"]["result"] == "gone"


HANG = f"""
import os, pathlib, threading
def read():
    while True:
        pathlib.Path("/store/series/{SERIES}.ozx").read_bytes()
        pathlib.Path("/work/alice/x").write_bytes(os.urandom(100000))
threading.Thread(target=read).start()
pathlib.Path("up").write_text("1")
"""


@pytest.mark.parametrize("victim", ["keeper", "warden"])
def test_kill_with_hung_mounts_ends_all(world: World, victim: str) -> None:
    with world.session(HANG) as session:
        session.file("up")
        tree = session.tree()
        for name in ("sshfs", "view", "ssh"):
            os.kill(tree[name], signal.SIGSTOP)
        os.kill(tree[victim], signal.SIGKILL)
        assert_nothing_left(session)
        session.wait(10)


@pytest.mark.parametrize(
    ("victim", "reason"), [("sshfs", "the work folder has gone"), ("view", "the view of the store")]
)
def test_a_mount_that_dies_ends_the_session_with_a_reason(
    world: World, victim: str, reason: str
) -> None:
    with world.session(STAY) as session:
        session.file("up")
        os.kill(session.tree()[victim], signal.SIGKILL)
        assert session.wait(20)[0] == 1
        assert_nothing_left(session)
        assert reason in items(session)["end"]["detail"]


def lease(session: Session, init: int) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(
        Path(f"/proc/{init}/root/run/kakehashi/lease.json").read_text()
    )
    return value


AGAIN = f"""
import pathlib, threading
pathlib.Path("up").write_text("1")
while not pathlib.Path("again").exists():
    threading.Event().wait(0.05)
pathlib.Path("size").write_text(str(len(pathlib.Path("/store/series/{SERIES}.ozx").read_bytes())))
"""


def test_a_lease_is_renewed_and_outlived(brief: World) -> None:
    with brief.session(AGAIN) as session:
        session.file("up")
        init = session.tree()["init"]
        first = lease(session, init)
        until(
            lambda: lease(session, init)["expires_at"] > first["expires_at"], what="a later lease"
        )
        until(lambda: len(session.portal.called("renew")) > 4, seconds=20, what="five renewals")
        counters = [json.loads(one["message"])["counter"] for one in session.portal.called("renew")]
        assert counters == sorted(set(counters))
        (session.work / "alice/again").write_text("1")
        assert session.file("size") == str(len(brief.content))
        assert session.wait()[0] == 0


ANEW = """
import pathlib, socket, struct, threading
pathlib.Path("up").write_text("1")
while not pathlib.Path("again").exists():
    threading.Event().wait(0.05)
with socket.socket(socket.AF_UNIX) as link:
    link.connect("/run/kakehashi/store.sock")
    link.sendall(struct.pack(">IBI", 5, 1, 3))
    pathlib.Path("answer").write_text(repr(link.recv(5)[4:]))
"""


def test_a_node_hears_of_a_new_host_ca_with_its_next_renewal(brief: World) -> None:
    with brief.session(ANEW) as session:
        session.file("up")
        certificate = brief.store.layout.host_certificate
        before = certificate.read_bytes()
        rotation.rotate(brief.store.config, "host-ca", at_once=True)
        assert certificate.read_bytes() != before
        renewals = len(session.portal.called("renew"))
        until(
            lambda: len(session.portal.called("renew")) > renewals + 1, seconds=20, what="renewals"
        )
        (session.work / "alice/again").write_text("1")
        # A connection of its own, made anew, whose other side shows the new certificate.
        assert session.file("answer") == r"b'\x02'"
        assert session.wait()[0] == 0


def test_a_lost_right_ends_at_once(brief: World) -> None:
    with brief.session(STUBBORN) as session:
        session.file("up")
        session.family()
        session.portal.lost = True
        status, said = session.wait(5)
        assert status == 1
        assert "the session was ended" in said
        assert_nothing_left(session)


def test_a_portal_out_of_reach_is_waited_for(brief: World) -> None:
    with brief.session(STAY) as session:
        session.file("up")
        init = session.tree()["init"]
        session.portal.down = True
        until(lambda: lease(session, init)["state"] == "offline", what="the state offline")
        assert "goes on" in lease(session, init)["message"]
        session.portal.down = False
        until(lambda: lease(session, init)["state"] == "live", what="the state live")
        assert session.process.poll() is None


def test_a_portal_out_of_reach_for_too_long_ends_the_session(brief: World) -> None:
    with brief.session(STAY, portal={"offline_max_s": 1.5}) as session:
        session.file("up")
        session.family()
        session.portal.down = True
        status, said = session.wait(20)
        assert status == 1
        assert "longest that this site allows" in said
        assert_nothing_left(session)


def test_the_time_that_was_granted_ends_the_session(world: World) -> None:
    with world.session(STAY, hours=0.002) as session:
        session.file("up")
        session.family()
        status, _ = session.wait(20)
        assert status == 0
        assert items(session)["end"]["detail"] == "the session's time is over"
        assert_nothing_left(session)
