"""One object while it arrives: a ``.part`` file, its checksum, and what its head says."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from kakehashi.store.dicom import UID
from kakehashi.store.receive.entry import HEADER_SIZE, header
from kakehashi.store.receive.head import (
    DEFLATED,
    Head,
    HeadError,
    ShortError,
    inflate,
    read_head,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kakehashi.store.receive.entry import Receipt

_BEGIN_EVERY = 1 << 17
"""Bytes after which the disk is told to begin."""

_LOOK_EVERY = 1 << 24
"""Bytes after which the free space is looked at again."""

_LIBC = ctypes.CDLL(None)
_WRITE = 2  # SYNC_FILE_RANGE_WRITE
_FIRST_LOOK = 1 << 15
_FURTHEST_LOOK = 1 << 24
_UIDS = ("sop_class", "sop", "study", "series")
_NAMES = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")


class Part:
    """A file that grows; it is gone unless it was sealed.

    Parameters
    ----------
    path : Path
        Where; nothing may be there yet.
    most : int
        Bytes that the data set may have.
    reserve : int
        Bytes of the file system that must stay free.

    Raises
    ------
    OSError
        The file cannot be made; no space is left, most likely.
    """

    def __init__(self, path: Path, *, most: int = sys.maxsize, reserve: int = 0) -> None:
        self.path = path
        self._most, self._reserve = most, reserve
        self._look(path.parent)
        self._digest = hashlib.sha256()
        self._size = 0
        self._begun = 0
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        os.lseek(self._descriptor, HEADER_SIZE, os.SEEK_SET)

    def write(self, piece: memoryview) -> None:
        """Take the next bytes of the data set.

        Raises
        ------
        OSError
            They cannot be written, or there are too many.
        """
        before = self._size
        self._size += len(piece)
        if self._size > self._most:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if before // _LOOK_EVERY != self._size // _LOOK_EVERY:
            self._look(self._descriptor)
        rest = piece
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        if self._size - self._begun >= _BEGIN_EVERY:
            # The disk works while the hash is made and the rest is on its way, so that there is
            # less to wait for at the end. Where this is not possible, fsync does all of it.
            offset, length = HEADER_SIZE + self._begun, self._size - self._begun
            _LIBC.sync_file_range(
                self._descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), _WRITE
            )
            self._begun = self._size
        self._digest.update(piece)

    def seal(self, receipt: Receipt) -> tuple[Receipt, str]:
        """Write the header and make the file survive a power cut.

        Parameters
        ----------
        receipt : Receipt
            What is known from the command; study, series, size and hash are filled in.

        Returns
        -------
        receipt : Receipt
        reason : str
            Why the object belongs into quarantine; empty if it does not.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        try:
            head, reason = self._head(receipt.transfer_syntax), ""
        except HeadError as error:
            head, reason = Head(), str(error)
        receipt = replace(
            receipt,
            study=head.study if UID.fullmatch(head.study) else "",
            series=head.series if UID.fullmatch(head.series) else "",
            size=self._size,
            sha256=self._digest.hexdigest(),
        )
        os.pwrite(self._descriptor, header(receipt), 0)
        os.fsync(self._descriptor)
        self.close()
        return receipt, reason or _objection(head, receipt)

    def close(self) -> None:
        """Let go of the file, and leave it where it is."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def drop(self) -> None:
        """Take the file away."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _look(self, where: Path | int) -> None:
        """Leave the disk its reserve: the journal needs room too, and so does the intake."""
        status = os.statvfs(where)
        if self._reserve and status.f_bavail * status.f_frsize < self._reserve:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _head(self, syntax: str) -> Head:
        look = _FIRST_LOOK
        while True:
            data = os.pread(self._descriptor, look, HEADER_SIZE)
            if syntax == DEFLATED:
                data = inflate(data, _FURTHEST_LOOK)
            try:
                return read_head(data, syntax)
            except ShortError:
                if look >= min(self._size, _FURTHEST_LOOK):
                    raise HeadError(
                        "the data set ends before a SeriesInstanceUID, or has none within its "
                        f"first {_FURTHEST_LOOK >> 20} MiB"
                    ) from None
                look = _FURTHEST_LOOK


def _objection(head: Head, receipt: Receipt) -> str:
    for field, name in zip(_UIDS, _NAMES, strict=True):
        if not UID.fullmatch(getattr(head, field)):
            return f"the data set has no valid {name}"
    for field, name in zip(_UIDS[:2], _NAMES, strict=False):
        inside, outside = getattr(head, field), getattr(receipt, field)
        if inside != outside:
            return f"the data set's {name} is {inside}, that of the sender's command {outside}"
    return ""
