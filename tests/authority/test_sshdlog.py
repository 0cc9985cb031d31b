"""Whom sshd refuses by itself stands in the audit trail: few words, of ours, in bounded numbers."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from kakehashi.store.authority.ca import Keys, PublicKey
from tests.authority.real import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kakehashi.audit import Record
    from tests.authority.real import Node, RealStore

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")
HOUR_S = 3600


def refused(store: RealStore) -> list[Record]:
    return store.records(kind="sshd.refused")


def sign(
    store: RealStore,
    session: str,
    node: Node,
    *,
    keys: Path | None = None,
    begins: float = 1000,
    ends: float = 2**40,
    accounts: tuple[str, ...] = (),
    sources: tuple[str, ...] = (),
    known: bool = True,
) -> None:
    """Give a node a certificate that the store did not give, which the book may know."""
    signed = Keys(keys or store.layout.keys).sign_user(
        PublicKey.parse(node.public),
        session=session,
        accounts=accounts or (store.view(), store.work()),
        now=begins,
        expires_at=int(ends),
        sources=sources,
    )
    if known:
        with closing(sqlite3.connect(store.layout.book)) as book, book:
            book.execute(
                "INSERT INTO certificates SELECT ?, id, fingerprint, 0, ? FROM sessions"
                " WHERE id = ?",
                (signed.serial, 2.0**40, session),
            )
    node.take({**node.grant, "certificate": signed.certificate, "serial": signed.serial})


def forged(store: RealStore, session: str, node: Node, tmp_path: Path) -> None:
    Keys.create(tmp_path)
    sign(store, session, node, keys=tmp_path, known=False)


def expired(store: RealStore, session: str, node: Node, tmp_path: Path) -> None:
    del tmp_path
    sign(store, session, node, ends=time.time() - 1)


def early(store: RealStore, session: str, node: Node, tmp_path: Path) -> None:
    del tmp_path
    sign(store, session, node, begins=time.time() + HOUR_S)


def elsewhere(store: RealStore, session: str, node: Node, tmp_path: Path) -> None:
    del tmp_path
    sign(store, session, node, sources=("192.0.2.7/32",))


def other_principal(store: RealStore, session: str, node: Node, tmp_path: Path) -> None:
    del tmp_path
    sign(store, session, node, accounts=("somebody",))


def over_long(store: RealStore, session: str, node: Node, tmp_path: Path) -> None:
    del tmp_path
    sign(store, session, node, known=False)


@needs_root
@pytest.mark.parametrize(
    ("make", "reason", "known"),
    [
        (forged, "authority", False),
        (expired, "expired", True),
        (early, "not-yet-valid", True),
        (elsewhere, "address", True),
        (other_principal, "principal", True),
        (over_long, "lease", False),
    ],
)
def test_a_certificate_that_sshd_refuses_is_recorded(
    store: RealStore,
    tmp_path: Path,
    make: Callable[[RealStore, str, Node, Path], None],
    reason: str,
    known: bool,
) -> None:
    session, node, _ = store.session()
    # The control: who is let in makes no such record.
    assert node.admitted(store.view())
    make(store, session, node, tmp_path)
    assert not node.admitted(store.view())
    key_id = f"{session}:{node.grant['serial']}"
    (record,) = until(
        lambda: [r for r in refused(store) if r.detail.get("key_id", "")[:32] == session],
        what="the record",
    )
    assert record.session == (session if known else None)
    assert {**record.detail, "at": ""} == {
        "at": "",
        "reason": reason,
        "address": "127.0.0.1",
        "account": store.view(),
        "key_id": key_id,
        "serial": node.grant["serial"],
    }


@needs_root
@pytest.mark.parametrize(
    ("options", "command", "reason"),
    [
        ((), (), "shell"),
        ((), ("id",), "command"),
        (("-tt",), (), "terminal"),
        (("-W", "127.0.0.1:22"), (), "forward"),
        (("-N", "-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:22"), (), "reverse-forward"),
        (
            ("-N", "-o", "ExitOnForwardFailure=yes", "-R", "/tmp/x:127.0.0.1:22"),
            (),
            "reverse-forward-socket",
        ),
        (("-s",), ("netconf",), "subsystem"),
    ],
)
def test_what_else_a_session_asks_of_sshd_is_recorded(
    store: RealStore, options: tuple[str, ...], command: tuple[str, ...], reason: str
) -> None:
    session, node, _ = store.session()
    assert node.admitted(store.view())
    assert node.ssh(store.view(), *options, command=command).returncode != 0
    record = until(
        lambda: [r for r in store.records(session, "sshd.refused") if r.detail["reason"] == reason],
        what="the record",
    )[0]
    assert record.detail["account"] == store.view()
    assert record.detail["address"] == "127.0.0.1"
    assert record.detail["serial"] == node.grant["serial"]
    # The first of all records of this session came after it had been let in without one.
    assert {r.detail["reason"] for r in store.records(session, "sshd.refused")} <= {
        reason,
        "shell",
    }
