"""Which rows of the catalogue a project may see: the one place that says so."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from kakehashi.store.query import FALSE, Condition, Query, any_of, parse

if TYPE_CHECKING:
    import datetime as dt

    from kakehashi.config import Project


@lru_cache(maxsize=256)  # a list of many series takes a while to be made one
def permission(project: Project, today: dt.date) -> Query:
    """Return the condition that every row must meet which a project gets to see or count.

    It is a filter, and no facet: no choice of values ever widens it.

    Parameters
    ----------
    project : Project
    today : date
        In UTC. Both the first and the last day of a project belong to it.

    Returns
    -------
    Query
        ``FALSE`` before the project's first day and after its last.

    Raises
    ------
    StoreError
        The project's own query cannot be parsed.
    """
    if today > project.expires or (project.starts is not None and today < project.starts):
        return FALSE
    return scope(project)


def scope(project: Project) -> Query:
    """Return the condition without the days: what a project's view is built of.

    The authority looks at the days, at each grant and each renewal.
    """
    cohort = project.cohort
    granted: Query = Condition("tier", "<=", (project.tier,))
    for column, values in {
        "facility": cohort.facility,
        "modality": cohort.modality,
        "body_part": cohort.body_part,
        "manufacturer": cohort.manufacturer,
        "series_uid": cohort.series,
    }.items():
        if values:
            granted &= any_of(column, values)
    return granted if cohort.query is None else granted & parse(cohort.query)
