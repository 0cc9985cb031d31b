"""What a project's account sees of the store: hard links to its packs, and a manifest.

The cohort is frozen when the view is built: the list of series gets a version and a hash,
is recorded, and stands in the manifest until the view is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kakehashi.config import PROJECT_ID
from kakehashi.errors import StoreError
from kakehashi.store.catalogue import Catalogue, Cohort, Series, now
from kakehashi.store.layout import (
    BLOCK_SIZE,
    PART,
    Layout,
    blocks_path,
    give_to_group,
    locked,
    replacing,
    sync_folder,
)
from kakehashi.store.permission import scope

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kakehashi.config import Config, Project

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class ViewBuilt:
    """A project's view, as it is now.

    Attributes
    ----------
    cohort : Cohort
        The frozen list.
    manifest_sha256 : str
        Hexadecimal; what a grant names.
    linked, removed : int
        Series that came and went.
    """

    cohort: Cohort
    manifest_sha256: str
    linked: int
    removed: int


def build_view(config: Config, project: str, catalogue: Catalogue | None = None) -> ViewBuilt:
    """Build or bring up to date the view of a project.

    Parameters
    ----------
    config : Config
        With the store and the project.
    project : str
        The project's id.
    catalogue : Catalogue, optional
        If one is open already.

    Returns
    -------
    ViewBuilt

    Raises
    ------
    StoreError
        There is no such project, or a pack is missing or not the catalogue's. The view is
        then what it was before.
    """
    store = config.need_store()
    found = next((p for p in config.projects if p.id == project), None)
    if found is None:
        known = ", ".join(sorted(p.id for p in config.projects)) or "none"
        raise StoreError(f"no project {project!r} in the configuration; there are: {known}")
    own = catalogue is None
    catalogue = catalogue or Catalogue.open(store)
    try:
        return _build(Layout(store.root), catalogue, found, f"{store.account_prefix}view")
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}") from error
    finally:
        if own:
            catalogue.close()


def manifest_sha256(root: Path, project: str) -> str:
    """Return the SHA-256 (hexadecimal) of a project's manifest.

    Parameters
    ----------
    root : Path
        ``store.root``.
    project : str

    Raises
    ------
    StoreError
        The view was not built yet.
    """
    path = Layout(root).view(project) / MANIFEST
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise StoreError(
            f"project {project!r} has no readable view ({error.strerror}); build it with "
            f"`kakehashi store view {project}`"
        ) from error


def remove_view(config: Config, project: str) -> int:
    """Take a project's view away; its packs stay in the store.

    Grants on it have to be ended before: who is connected goes on reading what is open.

    Parameters
    ----------
    config : Config
        With the store; the project may have left it.
    project : str
        The project's id.

    Returns
    -------
    int
        Series that were in the view; 0 if there was none.

    Raises
    ------
    StoreError
        That is no project's id, or a file cannot be removed. Repeat it then: the view is out
        of reach at once, and only what it took up remains.
    """
    if not PROJECT_ID.fullmatch(project):
        raise StoreError(f"{project!r} is not a project's id, so that it can have no view")
    layout = Layout(config.need_store().root)
    view = layout.view(project)
    if not view.parent.is_dir():
        return 0
    try:
        with locked(beside(layout, project, "lock"), wait=True):
            removed = _clear(layout, project)
            if view.is_dir():
                # In one step, so that there never is a manifest of what is gone.
                view.rename(beside(layout, project, "gone"))
                sync_folder(view.parent)
                removed += _clear(layout, project)
            beside(layout, project, "checked").unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}") from error
    return removed


def beside(layout: Layout, project: str, what: str) -> Path:
    """Path of what belongs to a view and lies outside the chroot; no project has a dot."""
    return layout.view(project).with_name(f".{project}.{what}")


def _clear(layout: Layout, project: str) -> int:
    """Remove a view that was taken away; say how many series it had."""
    gone = beside(layout, project, "gone")
    if not gone.is_dir():
        return 0
    (gone / MANIFEST).unlink(missing_ok=True)
    count = len(list(gone.glob("series/*.ozx")))
    shutil.rmtree(gone)
    return count


def _made(folder: Path) -> Path:
    # sshd refuses a chroot that anyone but root could write to, or that lies in one.
    folder.mkdir(mode=0o755, exist_ok=True)
    folder.chmod(0o755)
    return folder


def _build(layout: Layout, catalogue: Catalogue, project: Project, group: str) -> ViewBuilt:
    view = layout.view(project.id)
    _made(view.parent)
    with locked(beside(layout, project.id, "lock"), wait=True):
        _clear(layout, project.id)
        folder = _made(_made(view) / "series")
        rows = catalogue.select(scope(project))
        if rows and folder.stat().st_dev != layout.packs.stat().st_dev:
            raise StoreError(
                f"{folder} and {layout.packs} lie on two file systems; a view is made of hard "
                "links, so put both on one"
            )
        memory = beside(layout, project.id, "checked")
        before = _recall(memory)
        seen: dict[str, _Seen] = {}
        with os.scandir(folder) as entries:
            there = {entry.name: entry.inode() for entry in entries}
        wanted: set[str] = set()
        absent: list[tuple[Path, int]] = []
        for row in rows:
            pack = layout.absolute(row.path)
            hashes = blocks_path(pack)
            found = seen[row.series_uid] = _check(pack, hashes, row, before.get(row.series_uid))
            for source, inode in ((pack, found.pack), (hashes, found.hashes)):
                wanted.add(source.name)
                if there.get(source.name) != inode:
                    absent.append((source, inode))
        cohort = _freeze(catalogue, project.id, rows)
        linked = sum(link_to(source, folder / source.name, inode) for source, inode in absent)
        _refuse_withdrawn(catalogue, rows, folder)
        sync_folder(folder)
        sha256 = _write_manifest(view, _manifest(cohort, rows), group)
        # Last, so that whatever the manifest in force names is there.
        removed = 0
        for name in there.keys() - wanted:
            (folder / name).unlink()
            removed += name.endswith(".ozx")
        if seen != before:
            _remember(memory, seen)
        return ViewBuilt(cohort, sha256, linked // 2, removed)


def _refuse_withdrawn(catalogue: Catalogue, rows: list[Series], folder: Path) -> None:
    """Take the links of who withdrew away again, if somebody did since the rows were chosen."""
    withdrawn = catalogue.withdrawn()
    gone = [row for row in rows if row.patient_id in withdrawn]
    for row in gone:
        unlink_series(folder, [row.series_uid])
    if gone:
        raise StoreError("a person withdrew while the view was built; build it again")


def unlink_series(folder: Path, series_uids: Iterable[str]) -> None:
    """Remove the links of series from a view's folder."""
    for uid in series_uids:
        for end in (".ozx", ".blocks"):
            (folder / f"{uid}{end}").unlink(missing_ok=True)


class _Seen(NamedTuple):
    """A pack and its block hashes when they were found to be what the catalogue says.

    As long as all of this is the same they need not be read again: nothing writes into a pack,
    and another file has another inode. ``ctime`` would change with each link.
    """

    blocks: str
    pack: int
    size: int
    written: int
    hashes: int
    hashes_size: int
    hashes_written: int


def _check(pack: Path, hashes: Path, row: Series, before: _Seen | None) -> _Seen:
    try:
        one, other = pack.stat(), hashes.stat()
        seen = _Seen(
            row.blocks,
            one.st_ino,
            one.st_size,
            one.st_mtime_ns,
            other.st_ino,
            other.st_size,
            other.st_mtime_ns,
        )
        same = seen == before or hashlib.sha256(hashes.read_bytes()).hexdigest() == row.blocks
    except OSError as error:
        raise StoreError(
            f"{error.filename} is missing, though series {row.series_uid} is in the catalogue; "
            "restore it from a backup"
        ) from error
    if seen.size != row.size or not same:
        raise StoreError(
            f"{pack} or its block hashes are not what the catalogue says; restore both from a "
            "backup"
        )
    return seen


def _recall(path: Path) -> dict[str, _Seen]:
    """Return what was checked before; nothing of a file that another than we could write."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return {}
            return {uid: _Seen(*values) for uid, values in json.load(file).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(path: Path, seen: dict[str, _Seen]) -> None:
    with replacing(path, mode=0o600) as file:
        file.write(json.dumps(seen, separators=(",", ":")).encode())


def _freeze(catalogue: Catalogue, project: str, rows: list[Series]) -> Cohort:
    listed = [[row.series_uid, row.blocks] for row in rows]
    sha256 = hashlib.sha256(_canonical(listed)).hexdigest()
    before = catalogue.cohort(project)
    if before is not None and before.sha256 == sha256:
        return before
    cohort = Cohort(
        project=project,
        version=before.version + 1 if before else 1,
        sha256=sha256,
        series=tuple(row.series_uid for row in rows),
        frozen_at=now(),
    )
    catalogue.add_cohort(cohort)
    return cohort


def link_to(source: Path, target: Path, inode: int | None = None) -> bool:
    """Make `target` the same file as `source`; say whether it was not yet.

    Raises
    ------
    StoreError
        The source is another file by now than the one with that inode; the target is as before.
    """
    try:
        os.link(source, target)
        _expect(target, inode)
    except FileExistsError:
        # Some file systems list other inodes than they state.
        if target.samefile(source):
            return False
        part = target.with_name(target.name + PART)
        part.unlink(missing_ok=True)
        os.link(source, part)
        _expect(part, inode)
        part.replace(target)
    return True


def _expect(link: Path, inode: int | None) -> None:
    if inode is not None and link.stat().st_ino != inode:
        link.unlink()
        raise StoreError(
            f"a series was packed anew while the view was built ({link.stem}); build it again"
        )


def _manifest(cohort: Cohort, rows: list[Series]) -> bytes:
    files = []
    for row in rows:
        facts = row.as_json()
        del facts["path"]
        entry = {
            "path": f"series/{row.series_uid}.ozx",
            "size": row.size,
            "blocks": row.blocks,
            "series": facts,
        }
        # One by one: many objects alive at a time cost more than what is done with them.
        files.append(_canonical(entry))
    document = {
        "kakehashi_manifest": 1,
        "project": cohort.project,
        "cohort": {"version": cohort.version, "sha256": cohort.sha256},
        "block_size": BLOCK_SIZE,
        "files": [],
    }
    before, empty, after = _canonical(document).partition(b"[]")
    return before + empty[:1] + b",".join(files) + empty[1:] + after


def _write_manifest(view: Path, content: bytes, group: str) -> str:
    path = view / MANIFEST
    if not path.exists() or path.read_bytes() != content:
        # Readable for the authority too, which names its hash in grants.
        with replacing(path, mode=0o644) as file:
            file.write(content)
        give_to_group(path, group)
    return hashlib.sha256(content).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
