"""Writes into the audit trail whom sshd refused by itself, in bounded numbers."""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kakehashi.audit.canonical import utc
from kakehashi.errors import StoreError
from kakehashi.store.authority.refusals import Reader, Refusal
from kakehashi.store.authority.sshdlog import LogReader, Position

if TYPE_CHECKING:
    from collections.abc import Callable

    from kakehashi.audit import Audit
    from kakehashi.store.authority.book import Book
    from kakehashi.store.authority.layout import Layout

WINDOW_S = 60
"""Seconds over which refusals are counted."""

EACH = 10
"""Records of one reason that one network, or one session, gets in that time."""

STRANGERS = 60
"""Records that all who were not let in get together in that time."""

PATIENCE_S = 0.1
"""Seconds that one look may take; the hubs wait meanwhile."""

_NAMED = 20


@dataclass
class _Window:
    """What was refused since some time, and how much of it was not written down."""

    since: float
    recorded: Counter[tuple[str, str]] = field(default_factory=Counter)
    strangers: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    addresses: Counter[str] = field(default_factory=Counter)

    def covers(self, moment: float) -> bool:
        return self.since <= moment < self.since + WINDOW_S

    def admits(self, refusal: Refusal, session: str | None) -> bool:
        """Count a refusal; return whether it gets a record of its own."""
        # Who was let in is counted by session: no stranger can push their records out.
        inside = refusal.admitted and session is not None
        key = (session if inside and session else _network(refusal.address), refusal.reason)
        if self.recorded[key] < EACH and (inside or self.strangers < STRANGERS):
            self.recorded[key] += 1
            self.strangers += not inside
            return True
        self.reasons[refusal.reason] += 1
        known = refusal.address in self.addresses or len(self.addresses) < _NAMED
        self.addresses[refusal.address if known else "others"] += 1
        return False


class Watch:
    """Follows sshd's log, from where the last watch ended.

    Parameters
    ----------
    layout : Layout
    book : Book
        Knows which session a certificate belongs to.
    audit : Audit
    clock : callable
        Gives the time in seconds since 1970.
    """

    def __init__(
        self, layout: Layout, book: Book, audit: Audit, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = layout.sshd_log
        self._kept = layout.sshd_position
        self._book = book
        self._audit = audit
        self._clock = clock
        self._window: _Window | None = None
        self._begin()

    def look(self) -> None:
        """Write down what has come.

        Raises
        ------
        StoreError
            The log may not be read.
        AuditError
            A record cannot be written; it is tried again with the next look.
        """
        deadline = time.monotonic() + PATIENCE_S
        try:
            self._follow(deadline)
        except PermissionError as error:
            raise StoreError(
                f"{self._path}: the authority may not read what sshd says ({error.strerror}); "
                "run `kakehashi store init` and start the store anew"
            ) from error
        except BaseException:
            # What was read and not written down is read once more.
            self._begin()
            raise

    def close(self) -> None:
        """Write down what was only counted, and let go of the log."""
        self._sum_up()
        self._log.close()

    def _begin(self) -> None:
        self._log = LogReader(self._path)
        self._reader = Reader()
        # Read anew up to there without a record: connections that stand began before it.
        self._seen_until: Position | None = None
        self._begun = False

    def _start(self) -> None:
        self._begun = True
        kept = Position.load(self._kept)
        if kept and self._log.holds(kept):
            self._seen_until = kept
        elif kept:
            self._log.lost = True

    def _follow(self, deadline: float) -> None:
        if not self._begun:
            self._start()
        place = None
        for entry, position in self._log.entries():
            refusals = self._reader.read(entry)
            if self._seen_until:
                until = self._seen_until
                if position.inode == until.inode and position.offset >= until.offset:
                    self._seen_until = None
            else:
                place = position
                # Not any(): each of them is to be recorded.
                if sum([self._record(refusal) for refusal in refusals]):
                    position.save(self._kept)
            if time.monotonic() > deadline:
                break
        else:
            if self._window and not self._window.covers(self._clock()):
                self._sum_up()
        if self._log.lost:
            self._audit.append("sshd.log-lost", detail={"log": self._path.name})
            self._log.lost = False
        if place:
            place.save(self._kept)

    def _record(self, refusal: Refusal) -> bool:
        if self._window and not self._window.covers(refusal.time):
            self._sum_up()
        self._window = self._window or _Window(refusal.time)
        session = self._session(refusal)
        if not self._window.admits(refusal, session):
            return False
        detail = {
            "at": utc(refusal.time),
            "reason": refusal.reason,
            "address": refusal.address,
            "account": refusal.account,
            "key_id": refusal.key_id,
            "serial": refusal.serial,
        }
        self._audit.append(
            "sshd.refused",
            session=session,
            detail={name: value for name, value in detail.items() if value is not None},
        )
        return True

    def _session(self, refusal: Refusal) -> str | None:
        """Return the session whose certificate it was, as far as the book knows it."""
        if refusal.reason == "authority" or refusal.serial is None:
            # Whoever forges a certificate can name any session in it.
            return None
        session = self._book.holder(refusal.serial) if refusal.serial < 2**63 else None
        return session if refusal.key_id == f"{session}:{refusal.serial}" else None

    def _sum_up(self) -> None:
        window = self._window
        if window and window.reasons:
            self._audit.append(
                "sshd.suppressed",
                detail={
                    "since": utc(window.since),
                    "refused": window.reasons.total(),
                    "reasons": dict(window.reasons),
                    "addresses": dict(window.addresses),
                },
            )
        self._window = None


def _network(address: str) -> str:
    """Return what stands for whoever has an address: of IPv6 the whole network is theirs."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "others"
    return str(found) if found.version == 4 else str(ipaddress.IPv6Address(int(found) >> 64 << 64))
