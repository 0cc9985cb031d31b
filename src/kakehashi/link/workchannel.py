"""The work folder over SFTP channels.

Everything is a sequence of steps that may be done twice. A channel that breaks is opened anew, and
the step begins again, until the store was out of reach for too long. A file is written beside its
place under a name of its own, flushed, read back and compared, and only then takes the place.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import posixpath
import stat
from functools import partial
from typing import TYPE_CHECKING, Self, TypeVar

from kakehashi.link.channels import PATIENCE_S, Channels, explained
from kakehashi.link.door import enter_open
from kakehashi.link.sftp import (
    STATUS_NO_SUCH_FILE,
    STATUS_PERMISSION_DENIED,
    Stat,
    StatusError,
)
from kakehashi.link.upload import Upload
from kakehashi.link.work import (
    WorkError,
    WorkExistsError,
    WorkFolder,
    WorkFullError,
    WorkNotFoundError,
    WorkStat,
    is_part,
    kind_of,
    part_name,
    relative,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kakehashi.link.sftpwrite import WritingSftp

T = TypeVar("T")

_ROOT = "/work"
# What is done again after a cut.
_STEP = 4 << 20
# A file that is on its way for longer than this has been left by whoever wrote it.
_STALE_S = 24 * 3600


class ChannelFolder(WorkFolder):
    """The work folder through channels that are opened when they are needed.

    Parameters
    ----------
    connect : callable
        Returns a connected stream socket with an SFTP server behind it.
    root : str
        The work folder's path on that server.
    patience_s : float
        Seconds without the store after which an operation gives up.
    """

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        *,
        root: str = _ROOT,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._root = root
        self._channels = Channels(connect, patience_s)

    @classmethod
    def on_socket(cls, path: Path, *, root: str = _ROOT, patience_s: float = PATIENCE_S) -> Self:
        """Return the work folder behind a unix socket, each connection to which is a channel."""
        connect = partial(enter_open, path, "the way to the work folder")
        return cls(connect, root=root, patience_s=patience_s)

    def close(self) -> None:
        """Close the channels; whoever waits for the store gives up."""
        self._channels.close()

    def listdir(self, path: str = "") -> list[WorkStat]:
        """Return a folder's entries, sorted by name."""
        place = self._place(path)

        def step(sftp: WritingSftp, _: int) -> list[WorkStat]:
            found = []
            for name, entry in sftp.list(place):
                shown = entry
                if kind_of(entry.mode or 0) == "link":
                    with contextlib.suppress(StatusError):
                        shown = sftp.stat(posixpath.join(place, name))
                found.append(_described(name, shown))
            return sorted(found, key=lambda entry: entry.name)

        return self._channels.run(path, step)

    def stat(self, path: str = "") -> WorkStat:
        """Return what a path is; links are followed."""
        place = self._place(path)
        found = self._channels.run(path, lambda sftp, _: sftp.stat(place))
        return _described(posixpath.basename(relative(path)), found)

    def read(self, path: str) -> bytes:
        """Return a file's whole content."""
        return self.fetch(path)[1]

    def fetch(self, path: str) -> tuple[WorkStat, bytes]:
        """Return what a file was when it was opened, and its whole content.

        Raises
        ------
        WorkNotFoundError, WorkDeniedError
            As for :meth:`read`.
        """
        place = self._place(path)

        def step(sftp: WritingSftp, _: int) -> tuple[WorkStat, bytes]:
            _require_file(sftp.stat(place), path)
            with _opened(sftp, sftp.open_for_reading(place)) as handle:
                found = sftp.fstat(handle)
                data = b"".join(sftp.read(handle, 0, found.size or 0))
            return _described(posixpath.basename(place), found), data

        return self._channels.run(path, step)

    def write(self, path: str, data: bytes) -> None:
        """Make a file hold ``data``, or leave it as it is."""
        with self.begin(path) as incoming:
            incoming.feed(bytes(data))
            incoming.commit()

    def begin(self, path: str, *, progress: Callable[[int], None] | None = None) -> Incoming:
        """Begin a file that comes in pieces; it takes its place when it is committed.

        Parameters
        ----------
        path : str
            The file.
        progress : callable, optional
            Is told, in any thread, how many more bytes stand at the store.

        Raises
        ------
        WorkNotFoundError, WorkDeniedError
            There is no such folder, or the file that is there may not be written.
        """
        place = self._place(path)

        def step(sftp: WritingSftp, _: int) -> tuple[str, int | None]:
            target = place
            try:
                old = sftp.stat(target, follow=False)
                if kind_of(old.mode or 0) == "link":
                    target = sftp.real_path(target)
                    old = sftp.stat(target)
            except StatusError as error:
                if error.code != STATUS_NO_SUCH_FILE:
                    raise
                return target, None
            _require_file(old, path)
            # Replacing asks the folder only; a file that was made read-only stays as it is.
            sftp.check_writable(target)
            return target, stat.S_IMODE(old.mode or 0)

        target, mode = self._channels.run(path, step)
        return Incoming(self._channels, path, target, mode, progress)

    def mkdir(self, path: str) -> None:
        """Make a folder."""
        place = self._place(path)

        def step(sftp: WritingSftp, again: int) -> None:
            try:
                sftp.mkdir(place)
            except StatusError:
                there = _look(sftp, place)
                if there is None:
                    raise
                if not (again and kind_of(there.mode or 0) == "folder"):
                    raise WorkExistsError(f"{path}: is there already") from None

        self._channels.run(path, step)

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link (not what it leads to) or an empty folder."""
        place = self._place(path)
        if place == self._root:
            raise WorkError("the work folder itself cannot be removed")

        def step(sftp: WritingSftp, again: int) -> None:
            there = _look(sftp, place)
            if there is None:
                if again:
                    return
                raise WorkNotFoundError(f"{path}: is not there")
            if kind_of(there.mode or 0) != "folder":
                sftp.remove(place)
                return
            entries = sftp.list(place)
            if entries and not recursive:
                raise WorkError(
                    f"{path}: is a folder that is not empty; remove what is in it first, or give "
                    "recursive=True"
                )
            self._empty(sftp, place, entries)
            sftp.rmdir(place)

        self._channels.run(path, step)

    def rename(self, old: str, new: str) -> None:
        """Give a file or a folder another name, which nothing has yet."""
        source, target = self._place(old), self._place(new)
        before: Stat | None = None

        def step(sftp: WritingSftp, again: int) -> None:
            nonlocal before
            here, there = _look(sftp, source), _look(sftp, target)
            if here is None:
                # A cut may have come after it was done.
                if again and there is not None and before is not None and before.mode == there.mode:
                    return
                raise WorkNotFoundError(f"{old}: is not there")
            if there is not None:
                raise WorkExistsError(f"{new}: is there already")
            before = here
            sftp.rename(source, target)

        self._channels.run(new, step)

    def copy(self, source: str, target: str) -> None:
        """Copy a file; ``target`` is made or replaced as by :meth:`write`."""
        place = self._place(source)
        first: Stat | None = None

        def piece(at: int) -> Callable[[WritingSftp, int], bytes]:
            def step(sftp: WritingSftp, _: int) -> bytes:
                nonlocal first
                _require_file(sftp.stat(place), source)
                with _opened(sftp, sftp.open_for_reading(place)) as handle:
                    now = sftp.fstat(handle)
                    if first is None:
                        first = now
                    if now != first:
                        raise WorkError(f"{source}: changed while it was copied; copy it again")
                    return b"".join(sftp.read(handle, at, min(_STEP, (now.size or 0) - at)))

            return step

        start = self._channels.run(source, piece(0))
        with self.begin(target) as incoming:
            data, at = start, 0
            while data:
                incoming.write(data)
                at += len(data)
                data = self._channels.run(source, piece(at))
            incoming.commit()

    def sweep(self, path: str = "") -> None:
        """Remove from a folder what writes left there when they were killed, a day ago."""
        oldest = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=_STALE_S)
        for entry in self.listdir(path):
            if is_part(entry.name) and entry.modified < oldest:
                with contextlib.suppress(WorkNotFoundError):
                    self.remove(posixpath.join(relative(path), entry.name))

    def _place(self, path: str) -> str:
        inside = relative(path)
        return posixpath.join(self._root, inside) if inside else self._root

    def _empty(self, sftp: WritingSftp, place: str, entries: list[tuple[str, Stat]]) -> None:
        for name, entry in entries:
            below = posixpath.join(place, name)
            if kind_of(entry.mode or 0) == "folder":
                self._empty(sftp, below, sftp.list(below))
                sftp.rmdir(below)
            else:
                sftp.remove(below)


class Incoming:
    """A file on its way into the work folder; made by :meth:`ChannelFolder.begin`.

    As a context manager it discards what was not committed. One thread uses it at a time.
    """

    def __init__(
        self,
        channels: Channels,
        path: str,
        target: str,
        mode: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._channels = channels
        self._path = path
        self._target = target
        self._mode = mode
        self._part = ""
        self._parts: list[str] = []
        self._links: list[str] = []
        self._over = False

        def step(sftp: WritingSftp, _: int) -> None:
            # A new name at each attempt: a server that was cut off may make the last one yet.
            self._part = posixpath.join(posixpath.dirname(target), part_name())
            self._parts.append(self._part)
            handle = sftp.open_for_writing(self._part, create=True, exclusive=True)
            sftp.close_handle(handle)

        try:
            self._take_in(lambda: self._channels.run(self._path, step))
        except BaseException:
            self._drop()
            raise
        self._upload = Upload(channels, path, self._part, progress=progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def write(self, data: bytes) -> None:
        """Append bytes; they are at the store when this returns.

        Raises
        ------
        WorkFullError, WorkLostError
            No space is left, or the store is out of reach; discard it then.
        """

        def put() -> None:
            self._upload.put(data, check=False)
            self._upload.drain()

        self._take_in(put)

    def feed(self, data: bytes | memoryview) -> None:
        """Append bytes that go their way from now on; they must not change until the commit.

        It waits while more than 64 MiB are under way. A whole file given at once goes fastest.

        Raises
        ------
        WorkFullError, WorkLostError
            As for :meth:`write`, at the latest when it is committed.
        """
        self._take_in(lambda: self._upload.put(data, check=True))

    @property
    def size(self) -> int:
        """Bytes that it has so far."""
        return self._upload.size

    def settle(self) -> None:
        """Have everything stand on the store's disk, and compare it.

        Raises
        ------
        WorkError
            As for :meth:`commit`.
        """
        self._take_in(self._upload.settle)

    def commit(self, *, also: str | None = None) -> WorkStat:
        """Settle it, then take the file's place.

        Parameters
        ----------
        also : str, optional
            Another name in the same folder, which nothing has yet, under which it stays.

        Returns
        -------
        WorkStat
            What the file is now, whatever another may make of it at once.

        Raises
        ------
        WorkFullError, WorkLostError
            As for :meth:`write`. After ``WorkLostError`` the file is the old or the new one.
        WorkError
            What the store holds is not what was written; the old file is untouched.
        """
        self.settle()
        settled = self._channels.run(self._path, self._describe)
        if also is None:
            self._channels.run(self._path, self._replace)
        else:
            self._channels.run(self._path, partial(self._replace_and_keep, also))
        self._parts.remove(self._part)
        self._drop()
        return _described(posixpath.basename(relative(self._path)), settled)

    def stop(self) -> None:
        """From any thread: end a :meth:`feed` or :meth:`settle` that waits, by a ``WorkError``."""
        self._upload.stop()

    def discard(self) -> None:
        """Remove what was written; the file stays as it was. After a commit, do nothing."""
        if not self._over:
            self._upload.cancel()
            self._drop()

    def _drop(self) -> None:
        self._over = True
        for part in (*self._parts, *self._links):
            self._channels.drop(part)

    def _describe(self, sftp: WritingSftp, _: int) -> Stat:
        with _opened(sftp, sftp.open_for_writing(self._part)) as handle:
            if self._mode is not None:
                # Some file systems keep rights as they are.
                with contextlib.suppress(StatusError):
                    sftp.set_mode(handle, self._mode)
            return sftp.fstat(handle)

    def _replace(self, sftp: WritingSftp, again: int) -> None:
        """Take the file's place for good: on one channel, since a machine that starts anew forgets.

        What was renamed and not flushed by then is a part once more.
        """
        self._rename(sftp, self._target, again)
        self._flush_folder(sftp)

    def _replace_and_keep(self, also: str, sftp: WritingSftp, again: int) -> None:
        """As above, by way of the name under which it stays, of which the file becomes a link."""
        folder = posixpath.dirname(self._target)
        kept = posixpath.join(folder, also)
        self._rename(sftp, kept, again)
        # A server that was cut off may be about to rename the last one: it must not find it later.
        self._forget_links(sftp)
        self._links.append(posixpath.join(folder, part_name()))
        sftp.link(kept, self._links[-1])
        sftp.rename(self._links[-1], self._target)
        # Where both already are the same file, renaming leaves both.
        self._forget_links(sftp)
        self._flush_folder(sftp)

    def _forget_links(self, sftp: WritingSftp) -> None:
        for link in self._links:
            try:
                sftp.remove(link)
            except StatusError as error:
                if error.code != STATUS_NO_SUCH_FILE:
                    raise
        self._links.clear()

    def _rename(self, sftp: WritingSftp, target: str, again: int) -> None:
        try:
            sftp.rename(self._part, target)
        except StatusError as error:
            # A cut may have come after it was done. Nobody else knows the part's name.
            if not (again and error.code == STATUS_NO_SUCH_FILE):
                raise
            if _look(sftp, target) is None:
                raise

    def _flush_folder(self, sftp: WritingSftp) -> None:
        # Some file systems cannot flush a folder; nothing is lost by it there.
        with contextlib.suppress(StatusError):
            sftp.fsync_folder(posixpath.dirname(self._target))

    def _take_in(self, act: Callable[[], T]) -> T:
        """Do what needs space: there a refusal without a reason is a lack of it."""
        try:
            return act()
        except (StatusError, WorkError) as error:
            cause = error if isinstance(error, StatusError) else error.__cause__
            if isinstance(cause, StatusError):
                if cause.code in {STATUS_NO_SUCH_FILE, STATUS_PERMISSION_DENIED}:
                    raise explained(cause, self._path) from cause
                raise WorkFullError(
                    f"{self._path}: the store did not take it: its disk is full or the project's "
                    "quota is used up; remove what is no longer needed, then write it again"
                ) from cause
            raise


def _described(name: str, found: Stat) -> WorkStat:
    mode = found.mode or 0
    modified = dt.datetime.fromtimestamp(found.modified or 0, dt.UTC)
    return WorkStat(name, kind_of(mode), found.size or 0, modified, stat.S_IMODE(mode))


def _look(sftp: WritingSftp, place: str) -> Stat | None:
    """Return what is at a place, links not followed; ``None`` if nothing is."""
    try:
        return sftp.stat(place, follow=False)
    except StatusError as error:
        if error.code == STATUS_NO_SUCH_FILE:
            return None
        raise


def _require_file(found: Stat, path: str) -> None:
    # To open a pipe would hold the server for ever.
    kind = kind_of(found.mode or 0)
    if kind != "file":
        raise WorkError(f"{path or 'the work folder'}: is no file ({kind})")


@contextlib.contextmanager
def _opened(sftp: WritingSftp, handle: bytes) -> Iterator[bytes]:
    """Close a handle afterwards; on a channel that broke it went with it."""
    try:
        yield handle
    except (StatusError, WorkError):
        with contextlib.suppress(StatusError):
            sftp.close_handle(handle)
        raise
    sftp.close_handle(handle)
