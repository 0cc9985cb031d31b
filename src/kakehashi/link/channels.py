"""The work folder's channels: opened when needed, kept while whole, opened anew after a cut."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, TypeVar

from kakehashi.errors import LinkClosedError, LinkError
from kakehashi.link.locks import Condition, Event, Uninterrupted
from kakehashi.link.sftp import STATUS_NO_SUCH_FILE, STATUS_PERMISSION_DENIED, StatusError
from kakehashi.link.sftpwrite import WritingSftp
from kakehashi.link.work import WorkDeniedError, WorkError, WorkLostError, WorkNotFoundError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

T = TypeVar("T")

PATIENCE_S = 30.0
"""How long the store may be out of reach before an operation gives up."""

_CHANNELS = 3
# More are closed again: others in the session want some too.
_IDLE = 3
# A silent store is given up sooner than by a reader: somebody waits for the save.
_SILENT_S = 20.0
_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


class Channels:
    """Runs steps on channels to one SFTP server; one object may be used by many threads.

    A step is a function of a channel and of how often it was begun before; it must be such that
    doing it twice does no harm.

    Parameters
    ----------
    open_one : callable
        Returns a connected stream socket with an SFTP server behind it.
    patience_s : float
        Seconds without the store after which a step gives up.
    """

    def __init__(self, open_one: Callable[[], socket.socket], patience_s: float) -> None:
        self._open_one = open_one
        self._patience_s = patience_s
        self._free = _CHANNELS
        self._freed = Condition()
        self._lock = threading.Lock()
        self._idle: list[WritingSftp] = []
        self._rubbish: set[str] = set()
        self._closed = Event()
        self._lost = False
        self._pid = os.getpid()

    def close(self) -> None:
        """Close the channels; whoever waits for the store gives up."""
        self._closed.set()
        with self._lock:
            idle, self._idle = self._idle, []
        for sftp in idle:
            sftp.close()

    def run(self, path: str, step: Callable[[WritingSftp, int], T]) -> T:
        """Do a step, and again on a new channel where one broke.

        Parameters
        ----------
        path : str
            What it is about, for messages.
        step : callable
            Gets the channel and the number of times it was begun before.

        Raises
        ------
        WorkError
            The server refused, or the store was out of reach for too long.
        LinkClosedError
            The session has ended.
        """
        self._require_own()
        since, begun = None, 0

        def begin(sftp: WritingSftp) -> T:
            nonlocal begun
            self._lost = False
            begun += 1
            return step(sftp, begun - 1)

        while True:
            try:
                return self._do(begin)
            except (WorkError, LinkClosedError):
                raise
            except StatusError as error:
                raise explained(error, path) from error
            except (LinkError, OSError) as error:
                since = time.monotonic() if since is None else since
                self.wait(path, error, since)

    def wait(self, path: str, error: Exception, since: float) -> None:
        """Wait a little before another attempt, longer the longer it has been.

        Parameters
        ----------
        path : str
            What it is about, for messages.
        error : Exception
            Why the last attempt failed.
        since : float
            When the first one failed, by the monotonic clock.

        Raises
        ------
        WorkLostError
            It has been long enough.
        LinkClosedError
            The folder was closed meanwhile.
        """
        past = time.monotonic() - since
        pause = min(max(past / 2, _PAUSE_S), _LONGEST_PAUSE_S)
        if past < self._patience_s and self._closed.wait(pause):
            raise LinkClosedError("this work folder was closed; take a new one") from error
        if past >= self._patience_s:
            self._lost = True
            raise WorkLostError(
                f"{path or 'the work folder'}: the store was out of reach for "
                f"{past:.0f} s ({error}); try again when the link is back"
            ) from error

    def lend(self) -> WritingSftp:
        """Return a channel for a longer time; give it back, or close it.

        Raises
        ------
        LinkError, OSError
            There is none at the moment, or no more (`LinkClosedError`).
        """
        self._require_own()
        sftp = self._take()
        try:
            self._tidy(sftp)
        except BaseException:
            sftp.close()
            raise
        self._lost = False
        return sftp

    def give_back(self, sftp: WritingSftp) -> None:
        """Take back a channel that was lent; one with questions open is closed."""
        with self._lock:
            keep = not sftp.outstanding and not self._closed.is_set() and len(self._idle) < _IDLE
            if keep:
                self._idle.append(sftp)
        if not keep:
            sftp.close()

    def _require_own(self) -> None:
        if os.getpid() != self._pid:
            raise WorkError(
                "this work folder was opened before the process was forked and cannot be used "
                "here; take a new one with WorkFolder.current()"
            )

    def drop(self, part: str) -> None:
        """Remove a file that a write left: now, or with a lost store before anything else."""
        with self._lock:
            self._rubbish.add(part)
        if self._lost:
            return
        with contextlib.suppress(LinkError, OSError):
            self._do(lambda _: None)

    def _do(self, use: Callable[[WritingSftp], T]) -> T:
        """Call something with one of the channels, once nothing is left to tidy."""
        # All in one function: a Ctrl-C in entering or leaving a context would cost a channel.
        mine = False
        try:
            with self._freed:
                while not self._free:
                    self._freed.wait()
                # Nothing is called in between, so that no Ctrl-C comes in between.
                self._free -= 1
                mine = True
            sftp = self._take()
            whole = False
            try:
                self._tidy(sftp)
                done = use(sftp)
                whole = True
            except (StatusError, WorkError):
                whole = True
                raise
            finally:
                if whole:
                    self.give_back(sftp)
                else:
                    sftp.close()
            return done
        finally:
            if mine:
                with Uninterrupted(), self._freed:
                    self._free += 1
                    self._freed.notify_all()

    def _take(self) -> WritingSftp:
        if self._closed.is_set():
            raise LinkClosedError("this work folder was closed; take a new one")
        with self._lock:
            if self._idle:
                return self._idle.pop()
        sftp = WritingSftp(self._open_one(), patience_s=_SILENT_S)
        try:
            sftp.greet()
        except BaseException:
            sftp.close()
            raise
        return sftp

    def _tidy(self, sftp: WritingSftp) -> None:
        """Remove what broken writes left, before anything else is done.

        A server that was cut off may still have the last step of such a write before it, the one
        that takes the file's place: without its source it can no longer do that.
        """
        with self._lock:
            rubbish = set(self._rubbish)
        for part in rubbish:
            with contextlib.suppress(StatusError):
                sftp.remove(part)
            with self._lock:
                self._rubbish.discard(part)


def explained(error: StatusError, path: str) -> WorkError:
    """Return what a refusal means to who asked for a file or folder."""
    shown = path or "the work folder"
    if error.code == STATUS_NO_SUCH_FILE:
        return WorkNotFoundError(f"{shown}: is not there")
    if error.code == STATUS_PERMISSION_DENIED:
        return WorkDeniedError(f"{shown}: its rights do not allow this")
    return WorkError(f"{shown}: the store refused this and gave no reason ({error})")
