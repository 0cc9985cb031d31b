"""Go through the whole store and say what is not as it should be; nothing is ever deleted.

It runs beside everything else: it reads at a rate, keeps objects and packs out of the page cache,
and looks again at the end at whatever seemed wrong. How far it has come stands in a file, so
that it goes on after whatever stopped it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from kakehashi.errors import StoreError
from kakehashi.store.catalogue import now
from kakehashi.store.fsckchecks import Checks, stated_files
from kakehashi.store.fsckfinding import Finding
from kakehashi.store.layout import (
    Layout,
    block_hashes,
    blocks_path,
    damaged_blocks,
    locked,
    replacing,
)
from kakehashi.store.pace import Pace
from kakehashi.store.view import beside, link_to

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kakehashi.config import Config
    from kakehashi.store.catalogue import Catalogue

MOST_FINDINGS = 10_000
"""More have one cause, which has to be found before each is listed."""

_SAVE_S = 1.0


class Progress(Protocol):
    """What is told of a running :func:`fsck`."""

    def at(self, stage: str, done: int, total: int | None, read: int) -> None:
        """Report the things of a stage that were looked at, and the bytes read in all."""


class _Silent:
    def at(self, stage: str, done: int, total: int | None, read: int) -> None:
        pass


@dataclass
class FsckReport:
    """What :func:`fsck` found.

    Attributes
    ----------
    findings : list of Finding
        What is wrong, after it was looked at twice.
    repaired : list of Finding
        What was wrong and is no more.
    checked : dict of str to int
        Series, kept objects, folders, views, received objects, staged series and segments of
        the index that were looked at.
    read : int
        Bytes read in this run.
    young : int
        What is not judged yet: files without a row that may be such as are being added, and
        series that wait to be entered into the index.
    outdated : dict of str to int
        Series of which a project's view has the earlier pack, whole, while the store has one that
        was packed anew: nothing is wrong, and the view may be built again.
    since : str
        When the check began that this run ended, ISO 8601, UTC.
    """

    findings: list[Finding] = field(default_factory=list)
    repaired: list[Finding] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)
    read: int = 0
    young: int = 0
    outdated: dict[str, int] = field(default_factory=dict)
    since: str = field(default_factory=now)

    def as_json(self) -> dict[str, object]:
        """Return it as JSON types."""
        return {"ok": not self.findings, **dataclasses.asdict(self)}


def fsck(
    config: Config,
    catalogue: Catalogue,
    *,
    rate: float | None = None,
    series: Sequence[str] = (),
    resume: bool = True,
    repair: bool = False,
    progress: Progress | None = None,
) -> FsckReport:
    """Check every row, pack, kept object, folder, view and area of the store.

    Parameters
    ----------
    config : Config
        With the store and the projects.
    catalogue : Catalogue
    rate : float, optional
        Bytes a second to read at most; without it as many as there are.
    series : sequence of str
        Only the packs of these; then there is nothing to go on with.
    resume : bool
        Go on where an earlier run was stopped, if one was.
    repair : bool
        Relink views whose pack is whole, and remove ``.part`` files older than a day: what
        loses nothing.
    progress : Progress, optional

    Returns
    -------
    FsckReport

    Raises
    ------
    StoreError
        Another run is going on, the database refuses, a series is not in the catalogue, or so
        much is wrong that it has one cause.
    KeyboardInterrupt
        As it came; how far it got is saved.
    """
    layout = Layout(config.need_store().root)
    pace = Pace(rate)
    checks = Checks(layout, catalogue, [project.id for project in config.projects], pace)
    run = _Run(layout, checks, pace, progress or _Silent())
    if series:
        for uid in series:
            if catalogue.series(uid) is None:
                raise StoreError(
                    f"no series {uid!r} in the store; `kakehashi store list` shows all"
                )
        return run.only(series)
    if not layout.packs.is_dir() and checks.count("series"):
        raise StoreError(f"{layout.packs} is not there, and the catalogue has series: mount it")
    with locked(layout.root / ".fsck.lock", wait=False):
        return run.all(resume=resume, repair=repair)


@dataclass
class _State:
    """How far it has come; what is wrong by the stage and key under which it was found."""

    since: str = field(default_factory=now)
    stage: str = ""
    after: str = ""
    checked: dict[str, int] = field(default_factory=dict)
    outdated: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, dict[str, list[Finding]]] = field(default_factory=dict)

    def as_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode()

    @classmethod
    def parse(cls, raw: bytes) -> _State:
        state = cls(**json.loads(raw))
        for found in state.wrong.values():
            for key, findings in found.items():
                found[key] = [Finding(**finding) for finding in findings]  # type: ignore[arg-type]
        return state


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    keys: Callable[[str], Iterator[str]]
    look: Callable[[str], list[Finding]]
    table: str | None = None
    again: Callable[[str, list[Finding]], list[Finding]] | None = None

    def look_again(self, key: str, before: list[Finding]) -> list[Finding]:
        return self.look(key) if self.again is None else self.again(key, before)


class _Run:
    def __init__(self, layout: Layout, checks: Checks, pace: Pace, progress: Progress) -> None:
        self._layout = layout
        self._checks = checks
        self._pace = pace
        self._progress = progress
        self._file = layout.root / ".fsck.json"
        self._stages = {
            stage.name: stage
            for stage in (
                _Stage("series", checks.series_after, checks.series, "series"),
                _Stage("kept", checks.kept_after, checks.kept, "kept"),
                _Stage("folders", checks.folders_after, checks.folder),
                _Stage("views", checks.views_after, checks.view),
                _Stage(
                    "received",
                    checks.received_after,
                    checks.received,
                    again=checks.received_again,
                ),
                _Stage("staged", checks.staged_after, checks.staged),
                _Stage("facets", checks.facets_after, checks.facets),
            )
        }

    def only(self, series: Sequence[str]) -> FsckReport:
        findings = []
        for done, uid in enumerate(series, start=1):
            findings += self._checks.series(uid)
            self._progress.at("series", done, len(series), self._pace.taken)
        return FsckReport(
            findings,
            checked={"series": len(series)},
            read=self._pace.taken,
            young=len(self._checks.young),
        )

    def all(self, *, resume: bool, repair: bool) -> FsckReport:
        state = self._earlier() if resume else _State()
        self._checks.outdated = state.outdated
        with self._saved(state):
            self._go(state)
            before = self._wrong(state)
            if repair:
                for finding in before:
                    self._repair(finding)
            # What is being taken in, built or withdrawn at this moment is not wrong.
            for name, found in state.wrong.items():
                for key, findings in found.items():
                    found[key] = self._stages[name].look_again(key, findings)
            after = self._wrong(state)
        self._file.unlink(missing_ok=True)
        repaired = [finding for finding in before if finding not in after] if repair else []
        return FsckReport(
            after,
            repaired,
            state.checked,
            self._pace.taken,
            len(self._checks.young),
            state.outdated,
            state.since,
        )

    def _earlier(self) -> _State:
        try:
            return _State.parse(self._file.read_bytes())
        except FileNotFoundError:
            return _State()
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{self._file}: how far the last run came cannot be read ({error}); start with "
                "--from-start"
            ) from error

    @contextmanager
    def _saved(self, state: _State) -> Iterator[None]:
        """Save how far it came also when it is stopped or fails."""
        try:
            yield
        except BaseException:
            self._save(state)
            raise

    def _save(self, state: _State) -> None:
        with replacing(self._file, mode=0o600) as file:
            file.write(state.as_json())

    def _go(self, state: _State) -> None:
        names = list(self._stages)
        saved = time.monotonic()
        for name in names[names.index(state.stage) if state.stage else 0 :]:
            if state.stage != name:
                state.stage, state.after = name, ""
            stage = self._stages[name]
            total = self._checks.count(stage.table) if stage.table else None
            state.checked.setdefault(name, 0)
            for key in stage.keys(state.after):
                if findings := stage.look(key):
                    state.wrong.setdefault(name, {})[key] = findings
                # Only now, so that what was being looked at is looked at again.
                state.after = key
                state.checked[name] += 1
                self._progress.at(name, state.checked[name], total, self._pace.taken)
                if findings:
                    self._enough(state)
                if time.monotonic() - saved >= _SAVE_S:
                    self._save(state)
                    saved = time.monotonic()

    def _enough(self, state: _State) -> None:
        wrong = self._wrong(state)
        if len(wrong) >= MOST_FINDINGS:
            listed = "; ".join(f"{one.path}: {one.what}" for one in wrong[:3])
            raise StoreError(
                f"{len(wrong)} things are wrong, which must have one cause (is the right storage "
                f"mounted?): {listed}; ... Mend it and start again with --from-start"
            )

    @staticmethod
    def _wrong(state: _State) -> list[Finding]:
        return [one for found in state.wrong.values() for each in found.values() for one in each]

    def _repair(self, finding: Finding) -> None:
        path = self._layout.absolute(finding.path)
        if finding.kind == "part":
            path.unlink(missing_ok=True)
        elif finding.kind == "view-link":
            self._relink(path)

    def _relink(self, link: Path) -> None:
        """Link a pack, or its hashes, into a view again, if no byte gets lost by that."""
        pack = self._layout.pack(link.stem)
        view = link.parents[1]
        source = pack if link.suffix == pack.suffix else blocks_path(pack)
        with locked(beside(self._layout, view.name, "lock"), wait=True):
            try:
                # A pack that the manifest does not name would not be read by any session.
                stated = stated_files(view).get(pack.name)
                if stated is None or stated[1] != self._checks.digest(link.stem):
                    return
                if damaged_blocks(pack, stated[1]):
                    return
            except (StoreError, OSError, ValueError, KeyError, TypeError):
                return
            # Another content under this name may be the last copy of something.
            if not link.exists() or block_hashes(link) == block_hashes(source):
                link_to(source, link)
