"""Who looked at how much: all in the log, and what was given out in the audit trail.

Lists and tables stand in the trail before they go out. What a person sees while they click and
type is added up, session by session: the trail gets a record for each thousand rows and each
hundred pictures, and the rest when the session has ended, so that who goes through the whole
catalogue shows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kakehashi.errors import AuditError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kakehashi.audit import Audit
    from kakehashi.store.service.parts import AuditEvent

GIVEN = frozenset({"export", "freeze", "version", "diff"})
"""What gives out lists: a record each."""

MOST_UNSAID = {"page": 1000, "search": 1000, "series": 100, "thumbnail": 100}
"""What shows series, and how many of them stand in no record yet at most."""

SEARCH_S = 60.0
"""Seconds whose searches become one record, but for the first, and if they found less than that."""

_MOST_QUERIES = 50
_log = logging.getLogger("kakehashi.catalogue")


@dataclass
class _Seen:
    """What a session saw since the last record about it."""

    last: AuditEvent
    shown: Counter[str] = field(default_factory=Counter)
    searches: int = 0
    found: int = 0
    queries: dict[str, None] = field(default_factory=dict)
    searched_at: float | None = None


class Notes:
    """Takes notes; from any thread.

    Parameters
    ----------
    audit : Audit
    clock : callable
        Gives seconds since 1970, as the tokens' ends are counted.
    """

    def __init__(self, audit: Audit, clock: Callable[[], float] = time.time) -> None:
        self._audit = audit
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[str, _Seen] = {}

    def add(self, event: AuditEvent) -> None:
        """Note an event; it may wait for the disk.

        Raises
        ------
        AuditError
            The trail cannot be written; then nothing is to be given out.
        """
        _log.info(
            "looked at: %s, %d series, query %s, person %r, project %s, session %s",
            event.kind,
            event.count,
            event.query_digest,
            event.person,
            event.project,
            event.session,
        )
        if event.kind in GIVEN:
            self._write(event, event.kind, series=event.count, query_digest=event.query_digest)
        elif event.kind in MOST_UNSAID:
            with self._lock:
                self._add(event)

    def _add(self, event: AuditEvent) -> None:
        seen = self._sessions.setdefault(event.session, _Seen(event))
        seen.last = event
        if event.kind == "search":
            seen.searches += 1
            seen.found += event.count
            if event.query_digest is not None and len(seen.queries) < _MOST_QUERIES:
                seen.queries[event.query_digest] = None
            # The first at once: that there was a search stands there whatever happens next.
            if self._is_due(seen) or seen.found >= MOST_UNSAID["search"]:
                self._say_searches(seen)
                # Only now: what could not be written is due still, and the next is not given.
                seen.searched_at = self._clock()
            return
        seen.shown[event.kind] += event.count
        if seen.shown[event.kind] >= MOST_UNSAID[event.kind]:
            self._say_shown(seen)

    def flush(self, *, everything: bool = False) -> None:
        """Write what is due: searches of a minute, and what sessions saw whose token is over.

        Raises
        ------
        AuditError
            The trail cannot be written; what was not written stays due.
        """
        with self._lock:
            for session, seen in list(self._sessions.items()):
                over = everything or seen.last.expires <= self._clock()
                if over or self._is_due(seen):
                    self._say_searches(seen)
                    seen.searched_at = None
                if over:
                    self._say_shown(seen)
                    del self._sessions[session]

    def _is_due(self, seen: _Seen) -> bool:
        """Say whether searches are to be written that stand in no record, if there are any."""
        return seen.searched_at is None or self._clock() - seen.searched_at >= SEARCH_S

    def _say_searches(self, seen: _Seen) -> None:
        if not seen.searches:
            return
        self._write(
            seen.last,
            "search",
            searches=seen.searches,
            series=seen.found,
            query_digests=list(seen.queries),
        )
        seen.searches = seen.found = 0
        seen.queries.clear()

    def _say_shown(self, seen: _Seen) -> None:
        if not any(seen.shown.values()):
            return
        self._write(
            seen.last,
            "looked",
            rows=seen.shown["page"],
            series=seen.shown["series"],
            thumbnails=seen.shown["thumbnail"],
        )
        seen.shown.clear()

    def _write(self, event: AuditEvent, kind: str, **detail: Any) -> None:
        self._audit.append(
            f"catalogue.{kind}",
            session=event.session,
            person=event.person,
            detail={"project": event.project, **detail},
        )


def flush_or_say(notes: Notes) -> None:
    """Write what is due, and say in the log if that is not possible; it is tried again."""
    try:
        notes.flush()
    except AuditError as error:
        _log.error("%s", error)
