"""Several endpoints with the same files, sessions that refuse channels, and the figures."""

from __future__ import annotations

import shutil
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from kakehashi.errors import BlockMismatchError
from kakehashi.link import Reader
from kakehashi.link.figures import HISTORY_S, Ledger
from kakehashi.link.manifest import Manifest
from tests.link.stores import BLOCK, Gate, Server, StoreFolder, random_bytes
from tests.link.test_reader import reader_of, until


class Replicas:
    """Copies of a folder, each behind a server of its own that sees it at the same path.

    The servers here have no root of their own, so that the path is one: what a copy differs in
    is done to what its server says.
    """

    def __init__(self, folder: StoreFolder, *meddles: Callable[[bytes], bytes | None]) -> None:
        self.folder = folder
        self.servers = [Server(partial(_meddled, one)) for one in meddles]

    def reader(self, channels: int = 4, patience_s: float = 60.0) -> Reader:
        return Reader(
            self.servers,
            Manifest.parse(Path(self.folder.manifest_path).read_bytes(), self.folder.sha256),
            manifest_path=self.folder.manifest_path,
            channels=channels,
            patience_s=patience_s,
        )

    def close(self) -> None:
        for server in self.servers:
            server.close()


def _meddled(
    meddle: Callable[[bytes], bytes | None], _channel: int, _at: int, data: bytes
) -> bytes | None:
    return meddle(data)


def honest(data: bytes) -> bytes:
    return data


def flipping(data: bytes) -> bytes:
    if len(data) < 20_000:
        return data
    changed = bytearray(data)
    changed[10_000] ^= 1
    return bytes(changed)


def dead(_: bytes) -> None:
    return None


@pytest.fixture
def paths(folder: StoreFolder) -> list[str]:
    sizes = [3 * BLOCK] * 20 + [40 * BLOCK + 9, 2 * BLOCK]
    return [folder.add(f"1.2.{n}", random_bytes(size, n)) for n, size in enumerate(sizes)]


def test_both_are_used_side_by_side_also_for_one_file(folder: StoreFolder) -> None:
    path = folder.add("1.2.3", random_bytes(300 * BLOCK))
    with closing(Replicas(folder, honest, honest)) as stores, stores.reader() as reader:
        for _ in range(3):
            (data,) = reader.read_many([path])
            assert data == folder.contents[path]
        first, second = reader.stats().replicas
        assert first.bytes > 0
        assert second.bytes > 0
        assert first.bytes + second.bytes == reader.stats().bytes
        assert first.aside == second.aside == ""


@pytest.mark.parametrize("bad_first", [True, False])
def test_one_with_wrong_bytes_is_put_aside_and_reported(
    folder: StoreFolder, paths: list[str], bad_first: bool
) -> None:
    meddles = [flipping, honest] if bad_first else [honest, flipping]
    with closing(Replicas(folder, *meddles)) as stores, stores.reader() as reader:
        for _ in range(3):
            assert list(reader.read_many(paths)) == [folder.contents[path] for path in paths]
            for path in paths:
                with reader.open(path) as file:
                    assert file.read(5, file.size) == folder.contents[path][5:]
        bad, good = sorted(reader.stats().replicas, key=lambda one: not one.aside)
        assert "wrong" in bad.aside
        assert bad.wrong >= 3
        assert good.aside == ""
        until(lambda: {one.channels for one in reader.stats().replicas if one.aside} == {0})


def test_one_out_of_reach_leaves_the_work_to_the_other(
    folder: StoreFolder, paths: list[str]
) -> None:
    with closing(Replicas(folder, dead, honest)) as stores, stores.reader() as reader:
        assert list(reader.read_many(paths)) == [folder.contents[path] for path in paths]
        first, second = reader.stats().replicas
        assert first.bytes == 0
        assert first.aside == "", "it may be back"
        assert second.bytes > 0


def test_a_single_piece_does_not_wait_for_one_out_of_reach(
    folder: StoreFolder, paths: list[str]
) -> None:
    with closing(Replicas(folder, dead, dead, honest)) as stores, stores.reader() as reader:
        assert reader.open(paths[0]).read(0, 10) == folder.contents[paths[0]][:10]


def test_one_that_comes_back_is_used_again(folder: StoreFolder, paths: list[str]) -> None:
    back = threading.Event()

    def gone(data: bytes) -> bytes | None:
        return data if back.is_set() else None

    with closing(Replicas(folder, honest, gone)) as stores, stores.reader() as reader:
        assert len(list(reader.read_many(paths))) == len(paths)
        back.set()

        def both() -> bool:
            for data, path in zip(reader.read_many(paths), paths, strict=True):
                assert data == folder.contents[path]
            return reader.stats().replicas[1].bytes > 0

        until(both, 60)


def test_one_that_hangs_is_left(folder: StoreFolder, paths: list[str]) -> None:
    with closing(Replicas(folder, honest, honest)) as stores:
        with stores.reader(patience_s=1.0) as reader:
            bulk = reader.read_many(paths, ahead_bytes=4 * BLOCK)
            assert next(bulk) == folder.contents[paths[0]]
            stores.servers[1].send(signal.SIGSTOP)
            assert list(bulk) == [folder.contents[path] for path in paths[1:]]
        stores.servers[1].send(signal.SIGCONT)


def test_the_last_one_is_never_put_aside_and_its_error_is_told(
    folder: StoreFolder, paths: list[str]
) -> None:
    with closing(Replicas(folder, flipping, flipping)) as stores, stores.reader() as reader:
        with pytest.raises(BlockMismatchError):
            next(reader.read_many(paths))
        assert any(not one.aside for one in reader.stats().replicas)


def test_a_file_that_one_lacks_comes_from_the_other(tmp_path: Path) -> None:
    whole = StoreFolder(tmp_path / "whole")
    whole.root.mkdir()
    path = whole.add("1.2.3", random_bytes(4 * BLOCK))
    # A server that answers for another place, as a chroot does: the same names, less in it.
    (tmp_path / "less").mkdir()
    shutil.copy(whole.manifest_path, tmp_path / "less/manifest.json")

    class At(Server):
        def __init__(self, root: Path) -> None:
            super().__init__()
            self._command = ["/usr/lib/openssh/sftp-server", "-R", "-d", str(root)]

    with (
        closing(At(tmp_path / "less")) as less,
        closing(At(whole.root)) as full,
        Reader.connect([less, full], manifest_path="manifest.json", sha256=whole.sha256) as reader,
    ):
        for _ in range(5):
            assert list(reader.read_many([path])) == [whole.contents[path]]
            assert reader.open(path).read(0, 10) == whole.contents[path][:10]


def test_the_manifest_comes_from_whichever_has_it(folder: StoreFolder, server: Server) -> None:
    folder.add("1.2.3", b"x")

    with Reader.connect(
        [Gate(server), server], manifest_path=folder.manifest_path, sha256=folder.sha256
    ) as reader:
        assert len(reader.manifest.files) == 1
    with pytest.raises(ValueError, match="at least one endpoint"):
        Manifest.fetch([], "x", "0" * 64)


# --- channels that are refused -----------------------------------------------------------------


@pytest.fixture
def bounded(server: Server) -> Callable[[], socket.socket]:
    """A session that gives two channels and closes every further one at once."""
    ends: list[socket.socket] = []

    def connect() -> socket.socket:
        if len([one for one in ends if one.fileno() >= 0]) >= 2:
            near, far = socket.socketpair()
            far.close()
            return near
        ends.append(server())
        return ends[-1]

    return connect


def test_a_refused_channel_is_no_error(
    folder: StoreFolder, server: Server, bounded: Callable[[], socket.socket]
) -> None:
    paths = [folder.add(f"1.2.{n}", random_bytes(100 * BLOCK, n)) for n in range(3)]
    manifest = reader_of(folder, server).manifest
    with Reader(bounded, manifest, manifest_path=folder.manifest_path) as reader:
        reader.open(paths[0]).read(0, 1)
        reader._pool._pace.target = 8
        for _ in range(2):
            assert list(reader.read_many(paths)) == list(folder.contents.values())
        stats = reader.stats()
        assert stats.refused >= 1
        assert stats.channels <= 2
        assert stats.channel_limit <= 2
        assert stats.reconnects == 0


# --- figures -----------------------------------------------------------------------------------


def test_the_figures_say_what_was_done(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", random_bytes(100 * BLOCK))
    with reader_of(folder, server) as reader:
        assert reader.stats().rate_mean == 0
        list(reader.read_many([path]))
        stats = reader.stats()
        assert stats.bytes == 100 * BLOCK + 3200
        assert stats.channels == len(stats.rtt_s) >= 1
        assert all(0 < rtt < 10 for rtt in stats.rtt_s)
        assert stats.rate_mean > 0
        assert stats.waiting_s > 0
        until(lambda: sum(one.bytes for one in reader.history()) == stats.bytes)
        assert reader.stats().rate_now > 0


def test_history_is_by_the_second_and_bounded() -> None:
    now = 1000.0
    ledger = Ledger(lambda: now)
    ledger.begin()
    for step in range(HISTORY_S + 50):
        now = 1000.5 + step
        ledger.arrived(100)
        ledger.arrived(step)
        ledger.connected(step % 5)
    now += 10
    history = ledger.history()
    assert len(history) == HISTORY_S
    assert history[-1].at == 1000 + HISTORY_S + 49
    assert history[-1].bytes == 100 + HISTORY_S + 49
    assert history[-1].channels == (HISTORY_S + 49) % 5
    assert [one.at for one in history] == sorted(one.at for one in history)
    assert ledger.rates()[0] == 0, "nothing has come for ten seconds"


def test_a_second_without_anything_is_left_out() -> None:
    now = 5.0
    ledger = Ledger(lambda: now)
    ledger.reread()
    now = 9.2
    ledger.waited(0.5)
    ledger.reconnected(3)
    now = 11.0
    assert [(one.at, one.rereads, one.reconnects, one.waited_s) for one in ledger.history()] == [
        (5, 1, 0, 0.0),
        (9, 0, 1, 0.5),
    ]
    assert ledger.repeated == 3


def test_figures_can_be_asked_for_while_threads_read(folder: StoreFolder, server: Server) -> None:
    paths = [folder.add(f"1.2.{n}", random_bytes(20 * BLOCK, n)) for n in range(10)]
    with reader_of(folder, server) as reader:
        before = reader.stats()
        for _ in reader.read_many(paths * 3, ahead_bytes=10 * BLOCK):
            stats = reader.stats()
            assert stats.bytes >= before.bytes
            assert stats.blocks * BLOCK >= stats.bytes
            before = stats
