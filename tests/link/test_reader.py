"""The verified reader against a real SFTP server, also one that is cut, changed or flipped."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kakehashi.errors import BlockMismatchError, LinkClosedError, LinkError
from kakehashi.link import Reader, pool
from kakehashi.link.manifest import NotInManifestError
from tests.link.stores import BLOCK, Gate, Server, StoreFolder, random_bytes


def reader_of(
    folder: StoreFolder, connect: Callable[[], socket.socket], channels: int = 3
) -> Reader:
    return Reader.connect(
        connect, manifest_path=folder.manifest_path, sha256=folder.sha256, channels=channels
    )


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        os.sched_yield()


def link_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("link-")]


# --- the bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 77])
def test_a_whole_file_comes_as_it_is(folder: StoreFolder, server: Server, size: int) -> None:
    data = random_bytes(size)
    path = folder.add("1.2.3", data)
    with reader_of(folder, server) as reader, reader.open(path) as file:
        assert file.size == size
        assert file.read(0, size + 10) == data
        assert file.read(size, 10) == b""
        assert file.read(0, 0) == b""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StoreFolder, Server]]:
    folder = StoreFolder(tmp_path_factory.mktemp("store"), block_size=4096)
    folder.add("1.2.3", random_bytes(300_000))
    server = Server()
    yield folder, server
    server.close()


@settings(max_examples=30)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 310_000), st.integers(0, 100_000)), max_size=12),
    cache=st.sampled_from([1, 20_000, 1 << 20]),
    channels=st.integers(1, 3),
)
def test_any_range_equals_the_files_bytes(
    shared: tuple[StoreFolder, Server],
    ranges: list[tuple[int, int]],
    cache: int,
    channels: int,
) -> None:
    folder, server = shared
    path, data = next(iter(folder.contents.items()))
    whole = reader_of(folder, server)
    with (
        Reader(
            server,
            whole.manifest,
            manifest_path=folder.manifest_path,
            channels=channels,
            cache_bytes=cache,
        ) as reader,
        reader.open(path) as file,
    ):
        for offset, length in ranges:
            assert file.read(offset, length) == data[offset : offset + length]


def test_many_threads_read_the_right_bytes_at_once(folder: StoreFolder, server: Server) -> None:
    paths = [folder.add(f"1.2.{n}", random_bytes(20 * BLOCK + n, seed=n)) for n in range(3)]
    reader = reader_of(folder, server)

    def work(seed: int) -> None:
        pick = random.Random(seed)
        for _ in range(30):
            path = pick.choice(paths)
            data = folder.contents[path]
            offset = pick.randrange(len(data))
            length = pick.randrange(5 * BLOCK)
            assert reader.open(path).read(offset, length) == data[offset : offset + length]

    with reader, ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(work, seed) for seed in range(16)]:
            done.result(timeout=60)


def test_reading_in_sequence_reads_ahead_and_reading_at_random_does_not(
    folder: StoreFolder, server: Server
) -> None:
    data = random_bytes(200 * BLOCK)
    path = folder.add("1.2.3", data)
    with reader_of(folder, server) as reader, reader.open(path) as file:
        for block in (150, 20, 90, 55):
            file.read(block * BLOCK, BLOCK)
        assert reader.stats().blocks == 1 + 4, "the list of hashes, and what was asked for"
    with reader_of(folder, server) as reader, reader.open(path) as file:
        for block in range(20):
            file.read(block * BLOCK, BLOCK)
        until(lambda: reader.stats().blocks > 1 + 20 + 8)


def test_many_files_read_in_sequence_at_once_do_not_push_one_another_out(
    folder: StoreFolder, server: Server
) -> None:
    size, files = 96, 6
    paths = [folder.add(f"1.2.{number}", random_bytes(size * BLOCK)) for number in range(files)]
    manifest = reader_of(folder, server).manifest
    with Reader(
        server, manifest, manifest_path=folder.manifest_path, cache_bytes=128 * BLOCK
    ) as reader:
        opened = [reader.open(path) for path in paths]
        for at in range(0, size, 2):
            for file in opened:
                data = file.read(at * BLOCK, 2 * BLOCK)
                assert data == folder.contents[file.path][at * BLOCK :][: 2 * BLOCK]
        lists = files
        assert reader.stats().blocks - lists < 1.05 * size * files, "hardly one came twice"


def test_a_block_in_the_cache_is_not_fetched_again(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", random_bytes(8 * BLOCK))
    with reader_of(folder, server) as reader, reader.open(path) as file:
        first = file.read(0, BLOCK)
        blocks = reader.stats().blocks
        assert file.read(0, BLOCK) == first
        assert reader.stats().blocks == blocks
        assert reader.stats().cached_blocks == 1


@pytest.mark.parametrize("cache", [1, 4, 8, 12])
def test_a_small_cache_is_not_read_ahead_into_nothing(
    folder: StoreFolder, server: Server, cache: int
) -> None:
    path = folder.add("1.2.3", random_bytes(64 * BLOCK))
    manifest = reader_of(folder, server).manifest
    with Reader(
        server, manifest, manifest_path=folder.manifest_path, cache_bytes=cache * BLOCK
    ) as reader:
        file = reader.open(path)
        for at in range(64):
            file.read(at * BLOCK, BLOCK)
        assert reader.stats().blocks - 1 <= 64 + cache


def test_a_file_that_was_read_to_its_end_leaves_its_share_to_the_next(
    folder: StoreFolder, server: Server
) -> None:
    paths = [folder.add(f"1.2.{number}", random_bytes(20 * BLOCK)) for number in range(3)]
    with reader_of(folder, server) as reader:
        for path in paths:
            with reader.open(path) as file:
                for at in range(16):
                    file.read(at * BLOCK, BLOCK)
                assert list(reader._runs) == [path]
        for path in paths:
            file = reader.open(path)
            for at in range(20):
                file.read(at * BLOCK, BLOCK)
            assert not reader._runs


@pytest.mark.parametrize("size", [BLOCK - 100, 2 * BLOCK + 100])
def test_a_small_file_brings_its_first_block_when_it_is_opened(
    folder: StoreFolder, server: Server, size: int
) -> None:
    data = random_bytes(size)
    path = folder.add("1.2.3", data)
    listed = size > BLOCK
    if not listed:
        (folder.root / path).with_suffix(".blocks").unlink()
    with reader_of(folder, server) as reader, reader.open(path) as file:
        assert reader.stats().blocks == 1 + listed
        assert file.read(100, 4096) == data[100:4196]
        assert reader.stats().blocks == 1 + listed
        assert file.read(0, size) == data
        assert reader.stats().blocks == -(-size // BLOCK) + listed


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_small_file_that_differs_is_found_block_by_block(
    folder: StoreFolder, server: Server, wrong: int
) -> None:
    # One block, or the last or the first of two.
    data = random_bytes(BLOCK if wrong == 2 else 2 * BLOCK)
    path = folder.add("1.2.3", data)
    at = BLOCK + 7 if wrong == 1 else 7
    (folder.root / path).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with reader_of(folder, server) as reader, reader.open(path) as file:
        first = at // BLOCK * BLOCK
        with pytest.raises(BlockMismatchError, match=f"bytes {first} to {first + BLOCK}"):
            file.read(0, len(data))
        (folder.root / path).write_bytes(data)
        assert file.read(0, len(data)) == data


def test_the_cache_keeps_to_its_bound(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", random_bytes(64 * BLOCK))
    manifest = reader_of(folder, server).manifest
    with Reader(
        server, manifest, manifest_path=folder.manifest_path, cache_bytes=8 * BLOCK
    ) as reader:
        reader.open(path).read(0, 64 * BLOCK)
        assert len(reader._blocks) <= 8 + reader._window


# --- what must not come through ----------------------------------------------------------------


def test_a_path_that_the_manifest_does_not_name_is_not_there(
    folder: StoreFolder, server: Server
) -> None:
    path = folder.add("1.2.3", b"x")
    (folder.root / "series" / "9.9.ozx").write_bytes(b"another project's")
    with reader_of(folder, server) as reader:
        for wrong in ("series/9.9.ozx", "series/../" + path, "/etc/passwd", "series/1.2.3.blocks"):
            with pytest.raises(NotInManifestError):
                reader.open(wrong)
            with pytest.raises(FileNotFoundError):
                reader.open(wrong)


def test_a_bit_flipped_at_rest_is_never_handed_out(folder: StoreFolder, server: Server) -> None:
    data = random_bytes(10 * BLOCK)
    path = folder.add("1.2.3", data)
    changed = bytearray(data)
    changed[3 * BLOCK + 5] ^= 1
    (folder.root / path).write_bytes(changed)
    with reader_of(folder, server) as reader, reader.open(path) as file:
        with pytest.raises(BlockMismatchError, match="not those that the manifest names"):
            file.read(3 * BLOCK, 10)
        with pytest.raises(BlockMismatchError):
            file.read(0, len(data))
        assert file.read(0, 3 * BLOCK) == data[: 3 * BLOCK], "the other blocks are as good as ever"
        assert file.read(4 * BLOCK, BLOCK) == data[4 * BLOCK : 5 * BLOCK]
        assert reader.stats().retries >= 3


def test_a_file_repaired_at_the_store_can_be_read_again(
    folder: StoreFolder, server: Server
) -> None:
    data = random_bytes(2 * BLOCK)
    path = folder.add("1.2.3", data)
    (folder.root / path).write_bytes(bytes(2 * BLOCK))
    with reader_of(folder, server) as reader, reader.open(path) as file:
        with pytest.raises(BlockMismatchError):
            file.read(0, BLOCK)
        repaired = folder.root / "new"
        repaired.write_bytes(data)
        repaired.rename(folder.root / path)
        assert file.read(0, 2 * BLOCK) == data


@pytest.mark.parametrize("left", [0, BLOCK, 3 * BLOCK - 1])
def test_a_truncated_file_is_an_error_and_not_a_short_read(
    folder: StoreFolder, server: Server, left: int
) -> None:
    data = random_bytes(3 * BLOCK)
    path = folder.add("1.2.3", data)
    os.truncate(folder.root / path, left)
    with reader_of(folder, server) as reader, reader.open(path) as file:
        with pytest.raises(BlockMismatchError):
            file.read(0, 3 * BLOCK)
        whole = left // BLOCK * BLOCK
        assert file.read(0, whole) == data[:whole]


def test_a_file_that_is_gone_is_an_error(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", b"x" * 10)
    (folder.root / path).unlink()
    with (
        reader_of(folder, server) as reader,
        reader.open(path) as file,
        pytest.raises(LinkError, match="cannot open"),
    ):
        file.read(0, 10)


def test_a_changed_list_of_hashes_is_refused(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", random_bytes(30 * BLOCK))
    blocks = (folder.root / path).with_suffix(".blocks")
    blocks.write_bytes(bytes(len(blocks.read_bytes())))
    with reader_of(folder, server) as reader, pytest.raises(BlockMismatchError, match="list"):
        reader.open(path)


def test_a_changed_manifest_is_refused(folder: StoreFolder, server: Server) -> None:
    folder.add("1.2.3", b"x")
    good = folder.sha256
    raw = Path(folder.manifest_path).read_bytes()
    Path(folder.manifest_path).write_bytes(raw.replace(b'"lung"', b'"skin"'))
    with pytest.raises(BlockMismatchError, match="manifest"):
        Reader.connect(server, manifest_path=folder.manifest_path, sha256=good)
    Path(folder.manifest_path).write_bytes(raw)
    Reader.connect(server, manifest_path=folder.manifest_path, sha256=good).close()


# --- the wire ----------------------------------------------------------------------------------


def test_bytes_flipped_on_the_wire_are_found_and_read_again(folder: StoreFolder) -> None:
    data = random_bytes(40 * BLOCK)
    path = folder.add("1.2.3", data)
    flipped = threading.Event()

    def flip(channel: int, at: int, piece: bytes) -> bytes:
        # The first channel reads the manifest; the second gets one wrong bit, far inside.
        if channel == 1 and at > 300_000 and len(piece) > 1000 and not flipped.is_set():
            flipped.set()
            changed = bytearray(piece)
            changed[500] ^= 0x10
            return bytes(changed)
        return piece

    with closing(Server(flip)) as server, reader_of(folder, server) as reader:
        assert reader.open(path).read(0, len(data)) == data
        stats = reader.stats()
    assert flipped.is_set()
    assert stats.retries + stats.reconnects > 0, "a flip in the framing shows as a lost channel"


def test_a_line_that_always_flips_is_an_error_in_the_end(folder: StoreFolder) -> None:
    data = random_bytes(4 * BLOCK)
    path = folder.add("1.2.3", data)

    def flip(channel: int, at: int, piece: bytes) -> bytes:
        if channel == 0 or len(piece) < 30_000:
            return piece
        changed = bytearray(piece)
        changed[20_000] ^= 1
        return bytes(changed)

    with (
        closing(Server(flip)) as server,
        reader_of(folder, server) as reader,
        pytest.raises(BlockMismatchError),
    ):
        reader.open(path).read(0, len(data))


def test_channels_cut_in_the_middle_of_a_block_show_as_nothing(folder: StoreFolder) -> None:
    data = random_bytes(100 * BLOCK)
    path = folder.add("1.2.3", data)
    cuts = 0

    def cut(channel: int, at: int, piece: bytes) -> bytes | None:
        nonlocal cuts
        if 0 < channel < 8 and at > 1_000_000:
            cuts += 1
            return None
        return piece

    with closing(Server(cut)) as server, reader_of(folder, server) as reader:
        assert reader.open(path).read(0, len(data)) == data
        assert reader.stats().reconnects >= 3
        assert reader.stats().retries == 0, "a cut is not a wrong byte"
    assert cuts >= 3


def test_servers_killed_again_and_again_show_as_nothing(
    folder: StoreFolder, server: Server
) -> None:
    data = random_bytes(600 * BLOCK)
    path = folder.add("1.2.3", data)
    done = threading.Event()

    def killer(reader: Reader) -> None:
        seen = 0
        while not done.is_set() and seen < 400:
            if reader.stats().blocks > seen + 50:
                seen = reader.stats().blocks
                server.kill()

    with reader_of(folder, server) as reader:
        thread = threading.Thread(target=killer, args=(reader,))
        thread.start()
        assert reader.open(path).read(0, len(data)) == data
        done.set()
        thread.join()
        assert reader.stats().reconnects > 0


def test_a_store_out_of_reach_is_waited_for(folder: StoreFolder, server: Server) -> None:
    data = random_bytes(5 * BLOCK)
    path = folder.add("1.2.3", data)
    manifest = reader_of(folder, server).manifest
    gate = Gate(server)
    with (
        Reader(gate, manifest, manifest_path=folder.manifest_path) as reader,
        ThreadPoolExecutor(1) as pool,
    ):
        read = pool.submit(lambda: reader.open(path).read(0, len(data)))
        until(lambda: gate.refusals > 3)
        assert not read.done()
        gate.opened.set()
        assert read.result(timeout=30) == data
        assert reader.stats().waiting_s > 0


def test_a_silent_channel_is_replaced(folder: StoreFolder, server: Server) -> None:
    data = random_bytes(5 * BLOCK)
    path = folder.add("1.2.3", data)
    manifest = reader_of(folder, server).manifest
    held: list[socket.socket] = []

    def connect() -> socket.socket:
        if len(held) < 4:
            near, far = socket.socketpair()
            held.extend((far,))
            return near
        return server()

    with Reader(
        connect, manifest, manifest_path=folder.manifest_path, channels=2, patience_s=0.2
    ) as reader:
        assert reader.open(path).read(0, len(data)) == data
    for end in held:
        end.close()


# --- the end -----------------------------------------------------------------------------------


def test_closing_ends_reads_that_wait(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", random_bytes(BLOCK))
    manifest = reader_of(folder, server).manifest
    gate = Gate(server)
    reader = Reader(gate, manifest, manifest_path=folder.manifest_path)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(reader.open, path)
        assert gate.asked.wait(10)
        reader.close()
        with pytest.raises(LinkClosedError):
            read.result(timeout=10)
    with pytest.raises(LinkClosedError):
        reader.open(path)


def test_closing_ends_reads_from_a_server_that_hangs(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", random_bytes(BLOCK))
    manifest = reader_of(folder, server).manifest
    near, far = socket.socketpair()
    reader = Reader(lambda: near, manifest, manifest_path=folder.manifest_path, channels=1)
    with ThreadPoolExecutor(1) as pool, far:
        read = pool.submit(reader.open, path)
        assert far.recv(100), "the greeting is there, and is never answered"
        reader.close()
        with pytest.raises(LinkClosedError):
            read.result(timeout=10)
        assert not link_threads(), "nobody waits for as long as the server may be silent"


def test_a_link_that_is_closed_is_not_tried_again(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", random_bytes(BLOCK))
    manifest = reader_of(folder, server).manifest
    attempts = 0

    def connect() -> socket.socket:
        nonlocal attempts
        attempts += 1
        raise LinkClosedError("the session has ended")

    with Reader(connect, manifest, manifest_path=folder.manifest_path, channels=1) as reader:
        for _ in range(3):
            with pytest.raises(LinkClosedError, match="the session has ended"):
                reader.open(path)
    assert attempts == 1


def test_nothing_is_left_running(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", random_bytes(BLOCK))
    with reader_of(folder, server) as reader:
        reader.open(path).read(0, 10)
        assert link_threads()
    assert not link_threads()
    forgotten = reader_of(folder, server)
    forgotten.open(path).read(0, 10)
    assert link_threads()
    del forgotten
    until(lambda: not link_threads())  # a reader that nobody holds any more ends its threads


def test_a_reader_may_be_forgotten_in_the_middle_of_its_own_work(
    folder: StoreFolder, server: Server
) -> None:
    # Garbage collection comes wherever memory is asked for, so also where the pool is locked.
    path = folder.add("1.2.3", random_bytes(BLOCK))
    forgotten = reader_of(folder, server)
    forgotten.open(path).read(0, 10)
    pool = forgotten._pool
    with pool._lock:
        del forgotten
    until(lambda: not link_threads())
    assert pool.pulse(0).closed


def bells() -> int:
    return sum(
        str(entry.readlink()) == "anon_inode:[eventfd]"
        for entry in Path("/proc/self/fd").iterdir()
        if entry.is_symlink()
    )


def test_what_is_closed_holds_no_descriptors(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", random_bytes(BLOCK))
    before = bells()
    kept = []
    for _ in range(3):
        with reader_of(folder, server) as reader:
            reader.open(path).read(0, 10)
            assert bells() > before
            kept.append(reader)
        assert bells() == before
    unused = reader_of(folder, server, channels=16)
    assert bells() == before, "a channel takes a descriptor when it is first needed"
    unused.close()


def test_a_process_without_a_descriptor_left_is_told_so_and_can_go_on(
    folder: StoreFolder, server: Server
) -> None:
    path = folder.add("1.2.3", random_bytes(BLOCK))
    with ExitStack() as stack:
        manifest = reader_of(folder, server).manifest
        # Both without a channel at all, and with one that was lost.
        fresh, used = (
            stack.enter_context(Reader(server, manifest, manifest_path=folder.manifest_path))
            for _ in range(2)
        )
        assert used.open(path).read(0, 10)
        used._blocks.clear()
        server.kill()
        most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        few = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir()) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
        with ExitStack() as files:
            try:
                with suppress(OSError):
                    while True:
                        files.enter_context(Path(os.devnull).open())
                for reader in (fresh, used):
                    with pytest.raises(LinkError, match=f"may have {few} files open"):
                        reader.open(path).read(0, 10)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        for reader in (fresh, used):
            assert reader.open(path).read(0, 10)


def no_descriptor() -> socket.socket:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_what_lacks_a_descriptor_leaves_the_work_to_what_has_one(
    folder: StoreFolder, server: Server
) -> None:
    paths = [folder.add(f"1.2.{number}", random_bytes(3 * BLOCK)) for number in range(20)]
    manifest = reader_of(folder, server).manifest
    with Reader([server, no_descriptor], manifest, manifest_path=folder.manifest_path) as reader:
        for path in paths:
            assert reader.open(path).read(0, 3 * BLOCK) == folder.contents[path]


def test_what_lacks_a_descriptor_waits_for_what_is_connecting(
    folder: StoreFolder, server: Server
) -> None:
    path = folder.add("1.2.3", random_bytes(3 * BLOCK))
    manifest = reader_of(folder, server).manifest
    calls = itertools.count()
    lacking, connected = threading.Event(), threading.Event()

    def slow_then_none() -> socket.socket:
        if next(calls):
            lacking.set()
            no_descriptor()
        connected.wait(20)
        return server()

    with (
        Reader(slow_then_none, manifest, manifest_path=folder.manifest_path) as reader,
        ThreadPoolExecutor(1) as threads,
    ):
        read = threads.submit(lambda: reader.open(path).read(0, 3 * BLOCK))
        assert lacking.wait(20)
        until(lambda: sum(one.starved for one in reader._pool._channels) >= 1)
        connected.set()
        assert read.result(timeout=20) == folder.contents[path]


def test_without_a_thread_a_read_is_an_error_and_can_be_tried_again(
    folder: StoreFolder, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.add("1.2.3", random_bytes(BLOCK))

    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    with reader_of(folder, server) as reader:
        with monkeypatch.context() as patch:
            few = SimpleNamespace(Thread=Refused, current_thread=threading.current_thread)
            patch.setattr(pool, "threading", few)
            with pytest.raises(LinkError, match="can't start new thread"):
                reader.open(path)
        assert reader.open(path).read(0, BLOCK) == folder.contents[path]


def test_what_is_closed_while_it_connects_holds_no_descriptors(
    folder: StoreFolder, server: Server
) -> None:
    path = folder.add("1.2.3", random_bytes(BLOCK))
    manifest = reader_of(folder, server).manifest
    before = bells()
    connecting, closed = threading.Event(), threading.Event()

    def slow() -> socket.socket:
        connecting.set()
        closed.wait(20)
        return server()

    reader = Reader(slow, manifest, manifest_path=folder.manifest_path)
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(reader.open, path)
        assert connecting.wait(20)
        reader.close()
        closed.set()
        with pytest.raises(LinkClosedError):
            read.result(timeout=20)
    until(lambda: not link_threads())
    assert bells() == before


def test_a_read_can_be_interrupted(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", random_bytes(BLOCK))
    manifest = reader_of(folder, server).manifest

    with (
        Reader(Gate(server), manifest, manifest_path=folder.manifest_path) as reader,
        pytest.raises(InterruptedError),
    ):
        reader.open(path, interrupted=lambda: True)


def test_a_forked_child_gets_an_error_and_does_not_hang(
    folder: StoreFolder, server: Server
) -> None:
    path = folder.add("1.2.3", random_bytes(BLOCK))
    with reader_of(folder, server) as reader, reader.open(path) as file:
        file.read(0, 1)
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # should it hang after all, it does not stay
            code = 1
            try:
                reader._blocks.clear()
                file.read(0, 1)
            except LinkError as error:
                code = 0 if "worker process" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert file.read(0, BLOCK)


def test_misuse_is_named(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", b"x")
    with reader_of(folder, server) as reader:
        file = reader.open(path)
        for offset, length in ((-1, 1), (0, -1)):
            with pytest.raises(ValueError, match="must not be negative"):
                file.read(offset, length)
        file.close()
        with pytest.raises(ValueError, match="closed"):
            file.read(0, 1)
