"""Take DICOM files into the store: pack what is a volume, keep the rest with the reason.

Each series is complete or not there at all: the pack is written under another name, made
durable, renamed, and only then gets its row. So an interrupted run is repeated without
harm, and what is in the store already is left alone.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kakehashi.errors import PackError, StoreError
from kakehashi.imaging.ozip import FileReader, open_pack
from kakehashi.store.catalogue import Catalogue, Kept, Series, SeriesFacts, now
from kakehashi.store.dicom import (
    UID,
    Instance,
    attribute,
    foreign,
    read_head,
    read_instance,
    references_of,
    refusal,
    tolerant,
)
from kakehashi.store.layout import (
    PART,
    Layout,
    blocks_path,
    give_to_group,
    locked,
    replacing,
)
from kakehashi.store.pack import PackInfo, pack_instances

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pydicom

    from kakehashi.config import StoreHost


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
        New in the catalogue.
    unchanged : list of str
        SeriesInstanceUIDs that were there already, of which some files came again.
    kept : list of Kept
        What could not be packed, with the reason; also what had been kept before.
    withdrawn : list of Path
        Of people who withdrew: not taken in.
    skipped : list of Path
        Neither files nor folders (links, devices): not followed, not read.
    """

    packed: list[Series] = field(default_factory=list)
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
            for folder in (layout.packs, layout.kept_folder):
                for stale in folder.glob(f"*/*{PART}"):
                    stale.unlink()
            return _Run(store, layout, catalogue, progress or _Silent(), origin).add(sources)
    except OSError as error:
        raise StoreError(
            f"{error.filename}: {error.strerror}; nothing half done is left"
        ) from error


@dataclass(frozen=True, slots=True)
class _Broken:
    path: Path
    reason: str
    sop: str


class _Run:
    """One run of :func:`add`, with the lock held."""

    def __init__(
        self,
        store: StoreHost,
        layout: Layout,
        catalogue: Catalogue,
        progress: Progress,
        origin: Origin,
    ) -> None:
        self._origin = origin
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
            if _text(head, "PatientID") in self._withdrawn:
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
                self._pack(series, members)
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
            there = {entry["sha256"] for entry, _ in open_pack(reader).original_headers()}
        for path in paths:
            if _sha256(path) in there:
                continue
            self._keep(
                path,
                "the series is in the store already, and this file is not one of those that "
                "were packed: other content under the same UID is refused",
            )
        self._report.unchanged.append(row.series_uid)

    def _pack(self, series: str, paths: list[Path]) -> None:
        earlier = list(self._earlier(series))
        tier = max([self._origin.tier, *(kept.tier for kept, _ in earlier)])
        good, broken, odd = _sort_out([*paths, *(path for _, path in earlier)])
        out = self._layout.pack(series)
        self._folder(out.parent)
        reason = _unreadable(broken, len(good))
        if reason is None:
            try:
                info = pack_instances(good, out, on_slice=self._progress.slices)
            except PackError as error:
                reason = str(error)
            except _DECODING as error:
                reason = f"cannot be packed: {type(error).__name__}"
            else:
                self._enter(info, out, tier)
        if reason is not None:
            odd += [(instance.path, reason) for instance in good]
            odd += [(item.path, item.reason) for item in broken]
        for path, reason in odd:
            self._keep(path, reason)

    def _folder(self, folder: Path) -> None:
        """Make a folder of packs, which the catalogue service may enter and nobody else."""
        if not folder.exists():
            folder.mkdir(mode=0o750)
            give_to_group(folder, self._group)

    def _earlier(self, series: str) -> Iterator[tuple[Kept, Path]]:
        """Yield images that came earlier and were kept: with what came now it may be whole."""
        for kept in self._catalogue.kept_of_series(series):
            path = self._layout.absolute(kept.path)
            head = read_head(path) if path.is_file() else None
            if head is not None and foreign(head) is None:
                yield kept, path

    def _enter(self, info: PackInfo, out: Path, tier: int) -> None:
        for path in (out, blocks_path(out)):
            give_to_group(path, self._group)
        facts = {slot: getattr(info.facts, slot) for slot in SeriesFacts.__slots__}
        row = Series(
            **facts,
            facility=self._origin.facility,
            tier=tier,
            path=self._layout.relative(out),
            size=info.size,
            blocks=info.blocks,
            added_at=now(),
        )
        self._catalogue.add_series(row)
        self._report.packed.append(row)
        for gone in self._catalogue.drop_kept(info.sources.values()):
            self._layout.absolute(gone.path).unlink(missing_ok=True)

    def _keep(self, path: Path, reason: str) -> None:
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        head = read_head(path)
        sop = _uid(head, "SOPInstanceUID")
        known = self._catalogue.kept(sha256)
        target = self._layout.absolute(known.path) if known else self._layout.kept(sop, sha256)
        if target.exists() and _sha256(target) != sha256:
            target = target.with_name(f"{target.stem}.{sha256[:16]}.dcm")
        if not target.exists():
            target.parent.mkdir(mode=0o750, exist_ok=True)
            with replacing(target) as file:
                file.write(content)
        row = Kept(
            sha256=sha256,
            sop_uid=sop,
            series_uid=_uid(head, "SeriesInstanceUID"),
            study_uid=_uid(head, "StudyInstanceUID"),
            patient_id=_text(head, "PatientID"),
            tier=max(self._origin.tier, known.tier if known else 1),
            modality=_text(head, "Modality"),
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
        study = _uid(head, "StudyInstanceUID")
        if not series and instances and study:
            series = self._series_with(instances, study)
        own = _uid(head, "SeriesInstanceUID")
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


def _unreadable(broken: list[_Broken], good: int) -> str | None:
    if not broken:
        return None
    return (
        f"{len(broken)} of {len(broken) + good} images of the series cannot be read; send them "
        f"again ({broken[0].reason})"
    )


def _sort_out(
    paths: list[Path],
) -> tuple[list[Instance], list[_Broken], list[tuple[Path, str]]]:
    """Divide a series' files into readable images, broken ones, and those not to be packed.

    Of equal files only one remains. A broken file whose image came intact too does no harm:
    it goes with those not to be packed.
    """
    good: dict[str, Instance] = {}
    broken: dict[str, _Broken] = {}
    odd: dict[str, tuple[Path, str]] = {}
    for path in paths:
        try:
            instance = read_instance(path)
        except PackError as error:
            sop = _uid(read_head(path), "SOPInstanceUID") or ""
            broken.setdefault(_sha256(path), _Broken(path, str(error), sop))
            continue
        if reason := refusal(instance.dataset):
            odd.setdefault(instance.sha256, (path, reason))
        else:
            good.setdefault(instance.sha256, instance)
    intact = {instance.sop for instance in good.values()}
    harmless = [(item.path, item.reason) for item in broken.values() if item.sop in intact]
    return (
        list(good.values()),
        [item for item in broken.values() if item.sop not in intact],
        [*odd.values(), *harmless],
    )


def _text(head: pydicom.Dataset | None, name: str) -> str | None:
    return None if head is None else str(attribute(head, name) or "") or None


def _uid(head: pydicom.Dataset | None, name: str) -> str | None:
    value = _text(head, name) or ""
    return value if UID.fullmatch(value) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
