"""One file on its way into the work folder: ranges of it over several channels at once.

Each range is written, asked for again behind the write, and compared while the next is on its way
in the other direction. Where a channel breaks, what it had not finished goes over another one. A
range counts only if the channel on which it was read back still stands after the flush: then the
store's machine has not started anew in between, and what was read was not merely in its memory.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kakehashi.errors import LinkClosedError, LinkError
from kakehashi.link.locks import Condition, Uninterrupted
from kakehashi.link.sftp import STATUS_NO_SUCH_FILE, Data, Stat, Status, StatusError
from kakehashi.link.sftpwrite import PIECE
from kakehashi.link.work import WorkError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kakehashi.link.channels import Channels
    from kakehashi.link.sftp import Reply
    from kakehashi.link.sftpwrite import WritingSftp

RANGE = 4 << 20
"""Bytes that are written, read back and, after a cut, written again together."""

HELD = 64 << 20
"""Bytes that may be on their way; who gives more waits."""

# Requests of one channel without an answer, each way: more than its window holds.
_DEPTH = 32
_FIRST_LANES, _MOST_LANES = 4, 8
# Another channel is opened where the last one made it so much faster.
_GAIN, _LOOK_S = 1.1, 0.5
_MISMATCHES = 3


class TornError(WorkError):
    """What the store holds of a file is not what was written; the old file is untouched."""


@dataclass(eq=False)
class _Range:
    start: int
    size: int
    # Until it was read back.
    data: memoryview | None
    digest: bytes = b""
    mismatches: int = 0
    # Its bytes were counted; after a cut they may be written once more.
    counted: bool = False


@dataclass(eq=False)
class _Check:
    """A range that is being read back."""

    range: _Range
    asked: int = 0
    heard: int = 0
    hash: hashlib._Hash = field(default_factory=hashlib.sha256)
    early: dict[int, bytearray | memoryview] = field(default_factory=dict)
    # More, fewer or other bytes than were asked for.
    whole: bool = True
    answers: int = 0

    def take(self, at: int, data: bytearray | memoryview) -> None:
        given = self.range.data
        if given is not None:
            # Much cheaper than a hash; that is for what was let go of.
            self.whole &= data == given[at : at + len(data)]
            self.heard += len(data)
            return
        self.early[at] = data
        while self.heard in self.early:
            piece = self.early.pop(self.heard)
            self.hash.update(piece)
            self.heard += len(piece)

    @property
    def matches(self) -> bool:
        if not self.whole or self.heard != self.range.size:
            return False
        return self.range.data is not None or self.hash.digest() == self.range.digest


@dataclass(eq=False)
class _Traffic:
    """What is under way on one channel."""

    writes: dict[int, _Range] = field(default_factory=dict)
    # Answers that a range still waits for.
    left: dict[_Range, int] = field(default_factory=dict)
    reads: dict[int, tuple[_Check, int, int]] = field(default_factory=dict)
    unread: deque[_Check] = field(default_factory=deque)
    # The range that is being written, and how far.
    now: _Range | None = None
    at: int = 0


@dataclass(eq=False)
class _Lane:
    """One channel of an upload, used by one thread at a time."""

    # The first one does not give up before the upload does.
    first: bool
    sftp: WritingSftp | None = None
    handle: bytes = b""
    mine: set[_Range] = field(default_factory=set)
    checked: list[_Range] = field(default_factory=list)
    thread: threading.Thread | None = None


class Upload:
    """The ranges of one file; one thread gives them.

    Parameters
    ----------
    channels : Channels
        To the store.
    path : str
        What it is about, for messages.
    part : str
        The file at the store, which is there and empty.
    progress : callable, optional
        Is told, in any thread, how many more bytes stand at the store.
    """

    def __init__(
        self,
        channels: Channels,
        path: str,
        part: str,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._channels = channels
        self._path = path
        self._part = part
        self._progress = progress
        self._state = Condition()
        self._waiting: deque[_Range] = deque()
        self._written: deque[_Range] = deque()
        self._busy = 0
        self._held = 0
        self._size = 0
        self._checking = False
        self._ending = False
        self._failure: Exception | None = None
        self._failing_since: float | None = None
        self._lanes: list[_Lane] = []
        self._most = _MOST_LANES
        self._looked, self._moved, self._best = time.monotonic(), 0, 0.0

    @property
    def size(self) -> int:
        """Bytes that were given so far."""
        return self._size

    def put(self, data: bytes | memoryview, *, check: bool) -> None:
        """Append bytes, which must not change any more; wait while too many are on their way.

        Parameters
        ----------
        data : bytes or memoryview
            What comes next.
        check : bool
            Read back at once; else when everything is settled.

        Raises
        ------
        LinkError
            As :meth:`settle`, as soon as it is known.
        """
        view = memoryview(data).cast("B")
        self._checking = check
        for start in range(0, len(view), RANGE):
            piece = view[start : start + RANGE]
            if self._held >= HELD and all(lane.thread is None for lane in self._lanes):
                self._run_out()
            with self._state:
                while self._held >= HELD and self._failure is None:
                    self._state.wait()
                self._raise_failure()
                self._waiting.append(_Range(self._size, len(piece), piece))
                self._held += len(piece)
                self._size += len(piece)
                self._state.notify_all()
                # One range alone goes without a thread.
                if len(self._waiting) > 1 and len(self._lanes) < min(_FIRST_LANES, self._most):
                    self._start_lane()

    def drain(self) -> None:
        """Wait until everything that was given is at the store, and give the channels back.

        Raises
        ------
        LinkError
            As :meth:`settle`.
        """
        self._run_out()
        self._release()

    def settle(self) -> Stat:
        """Wait until everything stands on the store's disk, compared with what was given.

        Raises
        ------
        StatusError
            The store refused.
        TornError
            It holds something else than what was given.
        LinkError
            It was out of reach for too long, or the session has ended.
        """
        self._checking = True
        while True:
            self._run_out()
            try:
                found = self._flush()
            except StatusError:
                raise
            except (LinkError, OSError) as error:
                self._after(error)
                continue
            self._release()
            return found

    def stop(self) -> None:
        """From any thread: have whoever waits here end at once, with a ``WorkError``."""
        self._fail(WorkError(f"{self._path}: the write was cancelled"))
        for lane in list(self._lanes):
            sftp = lane.sftp
            if sftp is not None:
                sftp.abort()

    def cancel(self) -> None:
        """Stop, wherever it is, and give the channels back."""
        self._fail(WorkError(f"{self._path}: the write was cancelled"))
        self._release()

    def _flush(self) -> Stat:
        """Flush over one channel; then see that all are the same as before."""
        for lane in [lane for lane in self._lanes if lane.sftp is None]:
            self._lanes.remove(lane)
        if not self._lanes:
            self._lanes.append(_Lane(first=True))
        found = None
        for number, lane in enumerate(self._lanes):
            try:
                sftp = lane.sftp or self._open(lane)
                if number == 0:
                    sftp.fsync(lane.handle)
                found = sftp.fstat(lane.handle)
            except StatusError:
                raise
            except (LinkError, OSError):
                self._lose(lane)
                raise
        if found is None or found.size != self._size:
            raise self._torn()
        return found

    # ------------------------------------------------------------------ lanes

    def _run_out(self) -> None:
        """Return when nothing is left to do, with no thread at work."""
        with self._state:
            threads = any(lane.thread is not None for lane in self._lanes)
            self._ending = True
            self._state.notify_all()
        try:
            if not threads:
                lane = self._lanes[0] if self._lanes else _Lane(first=True)
                lane.first = True
                self._lanes[:1] = [lane]
                self._serve(lane)
            with self._state:
                # One may have been started by another that now has ended.
                while any(lane.thread is not None for lane in self._lanes):
                    self._state.wait()
        finally:
            self._ending = False
        with self._state:
            self._raise_failure()

    def _start_lane(self) -> None:
        lane = _Lane(first=not self._lanes)
        lane.thread = threading.Thread(target=self._serve_along, args=(lane,), daemon=True)
        with Uninterrupted():
            try:
                lane.thread.start()
            except RuntimeError:
                # The interpreter is ending: what there is must do, the caller's thread at least.
                self._most = len(self._lanes)
                return
            self._lanes.append(lane)

    def _serve_along(self, lane: _Lane) -> None:
        """Serve in a thread of the lane's own."""
        try:
            self._serve(lane)
        finally:
            # Not left to who joins it: in Python 3.11 a Ctrl-C in there makes it look ended.
            with self._state:
                lane.thread = None
                self._state.notify_all()

    def _serve(self, lane: _Lane) -> None:
        while self._wait_for_work():
            try:
                sftp = lane.sftp or self._open(lane)
                self._pump(lane, sftp)
            except (StatusError, LinkClosedError, WorkError) as error:
                self._lose(lane)
                self._fail(error)
            except (LinkError, OSError) as error:
                opened = lane.sftp is not None
                self._lose(lane)
                if not (lane.first or opened):
                    # Refused: there are as many channels as there are to be.
                    with self._state:
                        self._lanes.remove(lane)
                        self._most = len(self._lanes)
                    return
                try:
                    self._after(error)
                except LinkError as final:
                    self._fail(final)

    def _wait_for_work(self) -> bool:
        with self._state:
            while self._failure is None:
                if self._waiting or (self._written and self._checking):
                    return True
                # What another lane has in hand may yet come back.
                if self._ending and not self._busy:
                    self._state.notify_all()
                    return False
                self._state.wait()
            return False

    def _open(self, lane: _Lane) -> WritingSftp:
        sftp = self._channels.lend()
        try:
            lane.handle = sftp.open_for_writing(self._part)
        except StatusError as error:
            self._channels.give_back(sftp)
            # It was made before: whoever removed it, it is not what was written.
            raise self._torn() if error.code == STATUS_NO_SUCH_FILE else error from error
        except BaseException:
            sftp.close()
            raise
        lane.sftp = sftp
        return sftp

    def _lose(self, lane: _Lane) -> None:
        """Take back what a channel had in hand, and what only it vouched for."""
        if lane.sftp is not None:
            lane.sftp.close()
            lane.sftp = None
        with self._state:
            for one in lane.mine:
                (self._waiting if one.data is not None else self._written).appendleft(one)
            self._busy -= len(lane.mine)
            self._written.extend(lane.checked)
            lane.mine, lane.checked = set(), []
            self._state.notify_all()

    def _release(self) -> None:
        """Give the channels back; what was read back over them counts no more."""
        with self._state:
            lanes, self._lanes = self._lanes, []
        for lane in lanes:
            if lane.thread is not None:
                if lane.sftp is not None:
                    lane.sftp.abort()
                with self._state:
                    while lane.thread is not None:
                        self._state.wait()
            sftp, lane.sftp = lane.sftp, None
            if sftp is None:
                continue
            try:
                sftp.close_handle(lane.handle)
            except (LinkError, OSError):
                sftp.close()
            else:
                self._channels.give_back(sftp)
            self._written.extend(lane.checked)

    def _after(self, error: Exception) -> None:
        """Wait a little after a cut; raise when it was long enough, or for good."""
        if isinstance(error, (LinkClosedError, WorkError)):
            raise error
        now = time.monotonic()
        with self._state:
            since = self._failing_since = self._failing_since or now
        self._channels.wait(self._path, error, since)

    # ------------------------------------------------------------------ one channel at work

    def _pump(self, lane: _Lane, sftp: WritingSftp) -> None:
        """Write and read back until nothing is left to take."""
        traffic = _Traffic()
        while True:
            while len(traffic.writes) < _DEPTH and self._ask_write(lane, sftp, traffic):
                pass
            while len(traffic.reads) < _DEPTH and self._ask_read(lane, sftp, traffic):
                pass
            if not sftp.outstanding:
                return
            if self._failure is not None:
                raise WorkError(f"{self._path}: the write was given up")
            reply = sftp.turn()
            if reply is None:
                continue
            self._failing_since = None
            if reply.request in traffic.writes:
                self._on_written(lane, traffic, reply)
            else:
                self._on_read(lane, *traffic.reads.pop(reply.request), reply)

    def _ask_write(self, lane: _Lane, sftp: WritingSftp, traffic: _Traffic) -> bool:
        if traffic.now is None:
            traffic.now, traffic.at = self._take(lane, self._waiting), 0
            if traffic.now is None:
                return False
            traffic.left[traffic.now] = -(-traffic.now.size // PIECE)
        one, at = traffic.now, traffic.at
        assert one.data is not None  # noqa: S101 - what waits has its bytes
        one.digest = one.digest or hashlib.sha256(one.data).digest()
        piece = one.data[at : at + PIECE]
        traffic.writes[sftp.ask_write(lane.handle, one.start + at, piece)] = one
        traffic.at += len(piece)
        if traffic.at == one.size:
            if self._checking:
                traffic.unread.append(_Check(one))
            traffic.now = None
        return True

    def _ask_read(self, lane: _Lane, sftp: WritingSftp, traffic: _Traffic) -> bool:
        if not traffic.unread:
            again = self._take(lane, self._written) if self._checking else None
            if again is None:
                return False
            traffic.unread.append(_Check(again))
        check = traffic.unread[0]
        length = min(PIECE, check.range.size - check.asked)
        request = sftp.ask_read(lane.handle, check.range.start + check.asked, length)
        traffic.reads[request] = (check, check.asked, length)
        check.asked += length
        check.answers += 1
        if check.asked == check.range.size:
            traffic.unread.popleft()
        return True

    def _take(self, lane: _Lane, queue: deque[_Range]) -> _Range | None:
        with self._state:
            if not queue:
                return None
            taken = queue.popleft()
            self._busy += 1
            lane.mine.add(taken)
            return taken

    def _on_written(self, lane: _Lane, traffic: _Traffic, reply: Reply) -> None:
        if not isinstance(reply, Status) or reply.code:
            code = reply.code if isinstance(reply, Status) else -1
            raise StatusError(code, f"{self._path}: the store refused to write")
        one = traffic.writes.pop(reply.request)
        traffic.left[one] -= 1
        if traffic.left[one]:
            return
        del traffic.left[one]
        if self._progress is not None and not one.counted:
            one.counted = True
            self._progress(one.size)
        if not self._checking:
            with self._state:
                self._let_go(lane, one)
                self._written.append(one)

    def _on_read(self, lane: _Lane, check: _Check, at: int, length: int, reply: Reply) -> None:
        check.answers -= 1
        if isinstance(reply, Data) and len(reply.data) == length:
            check.take(at, reply.data)
        else:
            # The file is shorter than what was written, or cannot be read.
            check.whole = False
        one = check.range
        if check.answers or check.asked < one.size:
            return
        with self._state:
            if check.matches:
                self._let_go(lane, one)
                lane.checked.append(one)
                self._grow(one.size)
                return
            one.mismatches += 1
            if one.data is None or one.mismatches >= _MISMATCHES:
                raise self._torn()
            self._busy -= 1
            lane.mine.discard(one)
            self._waiting.append(one)

    def _let_go(self, lane: _Lane, one: _Range) -> None:
        lane.mine.discard(one)
        self._busy -= 1
        if one.data is not None:
            self._held -= one.size
            one.data = None
        self._state.notify_all()

    def _grow(self, size: int) -> None:
        """Open another channel while that makes it faster."""
        self._moved += size
        took = time.monotonic() - self._looked
        if took < _LOOK_S:
            return
        rate = self._moved / took
        self._looked, self._moved = time.monotonic(), 0
        if not self._waiting or len(self._lanes) >= self._most or rate < _GAIN * self._best:
            return
        self._best = rate
        if any(lane.thread is not None for lane in self._lanes):
            self._start_lane()

    # ------------------------------------------------------------------ failing

    def _fail(self, error: Exception) -> None:
        with self._state:
            self._failure = self._failure or error
            self._state.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _torn(self) -> TornError:
        return TornError(
            f"{self._path}: what the store holds of it is not what was written; the old "
            "file is untouched, write it again"
        )
