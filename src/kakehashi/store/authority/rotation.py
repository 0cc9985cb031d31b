"""Replacing the store's keys without ending a session that may stay.

A certificate authority is replaced in two steps. First old and new are trusted side by side:
sshd takes certificates of both, grants name both to the nodes. Once the last lease given
before is over, every node has what the new key signed, and the old one is dropped; the
authority does that by itself.
"""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kakehashi.audit import Audit
from kakehashi.audit.canonical import utc
from kakehashi.errors import ConfigError, StoreError
from kakehashi.store.authority.accounts import acting_as
from kakehashi.store.authority.book import Book
from kakehashi.store.authority.ca import CAS, Keys, load_public, public_line, write_key
from kakehashi.store.authority.layout import Layout, names
from kakehashi.store.authority.trust import Trust, write_public

if TYPE_CHECKING:
    from kakehashi.config import Config, StoreHost
    from kakehashi.store.authority.ca import Ca

Rotated = Literal["user-ca", "host-key", "host-ca"]


def rotate(config: Config, what: Rotated, *, at_once: bool) -> str:
    """Make a new key in place of one.

    Parameters
    ----------
    config : Config
    what : {"user-ca", "host-key", "host-ca"}
    at_once : bool
        The old key was stolen: nothing that it signed is trusted any more. Connections that
        stand go on; a node makes new ones after its next renewal. For the host key this
        replaces the host CA too, which vouches for the old one.

    Returns
    -------
    str
        What comes next, for the operator.

    Raises
    ------
    ConfigError
        Not run as root.
    StoreError
        The same authority, or the one that has to sign, is being replaced already.
    """
    if os.geteuid() != 0:
        raise ConfigError("`kakehashi store rotate` writes sshd's keys and must be run as root")
    store = config.need_store()
    layout, account = Layout(store.root), names(store).authority
    needed: Ca = "user-ca" if what == "user-ca" else "host-ca"
    with acting_as(account):
        book = Book(layout.book)
    try:
        with acting_as(account):
            audit = Audit(layout.audit)
            settle(store, book, audit, time.time())
            if not at_once:
                _check_settled(layout, book, needed)
        if what == "host-key":
            write_key(layout.sshd / "host_key", Ed25519PrivateKey.generate())
        with acting_as(account), book.transaction():
            audit.append("key.rotated", detail={"key": what, "at_once": at_once})
            if what != "host-key" or at_once:
                _replace(layout, needed, at_once=at_once)
            if what == "host-key" or (what == "host-ca" and at_once):
                present(store)
        return _told(layout, book, needed)
    finally:
        book.close()


def settle(store: StoreHost, book: Book, audit: Audit, now: float) -> None:
    """Drop each replaced authority under which no lease is left."""
    layout = Layout(store.root)
    keys = Keys(layout.keys)
    for ca, files in CAS.items():
        path = layout.keys / files.trusted
        trust = Trust.read(path)
        # Where a rotation was interrupted the new key signs nothing yet, and the old one has to
        # stay; the next rotation begins anew.
        if trust.previous is None or trust.current != keys.public(ca):
            continue
        if book.leases_given_until(trust.replaced_at, now).sessions:
            continue
        audit.append("key.dropped", detail={"key": ca})
        if ca == "host-ca":
            present(store)
        Trust(trust.current).write(path)


def present(store: StoreHost) -> None:
    """Sign the host key for sshd to show; the supervisor tells sshd once the file has changed."""
    layout = Layout(store.root)
    certificate = Keys(layout.keys).sign_host(
        load_public(layout.sshd / "host_key.pub"), names=[store.address], now=time.time()
    )
    write_public(layout.host_certificate, f"{certificate}\n")


def replacing(layout: Layout, ca: Ca) -> bool:
    """Return whether an authority is being replaced."""
    return Trust.read(layout.keys / CAS[ca].trusted).previous is not None


def _replace(layout: Layout, ca: Ca, *, at_once: bool) -> None:
    files = CAS[ca]
    new = Ed25519PrivateKey.generate()
    current = public_line(new.public_key())
    if at_once:
        trust = Trust(current)
    else:
        # Nobody signs meanwhile: whoever does holds the book.
        trust = Trust(current, Keys(layout.keys).public(ca), math.ceil(time.time()))
    # Trusted before it signs, so that an interruption in between locks nobody out.
    trust.write(layout.keys / files.trusted)
    write_key(layout.keys / files.key, new)


def _check_settled(layout: Layout, book: Book, ca: Ca) -> None:
    trust = Trust.read(layout.keys / CAS[ca].trusted)
    if trust.previous is None or trust.current != Keys(layout.keys).public(ca):
        return
    left = book.leases_given_until(trust.replaced_at, time.time())
    raise StoreError(
        f"the {ca} is being replaced already: {left.sessions} session(s) have leases from "
        f"before, the last until {utc(left.last_expires_at or 0)}. Repeat it then, or with --now "
        "if the key was stolen"
    )


def _told(layout: Layout, book: Book, ca: Ca) -> str:
    trust = Trust.read(layout.keys / CAS[ca].trusted)
    if trust.previous is None:
        return "the new key is in use, and the old one is trusted no more"
    left = book.leases_given_until(trust.replaced_at, time.time())
    if not left.sessions:
        return "the new key is in use; the store drops the old one within seconds"
    return (
        f"the new key is in use; the old one is trusted until {utc(left.last_expires_at or 0)}, "
        f"when the leases of {left.sessions} session(s) from before are over. The store then "
        "drops it by itself"
    )
