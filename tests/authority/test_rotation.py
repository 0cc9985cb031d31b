"""Keys are replaced under sessions that run, at the real sshd."""

from __future__ import annotations

import itertools
import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kakehashi.store.authority.ca import CAS, load_private, public_line
from kakehashi.store.authority.trust import Trust
from tests.authority.desk import START, Desk
from tests.authority.real import RealStore, until
from tests.authority.test_commands import kakehashi

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.authority.real import Link, Node

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")

LEASE_S = 20


@pytest.fixture(scope="module")
def store() -> Iterator[RealStore]:
    """A running store whose leases are over soon, but not before a test has looked."""
    real = RealStore(lease_minutes=LEASE_S / 60, sessions_per_person=64)
    try:
        real.start()
        yield real
    finally:
        real.remove()


class Running:
    """A session with a connection that has to stay."""

    def __init__(self, store: RealStore) -> None:
        self.store = store
        self.session, self.node, _ = store.session()
        self.counters = itertools.count(1)

    @contextmanager
    def connected(self) -> Iterator[Running]:
        with self.node.connected(self.store.view()) as self.link:
            yield self
            self.link.ask()

    link: Link

    def renew(self) -> None:
        grant = self.store.hub.renew(self.session, self.node, next(self.counters)).ok()
        self.node.take(grant)
        self.link.ask()

    def until_dropped(self, ca: str) -> None:
        """Go on, as a node does, until the store has dropped the replaced authority."""

        def dropped() -> bool:
            self.renew()
            return len(trusted(self.store, ca)) == 1

        until(dropped, seconds=3 * LEASE_S, what="the end of the old key")


def trusted(store: RealStore, ca: str) -> tuple[str, ...]:
    files = {name: file.trusted for name, file in CAS.items()}
    return Trust.read(store.layout.keys / files[ca]).keys  # type: ignore[index]


def rotate(store: RealStore, *words: str) -> str:
    done = kakehashi(store, "store", "rotate", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_root
def test_user_ca_is_replaced_and_the_old_one_dropped_by_itself(store: RealStore) -> None:
    old = load_private(store.layout.keys / "user_ca")
    with Running(store).connected() as running:
        assert "until" in rotate(store, "user-ca")
        # Side by side: what the old one signed opens still, and so does what the new one signs.
        assert len(trusted(store, "user-ca")) == 2
        assert running.node.admitted(store.view())
        running.renew()
        assert running.node.admitted(store.view())
        again = kakehashi(store, "store", "rotate", "user-ca")
        assert again.returncode == 1
        assert "being replaced already" in again.stderr

        running.until_dropped("user-ca")
        assert running.node.admitted(store.view())
        assert not store.thief(running.node, old).admitted(store.view())
        new = load_private(store.layout.keys / "user_ca")
        # The control: with the key that is trusted, such a thief comes in.
        assert store.thief(running.node, new).admitted(store.view())
    assert store.records(kind="key.dropped")[-1].detail == {"key": "user-ca"}


@needs_root
def test_stolen_user_ca_opens_nothing_any_more_at_once(store: RealStore) -> None:
    stolen = load_private(store.layout.keys / "user_ca")
    with Running(store).connected() as running:
        thief = store.thief(running.node, stolen)
        assert thief.admitted(store.view())
        rotate(store, "user-ca", "--now")
        assert not thief.admitted(store.view())
        running.link.ask()
        running.renew()
        assert running.node.admitted(store.view())
    record = store.records(kind="key.rotated")[-1]
    assert record.detail == {"key": "user-ca", "at_once": True}


def knows(node: Node, line: str) -> None:
    """Have a node know one host CA alone."""
    node.take({**node.grant, "store": {**node.grant["store"], "host_ca": line}})


@needs_root
def test_host_ca_is_shown_once_every_node_knows_it(store: RealStore) -> None:
    with Running(store).connected() as running:
        listener, shown = store.pid("sshd"), store.layout.host_certificate.read_bytes()
        rotate(store, "host-ca")
        new, old = trusted(store, "host-ca")
        # This node has heard of the old one only.
        assert running.node.admitted(store.view())
        running.renew()
        assert running.node.grant["store"]["host_ca"].splitlines() == [new, old]
        assert store.layout.host_certificate.read_bytes() == shown
        refused = kakehashi(store, "store", "rotate", "host-key")
        assert refused.returncode == 1
        assert "being replaced already" in refused.stderr
        # An init meanwhile changes nothing of that.
        assert kakehashi(store, "store", "init").returncode == 0
        assert store.layout.host_certificate.read_bytes() == shown

        running.until_dropped("host-ca")
        running.renew()
        assert running.node.grant["store"]["host_ca"] == new
        until(lambda: running.node.admitted(store.view()), what="the new host certificate")
        knows(running.node, old)
        assert "Host key verification failed" in running.node.sftp(store.view(), "pwd").stderr
        assert store.pid("sshd") == listener


@needs_root
def test_host_key_is_replaced_under_the_same_authority(store: RealStore) -> None:
    with Running(store).connected() as running:
        before, listener = scanned(store), store.pid("sshd")
        heard = restarts(store)
        rotate(store, "host-key")
        until(lambda: restarts(store) > heard, what="sshd's new beginning")
        until(lambda: scanned(store) not in {"", before}, what="the new host key")
        running.renew()
        assert running.node.admitted(store.view())
        assert store.pid("sshd") == listener


@needs_root
def test_stolen_host_key_is_believed_by_nobody_any_more(store: RealStore) -> None:
    with Running(store).connected() as running:
        (old,) = trusted(store, "host-ca")
        rotate(store, "host-key", "--now")
        until(lambda: not running.node.admitted(store.view()), what="the new host certificate")
        running.renew()
        assert running.node.grant["store"]["host_ca"] != old
        until(lambda: running.node.admitted(store.view()), what="the listener")


def scanned(store: RealStore) -> str:
    found = subprocess.run(
        ["ssh-keyscan", "-t", "ed25519", "-p", str(store.sshd_port), "127.0.0.1"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return found.stdout.strip()


def restarts(store: RealStore) -> int:
    return (store.layout.log / "sshd.log").read_text().count("Received SIGHUP; restarting")


def test_interrupted_rotation_locks_nobody_out(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    session = desk.granted()
    path = desk.layout.keys / "user_cas"
    old = Trust.read(path).current
    # As where the machine stopped before the new key was written.
    lost = public_line(Ed25519PrivateKey.generate().public_key())
    Trust(lost, old, int(START) - 1).write(path)
    desk.authority.sweep(0)
    assert Trust.read(path).keys == (lost, old)
    desk.renew(session, 1)
    # The control: were the new key there, the old one would go.
    Trust(old, lost, int(START) - 1).write(path)
    desk.authority.sweep(0)
    assert Trust.read(path).keys == (old,)
