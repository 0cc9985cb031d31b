"""How much work folders take up, walls against more where the file system has them, snapshots.

Where it has project quotas (ext4 and XFS, mounted with ``prjquota``) a limit is a wall: writing
beyond it fails. Elsewhere it is a figure to compare with, and says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import stat
import struct
import subprocess
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kakehashi.config import PROJECT_ID
from kakehashi.errors import StoreError
from kakehashi.store.catalogue import now
from kakehashi.store.layout import PART, locked, replacing, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kakehashi.config import StoreHost

# From the kernel's headers linux/fs.h, linux/quota.h and linux/dqblk_xfs.h.
_GET_ATTRIBUTES, _SET_ATTRIBUTES = 0x801C581F, 0x401C5820
_ATTRIBUTES = struct.Struct("=5I8x")  # flags, extent size, extents, project, CoW extent size
_INHERIT = 0x200
_QUOTACTL_FD = 443
_PROJECT = 2
_GET, _SET, _STATE = 0x800007, 0x800008, 0x5805
_USAGE = struct.Struct("=8QI4x")  # hard, soft (KiB), bytes, three for inodes, two times, valid
_LIMITS_VALID = 1
_STATUS = struct.Struct("=bxH76x")
_ENFORCED = 0x20
_SUBVOLUME = 256  # inode of the root of each
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FIRST_ID = 1000
_WARN_AT = 0.9


@dataclass(frozen=True, slots=True)
class Usage:
    """What a project's work folder takes up.

    Attributes
    ----------
    size : int
        Bytes on the disk.
    files : int
    limit : int or None
        Bytes, if one was set.
    wall : bool
        The file system keeps to the limit. Without a wall it is only reported.
    """

    project: str
    size: int
    files: int
    limit: int | None
    wall: bool

    @property
    def warning(self) -> str | None:
        """What is to be said about it, None if nothing."""
        if self.limit is None or self.size < _WARN_AT * self.limit:
            return None
        over = "over its limit" if self.size > self.limit else "near its limit"
        return over if self.wall else f"{over}, which nothing enforces"

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self) | {"warning": self.warning}


def usage(store: StoreHost, project: str) -> Usage:
    """Measure a project's work folder, by going through all of it.

    Raises
    ------
    StoreError
        There is no such folder.
    """
    folder = _folder(store, project)
    size, files = _measure(folder)
    entry = _limits(store).get(project)
    if entry is None:
        return Usage(project, size, files, None, wall=False)
    wall = enforced(folder) and _project_of(folder) == entry["id"]
    return Usage(project, size, files, entry["limit"], wall=wall)


def set_limit(store: StoreHost, project: str, limit: int) -> Usage:
    """Limit a work folder: by the file system if it can, else only in what is reported.

    Parameters
    ----------
    store : StoreHost
    project : str
    limit : int
        Bytes.

    Raises
    ------
    StoreError
        There is no such folder, or the file system refuses.
    """
    folder = _folder(store, project)
    work = store.root / "work"
    with locked(work / ".quota.lock", wait=True):
        limits = _limits(store)
        known = limits.get(project)
        free = max([_FIRST_ID - 1, *(entry["id"] for entry in limits.values())]) + 1
        number = known["id"] if known else free
        limits[project] = {"id": number, "limit": limit}
        with replacing(work / ".quota.json", mode=0o600) as file:
            file.write(json.dumps(limits, sort_keys=True).encode())
        if enforced(folder):
            try:
                # The wall first: what is written meanwhile into what has the id counts too.
                _set_wall(folder, number, limit)
                _give_project(folder, number)
            except OSError as error:
                raise StoreError(
                    f"{error.filename or folder}: the quota cannot be set ({error.strerror})"
                ) from error
    return usage(store, project)


def enforced(folder: Path) -> bool:
    """Say whether the file system of a folder keeps to limits of projects."""
    with _opened(folder) as descriptor:
        buffer = ctypes.create_string_buffer(_STATUS.size)
        try:
            _quotactl(descriptor, _STATE, 0, buffer)
        except OSError:
            return False
        _, flags = _STATUS.unpack(buffer.raw)
        return bool(flags & _ENFORCED)


def snapshot(store: StoreHost, project: str) -> Path:
    """Keep a work folder as it is now, sharing what does not change.

    A subvolume of btrfs is kept at one moment; on XFS or btrfs otherwise one file after the
    other, each at one moment.

    Returns
    -------
    Path
        The snapshot, below ``snapshots`` in the store's folder, for root only.

    Raises
    ------
    StoreError
        There is no such folder, or the file system has no snapshots.
    """
    folder = _folder(store, project)
    target = store.root / "snapshots" / project / now().replace(":", "")
    for path in (target.parent.parent, target.parent):
        path.mkdir(mode=0o700, exist_ok=True)
    if target.exists():
        raise StoreError(f"{target} is there already; wait for the next second")
    part = target.with_name(target.name + PART)
    if _is_subvolume(folder):
        _run(["btrfs", "subvolume", "snapshot", "-r", str(folder), str(target)])
    else:
        try:
            _run(["cp", "--archive", "--reflink=always", "--", str(folder), str(part)])
        except StoreError:
            shutil.rmtree(part, ignore_errors=True)
            if _shares(folder):
                raise
            raise StoreError(
                f"{folder} lies on a file system without snapshots; btrfs and XFS have them, and "
                "some storage makes them by itself"
            ) from None
        part.rename(target)
    sync_folder(target.parent)
    return target


def _folder(store: StoreHost, project: str) -> Path:
    folder = store.root / "work" / project
    if not PROJECT_ID.fullmatch(project) or not folder.is_dir():
        raise StoreError(f"{folder} is not there; `kakehashi store init` makes work folders")
    return folder


def _limits(store: StoreHost) -> dict[str, dict[str, int]]:
    path = store.root / "work" / ".quota.json"
    try:
        found: dict[str, dict[str, int]] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read ({error}); remove it, set limits again") from None
    return found


def _measure(folder: Path) -> tuple[int, int]:
    """Return bytes on the disk and the number of files; what has several names counts once."""
    size, files = 0, 0
    seen: set[int] = set()
    device = folder.stat().st_dev
    for status in _walk(folder):
        if status.st_dev != device or (status.st_nlink > 1 and status.st_ino in seen):
            continue
        if status.st_nlink > 1:
            seen.add(status.st_ino)
        size += status.st_blocks * 512
        files += stat.S_ISREG(status.st_mode)
    return size, files


def _walk(folder: Path) -> Iterator[os.stat_result]:
    yield folder.lstat()
    waiting = [str(folder)]
    while waiting:
        # People go on working meanwhile: what vanishes is not there.
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(waiting.pop()) as found,
        ):
            for entry in found:
                with contextlib.suppress(FileNotFoundError):
                    yield entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, _FLAGS)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _quotactl(descriptor: int, command: int, number: int, buffer: ctypes.Array[Any]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    call = command << 8 | _PROJECT
    if libc.syscall(_QUOTACTL_FD, descriptor, ctypes.c_uint(call), number, buffer) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _set_wall(folder: Path, number: int, limit: int) -> None:
    blocks = -(-limit // 1024)
    packed = _USAGE.pack(blocks, 0, 0, 0, 0, 0, 0, 0, _LIMITS_VALID)
    with _opened(folder) as descriptor:
        _quotactl(descriptor, _SET, number, ctypes.create_string_buffer(packed, _USAGE.size))


def _project_of(path: Path) -> int:
    with _opened(path) as descriptor:
        return int(_ATTRIBUTES.unpack(_attributes(descriptor))[3])


def _attributes(descriptor: int) -> bytes:
    return fcntl.ioctl(descriptor, _GET_ATTRIBUTES, bytes(_ATTRIBUTES.size))


def _give_project(folder: Path, number: int) -> None:
    """Count a folder and all in it to a project; what comes later inherits it."""
    # Twice, for what came into a folder after it was listed and before it was marked.
    for _ in range(2):
        # By open folders: whoever works in them could put a link in one's place.
        for _, _, names, descriptor in os.fwalk(folder):
            _count(descriptor, number, folder=True)
            for name in names:
                try:
                    file = os.open(name, _FLAGS, dir_fd=descriptor)
                except OSError as error:
                    if error.errno in {errno.ENOENT, errno.ELOOP, errno.ENXIO}:
                        continue  # vanished, a link or a socket, which take up nothing
                    raise
                try:
                    if stat.S_ISREG(os.fstat(file).st_mode):
                        _count(file, number, folder=False)
                finally:
                    os.close(file)


def _count(descriptor: int, number: int, *, folder: bool) -> None:
    flags, size, extents, _, copied = _ATTRIBUTES.unpack(_attributes(descriptor))
    flags |= _INHERIT if folder else 0
    fcntl.ioctl(descriptor, _SET_ATTRIBUTES, _ATTRIBUTES.pack(flags, size, extents, number, copied))


def _is_subvolume(folder: Path) -> bool:
    return folder.stat().st_ino == _SUBVOLUME and _file_system(folder) == "btrfs"


def _shares(folder: Path) -> bool:
    return _file_system(folder) in {"btrfs", "xfs"}


def _file_system(folder: Path) -> str:
    return _run(["stat", "--file-system", "--format=%T", str(folder)]).strip()


def _run(arguments: list[str]) -> str:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise StoreError(f"the program {arguments[0]} is not installed") from error
    if done.returncode != 0:
        raise StoreError(f"{arguments[0]} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout
