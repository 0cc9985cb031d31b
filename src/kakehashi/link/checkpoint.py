"""Checkpoints of a training loop, whole or not at all, in the project's work folder.

:func:`save` returns when the file stands on the store's disk, read back and compared.
:class:`Saver` takes it into memory and returns at once, and what it promised is there when the
future that it gave is done. Beside ``NAME`` lies ``.NAME.sha256``, as ``sha256sum`` writes it, by
which :func:`load` knows that it has what was saved.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import math
import os
import posixpath
import re
import threading
from collections import deque
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeVar, overload

from kakehashi.link.locks import Condition, Uninterrupted
from kakehashi.link.session import Session
from kakehashi.link.upload import RANGE
from kakehashi.link.work import WorkError, WorkNotFoundError, relative
from kakehashi.link.workchannel import ChannelFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kakehashi.link.workchannel import Incoming

T = TypeVar("T")

BOUND = 1 << 30
"""Bytes that a :class:`Saver` holds at most, unless told otherwise."""

_NUMBERED = re.compile(r"(?P<name>.+)\.~(?P<number>[0-9]+)~", re.DOTALL)
# Sums that a name keeps at least: also those of saves that never took its place.
_LINES = 64


class DamagedError(WorkError):
    """A file is not what was saved under its name."""


@dataclass(frozen=True)
class Saved:
    """What became of a save.

    Attributes
    ----------
    name : str
        The file, relative to the work folder.
    size : int
        Bytes.
    sha256 : str
        Of these bytes; empty where it was superseded.
    superseded : bool
        It was never begun: a later save of the same name, which is there, came before its turn.
    """

    name: str
    size: int
    sha256: str
    superseded: bool = False


class Saving(Future[Saved]):
    """A save that is under way: done when it is there, byte for byte.

    Attributes
    ----------
    name : str
        The file, relative to the work folder.
    taken, written : int
        Bytes that were taken into memory so far, and that are at the store so far.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        # Whoever asks it may be interrupted; the saver must still be able to tell the result.
        self._condition = Condition()
        self.name = name
        self.taken = 0
        self.written = 0
        self._stop: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    def cancel(self) -> bool:
        """Give it up: the file stays as it was.

        Returns
        -------
        bool
            Whether it was asked in time; it may still be done where it is nearly so.
        """
        if super().cancel():
            self._stop()
            return True
        if self.done():
            return False
        self._stop()
        return True

    def _add_written(self, more: int) -> None:
        with self._lock:
            self.written += more


@dataclass(eq=False)
class _Job:
    saving: Saving
    keep: int
    pieces: deque[memoryview] = field(default_factory=deque)
    held: int = 0
    whole: bool = False
    begun: bool = False
    incoming: Incoming | None = None
    given_up: bool = False
    # It is in no row any more: done, failed or given up.
    over: bool = False
    # Saves of the same name that this one superseded.
    instead_of: list[Saving] = field(default_factory=list)


class _Spool:
    """What a save writes into: memory, as far as the bound goes."""

    def __init__(self, saver: Saver, job: _Job) -> None:
        self._saver = saver
        self._job = job
        self._block = bytearray()
        self._used = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take a copy."""
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view):
            if not self._block:
                self._block = bytearray(RANGE)
            count = min(len(view) - at, RANGE - self._used)
            self._block[self._used : self._used + count] = view[at : at + count]
            self._used += count
            at += count
            if self._used == RANGE:
                self.flush()
        return len(view)

    def flush(self) -> None:
        """Hand over what there is."""
        block, used, self._block, self._used = self._block, self._used, bytearray(), 0
        if used:
            self._saver._take(self._job, memoryview(block)[:used])


class Saver:
    """Saves in the background, in the order in which they were asked for.

    A save of a name, with ``keep=1``, that has not begun when another of the same name has been
    taken in whole is superseded by that one, and only then. Errors are raised by the future, and
    once more by the next :meth:`flush` or :meth:`close`. There is one writer to a name.

    After a Ctrl-C in the loop the saver still waits, at its end, for what it has taken; a Ctrl-C
    while it waits there gives that up.

    Parameters
    ----------
    bound : int
        Bytes in memory from which on :meth:`save` waits; up to 64 MiB more are under way.
    work : ChannelFolder, optional
        Where to; by default this session's work folder, waited for without a limit in a cut.

    Examples
    --------
    >>> with Saver() as saver:  # doctest: +SKIP
    ...     for epoch in range(100):
    ...         train(model)
    ...         saver.save("hanako/model.pt", model.state_dict(), keep=3)
    """

    def __init__(self, *, bound: int = BOUND, work: ChannelFolder | None = None) -> None:
        if bound <= 0:
            raise ValueError(f"bound must be above 0 bytes, not {bound}")
        self._bound = bound
        self._own = work is None
        self._work = work if work is not None else _current()
        self._state = Condition()
        self._turn = threading.Lock()
        self._jobs: deque[_Job] = deque()
        self._held = 0
        self._failures: list[Exception] = []
        self._swept: set[str] = set()
        self._closed = False
        self._worker: threading.Thread | None = None
        self._pid = os.getpid()
        atexit.register(self.close)

    @property
    def held(self) -> int:
        """Bytes in memory that are not on their way yet."""
        return self._held

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            if failure is not error:
                error.add_note(f"A save failed as well: {failure}")

    def save(self, name: str, what: object, *, keep: int = 1) -> Saving:
        """Take something into memory as it is now, and see to it that it gets to the store.

        Parameters
        ----------
        name : str
            The file, relative to the work folder; its folder is there.
        what : bytes, bytearray, memoryview, callable or object
            The bytes; or a function that writes them into the file-like object that it is called
            with; or anything else, as ``torch.save`` writes it.
        keep : int
            How many are kept: the last ones also stand as ``NAME.~1~``, ``NAME.~2~``...

        Raises
        ------
        WorkError
            The name is not one for a file.
        CancelledError
            It was cancelled while it was taken in.
        ValueError
            The saver was closed, or ``keep`` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep must be 1 or more, not {keep}")
        name = relative(name)
        if not posixpath.basename(name) or _NUMBERED.fullmatch(name):
            raise WorkError(f"{name!r}: is not a name to save under; take e.g. 'hanako/model.pt'")
        if os.getpid() != self._pid:
            raise WorkError(
                "this saver was made before the process was forked; make one in this process"
            )
        # One at a time: the first in the row is whole, or the one that is being taken in.
        with self._turn:
            job = _Job(Saving(name), keep)
            job.saving._stop = lambda: self._give_up(job)
            try:
                with Uninterrupted():
                    self._begin(job)
                _write_into(_Spool(self, job), what, self, job)
                with self._state:
                    self._complete(job)
            except BaseException:
                self._give_up(job)
                raise
        return job.saving

    def flush(self) -> None:
        """Wait until everything is at the store.

        Raises
        ------
        Exception
            What the first save that failed since the last time failed with.
        """
        with self._state:
            while self._jobs:
                self._state.wait()
            failures, self._failures = self._failures, []
        if failures:
            for other in failures[1:]:
                failures[0].add_note(f"Another save failed as well: {other}")
            raise failures[0]

    def close(self) -> None:
        """As :meth:`flush`; then close the way to the store, if it is its own."""
        atexit.unregister(self.close)
        if os.getpid() != self._pid:
            return
        try:
            self.flush()
        except Exception:
            raise
        except BaseException:
            # Ctrl-C, above all: whoever has had enough of waiting must get out.
            self._give_up_all()
            raise
        finally:
            with self._state:
                self._closed = True
                worker = self._worker
                self._state.notify_all()
            if worker is not None:
                worker.join()
            if self._own:
                self._work.close()

    # ------------------------------------------------------------------ taking in

    def _begin(self, job: _Job) -> None:
        with self._state:
            if self._closed:
                raise ValueError("this saver was closed; make a new one")
            if self._worker is None:
                self._worker = threading.Thread(
                    target=self._work_off, name="kakehashi saver", daemon=True
                )
                self._worker.start()
            self._jobs.append(job)
            self._state.notify_all()

    def _complete(self, job: _Job) -> None:
        """With the lock held: it was taken in to its end."""
        if job.given_up:
            raise CancelledError
        job.whole = True
        if not job.over:
            self._supersede(job)
        self._state.notify_all()

    def _take(self, job: _Job, piece: memoryview) -> None:
        with self._state:
            while self._held >= self._bound and not (job.given_up or job.over):
                self._state.wait()
            if job.given_up:
                raise CancelledError
            if job.over:
                # It has failed by now, and its future says so.
                return
            job.pieces.append(piece)
            job.held += len(piece)
            self._held += len(piece)
            job.saving.taken += len(piece)
            self._state.notify_all()

    def _supersede(self, job: _Job) -> None:
        if job.keep > 1:
            return
        for old in list(self._jobs):
            same = old is not job and old.saving.name == job.saving.name and old.keep == 1
            if same and not old.begun:
                job.instead_of += [*old.instead_of, old.saving]
                self._forget(old)

    def _give_up(self, job: _Job) -> None:
        with self._state:
            job.given_up = True
            if not job.begun and job in self._jobs:
                self._settle(job.instead_of, None, CancelledError())
                self._forget(job)
            incoming = job.incoming
            self._state.notify_all()
        if incoming is not None:
            incoming.stop()

    def _give_up_all(self) -> None:
        """End everything at once; in a cut no step would end by itself."""
        with self._state:
            jobs = list(self._jobs)
        for job in jobs:
            self._give_up(job)
        if self._own:
            self._work.close()

    def _forget(self, job: _Job) -> None:
        self._jobs.remove(job)
        job.over = True
        self._held -= job.held
        job.held = 0
        job.pieces.clear()
        self._state.notify_all()

    # ------------------------------------------------------------------ writing

    def _work_off(self) -> None:
        while (job := self._next()) is not None:
            saving = job.saving
            if not saving.set_running_or_notify_cancel():
                with self._state:
                    self._settle(job.instead_of, None, CancelledError())
                    self._forget(job)
                continue
            saved: Saved | None = None
            failure: Exception = CancelledError()
            try:
                saved = self._write(job)
            except Exception as error:  # whatever it is, who waits for it is to know
                if not job.given_up:
                    failure = error
            with self._state:
                if saved is None and not isinstance(failure, CancelledError):
                    self._failures.append(failure)
                if saved is None:
                    saving.set_exception(failure)
                else:
                    saving.set_result(saved)
                self._settle(job.instead_of, saved, failure)
                self._forget(job)

    @staticmethod
    def _settle(superseded: list[Saving], saved: Saved | None, failure: Exception) -> None:
        """Tell those that were superseded what became of the one that came instead."""
        for one in superseded:
            if not one.set_running_or_notify_cancel():
                continue
            if saved is None:
                one.set_exception(failure)
            else:
                one.set_result(Saved(one.name, one.taken, "", superseded=True))

    def _next(self) -> _Job | None:
        with self._state:
            while not self._jobs:
                if self._closed:
                    return None
                self._state.wait()
            self._jobs[0].begun = True
            return self._jobs[0]

    def _pieces(self, job: _Job) -> Iterator[memoryview]:
        while True:
            with self._state:
                while not job.pieces and not job.whole and not job.given_up:
                    self._state.wait()
                if job.given_up:
                    raise CancelledError
                if not job.pieces:
                    return
                piece = job.pieces.popleft()
            yield piece
            with self._state:
                job.held -= len(piece)
                self._held -= len(piece)
                self._state.notify_all()

    def _sweep(self, folder: str) -> None:
        """Remove what savers that were killed left in a folder long ago, once."""
        if folder not in self._swept:
            self._work.sweep(folder)
            self._swept.add(folder)

    def _write(self, job: _Job) -> Saved:
        work, name = self._work, job.saving.name
        found = hashlib.sha256()
        self._sweep(posixpath.dirname(name))
        with work.begin(name, progress=job.saving._add_written) as incoming:
            with self._state:
                job.incoming = incoming
            for piece in self._pieces(job):
                incoming.feed(piece)
                found.update(piece)
            incoming.settle()
            numbers = _numbers(work, name) if job.keep > 1 else []
            number = max(numbers, default=0) + 1
            base = posixpath.basename(name)
            names = [base, f"{base}.~{number}~"] if job.keep > 1 else [base]
            # Before the file: at each moment the sums know what is there.
            sums = [f"{found.hexdigest()}  {one}" for one in names]
            _add_sums(work, name, sums, max(_LINES, 4 * job.keep))
            with self._state:
                if job.given_up:
                    raise CancelledError
                # From here on it is done.
                job.incoming = None
            incoming.commit(also=names[1] if job.keep > 1 else None)
        for old in sorted(numbers, reverse=True)[job.keep - 1 :]:
            with contextlib.suppress(WorkNotFoundError):
                work.remove(f"{name}.~{old}~")
        return Saved(name, incoming.size, found.hexdigest())


def save(name: str, what: object, *, keep: int = 1, work: ChannelFolder | None = None) -> Saved:
    """Save something into the project's work folder, and return when it is there.

    Whoever looks finds the old file or the new one, whole, also after a kill at any moment.

    Parameters
    ----------
    name, what, keep
        As for :meth:`Saver.save`.
    work : ChannelFolder, optional
        Where to; by default this session's work folder, waited for without a limit in a cut.

    Raises
    ------
    WorkError
        It could not be saved; the old file is untouched.
    LinkClosedError
        The session has ended.

    Examples
    --------
    >>> save("hanako/model.pt", model.state_dict(), keep=3)  # doctest: +SKIP
    """
    with Saver(bound=4 * RANGE, work=work) as saver:
        try:
            saving = saver.save(name, what, keep=keep)
            saver.flush()
        except KeyboardInterrupt:
            saver._give_up_all()
            raise
    return saving.result()


@overload
def load(name: str, read: None = None, *, work: ChannelFolder | None = None) -> bytes: ...


@overload
def load(name: str, read: Callable[[BinaryIO], T], *, work: ChannelFolder | None = None) -> T: ...


def load(
    name: str, read: Callable[[BinaryIO], T] | None = None, *, work: ChannelFolder | None = None
) -> bytes | T:
    """Return what was saved under a name, every byte of it as it was then.

    Parameters
    ----------
    name : str
        As for :func:`save`; ``NAME.~2~`` is a version of ``NAME`` that was kept.
    read : callable, optional
        Makes something of a file-like object with the bytes, e.g. ``torch.load``.
    work : ChannelFolder, optional
        Where from; by default this session's work folder, waited for without a limit in a cut.

    Raises
    ------
    DamagedError
        The file is not what was saved under this name.
    WorkNotFoundError
        There is no such file, or it was not saved by :func:`save`.
    """
    name = relative(name)
    with contextlib.nullcontext(work) if work is not None else _current() as folder:
        data = _verified(folder, name)
    if read is None:
        return data
    return read(io.BytesIO(data))


def _current() -> ChannelFolder:
    return ChannelFolder.on_socket(Session.current().work_socket, patience_s=math.inf)


def _write_into(spool: _Spool, what: object, saver: Saver, job: _Job) -> None:
    if isinstance(what, bytes):
        # It cannot change: no copy.
        for start in range(0, len(what), RANGE):
            saver._take(job, memoryview(what)[start : start + RANGE])
    elif isinstance(what, (bytearray, memoryview)):
        spool.write(memoryview(what))
    elif callable(what) and not hasattr(what, "state_dict"):
        what(spool)
    else:
        _torch().save(what, spool)
    spool.flush()


def _torch() -> Any:
    try:
        return import_module("torch")
    except ImportError as error:
        raise TypeError(
            "bytes and functions that write into a file can be saved; anything else needs torch, "
            "which is not installed here"
        ) from error


def _sums_of(name: str) -> tuple[str, str]:
    """Return where the sums of a file lie, and what it is called in there."""
    folder, base = posixpath.split(name)
    numbered = _NUMBERED.fullmatch(base)
    return posixpath.join(folder, f".{numbered['name'] if numbered else base}.sha256"), base


def _sums(work: ChannelFolder, path: str) -> list[str]:
    try:
        return work.read(path).decode("utf-8", "surrogateescape").splitlines()
    except WorkNotFoundError:
        return []


def _add_sums(work: ChannelFolder, name: str, new: list[str], most: int) -> None:
    path, _ = _sums_of(name)
    lines = [*new, *(line for line in _sums(work, path) if line not in new)][:most]
    work.write(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))


def _numbers(work: ChannelFolder, name: str) -> list[int]:
    folder, base = posixpath.split(name)
    found = (_NUMBERED.fullmatch(entry.name) for entry in work.listdir(folder))
    return [int(match["number"]) for match in found if match and match["name"] == base]


def _verified(work: ChannelFolder, name: str) -> bytes:
    path, base = _sums_of(name)
    data = work.read(name)
    line = f"{hashlib.sha256(data).hexdigest()}  {base}"
    # After the file: the sums know it before it is there.
    lines = _sums(work, path)
    if not any(one.endswith(f"  {base}") for one in lines):
        raise WorkNotFoundError(
            f"{name}: was not saved by kakehashi.link.save; read it with WorkFolder.read"
        )
    if line not in lines:
        raise DamagedError(
            f"{name}: is not what was saved under this name ({len(data)} bytes); it was changed "
            f"since, or is damaged; kept versions are called {base}.~1~ and so on"
        )
    return data
