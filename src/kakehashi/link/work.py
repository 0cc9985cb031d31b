"""The project's work folder, as a notebook reaches it on every kind of node.

It goes through SFTP channels (:mod:`kakehashi.link.workchannel`), and its writes are whole or not
at all. Where the node also mounts the folder at ``/work``, every program sees there a second later
what was written here, and the other way round.
"""

from __future__ import annotations

import re
import secrets
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from kakehashi.errors import LinkError
from kakehashi.link.session import Session

if TYPE_CHECKING:
    import datetime as dt
    from pathlib import Path

Kind = Literal["file", "folder", "link", "other"]

_PART = re.compile(r"\.~[0-9a-f]{16}\.part")
_MAX_PATH = 3800


class WorkError(LinkError):
    """The work folder cannot do what was asked; nothing was changed unless the message says so."""


class WorkNotFoundError(WorkError, FileNotFoundError):
    """There is no such file or folder."""


class WorkExistsError(WorkError, FileExistsError):
    """Something has that name already."""


class WorkDeniedError(WorkError, PermissionError):
    """The file's rights do not allow it."""


class WorkFullError(WorkError, OSError):
    """The store's disk is full, or the project's quota is used up."""


class WorkLostError(WorkError, ConnectionError):
    """The work folder could not be reached for as long as was waited."""


@dataclass(frozen=True)
class WorkStat:
    """What a name in the work folder is.

    Attributes
    ----------
    name : str
        Last part of its path.
    kind : {"file", "folder", "link", "other"}
        Links are followed: ``link`` is one that leads nowhere.
    size : int
        Bytes.
    modified : datetime
        When it was changed last (UTC), to the second.
    mode : int
        Rights, as in ``chmod``.
    """

    name: str
    kind: Kind
    size: int
    modified: dt.datetime
    mode: int

    @property
    def writable(self) -> bool:
        """Whether its owner, which is the project's work account, may write it."""
        return bool(self.mode & stat.S_IWUSR)


class WorkFolder(ABC):
    """The project's work folder; one object may be used by many threads.

    Paths are text relative to it, with ``/`` between the parts: a person's own files lie below
    ``PERSON/``. They may not lead out of it.

    Examples
    --------
    >>> work = WorkFolder.current()  # doctest: +SKIP
    >>> work.write("hanako/result.csv", b"series,volume")  # doctest: +SKIP
    >>> [entry.name for entry in work.listdir("hanako")]  # doctest: +SKIP
    ['result.csv']
    """

    @staticmethod
    def current(session: Session | Path | str | None = None) -> WorkFolder:
        """Return the work folder of the session that this process runs in.

        Parameters
        ----------
        session : Session, Path or str, optional
            The session, or the path of its ``session.json`` where that is not at its usual place.

        Raises
        ------
        SessionError
            This is not inside a session.
        """
        from kakehashi.link.workchannel import ChannelFolder  # noqa: PLC0415 - it needs this one

        here = Session.of(session)
        return ChannelFolder.on_socket(here.work_socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the way to the store, if this has one of its own."""

    @abstractmethod
    def listdir(self, path: str = "") -> list[WorkStat]:
        """Return a folder's entries, sorted by name.

        Raises
        ------
        WorkNotFoundError
            There is no such folder.
        """

    @abstractmethod
    def stat(self, path: str = "") -> WorkStat:
        """Return what a path is; links are followed.

        Raises
        ------
        WorkNotFoundError
            There is no such file or folder, or it is a link that leads nowhere.
        """

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return a file's whole content.

        Raises
        ------
        WorkNotFoundError, WorkDeniedError
            There is no such file, or its rights do not allow it.
        """

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Make a file hold ``data``, or leave it as it is.

        Whoever looks finds the old file or the new one, whole. When this returns, the new one
        stands on the store's disk.

        Raises
        ------
        WorkNotFoundError, WorkDeniedError, WorkFullError
            There is no such folder, the file's rights do not allow it, no space is left.
        WorkLostError
            The store was out of reach: the file is the old or the new one.
        """

    @abstractmethod
    def mkdir(self, path: str) -> None:
        """Make a folder.

        Raises
        ------
        WorkExistsError, WorkNotFoundError
            Something has that name, or there is no folder to make it in.
        """

    @abstractmethod
    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link (not what it leads to) or an empty folder.

        Parameters
        ----------
        path : str
            What to remove.
        recursive : bool
            Also remove a folder with everything in it.

        Raises
        ------
        WorkNotFoundError
            There is nothing of that name.
        WorkError
            The folder is not empty.
        """

    @abstractmethod
    def rename(self, old: str, new: str) -> None:
        """Give a file or a folder another name, which nothing has yet.

        Raises
        ------
        WorkNotFoundError, WorkExistsError
            There is no ``old``, or there is a ``new`` already.
        """

    @abstractmethod
    def copy(self, source: str, target: str) -> None:
        """Copy a file; ``target`` is made or replaced as by :meth:`write`.

        Raises
        ------
        WorkNotFoundError, WorkDeniedError, WorkFullError
            As for :meth:`read` and :meth:`write`.
        """


def kind_of(mode: int) -> Kind:
    """Return what kind of thing a mode (``st_mode``) stands for."""
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    return "link" if stat.S_ISLNK(mode) else "other"


def relative(path: str) -> str:
    """Return a path without empty parts, ``""`` for the work folder itself.

    Raises
    ------
    WorkError
        It leads out of the work folder, or no file can have that name.
    """
    try:
        raw = path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise WorkError(f"{path!r}: is not a name that a file can have") from None
    if path.startswith("/"):
        raise WorkError(
            f"{path!r}: paths are relative to the work folder and do not begin with '/', "
            "e.g. 'hanako/result.csv'"
        )
    if b"\0" in raw or len(raw) > _MAX_PATH:
        raise WorkError(f"{path[:80]!r}: is not a name that a file can have")
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise WorkError(f"{path!r}: leads out of the work folder; '..' is not allowed")
    return "/".join(parts)


def part_name() -> str:
    """Return a name for a file on its way, by which what was left of it can be recognised."""
    return f".~{secrets.token_hex(8)}.part"


def is_part(name: str) -> bool:
    """Whether a name is one that :func:`part_name` gives."""
    return _PART.fullmatch(name) is not None
