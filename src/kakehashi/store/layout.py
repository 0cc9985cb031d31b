"""Where the store's files lie under ``store.root``, and how they are put there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from kakehashi.errors import StoreError
from kakehashi.store.dicom import UID

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK_SIZE = 131072
"""Bytes of a block: what the manifest's hashes cover, and a reader fetches and checks."""

PART = ".part"
"""Suffix of a file that is not complete yet."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of packs, kept objects and views.

    Attributes
    ----------
    root : Path
        ``store.root``.
    """

    root: Path

    @property
    def packs(self) -> Path:
        """Folder of the packed series."""
        return self.root / "packs"

    @property
    def kept_folder(self) -> Path:
        """Folder of what could not be packed."""
        return self.root / "kept"

    @property
    def catalogue(self) -> Path:
        """SQLite file of the catalogue, where no database is configured."""
        return self.root / "catalogue.sqlite"

    @property
    def facets(self) -> Path:
        """Folder of the index that facets are counted with."""
        return self.root / "facets"

    @property
    def deidentification_key(self) -> Path:
        """File of the key that UIDs and patients' ids are replaced with."""
        return self.root / "secrets" / "deidentification"

    def pack(self, series: str) -> Path:
        """Path of a packed series.

        Raises
        ------
        StoreError
            The UID is not one, so that a path must not be made of it.
        """
        if not UID.fullmatch(series):
            raise StoreError(f"{series!r} is not a valid SeriesInstanceUID")
        return self.packs / _spread(series) / f"{series}.ozx"

    def kept(self, sop: str | None, sha256: str) -> Path:
        """Path of an object that could not be packed; named by its hash if it has no UID."""
        name = sop if sop and UID.fullmatch(sop) else sha256
        return self.kept_folder / _spread(name) / f"{name}.dcm"

    def absolute(self, path: str) -> Path:
        """Return the path that the catalogue holds in relative form."""
        return self.root / path

    def view(self, project: str) -> Path:
        """Chroot of a project's view account."""
        return self.root / "views" / project

    def relative(self, path: Path) -> str:
        """Return a path as the catalogue holds it."""
        return path.relative_to(self.root).as_posix()


def _spread(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:2]


def blocks_path(pack: Path) -> Path:
    """Return the path of the block hashes that belong to a pack."""
    return pack.with_suffix(".blocks")


def block_hashes(path: Path) -> bytes:
    """Return the SHA-256 of each block of a file, 32 bytes each, in order."""
    hashes = bytearray()
    with path.open("rb") as file:
        while block := file.read(BLOCK_SIZE):
            hashes += hashlib.sha256(block).digest()
    return bytes(hashes)


def damaged_blocks(pack: Path, digest: str) -> list[int]:
    """Compare a pack with its block hashes.

    Parameters
    ----------
    pack : Path
        The pack; its ``.blocks`` lies beside it.
    digest : str
        SHA-256 (hexadecimal) that the ``.blocks`` file must have.

    Returns
    -------
    list of int
        Indices of blocks that differ, are missing or are too many; empty if all is well.

    Raises
    ------
    StoreError
        A file is missing, or the block hashes themselves are not those of the catalogue.
    """
    try:
        expected = blocks_path(pack).read_bytes()
        actual = block_hashes(pack)
    except OSError as error:
        raise StoreError(f"{error.filename}: cannot be read ({error.strerror})") from error
    if hashlib.sha256(expected).hexdigest() != digest:
        raise StoreError(
            f"{blocks_path(pack)} is not the one that the catalogue names; restore it and the "
            "pack from a backup"
        )
    count = max(len(expected), len(actual)) // 32
    return [i for i in range(count) if expected[i * 32 :][:32] != actual[i * 32 :][:32]]


@contextmanager
def replacing(path: Path, mode: int = 0o640) -> Iterator[BinaryIO]:
    """Write a file whole or not at all: ``.part``, fsync, rename, fsync of the folder.

    Parameters
    ----------
    path : Path
        Where the file shall be. What is there stays until the new one is complete.
    mode : int
        Permissions of the new file.
    """
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock file, so that two processes do not do the same work.

    The kernel lets go of it when the process ends, however it ends.

    Raises
    ------
    StoreError
        Somebody else holds it, and we were not to wait.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise StoreError(
                f"another process holds {path}; wait until it has ended and start again"
            ) from None
        yield


def give_to_group(path: Path, group: str) -> None:
    """Let a group read a file, where the group exists and we may say so."""
    if os.geteuid() != 0:
        return
    try:
        shutil.chown(path, user=0, group=group)
    except LookupError:
        shutil.chown(path, user=0, group=0)
