"""The line itself: round trip, ssh, the reader, the view, first bytes, headers, writing."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from kakehashi.errors import KakehashiError
from kakehashi.link.bench.ways import Book, one, timed
from kakehashi.link.reader import CACHE_BYTES
from kakehashi.link.sftp import MAX_READ, Data, Status
from kakehashi.link.work import WorkExistsError
from kakehashi.link.workchannel import ChannelFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kakehashi.link.bench.sample import Sample

CONNECTIONS = (1, 2, 4, 8, 16)
QUICK_CONNECTIONS = (1, 4)
WARM_S = 1.0
"""Behind the first bytes, until it is measured: further connections open meanwhile."""

HEADER_BYTES = 4096
RANGE_BYTES = 256 << 10
READ_BYTES = 1 << 20
PART_BYTES = 8 << 20
_RTT_TRIES = 9
_OUTSTANDING = 4 << 20
_HEADERS = 4000
_RANGES = 64
_AT_ONCE = 16
_PATIENCE_S = 60.0
_END_S = 10.0


def line(book: Book) -> None:
    """Measure round trip, and ssh by itself with several connections."""
    sample = book.sample
    ways = [
        one("round trip", "ms", partial(_round_trip, sample), better="lower"),
        one("a new connection", "ms", partial(_connect, sample), better="lower"),
    ]
    for count in QUICK_CONNECTIONS if book.settings.quick else CONNECTIONS:
        ways.append(one(ssh_name(count), "MB/s", partial(_ssh, book, count)))
    book.measure("line", ways)


def ssh_name(count: int) -> str:
    """Return what ssh with so many connections is called."""
    return f"ssh, {count} connection{'s' if count > 1 else ''}"


def reader_name(count: int) -> str:
    """Return what the reader with so many channels is called."""
    return f"reader, packed, {count} channel{'s at most' if count > 1 else ''}"


def reader(book: Book) -> None:
    """Measure reading packed files: the reader, the view, and both from memory."""
    seconds = book.settings.seconds
    near = partial(_rate, partial(_held, book.sample), seconds)
    ways = [
        one(reader_name(count), "MB/s", partial(_reader, book, count), near)
        for count in (QUICK_CONNECTIONS if book.settings.quick else CONNECTIONS)
    ]
    files = book.sample.mounted()
    if files:
        for workers in (1, 4):
            ways.append(
                one(f"view, packed, {_at_once(workers)}", "MB/s",
                    partial(_view, book, workers), near)
            )  # fmt: skip
        if book.sample.bytes < 4 * CACHE_BYTES:
            book.lacks(
                "the view without what it keeps in memory",
                f"the series read have {book.sample.bytes / 1e6:.0f} MB, and the view keeps up to "
                f"{CACHE_BYTES / 1e6:.0f} MB: part of its rate is that of memory",
            )
    else:
        book.lacks("the mounted view", "this node mounts nothing")
    book.measure("reader", ways)


def ranges(book: Book) -> None:
    """Measure small reads: first byte, headers, ranges at random places."""
    sample = book.sample
    headers = min(len(sample.manifest.files), _HEADERS)
    ways = [
        one("first byte, reader, from nothing", "ms", partial(_first_byte, sample),
            better="lower"),
        one(f"headers of {headers} series, reader", "headers/s",
            partial(_headers, sample, headers)),
        one("ranges of 256 KiB at random, reader", "MB/s", partial(_ranges, sample),
            partial(_held_ranges, sample)),
    ]  # fmt: skip
    if sample.mounted():
        ways.append(
            one("first byte, view", "ms", partial(_first_byte_view, sample), better="lower")
        )
        ways.append(
            one(f"headers of {len(sample.uids)} series, view, {_AT_ONCE} at once", "headers/s",
                partial(_headers_view, sample))
        )  # fmt: skip
    if not any(entry.size <= RANGE_BYTES for entry in sample.manifest.files.values()):
        book.lacks(
            "small files",
            "every series of this cohort is one packed file of more than 256 KiB; ranges of that "
            "size are measured instead",
        )
    book.measure("ranges", ways)


def write(book: Book) -> None:
    """Measure writing into the project's work folder; what was written is removed."""
    session = book.sample.session
    data = os.urandom(book.settings.write_bytes)
    own = f"{session.person}/.kakehashi-bench-{secrets.token_hex(8)}"
    with ChannelFolder.on_socket(session.work_socket) as work:
        with contextlib.suppress(WorkExistsError):
            work.mkdir(session.person)
        try:
            work.mkdir(own)
        except (KakehashiError, OSError) as error:
            book.lacks("the work folder's write rate", str(error))
            return
        try:
            way = one(
                f"work folder, {len(data) >> 20} MiB at once",
                "MB/s",
                lambda: len(data) / 1e6 / timed(partial(work.write, f"{own}/data", data)),
                lambda: len(data) / 1e6 / timed(partial(_write_memory, data)),
            )
            book.measure("write", [way])
        finally:
            work.remove(own, recursive=True)


def _at_once(workers: int) -> str:
    return "one file at a time" if workers == 1 else f"{workers} files at once"


def _round_trip(sample: Sample) -> float:
    with sample.channel() as sftp:
        handle = sftp.open(sample.session.manifest.path)
        return min(timed(partial(sftp.size, handle)) for _ in range(_RTT_TRIES)) * 1e3


def _connect(sample: Sample) -> float:
    started = time.monotonic()
    with sample.channel():
        return (time.monotonic() - started) * 1e3


class _Counter:
    """Bytes of several threads, and when the last of them came."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._bytes = 0
        self._at = 0.0

    def add(self, count: int) -> None:
        with self._changed:
            self._bytes += count
            self._at = time.monotonic()
            self._changed.notify_all()

    def failed(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def rate(self, seconds: float) -> float:
        """Return MB/s from an arrival of bytes, behind the warm-up, to one after the time.

        So a pause, as when further connections are opened, lowers the rate, and is never all
        that was seen.
        """
        _, first = self._arrival(0.0)
        begun, started = self._arrival(first + WARM_S)
        done, ended = self._arrival(started + seconds)
        return (done - begun) / 1e6 / (ended - started)

    def _arrival(self, after: float) -> tuple[int, float]:
        """Wait for the first bytes after a time; return how many there are then, and when."""
        until = max(after, time.monotonic()) + _PATIENCE_S
        with self._changed:
            while self._at <= after:
                if self._failure is not None:
                    raise self._failure
                if not self._changed.wait(until - time.monotonic()):
                    raise OSError(f"nothing came within {_PATIENCE_S:.0f} s")
            return self._bytes, self._at


def _threads_rate(acts: list[Callable[[_Counter], None]], seconds: float) -> float:
    counter = _Counter()

    def run(act: Callable[[_Counter], None]) -> None:
        try:
            act(counter)
        except (KakehashiError, OSError) as error:
            counter.failed(error)

    threads = [threading.Thread(target=run, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    try:
        return counter.rate(seconds)
    finally:
        counter.over.set()
        for thread in threads:
            thread.join(_END_S)


def _rate(chunks: Callable[[], Iterator[int]], seconds: float) -> float:
    def act(counter: _Counter) -> None:
        for count in chunks():
            if counter.over.is_set():
                return
            counter.add(count)

    return _threads_rate([act], seconds)


def _ssh(book: Book, count: int) -> float:
    """Read whole files by SFTP with so many connections, and do nothing with the bytes."""
    sample = book.sample
    with contextlib.ExitStack() as stack:
        # All are open before it counts: the session may give fewer.
        channels = [stack.enter_context(sample.channel()) for _ in range(count)]

        def act(counter: _Counter, number: int) -> None:
            sftp = channels[number]
            asked: deque[int] = deque()
            at = number
            while not counter.over.is_set():
                entry = sample.entries[at % len(sample.entries)]
                at += count
                handle = sftp.open(sample.remote(entry.path))
                offset = 0
                while (offset < entry.size or asked) and not counter.over.is_set():
                    while offset < entry.size and len(asked) < _OUTSTANDING // MAX_READ:
                        length = min(MAX_READ, entry.size - offset)
                        asked.append(sftp.ask_read(handle, offset, length))
                        offset += length
                    sftp.flush()
                    reply = sftp.receive()
                    if isinstance(reply, Status):
                        raise OSError(f"the store refused a read: {reply.message}")
                    asked.popleft()
                    if isinstance(reply, Data):
                        counter.add(len(reply.data))
                if not asked:
                    sftp.ask_close(handle)
                    sftp.flush()
                    sftp.receive()

        return _threads_rate([partial(act, number=number) for number in range(count)],
                             book.settings.seconds)  # fmt: skip


def _reader(book: Book, count: int) -> float:
    with book.sample.reader(count) as reader:

        def chunks() -> Iterator[int]:
            with closing(reader.read_many(_pieces(book.sample))) as stream:
                for data in stream:
                    yield len(data)

        return _rate(chunks, book.settings.seconds)


def _pieces(sample: Sample) -> Iterator[tuple[str, int, int]]:
    """Return whole files in parts, one after another without end."""
    while True:
        entry = sample.next()
        for at in range(0, entry.size, PART_BYTES):
            yield entry.path, at, min(PART_BYTES, entry.size - at)


def _held(sample: Sample) -> Iterator[int]:
    while True:
        entry = sample.next()
        for at in range(0, entry.size, PART_BYTES):
            yield len(_from_memory(sample, entry.uid, at, PART_BYTES))


def _from_memory(sample: Sample, uid: str, at: int, length: int) -> bytes:
    data = sample.held.read(uid, at, length)
    if data is None:
        raise OSError("what was held in memory was dropped: the session ends")
    return data


def _view(book: Book, workers: int) -> float:
    files = book.sample.mounted()

    def act(counter: _Counter, number: int) -> None:
        at = number
        while not counter.over.is_set():
            with _uncached(files[at % len(files)]) as descriptor:
                while not counter.over.is_set() and (data := os.read(descriptor, READ_BYTES)):
                    counter.add(len(data))
            at += workers

    return _threads_rate([partial(act, number=number) for number in range(workers)],
                         book.settings.seconds)  # fmt: skip


@contextlib.contextmanager
def _uncached(path: Path) -> Iterator[int]:
    """Open a file of which the kernel has forgotten what it read before."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        yield descriptor
    finally:
        os.close(descriptor)


def _first_byte(sample: Sample) -> float:
    entry = sample.next()
    started = time.monotonic()
    with sample.fresh_reader() as reader, reader.open(entry.path) as file:
        file.read(0, HEADER_BYTES)
        return (time.monotonic() - started) * 1e3


def _first_byte_view(sample: Sample) -> float:
    entry = sample.next()
    files = sample.mounted()
    path = files[sample.uids.index(entry.uid)]
    started = time.monotonic()
    with _uncached(path) as descriptor:
        os.pread(descriptor, HEADER_BYTES, 0)
    return (time.monotonic() - started) * 1e3


def _headers(sample: Sample, count: int) -> float:
    wanted = [(path, 0, HEADER_BYTES) for path in list(sample.manifest.files)[:count]]
    with sample.reader() as reader, closing(reader.read_many(wanted)) as stream:
        return count / timed(lambda: deque(stream, maxlen=0))


def _headers_view(sample: Sample) -> float:
    files = sample.mounted()

    def act(path: Path) -> None:
        with _uncached(path) as descriptor:
            os.pread(descriptor, HEADER_BYTES, 0)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return len(files) / timed(lambda: list(pool.map(act, files)))


def _places(sample: Sample) -> list[tuple[str, int, int, str]]:
    chance = random.Random()  # noqa: S311 - places to read at
    found = []
    for _ in range(_RANGES):
        entry = sample.next()
        length = min(RANGE_BYTES, entry.size)
        found.append((entry.path, chance.randrange(entry.size - length + 1), length, entry.uid))
    return found


def _ranges(sample: Sample) -> float:
    wanted = [(path, at, length) for path, at, length, _ in _places(sample)]
    total = sum(length for _, _, length in wanted)
    with sample.reader() as reader, closing(reader.read_many(wanted)) as stream:
        return total / 1e6 / timed(lambda: deque(stream, maxlen=0))


def _held_ranges(sample: Sample) -> float:
    wanted = _places(sample)
    started = time.monotonic()
    for _, at, length, uid in wanted:
        _from_memory(sample, uid, at, length)
    return sum(length for _, _, length, _ in wanted) / 1e6 / (time.monotonic() - started)


def _write_memory(data: bytes) -> None:
    descriptor = os.memfd_create("kakehashi-bench")
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)
