"""What ``fsck`` finds wrong in what the receiver holds, what is staged, and the index of facets.

Nothing here changes a file, or makes one: also not a folder that is not there yet.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import time
from functools import cached_property
from typing import TYPE_CHECKING

from kakehashi.errors import StoreError
from kakehashi.store.dicom import UID, read_head, tolerant
from kakehashi.store.facets import Index
from kakehashi.store.facets.compare import as_indexed
from kakehashi.store.facets.index import INDEX
from kakehashi.store.fsckfinding import STALE_S, YOUNG_S, Finding, blocks_of
from kakehashi.store.layout import PART, Layout
from kakehashi.store.query import TRUE, any_of
from kakehashi.store.receive.entry import HEADER_SIZE, Receipt, read_receipt
from kakehashi.store.receive.folders import Folders
from kakehashi.store.receive.inbox import IN, NOT_AS_RECEIVED
from kakehashi.store.receive.journal import ForeignPositionError, Journal
from kakehashi.store.receive.quarantine import Quarantine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kakehashi.store.catalogue import Catalogue, Series
    from kakehashi.store.pace import Pace

_JOURNAL, _INBOX, _QUARANTINE = "journal", "inbox", "quarantine"
_AGAIN = "ask the hospital to send it again"
_MENDS = "start `kakehashi store receive` anew: it mends this"
_BUILD = "`kakehashi store index`"
_PAGE = 500


class Areas:
    """The looks at the areas beside packs, kept objects and views.

    Parameters
    ----------
    layout : Layout
    catalogue : Catalogue
    pace : Pace
    young : set of str
        Gets the paths of what is too young to be judged: files without a row, and series that
        wait for the index.
    """

    def __init__(self, layout: Layout, catalogue: Catalogue, pace: Pace, young: set[str]) -> None:
        self._layout = layout
        self._catalogue = catalogue
        self._pace = pace
        self._young = young
        self._folders = Folders(layout.root)
        self._staging = layout.root / "staging"

    # What the receiver holds.

    def received_after(self, after: str) -> Iterator[str]:
        """Yield the receiver's journal, and what lies in its inbox and quarantine."""
        keys = [f"{_INBOX}/{name}" for name in _names(self._folders.inbox)]
        # Where nothing was ever noted, to look would make a lock.
        if (self._folders.journal / ".lock").exists():
            keys.append(_JOURNAL)
        held = {name.partition(".")[0] for name in _names(self._folders.quarantine)}
        keys += [f"{_QUARANTINE}/{name}" for name in sorted(held)]
        yield from (key for key in keys if key > after)

    def received(self, key: str) -> list[Finding]:
        """Look at an object that was received, or at all rows of the journal."""
        return self._received(key)

    def received_again(self, key: str, before: list[Finding]) -> list[Finding]:
        """Look once more at what was wrong; of the journal's rows, only at those."""
        base = self._folders.inbox
        paths = [self._layout.absolute(finding.path) for finding in before]
        # If the journal itself could not be read, nothing is known of any name.
        known = key == _JOURNAL and all(path.parent == base for path in paths)
        return self._received(key, {path.name for path in paths} if known else None)

    def _received(self, key: str, suspects: set[str] | None = None) -> list[Finding]:
        area, _, name = key.partition("/")
        try:
            if area == _JOURNAL:
                return self._journal(suspects)
            if area == _INBOX:
                return self._waiting(self._folders.inbox / name)
            return self._held(name)
        except FileNotFoundError:
            return []  # taken over meanwhile; if it is lost, the journal tells
        except OSError as error:
            path = self._layout.relative(self._folders.base / key)
            return [Finding("received-damaged", path, f"cannot be read: {error}", _AGAIN)]

    def _journal(self, suspects: set[str] | None) -> list[Finding]:
        journal, folder = Journal(self._folders.journal), self._folders.inbox
        waiting = _Waiting(journal)
        waiting.follow()
        if suspects is None:
            suspects = waiting.since.keys() ^ set(_names(folder))
        if not suspects:
            return []
        # What was noted meanwhile is read before the lock is taken, which holds up who receives.
        waiting.follow()
        with journal.held():
            waiting.follow(held=True)
            there = {name for name in suspects if os.path.lexists(folder / name)}
        said = suspects & waiting.since.keys()
        inbox = self._layout.relative(folder)
        lost, unknown = sorted(said - there), sorted(there - said)
        what = "it was acknowledged and not taken over, and its file is gone"
        return [
            *(Finding("received-lost", f"{inbox}/{name}", what, _AGAIN) for name in lost),
            *(
                Finding(
                    "received-unknown", f"{inbox}/{name}", "the journal has no row of it", _MENDS
                )
                for name in unknown
            ),
        ]

    def _waiting(self, path: Path) -> list[Finding]:
        where = self._layout.relative(path)
        try:
            receipt = read_receipt(path)
        except StoreError:
            what = "it does not begin as the receiver's files do"
            return [Finding("received-damaged", where, what, _AGAIN)]
        if receipt.name != path.name:
            return [Finding("received-damaged", where, "it has another object's name", _MENDS)]
        return self._content(path, receipt)

    def _held(self, identifier: str) -> list[Finding]:
        folder = self._folders.quarantine
        thing, sidecar = folder / f"{identifier}.dcm", folder / f"{identifier}.json"
        where = self._layout.relative(thing)
        for path, what in ((sidecar, "nothing says why it is held"), (thing, "its file is gone")):
            if not path.exists():
                return [Finding("quarantine", where, what, _MENDS)]
        try:
            held = Quarantine(folder).get(identifier)
        except StoreError:
            what = "what says why it is held is damaged"
            todo = f"look at the object, and remove both if it is of no use: {sidecar.name}"
            return [Finding("quarantine", where, what, todo)]
        return [] if held.reason == NOT_AS_RECEIVED else self._content(thing, held.receipt)

    def _content(self, path: Path, receipt: Receipt) -> list[Finding]:
        digest, size, header = hashlib.sha256(), 0, HEADER_SIZE
        for block in blocks_of(path, self._pace):
            digest.update(block[header:])
            size += len(block) - header
            header = 0
        if (size, digest.hexdigest()) == (receipt.size, receipt.sha256):
            return []
        what = "its data set is not the one that was received"
        return [Finding("received-damaged", self._layout.relative(path), what, _AGAIN)]

    # Series that are not complete yet.

    def staged_after(self, after: str) -> Iterator[str]:
        """Yield what lies in staging."""
        yield from (name for name in _names(self._staging) if name > after)

    def staged(self, name: str) -> list[Finding]:
        """Look at a series that is not complete yet: its origin, and each of its files."""
        folder = self._staging / name
        where = self._layout.relative(folder)
        try:
            if name.endswith(PART):
                old = time.time() - folder.stat().st_mtime > STALE_S
                todo = "the intake removes it when it starts"
                return [Finding("staged", where, "left over", todo)] if old else []
            if not UID.fullmatch(name) or not folder.is_dir():
                return [Finding("staged", where, "not a series that is staged", "remove it")]
            with tolerant():
                return [*self._origin(folder), *self._objects(folder)]
        except FileNotFoundError:
            return []  # packed meanwhile

    def _origin(self, folder: Path) -> list[Finding]:
        path = folder / "origin.json"
        restore = "write it again, or remove the series and ask the hospital to send it again"
        where = self._layout.relative(path)
        try:
            said = json.loads(path.read_bytes())
        except FileNotFoundError:
            if not folder.is_dir():
                raise
            what = "whose the series is stands nowhere"
            return [Finding("staged", where, what, restore)]
        except (OSError, ValueError) as error:
            return [Finding("staged", where, f"cannot be read: {error}", restore)]
        kinds = {"facility": str, "tier": int, "patient": str}
        if not isinstance(said, dict) or any(
            not isinstance(said.get(name), kind) for name, kind in kinds.items()
        ):
            return [Finding("staged", where, "facility, tier and patient are missing", restore)]
        return []

    def _objects(self, folder: Path) -> Iterator[Finding]:
        for path in sorted(folder.glob("*.dcm")):
            where, what = self._layout.relative(path), ""
            try:
                if read_head(path) is None:
                    what = "it is not DICOM"
                # Last, so that of the head, too, nothing stays in the page cache.
                for _ in blocks_of(path, self._pace):
                    pass
            except FileNotFoundError:
                raise
            except OSError as error:
                what = f"cannot be read: {error.strerror}"
            if what:
                yield Finding("staged", where, what, f"remove it, and {_AGAIN}")

    # The index of facets.

    @cached_property
    def _index(self) -> Index:
        return Index.open(self._layout.facets)

    def facets_after(self, after: str) -> Iterator[str]:
        """Yield the index as a whole, then its segments."""
        if not (self._layout.facets / INDEX).exists():
            return
        names = [] if self._broken() else [f"segments/{name}" for name in self._index.names()]
        yield from (key for key in [INDEX, *names] if key > after)

    def facets(self, key: str) -> list[Finding]:
        """Look at the index as a whole, or at one of its segments. That is read whole."""
        where = self._layout.relative(self._layout.facets)
        build = f"move {where} aside and build it anew with {_BUILD}"
        if broken := self._broken():
            return [Finding("facets", where, broken, build)]
        if key == INDEX:
            return []
        name = key.partition("/")[2]
        found = [
            Finding("facets", self._layout.relative(path), "it is not as it was written", build)
            for path in self._index.verify([name], self._pace.take)
        ]
        if found:
            return found  # what such a segment says of rows means nothing
        for uids in self._index.contents([name]):
            for start in range(0, len(uids), _PAGE):
                some = uids[start : start + _PAGE]
                rows = self._catalogue.select(any_of("series_uid", some))
                for uid in sorted(set(some) - {row.series_uid for row in rows}):
                    what = f"it has the series {uid}, which the catalogue has not"
                    found.append(Finding("facets-row", f"{where}/{key}", what, _BUILD))
        return found

    def row(self, uid: str) -> list[Finding]:
        """Look at what the index says of a series."""
        if not (self._layout.facets / INDEX).exists() or self._broken():
            return []  # found when the index is looked at
        rows = self._catalogue.select(any_of("series_uid", (uid,)))
        if not rows:
            return []  # who withdrew; the index is looked through for them
        path = self._layout.relative(self._layout.facets)
        try:
            said = self._index.lookup(uid, permission=TRUE)
        except Exception as error:  # whatever a damaged index leads to
            what = f"the series {uid} cannot be looked up: {type(error).__name__}"
            return [Finding("facets-row", path, what, _BUILD)]
        if said == as_indexed(rows[0]):
            return []
        if self._catalogue.has_change(uid) and (self._level() or _is_young(rows[0])):
            # The intake enters it soon, and at its next start for sure.
            self._young.add(rows[0].path)
            return []
        wrong = "has not got the series" if said is None else "says something else of the series"
        return [Finding("facets-row", path, f"the index {wrong} {uid}", _BUILD)]

    def _level(self) -> bool:
        """Say whether the index was level once with this catalogue, whose changes it follows."""
        mark = self._index.mark
        return mark is not None and mark == self._catalogue.mark()

    def _broken(self) -> str:
        try:
            self._index.names()
        except StoreError as error:
            return str(error)
        return ""


class _Waiting:
    """The names that wait for their intake by the journal, with the positions of their rows."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._end = 0
        self.since: dict[str, int] = {}

    def follow(self, *, held: bool = False) -> None:
        """Read the rows that came since the last time."""
        try:
            rows = self._journal.rows(self._end, held=held)
        except ForeignPositionError:
            # The file that ended there was dropped, or all of the journal was lost.
            self.since.clear()
            rows = self._journal.rows(held=held)
        for position, row in rows:
            if row["kind"] == IN:
                self.since[Receipt.from_json(row).name] = position
            elif "of" in row and self.since.get(str(row["name"])) == row["of"]:
                del self.since[str(row["name"])]
        self._end = rows.end


def _is_young(row: Series) -> bool:
    return time.time() - dt.datetime.fromisoformat(row.added_at).timestamp() < YOUNG_S


def _names(folder: Path) -> list[str]:
    """Return the names in a folder but the hidden ones, sorted; none if it is not there."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
