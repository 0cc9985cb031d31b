"""Folders of the store that a backup holds beside the tables, and how they are put back."""

from __future__ import annotations

import fcntl
import gzip
import io
import os
import shutil
import sqlite3
import stat
import tarfile
from contextlib import closing, contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from kakehashi.config import APPROVED
from kakehashi.errors import StoreError
from kakehashi.store.catalogue import now
from kakehashi.store.layout import PART, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SERVICE = "service"
"""Reports and cohorts, where they are not in the store's database."""

SAVED = ("authority", APPROVED, "secrets", SERVICE)
"""Book, audit trail, receipts and keys; approved projects; keys of de-identification."""

_SQLITE = b"SQLite format 3\0"
_JOURNALS = ("-wal", "-shm", "-journal")


def pack(folder: Path, out: gzip.GzipFile) -> None:
    """Write a folder as a tar file, each file as it is at one moment.

    Raises
    ------
    StoreError
        There is something else in it than files and folders.
    """
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in (folder, *sorted(folder.rglob("*"))):
            name = path.relative_to(folder.parent).as_posix()
            try:
                status = path.lstat()
                if path.name.endswith((PART, *_JOURNALS)):
                    continue  # what is being written, and what is in the database's copy
                if stat.S_ISDIR(status.st_mode):
                    archive.addfile(archive.gettarinfo(path, name))
                elif stat.S_ISREG(status.st_mode):
                    _add(archive, path, name)
                else:
                    raise StoreError(f"{path} is neither a file nor a folder; remove it")
            except FileNotFoundError:
                continue  # removed meanwhile


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    with path.open("rb") as file:
        info = archive.gettarinfo(name=str(path), arcname=name)
        info.type, info.linkname = tarfile.REGTYPE, ""  # also of a second name of a file
        if file.read(len(_SQLITE)) == _SQLITE:
            content = _database(path)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
            return
        file.seek(0)
        # Whoever appends holds this lock meanwhile: no half line. What is there stays as it is.
        fcntl.flock(file, fcntl.LOCK_SH)
        info.size = os.fstat(file.fileno()).st_size
        fcntl.flock(file, fcntl.LOCK_UN)
        archive.addfile(info, file)


def _database(path: Path) -> bytes:
    with (
        closing(sqlite3.connect(path)) as database,
        closing(sqlite3.connect(":memory:")) as copy,
    ):
        database.backup(copy)
        return copy.serialize()


def refuse_running(root: Path) -> None:
    """Refuse to replace what a running store works with."""
    try:
        pid = int((root / "run" / "serve.pid").read_text(encoding="ascii"))
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return
    except PermissionError:
        pass
    raise StoreError(f"the store is running (process {pid}); stop `kakehashi store serve` first")


def refuse_there(root: Path, names: list[str]) -> None:
    """Refuse to replace folders with something in them."""
    for name in names:
        folder = root / name
        if folder.is_dir() and any(folder.iterdir()):
            raise StoreError(
                f"{folder} is there and not empty; restore into a new store, or give --replace "
                "to move it aside"
            )


@contextmanager
def swapped(root: Path, archives: dict[str, Path]) -> Iterator[None]:
    """Put folders in place for good if what is done within succeeds, else not at all.

    Folders that are there are renamed, with the time in their new name.
    """
    fresh = root / f".restore{PART}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    aside: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        for name, archive in archives.items():
            unpack(archive, fresh, name)
        for name in archives:
            there = root / name
            if there.exists():
                old = root / f"{name}.before-restore-{now().replace(':', '')}"
                there.rename(old)
                aside.append((old, there))
            (fresh / name).rename(there)
            placed.append(there)
        sync_folder(root)
        yield
    except BaseException:
        for there in placed:
            there.rename(fresh / there.name)
        for old, there in aside:
            old.rename(there)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def unpack(archive: Path, target: Path, name: str) -> None:
    """Unpack a folder and make it durable.

    Raises
    ------
    StoreError
        The archive holds something else.
    """
    folders = []
    try:
        with gzip.open(archive, "rb") as file, tarfile.open(fileobj=file, mode="r|") as members:
            for member in members:
                place = PurePosixPath(member.name)
                if place.parts[0] != name or ".." in place.parts:
                    raise StoreError(f"{archive}: {member.name!r} does not belong there")
                path = target / place
                content = members.extractfile(member)
                if member.isdir():
                    path.mkdir(mode=0o700)
                    folders.append((path, member))
                elif member.isreg() and content is not None:
                    with path.open("xb") as out:
                        _give(path, member)
                        shutil.copyfileobj(content, out)
                        out.flush()
                        os.fsync(out.fileno())
                else:
                    raise StoreError(f"{archive}: {member.name!r} is neither file nor folder")
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise StoreError(f"{archive}: cannot be unpacked ({error}); use another backup") from error
    for path, member in reversed(folders):
        _give(path, member)
        sync_folder(path)


def _give(path: Path, member: tarfile.TarInfo) -> None:
    """Give a file the owner and permissions that it had."""
    # What the archive says, but nothing that gives rights: no setuid, no writing by others.
    path.chmod(member.mode & 0o755)
    if os.geteuid() == 0:
        try:
            shutil.chown(path, member.uname, member.gname)
        except LookupError:  # an account that `kakehashi store init` has not made yet
            os.chown(path, member.uid, member.gid)
