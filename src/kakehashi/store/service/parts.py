"""What the service is made of; each part can be another one in a test."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kakehashi.store.permission import permission
from kakehashi.store.service.work import Limiter, Workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from kakehashi.config import Project
    from kakehashi.store.catalogue import Catalogue
    from kakehashi.store.cohorts import Cohorts
    from kakehashi.store.facets import Index
    from kakehashi.store.layout import Layout
    from kakehashi.store.query import Query
    from kakehashi.store.service.reports import Reports
    from kakehashi.store.service.tokens import Tokens

THREADS = 4
PATIENCE_S = 30.0
PER_SECOND, BURST, TOGETHER = 50.0, 300, 3


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """That something was looked at; what was sought for is there as a digest only.

    Attributes
    ----------
    kind : str
        E.g. ``facets``, ``series``, ``export``.
    query_digest : str or None
        Of the query in its canonical form with the chosen values, under a key of the store: a
        plain hash of a name that was sought could be guessed.
    count : int
        Series counted or given.
    expires : int
        When the token ends with which it was asked, seconds since 1970.
    """

    kind: str
    session: str
    project: str
    person: str
    query_digest: str | None
    count: int
    expires: int


def _today() -> dt.date:
    return dt.datetime.now(dt.UTC).date()


def _unheard(event: AuditEvent) -> None:
    del event


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All that a request may need.

    Attributes
    ----------
    is_live : callable
        Says whether a session has its lease at this moment.
    project : callable
        Gives a project by its id, None if there is none.
    permission : callable
        See :func:`kakehashi.store.permission.permission`.
    audit : callable
        Is told of everything that was looked at, on a thread, before it is given.
    """

    tokens: Tokens
    is_live: Callable[[str], bool]
    project: Callable[[str], Project | None]
    index: Index
    catalogue: Catalogue
    cohorts: Cohorts
    reports: Reports
    layout: Layout
    permission: Callable[[Project, dt.date], Query] = permission
    today: Callable[[], dt.date] = _today
    audit: Callable[[AuditEvent], None] = _unheard
    workers: Workers = field(default_factory=lambda: Workers(THREADS, PATIENCE_S))
    limiter: Limiter = field(default_factory=lambda: Limiter(PER_SECOND, BURST, TOGETHER))
