"""A person takes back the consent: all that the store holds of them goes, and stays away.

The order makes it safe to be cut off and repeated. First it is written down who withdrew: from
then on nothing new of them is taken in, and no cohort has them. Views and running sessions come
next, then the files, and the rows by which the files are found come last.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict, dataclass, field
from itertools import groupby, tee, zip_longest
from typing import TYPE_CHECKING, Any, Protocol

from kakehashi.errors import StoreError
from kakehashi.store.layout import Layout, blocks_path, locked
from kakehashi.store.view import build_view, unlink_series

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from kakehashi.config import Config
    from kakehashi.store.catalogue import Catalogue, Cohort, Kept, Series
    from kakehashi.store.cohorts import Affected
    from kakehashi.store.projects import Trail


class Index(Protocol):
    """The facets' index."""

    def withdraw(self, series_uids: Iterable[str]) -> object:
        """Leave series out of all answers from now on."""


class Cohorts(Protocol):
    """The record of frozen cohorts."""

    def withdraw(self, series_uids: Iterable[str]) -> list[Affected]:
        """Put tombstones in their place."""


class Reports(Protocol):
    """The texts of reports."""

    def withdraw(self, study_uids: Iterable[str], patient_id: str) -> int:
        """Remove the reports of a person."""


class Staging(Protocol):
    """Series that are not complete yet."""

    def withdraw(self, patient_id: str) -> int:
        """Remove what is there of a person."""


@dataclass
class Withdrawal:
    """What became of a person's data.

    Attributes
    ----------
    patient_id : str
        The store's key of the person.
    problems : list of str
        Views that could not be built anew; the person's links are out of them all the same.
    series, kept, reports, staged, quarantined : int
        Packs, objects beside them, reports, incomplete series and objects in quarantine that
        were removed.
    views : list of str
        Projects whose views hold or held a series.
    sessions : list of str
        Sessions of these that were ended.
    cohorts : list of dict
        Frozen cohorts that hold or held a series: ``project``, ``name`` (that of the view is
        empty), ``version``.
    trained : list of dict
        Sessions that were granted a view which held a series: ``session``, ``person``,
        ``project``, ``time``, ``version``. What was trained in them saw this person.
    """

    patient_id: str
    problems: list[str] = field(default_factory=list)
    series: int = 0
    kept: int = 0
    reports: int = 0
    staged: int = 0
    quarantined: int = 0
    views: list[str] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    cohorts: list[dict[str, Any]] = field(default_factory=list)
    trained: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Everything at a store that holds something of a person.

    Attributes
    ----------
    end_sessions : callable
        Ends all sessions of a project, and returns them.
    granted : callable
        Gives the grants of a project so far: ``session``, ``person``, ``time``, and ``until``
        when the session ended, None if it has not (ISO 8601).
    """

    config: Config
    catalogue: Catalogue
    index: Index
    cohorts: Cohorts
    reports: Reports
    staging: Staging
    trail: Trail
    end_sessions: Callable[[str], list[str]]
    granted: Callable[[str], list[dict[str, Any]]]


def withdraw(places: Places, patient_id: str, by: str, reason: str) -> Withdrawal:
    """Remove a person from the store.

    Parameters
    ----------
    places : Places
    patient_id : str
        The store's key of the person.
    by, reason : str
        Stand in the audit trail.

    Returns
    -------
    Withdrawal

    Raises
    ------
    StoreError
        Something could not be removed. What was done stays done; repeat it.
    """
    done = Withdrawal(patient_id)
    layout = Layout(places.config.need_store().root)
    detail = {"patient": patient_id, "reason": reason}
    places.trail.append("patient.withdrawn", person=by, detail=detail)
    places.catalogue.withdraw(patient_id, by, reason)
    # Nothing is found any more from here on; the lock may be a while in coming.
    places.index.withdraw(row.series_uid for row in places.catalogue.of_patient(patient_id)[0])
    layout.packs.mkdir(mode=0o750, exist_ok=True)
    # Whoever takes data in at this moment is waited for, and then knows it.
    with locked(layout.packs / ".lock", wait=True):
        _clear(places, done)
    removed = {"patient": patient_id, "series": done.series, "kept": done.kept}
    places.trail.append("patient.removed", person=by, detail=removed)
    return done


def _clear(places: Places, done: Withdrawal) -> None:
    patient_id = done.patient_id
    series, kept = places.catalogue.of_patient(patient_id)
    uids = [row.series_uid for row in series]
    places.index.withdraw(uids)
    done.cohorts = [
        {"project": one.project, "name": one.name, "version": one.version}
        for one in places.cohorts.withdraw(uids)
    ]
    for project, versions in _holding(places.catalogue, set(uids)).items():
        done.views.append(project)
        done.cohorts += [
            {"project": project, "name": "", "version": held.cohort.version} for held in versions
        ]
        done.trained += _trained(places.granted(project), versions)
        done.sessions += places.end_sessions(project)
    layout = Layout(places.config.need_store().root)
    # Also from views of projects that are no more, or were half removed.
    for folder in (layout.root / "views").glob("*/series"):
        unlink_series(folder, uids)
    for project in done.views:
        if any(project == one.id for one in places.config.projects):
            try:
                build_view(places.config, project, places.catalogue)
            except StoreError as error:
                done.problems.append(f"the view of {project} could not be built anew: {error}")
        # Once more: a session that begins from now on sees the new view.
        done.sessions += places.end_sessions(project)
    places.trail.append(
        "patient.seen",
        person=None,
        detail={
            "patient": patient_id,
            "cohorts": done.cohorts,
            "sessions": sorted({str(one["session"]) for one in done.trained}),
        },
    )
    done.staged = places.staging.withdraw(patient_id)
    done.reports = places.reports.withdraw({row.study_uid for row in series}, patient_id)
    done.series, done.kept = _remove(layout, places.catalogue, series, kept)


@dataclass(frozen=True, slots=True)
class _Held:
    """A frozen cohort of a view, and until when it was in force."""

    cohort: Cohort
    until: str | None


def _holding(catalogue: Catalogue, series: set[str]) -> dict[str, list[_Held]]:
    """Return, by project, the cohorts of its view that held one of the series."""
    found: dict[str, list[_Held]] = {}
    for project, versions in groupby(catalogue.cohort_history(), lambda one: one.project):
        following: Iterator[Cohort | None]
        now, following = tee(versions)
        next(following, None)
        for cohort, later in zip_longest(now, following):
            if not series.isdisjoint(cohort.series):
                held = _Held(cohort, None if later is None else later.frozen_at)
                found.setdefault(project, []).append(held)
    return found


def _trained(grants: list[dict[str, Any]], versions: list[_Held]) -> list[dict[str, Any]]:
    """Return the grants of sessions that were open while one of the cohorts was in force."""
    return [
        grant | {"project": held.cohort.project, "version": held.cohort.version}
        for held in versions
        for grant in grants
        if _overlap(held, grant)
    ]


def _overlap(held: _Held, grant: dict[str, Any]) -> bool:
    """Say whether a session was open while a cohort was in force."""
    begun, ended = _time(grant["time"]), _time(grant["until"])
    first, last = _time(held.cohort.frozen_at), _time(held.until)
    return (last is None or begun is None or begun <= last) and (
        ended is None or first is None or first <= ended
    )


def _time(text: str | None) -> dt.datetime | None:
    # To the second, as the records of cohorts have it.
    return None if text is None else dt.datetime.fromisoformat(text).replace(microsecond=0)


def _remove(
    layout: Layout, catalogue: Catalogue, series: list[Series], kept: list[Kept]
) -> tuple[int, int]:
    files: list[Path] = [layout.absolute(row.path) for row in kept]
    for row in series:
        pack = layout.absolute(row.path)
        files += [pack, blocks_path(pack)]
    try:
        for path in files:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"{error.filename}: cannot be removed ({error.strerror}); repeat it when it can"
        ) from error
    catalogue.forget((row.series_uid for row in series), (row.sha256 for row in kept))
    return len(series), len(kept)
