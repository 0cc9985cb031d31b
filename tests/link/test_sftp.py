"""The SFTP client against the real server, and against servers that break the protocol."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kakehashi.errors import LinkError
from kakehashi.link.sftp import Data, Opened, Sftp, Status, StatusError
from kakehashi.link.sftpwrite import PIECE, WritingSftp
from tests.link.stores import Server, random_bytes

VERSION = struct.pack(">IBI", 5, 2, 3)


def packet(kind: int, request: int, body: bytes) -> bytes:
    return struct.pack(">IBI", 5 + len(body), kind, request) + body


def text(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


_OFFERED = (b"fsync@openssh.com", b"posix-rename@openssh.com", b"hardlink@openssh.com")
_EXTENSIONS = b"".join(text(name) + text(b"1") for name in _OFFERED)
WRITES = struct.pack(">IBI", 5 + len(_EXTENSIONS), 2, 3) + _EXTENSIONS


def against(
    said: bytes,
    talk: Callable[[WritingSftp], object],
    *,
    then_close: bool = True,
    client: type[Sftp] = Sftp,
) -> object:
    """Run ``talk`` with a client whose server says ``said``, whatever it is asked."""
    near, far = socket.socketpair()
    with far:
        sender = threading.Thread(target=_say, args=(far, said, then_close))
        sender.start()
        try:
            with client(near, patience_s=0.2 if not then_close else 10) as sftp:
                return talk(cast("WritingSftp", sftp))
        finally:
            sender.join(timeout=10)


def _say(far: socket.socket, said: bytes, then_close: bool) -> None:
    try:
        far.sendall(said)
        if then_close:
            far.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the client has closed, which is what it should do with nonsense


def read_once(sftp: Sftp) -> object:
    sftp.greet()
    sftp.ask_read(b"handle", 0, 1000)
    sftp.flush()
    return sftp.receive()


def test_it_reads_from_the_real_server(tmp_path: Path, server: Server) -> None:
    data = random_bytes(500_000)
    (tmp_path / "日本 語.bin").write_bytes(data)
    with Sftp(server()) as sftp:
        sftp.greet()
        handle = sftp.open(str(tmp_path / "日本 語.bin"))
        assert sftp.size(handle) == len(data)
        asked = [sftp.ask_read(handle, at, 100_000) for at in range(0, 500_000, 100_000)]
        assert sftp.outstanding == 5
        sftp.flush()
        replies = [sftp.receive() for _ in asked]
        got = {r.request: bytes(r.data) for r in replies if isinstance(r, Data)}
        assert b"".join(got[request] for request in asked) == data
        sftp.ask_read(handle, 499_990, 100)
        sftp.ask_read(handle, 600_000, 100)
        sftp.ask_close(handle)
        sftp.flush()
        end, beyond, closed = (sftp.receive() for _ in range(3))
        assert isinstance(end, Data)
        assert bytes(end.data) == data[-10:]
        assert isinstance(beyond, Status)
        assert beyond.code == 1
        assert isinstance(closed, Status)
        assert closed.code == 0


def test_the_real_servers_refusals_have_their_code(tmp_path: Path, server: Server) -> None:
    with Sftp(server()) as sftp:
        sftp.greet()
        with pytest.raises(StatusError, match="none") as caught:
            sftp.open(str(tmp_path / "none"))
        assert caught.value.code == 2


def test_it_understands_a_good_answer() -> None:
    reply = against(VERSION + packet(103, 1, text(b"abc")), read_once)
    assert isinstance(reply, Data)
    assert bytes(reply.data) == b"abc"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        struct.pack(">IBI", 5, 2, 4),
        struct.pack(">IBI", 5, 101, 3),
        struct.pack(">IB", 0xFFFFFFFF, 2) + b"x" * 100,
        struct.pack(">IB", 1, 2),
        VERSION,
        VERSION + struct.pack(">IBI", 0xFFFFFFFF, 103, 1),
        VERSION + struct.pack(">IBI", 4, 103, 1),
        VERSION + packet(103, 2, text(b"abc")),
        VERSION + packet(102, 1, text(b"abc")),
        VERSION + packet(104, 1, text(b"abc")),
        VERSION + packet(105, 1, struct.pack(">IQ", 1, 5)),
        VERSION + packet(103, 1, b"abc"),
        VERSION + packet(103, 1, text(b"")),
        VERSION + packet(103, 1, text(b"x" * 1001)),
        VERSION + packet(103, 1, struct.pack(">I", 900) + b"x" * 100),
        VERSION + packet(103, 1, text(b"x" * 100) + b"more"),
        VERSION + packet(101, 1, struct.pack(">I", 0)),
        VERSION + packet(101, 1, b"\0"),
        VERSION + packet(101, 1, struct.pack(">I", 4) + b"\xff\xff\xff\xff"),
        VERSION + packet(103, 1, text(b"abc"))[:-1],
    ],
)
def test_what_breaks_the_protocol_is_an_error(said: bytes) -> None:
    with pytest.raises(LinkError):
        against(said, read_once)


@pytest.mark.parametrize("handle", [b"", b"x" * 257])
def test_a_handle_of_an_impossible_length_is_an_error(handle: bytes) -> None:
    def open_one(sftp: Sftp) -> object:
        sftp.greet()
        return sftp.open("x")

    assert against(VERSION + packet(102, 1, text(b"h")), open_one) == b"h"
    with pytest.raises(LinkError, match="handle"):
        against(VERSION + packet(102, 1, text(handle)), open_one)


def test_attributes_without_a_size_are_an_error() -> None:
    def size(sftp: Sftp) -> object:
        sftp.greet()
        return sftp.size(b"h")

    assert against(VERSION + packet(105, 1, struct.pack(">IQ", 1, 77)), size) == 77
    for body in (struct.pack(">I", 0), struct.pack(">I", 1), b""):
        with pytest.raises(LinkError):
            against(VERSION + packet(105, 1, body), size)


@pytest.mark.parametrize("said", [b"", VERSION, VERSION + packet(103, 1, text(b"abc"))[:-1]])
def test_a_server_that_falls_silent_is_an_error_in_time(said: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(LinkError, match="silent"):
        against(said, read_once, then_close=False)
    assert time.monotonic() - started < 5


def test_ending_it_from_another_thread_wakes_it() -> None:
    near, far = socket.socketpair()
    with far, Sftp(near) as sftp:
        far.sendall(VERSION)
        sftp.greet()
        sftp.ask_open("x")
        sftp.flush()
        timer = threading.Timer(0, sftp.abort)
        timer.start()
        with pytest.raises(LinkError):
            sftp.receive()
        timer.join()


@pytest.mark.parametrize("kind", [101, 102, 103])
def test_a_claimed_length_sets_no_memory_aside(kind: int) -> None:
    """A packet may say that it is huge: that is refused before a buffer of that size exists."""
    claimed = 256 << 20
    tracemalloc.start()
    try:
        with pytest.raises(LinkError):
            against(VERSION + struct.pack(">IBI", claimed, kind, 1), read_once)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


_bodies = st.one_of(
    st.binary(max_size=60),
    st.binary(max_size=60).map(text),
    st.integers(0, 2**32 - 1).map(lambda n: struct.pack(">I", n)),
)
_packets = st.one_of(
    st.binary(max_size=40),
    st.builds(
        packet,
        st.one_of(st.sampled_from([2, 101, 102, 103, 104, 105]), st.integers(0, 255)),
        st.integers(0, 6),
        st.lists(_bodies, max_size=3).map(b"".join),
    ),
)


@settings(max_examples=300)
@given(st.booleans(), st.lists(_packets, max_size=6))
def test_whatever_a_server_says_it_is_an_answer_or_an_error(
    greets: bool, packets: list[bytes]
) -> None:
    def talk(sftp: Sftp) -> None:
        sftp.greet()
        sftp.ask_open("x")
        sftp.ask_read(b"h", 5, 50)
        sftp.ask_size(b"h")
        sftp.ask_close(b"h")
        sftp.flush()
        while sftp.outstanding:
            reply = sftp.receive()
            if isinstance(reply, Data):
                assert 0 < len(reply.data) <= 50
            elif isinstance(reply, Opened):
                assert 0 < len(reply.handle) <= 256

    with contextlib.suppress(LinkError):
        against((VERSION if greets else b"") + b"".join(packets), talk)


def stat_of(mode: int) -> bytes:
    return struct.pack(">IQIII", 1 | 4 | 8, 5, mode, 7, 8)


def names(*entries: tuple[bytes, bytes]) -> bytes:
    listed = (text(name) + text(b"-rw-") + stat for name, stat in entries)
    return struct.pack(">I", len(entries)) + b"".join(listed)


def test_it_understands_good_answers_about_files() -> None:
    def talk(sftp: WritingSftp) -> object:
        sftp.greet()
        return sftp.stat("x"), sftp.list("y")

    extended = struct.pack(">IIII", 2 | 1 << 31, 1, 1, 1) + text(b"acl") + text(b"none")
    said = (
        packet(105, 1, stat_of(0o100644))
        + packet(102, 2, text(b"h"))
        + packet(104, 3, names((b".", stat_of(0o40755)), (b"a\xff", stat_of(0o100600))))
        + packet(104, 4, names((b"b", extended)))
        + packet(101, 5, struct.pack(">I", 1))
        + packet(101, 6, struct.pack(">I", 0))
    )
    found = against(WRITES + said, talk, client=WritingSftp)
    assert found == (
        (5, 0o100644, 8),
        [("a\udcff", (5, 0o100600, 8)), ("b", (None, None, None))],
    )


@pytest.mark.parametrize(
    "listing",
    [
        names(),
        names((b"", stat_of(0))),
        names((b"../x", stat_of(0))),
        names((b"a\0", stat_of(0))),
        names((b"a", struct.pack(">I", 1))),
        names((b"a", struct.pack(">II", 1 << 31, 0xFFFFFFFF))),
        struct.pack(">I", 0xFFFFFFFF) + names((b"a", stat_of(0)))[4:],
        b"",
    ],
)
def test_a_listing_that_cannot_be_is_an_error(listing: bytes) -> None:
    def talk(sftp: WritingSftp) -> object:
        sftp.greet()
        return sftp.list("x")

    with pytest.raises(LinkError):
        against(
            WRITES + packet(102, 1, text(b"h")) + packet(104, 2, listing),
            talk,
            client=WritingSftp,
        )


def test_a_greeting_that_is_cut_in_the_middle_is_an_error() -> None:
    cut = struct.pack(">IBI", 5 + 8, 2, 3) + text(b"fsyn")
    with pytest.raises(LinkError, match="cut field"):
        against(cut, Sftp.greet)


def test_a_refused_write_leaves_the_channel_in_order(tmp_path: Path) -> None:
    """All of the requests under way are answered before the refusal is told."""
    read_only = Server()
    (tmp_path / "a").write_bytes(b"old")
    try:
        with Sftp(read_only()) as plain, WritingSftp(read_only()) as sftp:
            plain.greet()
            with pytest.raises(LinkError, match="does not offer fsync"):
                sftp.greet()
            handle = sftp.open_for_reading(str(tmp_path / "a"))
            with pytest.raises(StatusError):
                sftp.write(handle, 0, bytes(40 * PIECE))
            assert sftp.outstanding == 0
            assert b"".join(sftp.read(handle, 1, 100)) == b"ld"
            assert sftp.outstanding == 0
    finally:
        read_only.close()


def test_files_are_read_beyond_one_window(tmp_path: Path, server: Server) -> None:
    data = random_bytes(40 * PIECE + 17)
    (tmp_path / "a").write_bytes(data)
    with WritingSftp(server()) as sftp:
        with pytest.raises(LinkError, match="does not offer"):
            sftp.greet()
        handle = sftp.open_for_reading(str(tmp_path / "a"))
        for offset, size in ((0, len(data)), (0, 10 * len(data)), (5, PIECE), (len(data), 9)):
            assert b"".join(sftp.read(handle, offset, size)) == data[offset : offset + size]
            assert sftp.outstanding == 0


_write_packets = st.one_of(
    _packets,
    st.builds(
        packet,
        st.sampled_from([101, 102, 103, 104, 105]),
        st.integers(1, 9),
        st.one_of(
            st.sampled_from(
                [
                    struct.pack(">I", 0),
                    struct.pack(">I", 1),
                    text(b"h"),
                    stat_of(0o100644),
                    names((b"a", stat_of(0o100644))),
                ]
            ),
            st.lists(_bodies, max_size=3).map(b"".join),
        ),
    ),
)


@settings(max_examples=400)
@given(
    st.lists(_write_packets, max_size=8),
    st.sampled_from(["write", "list", "read", "stat", "real", "rename", "flush"]),
)
def test_whatever_a_server_says_to_a_writer_it_is_an_answer_or_an_error(
    packets: list[bytes], call: str
) -> None:
    def talk(sftp: WritingSftp) -> None:
        sftp.greet()
        if call == "write":
            handle = sftp.open_for_writing("x", create=True, exclusive=True)
            sftp.write(handle, 0, bytes(3 * PIECE))
            sftp.set_mode(handle, 0o600)
            sftp.fsync(handle)
            sftp.close_handle(handle)
        elif call == "list":
            assert all("/" not in name and name for name, _ in sftp.list("x"))
        elif call == "read":
            assert sum(map(len, sftp.read(b"h", 0, 3 * PIECE))) <= 3 * PIECE
        elif call == "stat":
            sftp.stat("x")
            sftp.stat("x", follow=False)
            sftp.fstat(b"h")
        elif call == "real":
            sftp.real_path("x")
        elif call == "rename":
            sftp.rename("x", "y")
            sftp.mkdir("z")
            sftp.rmdir("z")
            sftp.remove("y")
        else:
            sftp.fsync_folder("x")
        assert sftp.outstanding == 0

    with contextlib.suppress(LinkError):
        against(WRITES + b"".join(packets), talk, client=WritingSftp)
