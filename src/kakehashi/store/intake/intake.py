"""Takes received objects over: de-identified into staging, and a whole series into a pack.

Each step can be repeated: an object leaves the inbox when its de-identified form is on the disk,
a series leaves staging when it is in the catalogue. So it does no harm to be cut off anywhere.
While the database is away all of this waits; what hospitals send is taken in all the same.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import stat
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from kakehashi.errors import StoreError
from kakehashi.imaging.ozip import FileReader, open_pack
from kakehashi.store.dicom import tolerant
from kakehashi.store.indexing import catch_up, enter
from kakehashi.store.ingest import Origin, add, study_is_whole
from kakehashi.store.intake.complete import Completeness, rule_of
from kakehashi.store.intake.parser import Unreadable
from kakehashi.store.intake.setbacks import Setbacks, place_of, why_of
from kakehashi.store.intake.staging import Staged, Staging
from kakehashi.store.intake.summary import HELD_BACK, summarise, waiting_in
from kakehashi.store.layout import Layout, locked, replacing
from kakehashi.store.receive import ForeignPositionError
from kakehashi.store.service.reports import LONGEST_REPORT, normalised

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from kakehashi.config import StoreHost
    from kakehashi.store.catalogue import Catalogue, Series
    from kakehashi.store.deidentify import Deidentifier
    from kakehashi.store.facets import Index
    from kakehashi.store.intake.packer import Packer
    from kakehashi.store.intake.parser import Parsed, Parser
    from kakehashi.store.intake.reports import Reports
    from kakehashi.store.receive import Entry, Inbox

PAUSE_S = 1.0
"""Seconds between two looks at the inbox when nothing is there."""

LONGEST_PAUSE_S = 60.0
"""Longest wait before what failed is tried again."""

SUMMARY_S = 60.0
"""Seconds between two summaries of what came."""

TIDY_S = 3600.0
"""Seconds between two looks for what the journal may lose: each reads all of it."""

ARRIVALS = "arrivals.json"
"""Name of the summary below the store's root."""

MOST_AT_ONCE = 1024
"""Objects that are taken before complete series are looked for."""

PASS_S = 5.0
"""Seconds from one pass over staging to the next while objects are being taken."""

TRIES = 3
"""How often an object is taken up again that the rest of the store has nothing against."""

_BATCH = 64

_log = logging.getLogger("kakehashi.intake")


@dataclass
class Progress:
    """What an :class:`Intake` has done since it began.

    Attributes
    ----------
    taken : int
        Objects that were de-identified and staged.
    again : int
        Objects that were in the store already, with the same content.
    quarantined : list of (str, str)
        Facility and reason of what was not taken.
    withdrawn : int
        Objects of people who withdrew; they were removed.
    packed, kept : int
        Series in the catalogue, and objects beside them that are no volumes.
    """

    taken: int = 0
    again: int = 0
    withdrawn: int = 0
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    packed: int = 0
    kept: int = 0


class Intake:
    """One store's intake; only one runs at a time.

    Parameters
    ----------
    store : StoreHost
    catalogue : Catalogue
    inbox : Inbox
    deidentifier : Deidentifier
        Says what became of an identifier; it sees no object.
    parser : Parser
        De-identifies objects.
    packer : Packer
        Packs series.
    reports : Reports
        Gets the text of reports.
    index : Index
        Gets the new series, for the facets.
    as_receiver : callable
        Gives a context in which this process has the rights of the receiver's account alone: to
        read what hospitals sent.
    clock : callable
        Gives the time in seconds since 1970.
    """

    def __init__(
        self,
        store: StoreHost,
        catalogue: Catalogue,
        *,
        inbox: Inbox,
        deidentifier: Deidentifier,
        parser: Parser,
        packer: Packer,
        reports: Reports,
        index: Index,
        as_receiver: Callable[[], AbstractContextManager[None]] = nullcontext,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._layout = Layout(store.root)
        self._catalogue = catalogue
        self._inbox = inbox
        self._parser = parser
        self._packer = packer
        self._reports = reports
        self._index = index
        self._as_receiver = as_receiver
        self._clock = clock
        self._staging = Staging(store.root)
        self._complete = Completeness(
            rule_of(store.receive),
            inbox=inbox,
            deidentifier=deidentifier,
            as_receiver=as_receiver,
            clock=clock,
        )
        # Its lock is taken before the first pack is there.
        self._layout.packs.mkdir(mode=0o750, exist_ok=True)
        self._position_file = store.root / "staging" / ".position.json"
        self._setbacks = Setbacks()
        self._passed = float("-inf")
        self._swept = False
        self._said: float | None = None
        self._tidied: float | None = None
        self.progress = Progress()

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop; what fails is tried again, later and later.

        Raises
        ------
        StoreError
            Another intake runs at this store.
        """
        pause = PAUSE_S
        behind = True
        with locked(self._store.root / "staging" / ".lock", wait=False), tolerant():
            # A run before may have been cut off while it packed.
            self._packer.clear()
            while not stop.is_set():
                try:
                    if behind:
                        # What was packed when the last run was cut off.
                        catch_up(self._store, self._catalogue, self._index)
                        behind = False
                    busy = self.take()
                    if not busy or self._clock() - self._passed >= PASS_S:
                        busy += self.finish()
                        self._passed = self._clock()
                    self._say()
                    self._tidy()
                    pause = PAUSE_S
                except Exception as error:
                    # What was packed may be in no index yet.
                    behind = True
                    _log.warning("the intake waits %.0f s: %s", pause, why_of(error))
                    stop.wait(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                    continue
                if not busy:
                    stop.wait(PAUSE_S)

    def once(self) -> None:
        """Take what is there, and pack all of it, complete or not.

        Raises
        ------
        StoreError
            Another intake runs at this store, or something failed.
        """
        with locked(self._store.root / "staging" / ".lock", wait=False), tolerant():
            self._packer.clear()
            while self.take():
                pass
            self.finish(quiet_s=0)
            if self._setbacks:
                raise StoreError(
                    f"{len(self._setbacks)} series could not be packed and wait in staging; the "
                    "log has the reasons"
                )
            catch_up(self._store, self._catalogue, self._index)
            self._say()
            self._tidy()

    def take(self, most: int = MOST_AT_ONCE) -> int:
        """De-identify and stage what the inbox has; return how many objects that were.

        Parameters
        ----------
        most : int
            Objects after which it is enough, so that what is complete gets packed meanwhile.
        """
        entries = self._waiting(most)
        for start in range(0, len(entries), _BATCH):
            batch = entries[start : start + _BATCH]
            withdrawn = self._catalogue.withdrawn()
            done: list[Entry] = []
            try:
                for entry in batch:
                    if self._take(entry, withdrawn):
                        done.append(entry)
            finally:
                # Together: each note of the journal waits for the disk.
                with self._as_receiver():
                    self._inbox.discard(*done)
            self._remember(batch[-1].position)
        return len(entries)

    def finish(self, *, quiet_s: float | None = None) -> int:
        """Pack the series that are complete; return how many.

        Parameters
        ----------
        quiet_s : float, optional
            Seconds without a new object after which a series is packed, complete or not; what
            :func:`kakehashi.store.intake.complete.complete` says by default.
        """
        # What comes while this goes on is not taken, so that no silence may be counted from then.
        now = self._clock()
        looked = False
        count = 0
        packed: list[Series] = []
        try:
            for staged in self._staging.list():
                if self._setbacks.rests(staged.series, self._clock()):
                    continue
                if not looked:
                    # Whatever is wrong there is the fault of no series.
                    self._complete.look(self._position())
                    looked = True
                try:
                    if self._is_complete(staged, quiet_s, now):
                        packed += self._finish(staged)
                        count += 1
                except (StoreError, OSError) as error:
                    self._set_back(staged, error)
                except Exception as error:
                    why = place_of(error)
                    _log.error("%s is set aside: unexpected %s", staged.series, why)
                    self._staging.set_aside(staged.folder)
                else:
                    self._setbacks.forget(staged.series)
        finally:
            # Together: each entry is a segment of the index.
            enter(self._store, self._catalogue, self._index, packed)
        return count

    def _set_back(self, staged: Staged, error: Exception) -> None:
        """Have a series wait and the others go on; if nothing can go on, say so."""
        # While the database is away it is nobody's fault.
        self._catalogue.withdrawn()
        self._setbacks.add(staged.series, self._clock())
        _log.warning("%s cannot be packed now, and waits: %s", staged.series, error)

    def _waiting(self, most: int) -> list[Entry]:
        position = self._position()
        with self._as_receiver():
            try:
                return list(islice(self._inbox.entries(after=position), most))
            except ForeignPositionError as error:
                _log.warning("the inbox is looked through from its beginning: %s", error)
        self._remember(0)
        with self._as_receiver():
            return list(islice(self._inbox.entries(), most))

    def _is_complete(self, staged: Staged, quiet_s: float | None, now: float) -> bool:
        if quiet_s is not None:
            return staged.last + quiet_s <= now
        return self._complete.ready(staged, self._there, now)

    def _there(self, series: str) -> set[str]:
        """Return the objects of a series that the store has, packed or kept."""
        kept = self._catalogue.kept_of_series(series)
        return {*self._packed(series), *(one.sop_uid for one in kept if one.sop_uid)}

    def _take(self, entry: Entry, withdrawn: frozenset[str]) -> bool:
        """Deal with an object; say whether it may leave the inbox."""
        try:
            descriptor = self._open(entry.path)
        except FileNotFoundError:
            # Moved into quarantine by a run that was killed before it could note that.
            _log.warning("%s is gone from the inbox; the receiver mends it", entry.path.name)
            return False
        try:
            parsed = self._parser.object(descriptor, entry.facility)
        except Unreadable as error:
            return self._refuse(entry, str(error))
        finally:
            os.close(descriptor)
        if parsed.patient in withdrawn:
            self.progress.withdrawn += 1
            return True
        held = parsed.held or (f"{parsed.left} identifier(s) remained" if parsed.left else "")
        if held:
            return self._refuse(entry, f"{HELD_BACK}{held}")
        try:
            return self._stage(entry, parsed)
        except StoreError:
            self._catalogue.withdrawn()
            if self._setbacks.add(str(entry.position), self._clock()) < TRIES:
                raise
        except OSError:
            raise
        except Exception as error:
            _log.error("an object of %s: unexpected %s", entry.facility, place_of(error))
        # Neither the disk nor the database is away: it is this object, and the others go on.
        self._setbacks.forget(str(entry.position))
        return self._refuse(entry, "cannot be taken over: the intake's log has the reason")

    def _open(self, path: Path) -> int:
        """Open a file of the inbox, with no other rights than the receiver has."""
        with self._as_receiver():
            # Whatever has put it there: a pipe would be waited for, a link leads anywhere.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                descriptor = os.open(path, flags)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                raise FileNotFoundError(path) from error
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise FileNotFoundError(path)

    def _stage(self, entry: Entry, parsed: Parsed) -> bool:
        known = self._packed(parsed.series)
        if parsed.sop in known:
            if known[parsed.sop] != hashlib.sha256(parsed.content).hexdigest():
                return self._refuse(entry, "other content under a UID that is in the store already")
            self.progress.again += 1
            return True
        report = parsed.report
        if report is not None and len(normalised(report)) > LONGEST_REPORT:
            return self._refuse(entry, "its report is longer than any that is kept")
        if report is None:
            refused = self._put(entry, parsed)
        else:
            with locked(self._layout.packs / ".lock", wait=True):
                # Whoever withdraws waits for this lock, and takes away what is there then.
                if parsed.patient in self._catalogue.withdrawn():
                    self.progress.withdrawn += 1
                    return True
                refused = self._put(entry, parsed)
                if not refused:
                    self._reports.add(
                        parsed.study, entry.facility, report, patient_id=parsed.patient
                    )
        if refused:
            return self._refuse(entry, refused)
        self.progress.taken += 1
        return True

    def _put(self, entry: Entry, parsed: Parsed) -> str:
        """Stage an object, or return why not."""
        origin = Origin(entry.facility, parsed.tier)
        return self._staging.put(parsed.series, parsed.sop, origin, parsed.patient, parsed.content)

    def _packed(self, series: str) -> dict[str, str]:
        """Return the objects of a series that is in the store: UID to SHA-256."""
        row = self._catalogue.series(series)
        return {} if row is None else _instances(self._layout.absolute(row.path), row.blocks)

    def _finish(self, staged: Staged) -> list[Series]:
        images = sorted(staged.folder.glob("*.dcm"))
        known = self._complete.known(staged, self._there)
        report = add(
            self._store,
            self._catalogue,
            images,
            origin=staged.origin,
            study_short=known.study_short,
            pack=self._packer,
            sweep=not self._swept,
        )
        self._swept = True
        self.progress.packed += len(report.packed)
        self.progress.kept += len(report.kept)
        for series, short in report.short.items():
            _log.warning("series %s is packed with %s", series, short)
        packed = report.packed
        if known.study is not None and known.study.reached:
            packed = packed + study_is_whole(self._store, self._catalogue, known.study_uid)
        elif known.study is not None:
            _log.warning("series %s: its study has %s", staged.series, known.study)
        self._staging.remove(staged)
        self._complete.forget(staged)
        return packed

    def _refuse(self, entry: Entry, reason: str) -> bool:
        try:
            with self._as_receiver():
                self._inbox.quarantine(entry, reason)
        except StoreError as error:
            _log.warning("left in the inbox, and passed over: %s", error)
            return False
        self.progress.quarantined.append((entry.facility, reason))
        return False

    def _say(self) -> None:
        """Write the figures for the portal, once a minute."""
        now = self._clock()
        if self._said is None or now - self._said >= SUMMARY_S:
            self._said = now
            senders = {sender.facility for sender in self._store.receive.senders}
            waiting = waiting_in(self._staging)
            try:
                with self._as_receiver():
                    found = summarise(self._inbox, waiting, senders)
                found.write(self._store.root / ARRIVALS)
            except Exception as error:
                # It holds up nobody's series, and is tried again.
                _log.warning("no figures for the portal: %s", why_of(error))

    def _tidy(self) -> None:
        """Let go of what the journal has of objects that were dealt with, once an hour.

        Also have the next packing look for what a killed run of another command has left.
        """
        now, position = self._clock(), self._position()
        if self._tidied is None or now - self._tidied >= TIDY_S:
            self._tidied = now
            self._swept = False
            try:
                with self._as_receiver():
                    self._inbox.trim(position)
            except Exception as error:
                # As above: the journal only gets longer.
                _log.warning("the journal keeps all it has: %s", why_of(error))

    def _position(self) -> int:
        try:
            position: int = json.loads(self._position_file.read_bytes())["position"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            # From the start: what was taken over is no longer in the inbox.
            return 0
        return position

    def _remember(self, position: int) -> None:
        with replacing(self._position_file, mode=0o600) as file:
            file.write(json.dumps({"position": position}).encode())


@lru_cache(maxsize=64)
def _instances(pack: Path, blocks: str) -> dict[str, str]:
    del blocks  # a part of the key: a pack of other content is another one
    with FileReader(pack) as reader:
        return {entry["sop"]: entry["sha256"] for entry, _ in open_pack(reader).original_headers()}
