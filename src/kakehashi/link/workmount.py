"""The work folder where the node mounts it: the same face, and the same promises."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import os
import shutil
import stat
from typing import TYPE_CHECKING

from kakehashi.link.work import (
    WorkDeniedError,
    WorkError,
    WorkExistsError,
    WorkFolder,
    WorkFullError,
    WorkLostError,
    WorkNotFoundError,
    WorkStat,
    kind_of,
    part_name,
    relative,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_KINDS: dict[int, tuple[type[WorkError], str]] = {
    errno.ENOENT: (WorkNotFoundError, "is not there"),
    errno.ENOTDIR: (WorkNotFoundError, "is not there"),
    errno.EEXIST: (WorkExistsError, "is there already"),
    errno.EACCES: (WorkDeniedError, "its rights do not allow this"),
    errno.EPERM: (WorkDeniedError, "its rights do not allow this"),
    errno.ENOSPC: (WorkFullError, "the store's disk is full"),
    errno.EDQUOT: (WorkFullError, "the project's quota is used up"),
    # Through a mount a full store looks like one that is gone.
    errno.EIO: (WorkError, "the store is out of reach, or its disk is full"),
    errno.ENOTCONN: (WorkLostError, "the store is out of reach"),
    errno.ETIMEDOUT: (WorkLostError, "the store is out of reach"),
}


class MountedFolder(WorkFolder):
    """The work folder below a mount.

    Parameters
    ----------
    root : Path
        Where it is mounted.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def close(self) -> None:
        """Do nothing: the mount is the session's."""

    def listdir(self, path: str = "") -> list[WorkStat]:
        """Return a folder's entries, sorted by name."""
        with _as_work_errors(path):
            return [_described(entry) for entry in sorted(self._place(path).iterdir())]

    def stat(self, path: str = "") -> WorkStat:
        """Return what a path is; links are followed."""
        with _as_work_errors(path):
            place = self._place(path)
            place.stat()
            return _described(place)

    def read(self, path: str) -> bytes:
        """Return a file's whole content."""
        with _as_work_errors(path):
            place = self._place(path)
            _require_file(place, path)
            return place.read_bytes()

    def write(self, path: str, data: bytes) -> None:
        """Make a file hold ``data``, or leave it as it is."""
        with _as_work_errors(path):
            target = self._place(path).resolve()
            mode = None
            if target.exists():
                _require_file(target, path)
                if not os.access(target, os.W_OK):
                    raise WorkDeniedError(f"{path}: its rights do not allow this")
                mode = stat.S_IMODE(target.stat().st_mode)
            part = target.with_name(part_name())
            try:
                _fill(part, data, mode)
                part.replace(target)
            except BaseException:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise

    def mkdir(self, path: str) -> None:
        """Make a folder."""
        with _as_work_errors(path):
            self._place(path).mkdir()

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link (not what it leads to) or an empty folder."""
        place = self._place(path)
        if place == self._root:
            raise WorkError("the work folder itself cannot be removed")
        with _as_work_errors(path):
            if place.is_symlink() or not place.is_dir():
                place.unlink()
            elif recursive:
                shutil.rmtree(place)
            elif any(place.iterdir()):
                raise WorkError(f"{path}: is a folder that is not empty")
            else:
                place.rmdir()

    def rename(self, old: str, new: str) -> None:
        """Give a file or a folder another name, which nothing has yet."""
        source, target = self._place(old), self._place(new)
        with _as_work_errors(old):
            source.lstat()
        if os.path.lexists(target):
            raise WorkExistsError(f"{new}: is there already")
        with _as_work_errors(new):
            source.rename(target)

    def copy(self, source: str, target: str) -> None:
        """Copy a file; ``target`` is made or replaced as by :meth:`write`."""
        self.write(target, self.read(source))

    def _place(self, path: str) -> Path:
        return self._root / relative(path)


@contextlib.contextmanager
def _as_work_errors(path: str) -> Iterator[None]:
    try:
        yield
    except WorkError:
        raise
    except OSError as error:
        kind, text = _KINDS.get(error.errno or 0, (WorkError, f"failed: {error.strerror}"))
        raise kind(f"{path or 'the work folder'}: {text}") from error


def _fill(part: Path, data: bytes, mode: int | None) -> None:
    with part.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if mode is not None:
            with contextlib.suppress(OSError):
                os.fchmod(file.fileno(), mode)


def _described(place: Path) -> WorkStat:
    try:
        found = place.stat()
    except OSError:
        found = place.lstat()
    modified = dt.datetime.fromtimestamp(int(found.st_mtime), dt.UTC)
    mode = stat.S_IMODE(found.st_mode)
    return WorkStat(place.name, kind_of(found.st_mode), found.st_size, modified, mode)


def _require_file(place: Path, path: str) -> None:
    kind = kind_of(place.stat().st_mode)
    if kind != "file":
        raise WorkError(f"{path or 'the work folder'}: is no file ({kind})")
