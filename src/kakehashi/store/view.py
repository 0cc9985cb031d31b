"""What a project's account sees of the store: hard links to its packs, and a manifest.

The cohort is frozen when the view is built: the list of series gets a version and a hash,
is recorded, and stands in the manifest until the view is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
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


def _build(layout: Layout, catalogue: Catalogue, project: Project, group: str) -> ViewBuilt:
    view = layout.view(project.id)
    folder = view / "series"
    for path in (view.parent, view, folder):
        # sshd refuses a chroot that anyone but root could write to, or that lies in one.
        path.mkdir(mode=0o755, exist_ok=True)
        path.chmod(0o755)
    with locked(view.parent / f".{project.id}.lock", wait=True):
        rows = catalogue.select_cohort(project.cohort)
        wanted: dict[str, Path] = {}
        for row in rows:
            pack = layout.absolute(row.path)
            _check(pack, row)
            for source in (pack, blocks_path(pack)):
                wanted[source.name] = source
        cohort = _freeze(catalogue, project.id, rows)
        linked = sum(_link(source, folder / name) for name, source in wanted.items())
        sync_folder(folder)
        sha256 = _write_manifest(view, _manifest(cohort, rows), group)
        # Last, so that whatever the manifest in force names is there.
        removed = 0
        for path in sorted(folder.iterdir()):
            if path.name not in wanted:
                path.unlink()
                removed += path.suffix == ".ozx"
        return ViewBuilt(cohort, sha256, linked // 2, removed)


def _check(pack: Path, row: Series) -> None:
    try:
        size, hashes = pack.stat().st_size, blocks_path(pack).read_bytes()
    except OSError as error:
        raise StoreError(
            f"{error.filename} is missing, though series {row.series_uid} is in the catalogue; "
            "restore it from a backup"
        ) from error
    if size != row.size or hashlib.sha256(hashes).hexdigest() != row.blocks:
        raise StoreError(
            f"{pack} or its block hashes are not what the catalogue says; restore both from a "
            "backup"
        )


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


def _link(source: Path, target: Path) -> bool:
    """Make `target` the same file as `source`; say whether it was not yet."""
    if target.exists() and target.samefile(source):
        return False
    part = target.with_name(target.name + PART)
    part.unlink(missing_ok=True)
    os.link(source, part)
    part.replace(target)
    return True


def _manifest(cohort: Cohort, rows: list[Series]) -> dict[str, Any]:
    files = []
    for row in rows:
        facts = row.as_json()
        del facts["path"]
        files.append(
            {
                "path": f"series/{row.series_uid}.ozx",
                "size": row.size,
                "blocks": row.blocks,
                "series": facts,
            }
        )
    return {
        "kakehashi_manifest": 1,
        "project": cohort.project,
        "cohort": {"version": cohort.version, "sha256": cohort.sha256},
        "block_size": BLOCK_SIZE,
        "files": files,
    }


def _write_manifest(view: Path, manifest: dict[str, Any], group: str) -> str:
    path = view / MANIFEST
    content = _canonical(manifest)
    if not path.exists() or path.read_bytes() != content:
        # Readable for the authority too, which names its hash in grants.
        with replacing(path, mode=0o644) as file:
            file.write(content)
        give_to_group(path, group)
    return hashlib.sha256(content).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
