"""Objects that arrived whole: each gets a name, a row in the journal, and waits for its intake."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from kakehashi.errors import StoreError
from kakehashi.store.layout import sync_folder
from kakehashi.store.receive.entry import Entry, Receipt, is_whole, read_receipt
from kakehashi.store.receive.figures import Figures
from kakehashi.store.receive.folders import Folders
from kakehashi.store.receive.journal import Journal, Row, Rows
from kakehashi.store.receive.offer import NO_ROOM, Offer, Verdict
from kakehashi.store.receive.quarantine import Quarantine

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

IN, OUT, HELD, FREED, AGAIN, LOST = "in", "out", "held", "freed", "again", "lost"
"""Kinds of rows: came in, taken over, put into quarantine, taken out of it, came once more, and
gone without anybody having taken it.
"""

OTHER_CONTENT = (
    "an object with the same SOPInstanceUID and other content waits in the inbox; the first is kept"
)

NOT_AS_RECEIVED = "found in the inbox, but it is not what its own header says"

_LOG = logging.getLogger(__name__)


class Inbox:
    """What was received and is not taken over yet.

    Parameters
    ----------
    root : Path
        ``store.root``.
    quarantine_bytes : int, optional
        What of :meth:`admit` may lie in quarantine.

    Raises
    ------
    StoreError
        The receiver's folders cannot be made.
    """

    def __init__(self, root: Path, *, quarantine_bytes: int = sys.maxsize) -> None:
        self._quarantine_bytes = quarantine_bytes
        self._adrift: set[str] = set()
        # Positions of entries behind the first that are gone, by marks up to the second.
        self._gone: set[int] = set()
        self._gone_from = self._gone_until = 0
        # Between these positions nothing waits: who has nothing to do looks again and again.
        self._empty = 0, 0
        self.folders = Folders(root)
        self.folders.make()
        self._inbox, self._incoming = str(self.folders.inbox), str(self.folders.incoming)
        self.journal = Journal(self.folders.journal)
        self.held = Quarantine(self.folders.quarantine)
        self.figures = Figures(self.folders.figures)

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """Yield what waits, in the order in which it came, as it is asked for.

        An inbox that is asked again and again for what comes next reads each row of the journal
        a few times in all, however much waits.

        Parameters
        ----------
        after : int
            Position of the last entry that was dealt with.

        Raises
        ------
        ForeignPositionError
            The position is not of this journal: begin at 0. What was taken over is not there
            any more.
        """
        rows = self.journal.rows(after)
        gone = self._gone_behind(rows)
        empty, until = self._empty
        last = max(after, until) if empty == after and until <= rows.end else after
        found = False
        for position, row in rows.having("", last):
            if row["kind"] != IN or position in gone:
                last = position
                continue
            if not found:
                found, self._empty = True, (after, last)
            receipt = Receipt.from_json(row)
            yield Entry(
                **{name: getattr(receipt, name) for name in Receipt.__slots__},
                position=position,
                path=self.folders.inbox / receipt.name,
            )
        if not found:
            self._empty = after, rows.end

    def discard(self, *entries: Entry) -> None:
        """Remove objects that were taken over; those that are gone already are left aside."""
        with self.journal.held():
            here = self._still_here(entries)
            # First the row: a file without one counts as received and not taken over.
            self._note([_mark(OUT, entry, entry.position) for entry in here])
            for entry in here:
                entry.path.unlink()

    def quarantine(self, entry: Entry, reason: str) -> None:
        """Move an object to the quarantine.

        Raises
        ------
        StoreError
            It is not in the inbox any more.
        """
        with self.journal.held():
            if not self._still_here([entry]):
                raise StoreError(f"{entry.path} is not in the inbox any more")
            self.held.take(entry.path, entry, reason)
            sync_folder(self.folders.inbox)
            self._note([_row(HELD, entry) | _mark(HELD, entry, entry.position)])

    def release(self, identifier: str) -> None:
        """Put an object from the quarantine into the inbox, as a new entry.

        Raises
        ------
        StoreError
            There is no such object, or another one has its place.
        """
        with self.journal.held():
            held = self.held.get(identifier)
            target = self.folders.inbox / held.receipt.name
            if target.exists():
                raise StoreError(
                    f"an object with the UID of {identifier} waits in the inbox; release it again "
                    "when that one was taken over, or discard it"
                )
            held.path.rename(target)
            sync_folder(self.folders.inbox)
            self._note([_row(IN, held.receipt) | {"released": True}])
            self.held.forget(held)

    def discard_held(self, identifier: str) -> None:
        """Remove an object from the quarantine for good.

        Raises
        ------
        StoreError
            There is no such object.
        """
        with self.journal.held():
            held = self.held.get(identifier)
            self._note([_row(FREED, held.receipt)])
            self.held.forget(held)

    def trim(self, position: int) -> None:
        """Let go of journal files that lie wholly before a position.

        Files with rows of objects that still wait stay. Figures are kept.
        """
        self.figures.update(self.journal)
        alive: set[int] = set()
        # What is noted meanwhile can only end the wait of more of them.
        for at, row in self.journal.rows():
            if "of" in row:
                alive.discard(int(row["of"]))
            elif row["kind"] == IN and at <= position:
                alive.add(at)
        # No file whose row goes may come back after a power cut as one that was never taken.
        sync_folder(self.folders.inbox)
        self.journal.drop(position, alive)

    def admit(self, offers: Sequence[Offer]) -> list[Verdict]:
        """Give sealed objects their places; all is durable on return.

        Many at once cost no more waiting for the disk than one.

        Parameters
        ----------
        offers : sequence of Offer

        Returns
        -------
        list of Verdict
            For each; where nothing was stored, nothing is left of it but its ``.part``.
        """
        with self.journal.held():
            verdicts: list[Verdict] = []
            rows: list[Row] = []
            named: list[str] = []
            for offer in offers:
                try:
                    verdict, row = self._place(offer)
                except OSError as error:
                    verdict, row = _failed(error), None
                except Exception:  # one object must not take the others' places
                    _LOG.exception("%s cannot be given its place", offer.part)
                    verdict, row = Verdict.FAILED, None
                verdicts.append(verdict)
                if verdict is Verdict.STORED:
                    named.append(offer.receipt.name)
                if row is not None:
                    rows.append(row)
            try:
                if named:
                    # A power cut may leave the row without the name. What came then still has the
                    # name under which it came, and :meth:`recover` gives it the other again.
                    self.journal.append(rows, lambda: sync_folder(self.folders.inbox))
                else:
                    self._note(rows)
            except OSError as error:
                self._withdraw(named)
                return [_failed(error)] * len(offers)
            self._adrift.difference_update(named)
            return verdicts

    def recover(self) -> None:
        """Bring files and journal together after a run that ended in the midst of its work.

        Only the one receiver of this folder may call it, before it lets anybody in.
        """
        arrived = {}
        for path in self.folders.incoming.iterdir():
            with contextlib.suppress(StoreError):
                arrived[read_receipt(path).name] = path
        self.mend(arrived)
        for path in self.folders.incoming.iterdir():
            path.unlink()

    def mend(self, arrived: Mapping[str, Path] = MappingProxyType({})) -> None:
        """Finish what another run than the receiver's left half done; it may run meanwhile.

        Parameters
        ----------
        arrived : mapping of str to Path
            Objects that were sealed and may have a row, by the name that they get then.
        """
        with self.journal.held():
            self.journal.mend()
            self.held.mend()
            alive: dict[str, tuple[int, Receipt]] = {}
            over: dict[str, Receipt] = {}
            there = {path.name for path in self.folders.inbox.iterdir()}
            for position, row in self.journal.rows(held=True):
                if row["kind"] == IN:
                    receipt = Receipt.from_json(row)
                    alive[receipt.name] = position, receipt
                elif "of" in row:
                    name = str(row["name"])
                    if name in alive and alive[name][0] == row["of"]:
                        receipt = alive.pop(name)[1]
                        if name in there:
                            over[name] = receipt
            for name in alive.keys() & arrived.keys() - there:
                if _is(arrived[name], alive[name][1]):
                    arrived[name].rename(self.folders.inbox / name)
                    there.add(name)
            rows = [self._missing(*alive[name]) for name in sorted(alive.keys() - there)]
            for name in sorted(there - alive.keys()):
                path = self.folders.inbox / name
                if name in over and _is(path, over[name]):
                    path.unlink()
                else:
                    rows += self._adopt(path)
            self._note(rows)
            sync_folder(self.folders.inbox)

    def _gone_behind(self, rows: Rows) -> set[int]:
        """Return positions of the entries among some rows, to the journal's end, that are gone.

        A mark stands behind its entry, so those that were read once need not be read again.
        """
        if rows.after < self._gone_from or rows.end < self._gone_until:
            self._gone, self._gone_until = set(), rows.after
        unread = max(self._gone_until, rows.after)
        self._gone |= {int(row["of"]) for _, row in rows.having("of", unread) if "of" in row}
        self._gone = {one for one in self._gone if one > rows.after}
        self._gone_from, self._gone_until = rows.after, rows.end
        return self._gone

    def _withdraw(self, named: Iterable[str]) -> None:
        """Take back the names of what could not be noted."""
        for name in named:
            try:
                (self.folders.inbox / name).unlink()
            except OSError as error:
                # It is here without a row. When it comes again, that is when it came.
                _LOG.error("%s: cannot be taken back (%s)", name, error)
                self._adrift.add(name)

    def _place(self, offer: Offer) -> tuple[Verdict, Row | None]:
        receipt, reason = offer.receipt, offer.reason
        # Every object comes through here: strings are ten times as fast as paths.
        part, target = f"{self._incoming}/{offer.part}", f"{self._inbox}/{receipt.name}"
        if not reason:
            if not os.path.exists(target):  # noqa: PTH110 - see above
                os.rename(part, target)  # noqa: PTH104 - see above
                return Verdict.STORED, _row(IN, receipt)
            if _content(Path(target)) == (receipt.size, receipt.sha256):
                Path(part).unlink()
                if receipt.name in self._adrift:
                    return Verdict.STORED, _row(IN, read_receipt(Path(target)))
                return Verdict.AGAIN, _row(AGAIN, receipt)
            reason = OTHER_CONTENT
        full = self.held.size() + receipt.size > self._quarantine_bytes
        if full and not self.held.holds(receipt):
            return Verdict.CROWDED, None
        new = self.held.take(Path(part), receipt, reason)
        return Verdict.HELD, _row(HELD if new else AGAIN, receipt)

    def _still_here(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return those whose file is in the inbox; one that came later may have its name."""
        return [entry for entry in entries if _is(entry.path, entry)]

    def _missing(self, position: int, receipt: Receipt) -> Row:
        if self.held.holds(receipt):
            return _row(HELD, receipt) | _mark(HELD, receipt, position)
        _LOG.error("%s stands in the journal, and is gone from the inbox", receipt.name)
        return _mark(LOST, receipt, position)

    def _adopt(self, path: Path) -> list[Row]:
        """Enter a file that has a name, and no row."""
        try:
            receipt = read_receipt(path)
        except StoreError as error:
            _LOG.error("%s: not ours, left alone", error)
            return []
        if is_whole(path, receipt) and receipt.name == path.name:
            return [_row(IN, receipt)]
        self.held.take(path, receipt, NOT_AS_RECEIVED)
        return [_row(HELD, receipt)]

    def _note(self, rows: Sequence[Row]) -> None:
        if rows:
            self.journal.append(rows)


def _row(kind: str, receipt: Receipt) -> Row:
    return {"kind": kind, **receipt.as_json()}


def _mark(kind: str, receipt: Receipt, position: int) -> Row:
    """Return a row that ends the wait of an entry."""
    return {"kind": kind, "of": position, "name": receipt.name}


def _content(path: Path) -> tuple[int, str] | None:
    try:
        there = read_receipt(path)
    except StoreError:
        return None
    return there.size, there.sha256


def _is(path: Path, receipt: Receipt) -> bool:
    try:
        return read_receipt(path).as_json() == receipt.as_json()
    except (FileNotFoundError, StoreError):
        return False


def _failed(error: OSError) -> Verdict:
    return Verdict.NO_ROOM if error.errno in NO_ROOM else Verdict.FAILED
