"""Take DICOM files into the store: pack what is a volume, keep the rest with the reason.

Each series is complete or not there at all: the pack is written under another name, made
durable, renamed, and only then gets its row. So an interrupted run is repeated without
harm, and what is in the store already is left alone.

New images of a series that is packed already are packed with it anew, into what packing all of
them at once had given. Until its row names the new pack, the old one counts; a run that was cut
off in between is mended by the next one of the same hospital that meets the series.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kakehashi.errors import PackError, StoreError
from kakehashi.imaging.ozip import FileReader, open_pack
from kakehashi.store.catalogue import Catalogue, Kept, Series, SeriesFacts, now
from kakehashi.store.dicom import (
    UID,
    Instance,
    foreign,
    read_head,
    references_of,
    tolerant,
)
from kakehashi.store.found import Found, sha256_of, text_of, uid_of
from kakehashi.store.layout import (
    PART,
    Layout,
    block_hashes,
    blocks_path,
    give_to_group,
    locked,
    replacing,
)
from kakehashi.store.pack import PackInfo, pack_instances
from kakehashi.store.repack import packed_instances

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import pydicom

    from kakehashi.config import StoreHost


INCOMPLETE = "incomplete"
"""Flag of a series of which fewer objects came than they themselves say there are."""

INCOMPLETE_STUDY = "incomplete-study"
"""Flag of a series of a study of which fewer objects came than were stated."""

_OTHER_HOSPITAL = "its series is in the store already, and came from another hospital"

# What came from outside may break a decoder in many ways, and must not hold up the others.
_DECODING = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)


class Progress(Protocol):
    """What is told of a running :func:`add`."""

    def files(self, done: int, total: int) -> None:
        """Report files whose headers were read."""

    def series(self, done: int, total: int) -> None:
        """Report series that were dealt with."""

    def slices(self, done: int, total: int) -> None:
        """Report slices of the series that is being packed."""


class Packing(Protocol):
    """What makes the pack of a series; see :func:`kakehashi.store.pack.pack_instances`."""

    def __call__(
        self,
        instances: Sequence[Instance],
        out: Path,
        *,
        on_slice: Callable[[int, int], None] | None = None,
    ) -> PackInfo:
        """Pack instances that were read already."""


class _Silent:
    def files(self, done: int, total: int) -> None:
        pass

    def series(self, done: int, total: int) -> None:
        pass

    def slices(self, done: int, total: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of files besides what stands in them.

    Attributes
    ----------
    facility : str
        The hospital, by the store's name for it.
    tier : int
        How much of the person they may still show: 1 (least) to 3.
    """

    facility: str = ""
    tier: int = 1


@dataclass
class AddReport:
    """What :func:`add` did.

    Attributes
    ----------
    packed : list of Series
        New in the catalogue, or packed anew.
    short : dict of str to str
        Of those of them that are not whole, how many objects of how many there are.
    unchanged : list of str
        SeriesInstanceUIDs that were there already, of which nothing new could be packed.
    kept : list of Kept
        What could not be packed, with the reason; also what had been kept before.
    withdrawn : list of Path
        Of people who withdrew: not taken in.
    skipped : list of Path
        Neither files nor folders (links, devices): not followed, not read.
    """

    packed: list[Series] = field(default_factory=list)
    short: dict[str, str] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    withdrawn: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)


def add(
    store: StoreHost,
    catalogue: Catalogue,
    sources: Iterable[Path],
    progress: Progress | None = None,
    *,
    origin: Origin = Origin(),
    study_short: bool | None = None,
    pack: Packing = pack_instances,
    sweep: bool = True,
) -> AddReport:
    """Take files into the store.

    Parameters
    ----------
    store : StoreHost
        Where the store is.
    catalogue : Catalogue
    sources : iterable of Path
        Files, and folders that are searched to the bottom.
    progress : Progress, optional
    origin : Origin, optional
        From where the files are, and who may have them.
    study_short : bool, optional
        Whether fewer objects of the files' study came than were stated; as before by default.
    pack : callable, optional
        What makes a pack; by default it is made in this process.
    sweep : bool, optional
        Whether half written files of killed runs are looked for in all folders first.

    Returns
    -------
    AddReport

    Raises
    ------
    StoreError
        A source or the store cannot be used, or another run is going on. Series that were
        finished before stay finished; start it again to go on.
    """
    layout = Layout(store.root)
    try:
        for folder in (layout.packs, layout.kept_folder):
            folder.mkdir(mode=0o750, exist_ok=True)
        give_to_group(layout.packs, f"{store.account_prefix}view")
        with locked(layout.packs / ".lock", wait=False), tolerant():
            if sweep:
                for folder in (layout.packs, layout.kept_folder):
                    for stale in folder.glob(f"*/*{PART}"):
                        stale.unlink()
            run = _Run(
                store,
                layout,
                catalogue,
                progress or _Silent(),
                origin=origin,
                study_short=study_short,
                pack=pack,
            )
            return run.add(sources)
    except OSError as error:
        raise StoreError(
            f"{error.filename}: {error.strerror}; nothing half done is left"
        ) from error


def study_is_whole(store: StoreHost, catalogue: Catalogue, study_uid: str) -> list[Series]:
    """Take :data:`INCOMPLETE_STUDY` from all series of a study; return the rows that changed."""
    with locked(Layout(store.root).packs / ".lock", wait=True):
        changed = [
            replace(row, flags=tuple(flag for flag in row.flags if flag != INCOMPLETE_STUDY))
            for row in catalogue.list_series(study=study_uid)
            if INCOMPLETE_STUDY in row.flags
        ]
        for row in changed:
            catalogue.replace_series(row)
    return changed


class _Run:
    """One run of :func:`add`, with the lock held."""

    def __init__(
        self,
        store: StoreHost,
        layout: Layout,
        catalogue: Catalogue,
        progress: Progress,
        *,
        origin: Origin,
        study_short: bool | None,
        pack: Packing,
    ) -> None:
        self._make = pack
        self._origin = origin
        self._study_short = study_short
        self._group = f"{store.account_prefix}view"
        self._layout = layout
        self._catalogue = catalogue
        self._progress = progress
        self._report = AddReport()
        # With the lock held: who withdraws now waits until this run has ended.
        self._withdrawn = catalogue.withdrawn()

    def add(self, sources: Iterable[Path]) -> AddReport:
        groups: dict[str, list[Path]] = {}
        others: list[tuple[Path, str]] = []
        paths = list(self._files(sources))
        for done, path in enumerate(paths, start=1):
            head = read_head(path)
            if text_of(head, "PatientID") in self._withdrawn:
                self._report.withdrawn.append(path)
                self._progress.files(done, len(paths))
                continue
            reason = "not DICOM" if head is None else foreign(head)
            if head is None or reason is not None:
                others.append((path, reason or ""))
            else:
                groups.setdefault(str(head.SeriesInstanceUID), []).append(path)
            self._progress.files(done, len(paths))
        for done, (series, members) in enumerate(sorted(groups.items()), start=1):
            if row := self._catalogue.series(series):
                self._again(row, members)
            else:
                self._pack(series, members, self._origin.tier)
            self._progress.series(done, len(groups))
        # After the packs, so that references to them can be resolved.
        for path, reason in others:
            self._keep(path, reason)
        return self._report

    def _files(self, sources: Iterable[Path]) -> Iterator[Path]:
        for source in sources:
            if not source.exists():
                raise StoreError(f"{source} is not there; name a file or folder with DICOM files")
            for path in _below(source):
                # A link could lead anywhere, also to what is none of the store's business.
                if stat.S_ISREG(path.lstat().st_mode):
                    yield path
                else:
                    self._report.skipped.append(path)

    def _again(self, row: Series, paths: list[Path]) -> None:
        """Deal with files of a series that is in the store."""
        with FileReader(self._layout.absolute(row.path)) as reader:
            there = {one["sop"]: one["sha256"] for one, _ in open_pack(reader).original_headers()}
        known = frozenset(there.values())
        ours = row.facility == self._origin.facility
        late, again = [], False
        for path in paths:
            if sha256_of(path) in known:
                again = True
            elif uid_of(read_head(path), "SOPInstanceUID") in there:
                self._keep(
                    path,
                    "the series is in the store already, and this file is not one of those that "
                    "were packed: other content under the same UID is refused",
                )
            elif ours:
                late.append(path)
            else:
                self._keep(path, _OTHER_HOSPITAL)
        before = len(self._report.packed)
        # What was cut off is mended by the hospital whose series it is: only there is it known
        # how much the images may show that had gone into the pack and not into its row.
        level = self._is_level(row)
        if late or (ours and not level):
            tier = self._origin.tier if late or again else row.tier
            self._pack(row.series_uid, late, tier, row)
        elif level:
            self._drop_kept(known)
        if len(self._report.packed) == before:
            self._report.unchanged.append(row.series_uid)

    def _is_level(self, row: Series) -> bool:
        """Say whether the pack is the one that its row names, by the looks of it."""
        pack = self._layout.absolute(row.path)
        hashes = hashlib.sha256(blocks_path(pack).read_bytes()).hexdigest()
        return pack.stat().st_size == row.size and hashes == row.blocks

    def _pack(self, series: str, paths: list[Path], tier: int, row: Series | None = None) -> None:
        """Pack a series; if it has a row, with what is in its pack."""
        with ExitStack() as stack:
            old: list[Instance] = []
            reason = None
            if row is not None:
                try:
                    self._check(row)
                    old += stack.enter_context(packed_instances(self._layout.absolute(row.path)))
                except (PackError, StoreError) as error:
                    reason = str(error)
            packed = {instance.sop for instance in old}
            earlier = [one for one in self._earlier(series) if one[0].sop_uid not in packed]
            found = Found.of([*paths, *(path for _, path in earlier)], old)
            if reason is None:
                highest = max(tier, *(kept.tier for kept, _ in earlier), 1)
                reason = self._try(found, series, highest, row)
            if reason is not None and old and earlier and paths:
                # What waits beside a pack must not keep others out of it.
                new = Found.of(paths, old)
                if self._try(new, series, tier, row) is None:
                    found, reason = new, None
        odd = list(found.odd)
        if reason is not None:
            if row is not None:
                reason = f"the series is in the store without it: {reason}"
            if found.short:
                reason = f"{reason}; {found.short} came"
            odd += [(instance.path, reason) for instance in found.good]
            odd += [(item.path, item.reason) for item in found.broken]
        for path, why in odd:
            self._keep(path, why)

    def _check(self, row: Series) -> None:
        """Refuse to go on with a pack that is damaged.

        It may be newer than its row, or older than its hashes, where a run was cut off.
        """
        pack = self._layout.absolute(row.path)
        actual = hashlib.sha256(block_hashes(pack)).hexdigest()
        said = hashlib.sha256(blocks_path(pack).read_bytes()).hexdigest()
        if actual not in {row.blocks, said}:
            raise StoreError("its pack is damaged; restore it from a backup and add this again")

    def _try(self, found: Found, series: str, tier: int, row: Series | None) -> str | None:
        """Pack and enter a series, or return why that cannot be."""
        if found.unreadable:
            return found.unreadable
        if row is not None:
            tier = max(tier, row.tier)
            if not found.good and self._is_level(row):
                return None  # nothing of it belongs into the pack
        out = self._layout.pack(series)
        self._folder(out.parent)
        try:
            info = self._make([*found.old, *found.good], out, on_slice=self._progress.slices)
        except PackError as error:
            return str(error)
        except _DECODING as error:
            return f"cannot be packed: {type(error).__name__}"
        self._enter(info, out, tier, row, found.short)
        return None

    def _folder(self, folder: Path) -> None:
        """Make a folder of packs, which the catalogue service may enter and nobody else."""
        if not folder.exists():
            folder.mkdir(mode=0o750)
            give_to_group(folder, self._group)

    def _earlier(self, series: str) -> Iterator[tuple[Kept, Path]]:
        """Yield images that came earlier and were kept: with what came now it may be whole."""
        for kept in self._catalogue.kept_of_series(series):
            path = self._layout.absolute(kept.path)
            if kept.reason == _OTHER_HOSPITAL:
                continue
            head = read_head(path) if path.is_file() else None
            if head is not None and foreign(head) is None:
                yield kept, path

    def _enter(
        self, info: PackInfo, out: Path, tier: int, before: Series | None, short: str
    ) -> None:
        for path in (out, blocks_path(out)):
            give_to_group(path, self._group)
        facts = {slot: getattr(info.facts, slot) for slot in SeriesFacts.__slots__}
        study_short = self._study_short
        if study_short is None:
            study_short = before is not None and INCOMPLETE_STUDY in before.flags
        lacking = {INCOMPLETE: bool(short), INCOMPLETE_STUDY: study_short}
        facts["flags"] += tuple(flag for flag, holds in lacking.items() if holds)
        row = Series(
            **facts,
            facility=self._origin.facility if before is None else before.facility,
            tier=tier,
            path=self._layout.relative(out),
            size=info.size,
            blocks=info.blocks,
            added_at=now(),
        )
        if before is None:
            self._catalogue.add_series(row)
        else:
            self._catalogue.replace_series(row)
        self._report.packed.append(row)
        if short:
            self._report.short[row.series_uid] = short
        self._drop_kept(info.sources.values())

    def _drop_kept(self, sha256: Iterable[str]) -> None:
        """Let go of kept objects that are in a pack."""
        for gone in self._catalogue.drop_kept(sha256):
            self._layout.absolute(gone.path).unlink(missing_ok=True)

    def _keep(self, path: Path, reason: str) -> None:
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        head = read_head(path)
        sop = uid_of(head, "SOPInstanceUID")
        known = self._catalogue.kept(sha256)
        target = self._layout.absolute(known.path) if known else self._layout.kept(sop, sha256)
        if target.exists() and sha256_of(target) != sha256:
            target = target.with_name(f"{target.stem}.{sha256[:16]}.dcm")
        if not target.exists():
            target.parent.mkdir(mode=0o750, exist_ok=True)
            with replacing(target) as file:
                file.write(content)
        row = Kept(
            sha256=sha256,
            sop_uid=sop,
            series_uid=uid_of(head, "SeriesInstanceUID"),
            study_uid=uid_of(head, "StudyInstanceUID"),
            patient_id=text_of(head, "PatientID"),
            tier=max(self._origin.tier, known.tier if known else 1),
            modality=text_of(head, "Modality"),
            reason=reason,
            path=self._layout.relative(target),
            size=len(content),
            added_at=known.added_at if known else now(),
            refers_to=self._references(head),
        )
        self._catalogue.add_kept(row)
        self._report.kept.append(row)

    def _references(self, head: pydicom.Dataset | None) -> tuple[str, ...]:
        if head is None:
            return ()
        series, instances = references_of(head)
        study = uid_of(head, "StudyInstanceUID")
        if not series and instances and study:
            series = self._series_with(instances, study)
        own = uid_of(head, "SeriesInstanceUID")
        return tuple(sorted(uid for uid in series - {own or ""} if UID.fullmatch(uid)))

    def _series_with(self, instances: set[str], study: str) -> set[str]:
        """Find, in a study, the series that hold some instances."""
        found = set()
        for row in self._catalogue.list_series(study=study):
            with FileReader(self._layout.absolute(row.path)) as reader:
                if instances.intersection(open_pack(reader).instances):
                    found.add(row.series_uid)
        return found


def _below(source: Path) -> Iterator[Path]:
    if not source.is_dir():
        yield source
        return
    for folder, folders, names in os.walk(source):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names))
