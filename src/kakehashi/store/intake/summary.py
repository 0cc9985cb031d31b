"""The figures of what came, without anything that names a person, for the portal's page."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from typing import TYPE_CHECKING

from kakehashi.store.arrivals_summary import (
    ArrivalDay,
    Arrivals,
    FacilityArrivals,
    Quarantined,
    Waiting,
    public_reason,
)
from kakehashi.store.receive.arrivals import arrivals
from kakehashi.store.receive.figures import day_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kakehashi.store.intake.staging import Staging
    from kakehashi.store.receive import Inbox
    from kakehashi.store.receive.arrivals import Arrival
    from kakehashi.store.receive.quarantine import Held

DAYS = 14
"""Days that the summary looks back."""

HELD_BACK = "held back: "
"""How the reason begins of what the de-identification did not let through."""


def summarise(inbox: Inbox, waiting: Waiting, facilities: Iterable[str]) -> Arrivals:
    """Return the figures as they are now.

    Parameters
    ----------
    inbox : Inbox
    waiting : Waiting
        See :func:`waiting_in`.
    facilities : iterable of str
        All who may send: whoever has fallen silent must not be forgotten.

    Raises
    ------
    StoreError
        The receiver's journal, lists or quarantine are damaged.
    """
    by_facility: defaultdict[str, list[ArrivalDay]] = defaultdict(list)
    by_facility.update({name: [] for name in facilities})
    for one in arrivals(inbox, DAYS):
        by_facility[one.facility].append(_day(one))
    return Arrivals(
        written_at=dt.datetime.now(dt.UTC).replace(microsecond=0),
        facilities=tuple(
            FacilityArrivals(facility=name, days=tuple(days))
            for name, days in sorted(by_facility.items())
        ),
        quarantine=_quarantined(inbox.held.list()),
        waiting=waiting,
    )


def waiting_in(staging: Staging) -> Waiting:
    """Return how much waits until its series is complete."""
    objects = series = 0
    for one in staging.list():
        objects += one.objects
        series += 1
    return Waiting(objects=objects, series=series)


def _day(one: Arrival) -> ArrivalDay:
    listed = one.expected_studies > 0
    short = sum(study.expected - study.received for study in one.missing)
    return ArrivalDay(
        day=one.date,
        expected=one.expected if listed else None,
        received=one.received,
        missing=short if listed else None,
        studies_missing=len(one.missing) if listed else None,
        quarantined=max(0, one.quarantined),
        bytes=one.bytes,
    )


def _quarantined(held: Iterable[Held]) -> tuple[Quarantined, ...]:
    groups: defaultdict[tuple[str, str, bool], list[dt.date]] = defaultdict(list)
    for one in held:
        back = one.reason.startswith(HELD_BACK)
        key = one.receipt.facility, public_reason(one.reason), back
        groups[key].append(day_of(one.held_at))
    return tuple(
        Quarantined(
            facility=facility, reason=reason, held_back=back, count=len(days), oldest=min(days)
        )
        for (facility, reason, back), days in sorted(groups.items())
    )
