"""What one look of ``fsck`` at a series, a kept object, a folder or a view finds wrong.

Nothing here changes a file. Each look can be repeated, so that what somebody was just about to
change is looked at again before it is called wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kakehashi.errors import StoreError
from kakehashi.imaging.ozip import FileReader, open_pack
from kakehashi.store.fsckareas import Areas
from kakehashi.store.fsckfinding import STALE_S, YOUNG_S, Finding, blocks_of
from kakehashi.store.layout import PART, Layout, blocks_path, locked
from kakehashi.store.view import MANIFEST, beside

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from kakehashi.store.catalogue import Catalogue
    from kakehashi.store.pace import Pace

_PAGE = 500
_RESTORE = "restore it from a backup of the packs, or add the series again"


class Checks:
    """The looks at one store.

    Parameters
    ----------
    layout : Layout
    catalogue : Catalogue
    projects : iterable of str
        Those of the configuration.
    pace : Pace
        For what is read of packs and kept objects.

    Attributes
    ----------
    young : set of str
        Files without a row that may be such as are being added, and packs of series that wait for
        the index.
    outdated : dict of str to int
        Series of which a view has the pack that it was built with, and the store another one, by
        the project.
    """

    def __init__(
        self, layout: Layout, catalogue: Catalogue, projects: Iterable[str], pace: Pace
    ) -> None:
        self._layout = layout
        self._catalogue = catalogue
        self._projects = frozenset(projects)
        self._pace = pace
        self.young: set[str] = set()
        self.outdated: dict[str, int] = {}
        self._areas = Areas(layout, catalogue, pace, self.young)
        self.received_after, self.received = self._areas.received_after, self._areas.received
        self.received_again = self._areas.received_again
        self.staged_after, self.staged = self._areas.staged_after, self._areas.staged
        self.facets_after, self.facets = self._areas.facets_after, self._areas.facets

    # What there is to look at, in an order that stays the same.

    def count(self, table: str) -> int:
        """Return the number of rows of a table."""
        with self._catalogue.transaction() as connection:
            return connection.execute(
                sa.select(sa.func.count()).select_from(sa.table(table))
            ).scalar_one()

    def series_after(self, after: str) -> Iterator[str]:
        """Yield the SeriesInstanceUIDs of the catalogue."""
        return self._keys("series", "series_uid", after)

    def kept_after(self, after: str) -> Iterator[str]:
        """Yield the hashes of the kept objects."""
        return self._keys("kept", "sha256", after)

    def _keys(self, table: str, column: str, after: str) -> Iterator[str]:
        key: sa.ColumnClause[str] = sa.column(column, sa.Text)
        while True:
            query = sa.select(key).select_from(sa.table(table)).where(key > after)
            with self._catalogue.transaction() as connection:
                page = connection.execute(query.order_by(key).limit(_PAGE)).scalars().all()
            yield from page
            if len(page) < _PAGE:
                return
            after = page[-1]

    def folders_after(self, after: str) -> Iterator[str]:
        """Yield the folders of packs and kept objects, relative to the root."""
        for top in (self._layout.kept_folder, self._layout.packs):
            if top.is_dir():
                below = (path for path in top.iterdir() if path.is_dir())
                names = sorted(self._layout.relative(path) for path in (top, *below))
                yield from (name for name in names if name > after)

    def views_after(self, after: str) -> Iterator[str]:
        """Yield the projects that have a view's folder."""
        top = self._layout.view("-").parent
        if top.is_dir():
            names = (path.name for path in top.iterdir() if path.is_dir())
            yield from sorted(n for n in names if not n.startswith(".") and n > after)

    def digest(self, uid: str) -> str | None:
        """Return what the catalogue says of a series' block hashes, None if it has no such."""
        row = self._rows("series", ["blocks"], "series_uid", [uid]).get(uid)
        return str(row["blocks"]) if row else None

    # The looks.

    def series(self, uid: str) -> list[Finding]:
        """Look at a series: its row, its pack, its block hashes. The whole pack is read."""
        columns = ["path", "size", "blocks", "slices", "volumes"]
        found = self._rows("series", columns, "series_uid", [uid])
        if uid not in found:
            return []
        return [*self._series(uid, found[uid]), *self._areas.row(uid)]

    def _series(self, uid: str, row: dict[str, Any]) -> list[Finding]:
        try:
            pack = self._layout.pack(uid)
        except StoreError as error:
            return [Finding("row", str(row["path"]), str(error), "tell those who keep the store")]
        path = self._layout.relative(pack)
        if row["path"] != path:
            return [
                Finding(
                    "row",
                    path,
                    f"the row of series {uid} names {row['path']!r}, which is not where its "
                    "pack belongs",
                    "restore the record from a backup",
                )
            ]
        try:
            return self._pack(uid, row, pack)
        except FileNotFoundError as error:
            missing = "pack-missing" if str(error.filename) == str(pack) else "blocks"
            return [
                Finding(missing, path, f"{error.filename} is missing", self._restore(row, pack))
            ]
        except OSError as error:
            what = f"{error.filename or pack}: {error.strerror}"
            return [Finding("pack-unreadable", path, what, "look after the disk; then restore it")]

    def _restore(self, row: dict[str, Any], pack: Path) -> str:
        views = self._layout.view("-").parent.glob(f"*/series/{pack.name}")
        # A view may still have an earlier pack.
        whole = [self._layout.relative(view) for view in views if _hashes(view) == row["blocks"]]
        return f"a view still has it: {whole[0]}; link it back" if whole else _RESTORE

    def _pack(self, uid: str, row: dict[str, Any], pack: Path) -> list[Finding]:
        path = self._layout.relative(pack)
        pack.stat()
        expected = blocks_path(pack).read_bytes()
        if hashlib.sha256(expected).hexdigest() != row["blocks"]:
            what = "the block hashes are not those that the catalogue names"
            return [Finding("blocks", self._layout.relative(blocks_path(pack)), what, _RESTORE)]
        size = 0
        damaged = []
        for index, block in enumerate(blocks_of(pack, self._pace)):
            size += len(block)
            if hashlib.sha256(block).digest() != expected[index * 32 :][:32]:
                damaged.append(index)
        if size != row["size"]:
            what = f"it has {size} bytes, and the catalogue says {row['size']}"
            return [Finding("pack-damaged", path, what, _RESTORE)]
        if damaged:
            what = f"{len(damaged)} of its blocks are damaged: {damaged[:8]}"
            return [Finding("pack-damaged", path, what, _RESTORE)]
        if other := _disagreement(uid, row, pack):
            return [Finding("pack-other", path, other, _RESTORE)]
        return []

    def kept(self, sha256: str) -> list[Finding]:
        """Look at a kept object. It is read whole."""
        found = self._rows("kept", ["path", "size"], "sha256", [sha256])
        if sha256 not in found:
            return []
        path, size = str(found[sha256]["path"]), found[sha256]["size"]
        name = PurePosixPath(path)
        if ".." in name.parts or name.parts[:1] != (self._layout.kept_folder.name,):
            what = f"the row of the kept object {sha256} names {path!r}, outside of its folder"
            return [Finding("row", path, what, "restore the record from a backup")]
        restore = "restore it from a backup, or add it again"
        digest, length = hashlib.sha256(), 0
        try:
            for block in blocks_of(self._layout.absolute(path), self._pace):
                digest.update(block)
                length += len(block)
        except FileNotFoundError:
            return [Finding("kept-missing", path, "the kept object is missing", restore)]
        except OSError as error:
            return [Finding("kept-damaged", path, str(error.strerror), restore)]
        if length != size or digest.hexdigest() != sha256:
            what = f"{length} bytes that are not those that were kept ({size} bytes)"
            return [Finding("kept-damaged", path, what, restore)]
        return []

    def folder(self, name: str) -> list[Finding]:
        """Look for files of a folder that belong to no row."""
        try:
            entries = sorted(os.scandir(self._layout.absolute(name)), key=lambda e: e.name)
            status = {e.name: e.stat(follow_symlinks=False) for e in entries}
        except FileNotFoundError:
            return []  # somebody tidies; the next look tells
        top, *below = name.split("/")
        packs = top == self._layout.packs.name
        owners = {n: _owner(n) if packs else n for n in status}
        known = {str(row["path"]) for row in self._with_paths(top, name, owners.values())}
        found = []
        for file, what in status.items():
            path = f"{name}/{file}"
            age = time.time() - what.st_mtime
            if not below and (stat.S_ISDIR(what.st_mode) or file == ".lock"):
                continue
            if file.endswith(PART):
                if age > STALE_S:
                    todo = "`kakehashi store fsck --repair` removes it, and so does the next add"
                    found.append(Finding("part", path, "left over by a run that ended", todo))
            elif not stat.S_ISREG(what.st_mode) or (packs and not file.endswith(_ENDS)):
                found.append(Finding("stray", path, "not a file of the store", "remove it"))
            elif f"{name}/{owners[file]}" not in known:
                if age < YOUNG_S:
                    self.young.add(path)
                    continue
                todo = "add the series again, or remove it if nobody misses it"
                found.append(Finding("orphan", path, "no row of the catalogue names it", todo))
        return found

    def _with_paths(self, top: str, folder: str, names: Iterable[str]) -> list[dict[str, Any]]:
        table = "series" if top == self._layout.packs.name else "kept"
        paths = sorted({f"{folder}/{name}" for name in names})
        return list(self._rows(table, ["path"], "path", paths).values())

    def view(self, project: str) -> list[Finding]:
        """Look at a view: its manifest, and that each link is the pack."""
        view = self._layout.view(project)
        found = []
        if project not in self._projects:
            what = f"there is no project {project!r} (any more)"
            found.append(
                Finding("view-unowned", self._layout.relative(view), what, "take the view away")
            )
        build = f"build it again with `kakehashi store view {project}`"
        self.outdated.pop(project, None)
        earlier: dict[str, tuple[int, str]] = {}
        with locked(beside(self._layout, project, "lock"), wait=True):
            try:
                with os.scandir(view / "series") as entries:
                    there = {entry.name: entry.inode() for entry in entries}
            except FileNotFoundError:
                there = {}
            path = self._layout.relative(view / MANIFEST)
            try:
                files = stated_files(view)
            except FileNotFoundError:
                if there:
                    found.append(Finding("view-manifest", path, "it is missing", build))
                return found
            except (OSError, ValueError, KeyError, TypeError) as error:
                what = f"it cannot be read ({error})"
                return [*found, Finding("view-manifest", path, what, build)]
            for name, wrong in self._links(view, files, there, earlier):
                link = self._layout.relative(view / "series" / name)
                todo = (
                    f"`kakehashi store fsck --repair` relinks it if its pack is whole; or {build}"
                )
                found.append(Finding("view-link", link, wrong, todo))
        # Read after the lock: that takes its time, and who builds the view need not wait.
        for name, stated in earlier.items():
            if wrong := self._not_as_stated(view / "series" / name, stated):
                what = f"the series was packed anew, and the view's pack {wrong}"
                link = self._layout.relative(view / "series" / name)
                found.append(Finding("view-link", link, what, build))
            else:
                self.outdated[project] = self.outdated.get(project, 0) + 1
        named = {end for name in files for end in (name, blocks_path(view / name).name)}
        for name in sorted(there.keys() - named):
            what = "it is in the view, and not in its manifest"
            link = self._layout.relative(view / "series" / name)
            found.append(Finding("view-extra", link, what, build))
        return found

    def _links(
        self,
        view: Path,
        files: dict[str, tuple[int, str]],
        there: dict[str, int],
        earlier: dict[str, tuple[int, str]],
    ) -> Iterator[tuple[str, str]]:
        """Yield the names in a view that are not what they should be, and why.

        What the store has packed anew goes into `earlier`: only a look at its content tells.
        """
        uids = {name: name.removesuffix(".ozx") for name in files}
        rows = self._rows("series", ["path", "size", "blocks"], "series_uid", uids.values())
        for name, stated in files.items():
            row = rows.get(uids[name])
            if row is None:
                yield name, "the manifest names a series that is not in the catalogue"
                continue
            pack = self._layout.absolute(str(row["path"]))
            if stated != (row["size"], row["blocks"]):
                if _same(view / "series" / name, pack):
                    yield name, "the manifest and the catalogue say different things of it"
                else:
                    earlier[name] = stated
                continue
            for source in (pack, blocks_path(pack)):
                link = view / "series" / source.name
                try:
                    inode = source.stat().st_ino
                except OSError:
                    continue  # found when the series was looked at
                if source.name not in there:
                    yield source.name, "it is missing, though the manifest names it"
                elif there[source.name] != inode and not link.samefile(source):
                    yield source.name, "it is not the same file as in the store"

    def _not_as_stated(self, link: Path, stated: tuple[int, str]) -> str:
        """Say what of a pack in a view is not as the view's manifest has it; it is read whole."""
        size, digest = 0, hashlib.sha256()
        try:
            for block in blocks_of(link, self._pace):
                size += len(block)
                digest.update(hashlib.sha256(block).digest())
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if (size, digest.hexdigest()) != stated or _hashes(link) != stated[1]:
            return "is not the one that its manifest names"
        return ""

    def _rows(
        self, table: str, columns: list[str], key: str, values: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        """Return some columns of the rows whose key is among `values`, by that key."""
        wanted, found = list(values), {}
        by: sa.ColumnClause[str] = sa.column(key, sa.Text)
        listed: list[sa.ColumnClause[Any]] = [sa.column(name) for name in columns if name != key]
        query = sa.select(by, *listed).select_from(sa.table(table))
        with self._catalogue.transaction() as connection:
            for start in range(0, len(wanted), _PAGE):
                page = query.where(by.in_(wanted[start : start + _PAGE]))
                for row in connection.execute(page).mappings():
                    found[str(row[key])] = dict(row)
        return found


def stated_files(view: Path) -> dict[str, tuple[int, str]]:
    """Return sizes and digests of the block hashes that a view's manifest states, by file name.

    Raises
    ------
    OSError, ValueError, KeyError, TypeError
        It cannot be read.
    """
    return {
        PurePosixPath(entry["path"]).name: (entry["size"], entry["blocks"])
        for entry in json.loads((view / MANIFEST).read_bytes())["files"]
    }


_ENDS = (".ozx", ".blocks")


def _hashes(link: Path) -> str:
    try:
        return hashlib.sha256(blocks_path(link).read_bytes()).hexdigest()
    except OSError:
        return ""


def _same(link: Path, pack: Path) -> bool:
    try:
        return link.samefile(pack)
    except OSError:
        return False


def _owner(name: str) -> str:
    """Return the name of the pack that a file belongs to."""
    return name.removesuffix(".blocks") + ".ozx" if name.endswith(".blocks") else name


def _disagreement(uid: str, row: dict[str, Any], path: Path) -> str | None:
    """Say what in a pack, all of whose blocks are as hashed, is not what its row says."""
    try:
        with FileReader(path) as reader:
            pack = open_pack(reader)
            slices = sum(pack.volume(index).shape[0] for index in range(pack.volumes))
            headers = [entry["sop"] for entry, _ in pack.original_headers()]
    except Exception as error:  # whatever the readers make of a broken file
        return f"it cannot be opened ({error})"
    if pack.series != uid:
        return f"it holds the series {pack.series}, not {uid}"
    if (slices, pack.volumes) != (row["slices"], row["volumes"]):
        return (
            f"it has {slices} slices in {pack.volumes} volumes, and the catalogue says "
            f"{row['slices']} in {row['volumes']}"
        )
    if headers != list(pack.instances) or not 1 <= len(headers) <= slices:
        return f"it has {len(headers)} headers for {len(pack.instances)} instances"
    return None
