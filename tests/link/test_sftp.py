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

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kakehashi.errors import LinkError
from kakehashi.link.sftp import Data, Opened, Sftp, Status, StatusError
from tests.link.stores import Server, random_bytes

VERSION = struct.pack(">IBI", 5, 2, 3)


def packet(kind: int, request: int, body: bytes) -> bytes:
    return struct.pack(">IBI", 5 + len(body), kind, request) + body


def text(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def against(said: bytes, talk: Callable[[Sftp], object], *, then_close: bool = True) -> object:
    """Run ``talk`` with a client whose server says ``said``, whatever it is asked."""
    near, far = socket.socketpair()
    with far:
        sender = threading.Thread(target=_say, args=(far, said, then_close))
        sender.start()
        try:
            with Sftp(near, patience_s=0.2 if not then_close else 10) as sftp:
                return talk(sftp)
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


@settings(max_examples=300, deadline=None)
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
