"""Many ranges as one stream: their order, their bytes, their memory, and the ugly cases."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kakehashi.errors import BlockMismatchError, LinkClosedError, LinkError
from kakehashi.link import Reader
from kakehashi.link.bulk import AHEAD_BYTES, Bulk, Memory
from kakehashi.link.manifest import NotInManifestError
from tests.link.stores import BLOCK, Gate, Server, StoreFolder, random_bytes
from tests.link.test_reader import reader_of, until

SIZES = [0, 1, 700, BLOCK - 1, BLOCK, 3 * BLOCK + 5, 40 * BLOCK + 11, 2, 17 * BLOCK]


def filled(folder: StoreFolder, sizes: list[int] = SIZES) -> list[str]:
    publish, folder.publish = folder.publish, lambda: None  # type: ignore[method-assign]
    paths = [folder.add(f"1.2.{n}", random_bytes(size, n)) for n, size in enumerate(sizes)]
    publish()
    return paths


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StoreFolder, Server]]:
    folder = StoreFolder(tmp_path_factory.mktemp("store"), block_size=4096)
    filled(folder, [0, 1, 4095, 4096, 4097, 40_000, 300_000])
    server = Server()
    yield folder, server
    server.close()


def test_whole_files_come_in_order_as_they_are(folder: StoreFolder, server: Server) -> None:
    paths = filled(folder)
    order = [*paths, *reversed(paths), paths[5], paths[5]]
    with reader_of(folder, server) as reader:
        got = list(reader.read_many(order))
        assert got == [folder.contents[path] for path in order]
        assert all(data.readonly for data in got)


@settings(max_examples=40)
@given(
    wanted=st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 310_000), st.integers(0, 320_000)), max_size=20
    ),
    ahead=st.sampled_from([1, 5_000, 100_000, AHEAD_BYTES]),
    channels=st.integers(1, 3),
)
def test_any_ranges_equal_the_files_bytes(
    shared: tuple[StoreFolder, Server],
    wanted: list[tuple[int, int, int]],
    ahead: int,
    channels: int,
) -> None:
    folder, server = shared
    paths = list(folder.contents)
    ranges = [(paths[number], offset, length) for number, offset, length in wanted]
    expected = [folder.contents[path][at : at + length] for path, at, length in ranges]
    with reader_of(folder, server, channels) as reader:
        assert [bytes(one) for one in reader.read_many(ranges, ahead_bytes=ahead)] == expected

        async def collect() -> list[bytes]:
            async with reader.aread_many(ranges, ahead_bytes=ahead) as found:
                return [bytes(one) async for one in found]

        assert asyncio.run(collect()) == expected


def test_small_whole_files_need_no_list_of_hashes(folder: StoreFolder, server: Server) -> None:
    paths = filled(folder, [1000] * 50)
    with reader_of(folder, server) as reader:
        assert [bytes(one) for one in reader.read_many(paths)] == list(folder.contents.values())
        assert reader.stats().blocks == 50


def test_what_waits_is_bounded_and_what_is_taken_makes_room(
    folder: StoreFolder, server: Server
) -> None:
    paths = filled(folder, [4 * BLOCK] * 100)
    with reader_of(folder, server) as reader:
        bulk = reader.read_many(paths, ahead_bytes=16 * BLOCK)
        assert next(bulk) == folder.contents[paths[0]]
        # As much as may wait comes by itself; nothing more does.
        until(lambda: reader.stats().blocks >= 16 + 4)
        assert bulk._held <= 20 * BLOCK
        assert reader.stats().blocks <= 4 + 16 + 4
        assert list(bulk) == [folder.contents[path] for path in paths[1:]]


def test_a_range_larger_than_the_bound_comes_through(folder: StoreFolder, server: Server) -> None:
    paths = filled(folder, [50 * BLOCK, 60 * BLOCK])
    with reader_of(folder, server) as reader:
        got = list(reader.read_many(paths, ahead_bytes=BLOCK))
    assert got == list(folder.contents.values())


def test_an_endless_iterable_is_asked_for_no_more_than_needed(
    folder: StoreFolder, server: Server
) -> None:
    (path,) = filled(folder, [BLOCK])
    asked = 0

    def endless() -> Iterator[str]:
        nonlocal asked
        while True:
            asked += 1
            yield path

    with reader_of(folder, server) as reader, reader.read_many(endless()) as bulk:
        for _ in range(5):
            assert next(bulk) == folder.contents[path]
        assert asked <= 5 + 1024


def test_a_bad_range_is_an_error_in_its_turn_and_the_next_follow(
    folder: StoreFolder, server: Server
) -> None:
    good, bad, last = filled(folder, [2 * BLOCK, 40 * BLOCK, 10])
    changed = bytearray(folder.contents[bad])
    changed[20 * BLOCK] ^= 1
    (folder.root / bad).write_bytes(changed)
    with reader_of(folder, server) as reader:
        bulk = reader.read_many([good, "series/9.ozx", bad, (good, -1, 5), last])
        assert next(bulk) == folder.contents[good]
        with pytest.raises(NotInManifestError):
            next(bulk)
        with pytest.raises(BlockMismatchError):
            next(bulk)
        with pytest.raises(ValueError, match="negative"):
            next(bulk)
        assert next(bulk) == folder.contents[last]
        with pytest.raises(StopIteration):
            next(bulk)
        assert bulk._held == bulk._flying == 0


def test_an_error_of_the_iterable_itself_comes_in_its_turn(
    folder: StoreFolder, server: Server
) -> None:
    (path,) = filled(folder, [10])

    def broken() -> Iterator[str]:
        yield path
        raise KeyError("the sampler's own")

    with reader_of(folder, server) as reader:
        bulk = reader.read_many(broken())
        assert next(bulk) == folder.contents[path]
        with pytest.raises(KeyError, match="sampler"):
            next(bulk)
        with pytest.raises(StopIteration):
            next(bulk)


@pytest.mark.parametrize("blocks", [1, 3, 30])
def test_bits_flipped_at_rest_never_come_through(
    folder: StoreFolder, server: Server, blocks: int
) -> None:
    paths = filled(folder, [blocks * BLOCK] * 3)
    changed = bytearray(folder.contents[paths[1]])
    changed[-1] ^= 0x80
    (folder.root / paths[1]).write_bytes(changed)
    with reader_of(folder, server) as reader:
        bulk = reader.read_many(paths)
        assert next(bulk) == folder.contents[paths[0]]
        with pytest.raises(BlockMismatchError):
            next(bulk)
        assert next(bulk) == folder.contents[paths[2]]


def test_flips_and_cuts_on_the_wire_show_as_nothing(folder: StoreFolder) -> None:
    paths = filled(folder, [3 * BLOCK] * 60 + [90 * BLOCK])
    flips = cuts = 0

    def meddle(channel: int, at: int, piece: bytes) -> bytes | None:
        nonlocal flips, cuts
        if channel == 0:
            return piece
        if channel % 3 == 1 and at > 2_000_000:
            cuts += 1
            return None
        if channel % 3 == 2 and at > 500_000 and len(piece) > 1000 and flips < 5:
            flips += 1
            changed = bytearray(piece)
            changed[700] ^= 4
            return bytes(changed)
        return piece

    with closing(Server(meddle)) as server, reader_of(folder, server) as reader:
        assert list(reader.read_many(paths)) == list(folder.contents.values())
        assert reader.stats().repeated > 0
    assert flips
    assert cuts


def test_servers_killed_again_and_again_show_as_nothing(
    folder: StoreFolder, server: Server
) -> None:
    paths = filled(folder, [3 * BLOCK] * 100 + [300 * BLOCK])
    with reader_of(folder, server) as reader:
        for number, data in enumerate(reader.read_many(paths, ahead_bytes=8 * BLOCK)):
            assert data == folder.contents[paths[number]]
            if number % 10 == 0:
                server.kill()
        assert reader.stats().reconnects > 5


def test_a_stopped_server_leaves_the_work_to_the_others(
    folder: StoreFolder, server: Server
) -> None:
    paths = filled(folder, [60 * BLOCK] * 3)
    with Reader.connect(server, manifest_path=folder.manifest_path, sha256=folder.sha256) as whole:
        manifest = whole.manifest
    with Reader(
        server, manifest, manifest_path=folder.manifest_path, channels=2, patience_s=1.0
    ) as reader:
        bulk = reader.read_many(paths, ahead_bytes=16 * BLOCK)
        assert next(bulk) == folder.contents[paths[0]]
        server.send(signal.SIGSTOP)
        assert [*bulk] == [folder.contents[path] for path in paths[1:]]
        assert reader.stats().repeated > 0
        server.send(signal.SIGCONT)


def test_closing_the_reader_ends_who_waits(folder: StoreFolder, server: Server) -> None:
    paths = filled(folder, [BLOCK] * 2000)
    manifest = reader_of(folder, server).manifest
    gate = Gate(server)
    reader = Reader(gate, manifest, manifest_path=folder.manifest_path)
    with ThreadPoolExecutor(1) as pool:
        bulk = reader.read_many([(path, 0, 10) for path in paths])
        read = pool.submit(next, bulk)
        assert gate.asked.wait(10)
        reader.close()
        with pytest.raises(LinkClosedError):
            read.result(timeout=10)
        with pytest.raises(LinkClosedError):
            next(bulk)
    with pytest.raises(LinkClosedError):
        next(reader.read_many(paths))


def test_closing_the_stream_ends_who_waits_and_frees_all(
    folder: StoreFolder, server: Server
) -> None:
    paths = filled(folder, [40 * BLOCK] * 3)
    manifest = reader_of(folder, server).manifest
    gate = Gate(server)
    memory: list[weakref.ref[memoryview]] = []

    def allocate(length: int) -> memoryview:
        view = Memory()(length)
        memory.append(weakref.ref(view))
        return view

    with (
        Reader(gate, manifest, manifest_path=folder.manifest_path) as reader,
        ThreadPoolExecutor(1) as pool,
    ):
        for path in paths:
            reader._keep_list(
                manifest.entry(path), (folder.root / path).with_suffix(".blocks").read_bytes()
            )
        bulk = Bulk(reader, paths, allocate=allocate)
        read = pool.submit(next, bulk, None)
        until(lambda: bool(bulk._flying) and gate.asked.is_set())
        assert any(one() is not None for one in memory)
        bulk.close()
        assert read.result(timeout=10) is None
        gc.collect()
        assert all(one() is None for one in memory)
        assert next(bulk, None) is None


def test_a_stream_that_is_dropped_does_not_keep_its_reader(
    folder: StoreFolder, server: Server
) -> None:
    paths = filled(folder, [4 * BLOCK] * 10)
    reader = reader_of(folder, server)
    bulk = reader.read_many(paths)
    next(bulk)
    gone = weakref.ref(reader)
    del bulk, reader
    until(lambda: gone() is None)


def test_memory_is_used_again_once_nothing_looks_at_it() -> None:
    memory = Memory()
    first = memory(3 << 20)
    first[:5] = b"first"
    part = first[:5].toreadonly()
    array = np.frombuffer(part, dtype=np.uint8)
    del first, part
    second = memory(3 << 20)
    second[:6] = b"second"
    assert array.tobytes() == b"first", "an array of a slice of a view still looks at it"
    del array
    third = memory((3 << 20) - 7)
    assert bytes(third[:5]) == b"first", "the very same memory"
    assert len(third) == (3 << 20) - 7
    assert bytes(second[:6]) == b"second"
    kept = [memory(2 << 20) for _ in range(20)]
    for number, view in enumerate(kept):
        view[:1] = bytes([number])
    assert [view[0] for view in kept] == list(range(20))


def test_what_is_kept_stays_as_it_is_while_more_comes(folder: StoreFolder, server: Server) -> None:
    paths = filled(folder, [20 * BLOCK + n for n in range(6)])
    with reader_of(folder, server) as reader:
        kept = []
        for number, data in enumerate(reader.read_many(paths * 5, ahead_bytes=8 * BLOCK)):
            if number % 3 == 0:
                kept.append((data, paths[number % 6]))
        assert all(data == folder.contents[path] for data, path in kept)


# --- asyncio -----------------------------------------------------------------------------------


def test_many_coroutines_read_at_once_without_a_thread_for_each(
    folder: StoreFolder, server: Server
) -> None:
    paths = filled(folder, [30 * BLOCK + 7] * 5)

    async def one(reader: Reader, number: int) -> None:
        path = paths[number % len(paths)]
        data = folder.contents[path]
        file = await reader.aopen(path)
        offset, length = number * 1009 % len(data), number * 50_021 % len(data)
        assert await file.aread(offset, length) == data[offset : offset + length]

    async def several(reader: Reader) -> int:
        tasks = [asyncio.create_task(one(reader, number)) for number in range(200)]
        await asyncio.sleep(0)
        threads = threading.active_count()
        await asyncio.gather(*tasks)
        return threads

    with reader_of(folder, server) as reader:
        before = threading.active_count()
        assert asyncio.run(several(reader)) - before <= 3


def test_a_cancelled_read_frees_its_memory_and_leaves_the_rest(
    folder: StoreFolder, server: Server
) -> None:
    (path,) = filled(folder, [64 * BLOCK])
    manifest = reader_of(folder, server).manifest
    gate = Gate(server)

    async def drive(reader: Reader) -> None:
        reader._keep_list(
            manifest.entry(path), (folder.root / path).with_suffix(".blocks").read_bytes()
        )
        file = await reader.aopen(path)
        task = asyncio.create_task(file.aread(0, file.size))
        await asyncio.sleep(0)
        assert any(piece.into is not None for piece in reader._pool._ahead)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(piece.into is None for piece in reader._pool._ahead)
        gate.opened.set()
        assert await file.aread(0, file.size) == folder.contents[path]
        assert reader.stats().bytes == 64 * BLOCK, "what was cancelled is not read at all"

    with Reader(gate, manifest, manifest_path=folder.manifest_path) as reader:
        asyncio.run(drive(reader))


def test_asyncio_sees_the_errors(folder: StoreFolder, server: Server) -> None:
    small, large = filled(folder, [BLOCK, 30 * BLOCK])
    for path in (small, large):
        (folder.root / path).write_bytes(bytes(len(folder.contents[path])))

    async def drive(reader: Reader) -> None:
        for path in (small, large):
            file = await reader.aopen(path)
            with pytest.raises(BlockMismatchError):
                await file.aread(0, file.size)
            with pytest.raises(ValueError, match="negative"):
                await file.aread(-1, 5)
        with pytest.raises(NotInManifestError):
            await reader.aopen("series/9.ozx")
        (folder.root / large).with_suffix(".blocks").unlink()
        fresh = reader_of(folder, server)
        with fresh, pytest.raises(LinkError, match="cannot open"):
            await fresh.aopen(large)

    with reader_of(folder, server) as reader:
        asyncio.run(drive(reader))


def test_a_loop_that_ended_does_not_harm_the_link(folder: StoreFolder, server: Server) -> None:
    (path,) = filled(folder, [4 * BLOCK])
    manifest = reader_of(folder, server).manifest
    gate = Gate(server)
    with Reader(gate, manifest, manifest_path=folder.manifest_path) as reader:
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(reader.aopen(path), 0.01))
        gate.opened.set()
        assert reader.open(path).read(0, BLOCK) == folder.contents[path][:BLOCK]


# --- the process -------------------------------------------------------------------------------


def test_a_forked_child_gets_an_error(folder: StoreFolder, server: Server) -> None:
    paths = filled(folder, [BLOCK] * 3)
    with reader_of(folder, server) as reader:
        bulk = reader.read_many(paths, ahead_bytes=1)
        next(bulk)
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # should it hang after all, it does not stay
            code = 0
            for attempt in (lambda: reader.read_many(paths), lambda: list(bulk)):
                try:
                    attempt()
                    code = 1
                except LinkError as error:
                    code = max(code, 0 if "worker process" in str(error) else 2)
                except BaseException:
                    code = 3
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(list(bulk)) == 2


def test_misuse_is_named(folder: StoreFolder, server: Server) -> None:
    filled(folder, [1])
    with reader_of(folder, server) as reader, pytest.raises(ValueError, match="ahead_bytes"):
        reader.read_many([], ahead_bytes=0)
