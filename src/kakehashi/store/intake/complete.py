"""Whether a series that waits in staging is complete: by what was said of its size, or by silence.

What says how many objects there are: the series itself (Number of Series Related Instances,
Images in Acquisition), its study (Number of Study Related Instances), and the hospital's list of
what it sent, which counts by study. The first number that is reached ends the wait; a number that
is not reached makes it longer. Where no number is known, silence and the gaps decide.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Self

from kakehashi.errors import PackError
from kakehashi.store.dicom import Instance, attribute, read_head, refusal
from kakehashi.store.intake.setbacks import why_of
from kakehashi.store.receive.arrivals import listed
from kakehashi.store.stated import IN_SERIES, IN_STUDY, images_acquired, objects_stated
from kakehashi.store.volumes import divide

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from contextlib import AbstractContextManager
    from pathlib import Path

    import pydicom

    from kakehashi.store.deidentify import Deidentifier
    from kakehashi.store.intake.staging import Staged
    from kakehashi.store.receive import Inbox
    from kakehashi.store.receive.arrivals import Listed
    from kakehashi.store.receive.settings import Receive

SETTLE_S = 30.0
"""Seconds without a new object after which a number that is reached counts: it may be wrong."""

LOOK_S = 30.0
"""Seconds between two looks at the inbox and the hospitals' lists."""

_DAY_S = 86400.0

_log = logging.getLogger("kakehashi.intake")


@dataclass(frozen=True, slots=True)
class Count:
    """How many objects there are, and how many there should be."""

    came: int
    expected: int

    @property
    def reached(self) -> bool:
        """Whether all have come."""
        return self.came >= self.expected

    def __str__(self) -> str:
        return f"{self.came} of {self.expected} objects"


@dataclass(frozen=True, slots=True)
class Rule:
    """How long is waited after the newest object of a series.

    Attributes
    ----------
    settle_s : float
        Seconds where a number of objects is known and reached.
    quiet_s : float
        Seconds where none is known.
    patience_s : float
        Seconds where something is known to be missing, or seems to be.
    """

    settle_s: float
    quiet_s: float
    patience_s: float


def rule_of(settings: Receive) -> Rule:
    """Return the rule that ``store.receive`` sets."""
    quiet_s = settings.quiet_minutes * 60
    return Rule(min(SETTLE_S, quiet_s), quiet_s, max(quiet_s, settings.patience_hours * 3600))


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a series that waits.

    Attributes
    ----------
    last : float
        When its newest object came, seconds since 1970.
    arriving : bool
        Some of it waits in the inbox.
    series : Count or None
        By what its objects say of the series.
    acquired : Count or None
        By what its objects say of their acquisitions. These may have given other series too, so
        that it proves nothing where it is not reached.
    study : Count or None
        By what hospital or objects say of the study; those of all its series have come.
    study_uid : str
        StudyInstanceUID, de-identified.
    whole : bool
        Its images lie on regular grids, or were not looked at.
    """

    last: float
    arriving: bool = False
    series: Count | None = None
    acquired: Count | None = None
    study: Count | None = None
    study_uid: str = ""
    whole: bool = True

    @property
    def study_short(self) -> bool | None:
        """Whether something of the study is missing that may belong to it, None if unknown."""
        if self.series is not None and self.series.reached:
            return False
        return None if self.study is None else not self.study.reached


def complete(known: Known, rule: Rule, now: float) -> bool:
    """Say whether a series is packed now.

    Parameters
    ----------
    known : Known
    rule : Rule
    now : float
        Seconds since 1970.
    """
    if known.arriving:
        return False
    return now >= known.last + _wait_s(known, rule)


def _wait_s(known: Known, rule: Rule) -> float:
    # Its own number first: that of the study says nothing of which series lacks something.
    if known.series is not None:
        return rule.settle_s if known.series.reached else rule.patience_s
    reached = [count.reached for count in (known.study, known.acquired) if count is not None]
    if any(reached):
        return rule.settle_s
    if known.study is not None:
        return rule.patience_s
    return rule.quiet_s if known.whole else rule.patience_s


@dataclass(frozen=True, slots=True)
class _Heads:
    """What the files of a series say together.

    Attributes
    ----------
    came : int
        Different objects, with those that the store has already.
    study : str
        StudyInstanceUID, empty if there is none.
    in_series, in_study, acquired : int or None
        Objects that there should be.
    whole : bool
        Its images lie on regular grids, or cannot be judged.
    """

    came: int
    study: str
    in_series: int | None
    in_study: int | None
    acquired: int | None
    whole: bool

    @classmethod
    def of(cls, paths: Iterable[Path], before: Collection[str]) -> Self:
        """Read them; of the series the store has some objects before."""
        found = [(path, head) for path in paths if (head := read_head(path)) is not None]
        heads = [head for _, head in found]
        images = [_Placed.of(path, head) for path, head in found if refusal(head) is None]
        sops = {str(attribute(head, "SOPInstanceUID")) for head in heads}
        return cls(
            came=len(sops.union(before)),
            study=next((str(attribute(head, "StudyInstanceUID") or "") for head in heads), ""),
            in_series=objects_stated(heads, IN_SERIES),
            in_study=objects_stated(heads, IN_STUDY),
            acquired=images_acquired(heads),
            # Gaps in what came late say nothing: its neighbours are in the store.
            whole=bool(before) or _on_grids(images),
        )


class _Placed(Instance):
    """An image of which only the attributes were read."""

    @classmethod
    def of(cls, path: Path, head: pydicom.Dataset) -> Self:
        return cls(path, "", 0, head, b"", 0, b"")

    def pixel_bytes(self) -> bytes:
        """Return nothing: whether two are copies of each other is not asked for here."""
        return b""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A series when it was looked at; no UIDs of objects, as there may be many such series."""

    staged: Staged
    heads: _Heads


def _on_grids(images: list[_Placed]) -> bool:
    if not images:
        return True
    try:
        divide(sorted(images, key=lambda image: image.sop))
    except PackError:
        return False
    except Exception:
        # Attributes from outside can break it in any way: packing says what is wrong with them, and
        # waiting would mend nothing.
        return True
    return True


class Completeness:
    """Looks at the series in staging, at the inbox and at the hospitals' lists.

    Parameters
    ----------
    rule : Rule
        Its times also say how far back lists are looked at.
    inbox : Inbox
    deidentifier : Deidentifier
        Gives the UIDs that stand in staging.
    as_receiver : callable
        Gives a context with the rights of the receiver's account.
    clock : callable
        Gives the time in seconds since 1970.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        inbox: Inbox,
        deidentifier: Deidentifier,
        as_receiver: Callable[[], AbstractContextManager[None]],
        clock: Callable[[], float],
    ) -> None:
        self.rule = rule
        self._inbox = inbox
        self._deidentifier = deidentifier
        self._as_receiver = as_receiver
        self._clock = clock
        self._looked: float | None = None
        self._unread = ""
        self._arriving: frozenset[str] = frozenset()
        self._studies: dict[tuple[str, str], Listed] = {}
        self._seen: dict[str, _Seen] = {}

    def look(self, position: int) -> None:
        """Look at what waits behind a position of the inbox, and at the lists; not too often.

        Raises
        ------
        StoreError
            The inbox cannot be read.
        """
        if self._looked is not None and self._clock() - self._looked < LOOK_S:
            return
        with self._as_receiver():
            arriving = {entry.series for entry in self._inbox.entries(after=position)}
        self._arriving = frozenset(map(self._deidentifier.uid, arriving))
        self._studies = self._listed()
        # Also what was withdrawn, or set aside.
        self._seen = {uid: one for uid, one in self._seen.items() if one.staged.folder.is_dir()}
        # Not when it began: where that takes longer, it would begin again at once.
        self._looked = self._clock()

    def _listed(self) -> dict[tuple[str, str], Listed]:
        """Return what lists say of studies; nothing while one of them is damaged.

        Then a study that lacks something is packed sooner, and again when that comes. Nothing is
        lost, and nothing waits for the day on which somebody mends the file.
        """
        # A study stands in the list of the day on which it was sent, which may be the day before.
        days = 2 + ceil(self.rule.patience_s / _DAY_S)
        uid = self._deidentifier.uid
        try:
            with self._as_receiver():
                counts = listed(self._inbox, days)
            found = {(facility, uid(study)): one for (facility, study), one in counts.items()}
        except Exception as error:
            # The receiver's account wrote them: whatever stands there, it must not stop this.
            why = why_of(error)
            if why != self._unread:
                _log.warning("the hospitals' lists cannot be read, and count for nothing: %s", why)
            self._unread = why
            return {}
        self._unread = ""
        return found

    def known(self, staged: Staged, there: Callable[[str], Collection[str]]) -> Known:
        """Return what is known of a series, after a :meth:`look`.

        Parameters
        ----------
        staged : Staged
        there : callable
            Gives the SOPInstanceUIDs of a series that are in the store already.
        """
        heads = self._see(staged, there).heads
        return Known(
            last=staged.last,
            arriving=staged.series in self._arriving,
            series=_count(heads.came, heads.in_series),
            acquired=_count(heads.came, heads.acquired),
            study=self._study(staged.origin.facility, heads),
            study_uid=heads.study,
            whole=heads.whole,
        )

    def ready(self, staged: Staged, there: Callable[[str], Collection[str]], now: float) -> bool:
        """Say whether a series is packed at a time; see :meth:`known`."""
        # More may come any moment, so its files are not read before.
        return now >= staged.last + self.rule.settle_s and complete(
            self.known(staged, there), self.rule, now
        )

    def forget(self, staged: Staged) -> None:
        """Let go of what is known of a series that was packed."""
        self._seen.pop(staged.series, None)

    def _see(self, staged: Staged, there: Callable[[str], Collection[str]]) -> _Seen:
        """Look at a series, once for as long as nothing more of it comes."""
        seen = self._seen.get(staged.series)
        if seen is None or seen.staged != staged:
            paths = sorted(staged.folder.glob("*.dcm"))
            seen = _Seen(staged, _Heads.of(paths, there(staged.series)))
            self._seen[staged.series] = seen
        return seen

    def _study(self, facility: str, heads: _Heads) -> Count | None:
        study = self._studies.get((facility, heads.study))
        if study is None:
            return None
        return _count(study.received, study.expected or heads.in_study)


def _count(came: int, expected: int | None) -> Count | None:
    return None if expected is None else Count(came, expected)
