"""The agent signs log-ins to the session's accounts, and nothing else whatever is sent."""

from __future__ import annotations

import os
import socket
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import example, given
from hypothesis import strategies as st

from kakehashi.session import agent, keys

KEY = keys.SigningKey()
BLOB = keys.public_blob(KEY.public)
CERTIFICATE = keys.pack(b"ssh-ed25519-cert-v01@openssh.com", b"nonce", KEY.public, b"rest")
ACCOUNTS = frozenset({"kv-lung", "kw-lung"})


def make() -> agent.Agent:
    made = agent.Agent(KEY, ACCOUNTS, lambda pid: pid == os.getpid())
    made.renew(CERTIFICATE)
    return made


def login(
    account: bytes = b"kv-lung",
    service: bytes = b"ssh-connection",
    method: bytes = b"publickey",
    blob: bytes = CERTIFICATE,
) -> bytes:
    begin = keys.pack(b"session id" * 3) + bytes([50])
    return begin + keys.pack(account, service, method) + b"\1" + keys.pack(b"ssh-ed25519", blob)


def request(data: bytes, blob: bytes = BLOB) -> bytes:
    return bytes([agent.SIGN_REQUEST]) + keys.pack(blob, data) + struct.pack(">I", 0)


def signed(answer: bytes) -> bool:
    return answer[0] == agent.SIGN_RESPONSE


def test_a_login_is_signed_so_that_it_verifies() -> None:
    data = login()
    answer = make().answer(request(data))
    assert signed(answer)
    reader = keys.Reader(keys.Reader(answer[1:]).string())
    assert reader.string() == b"ssh-ed25519"
    Ed25519PublicKey.from_public_bytes(KEY.public).verify(reader.string(), data)


def test_the_one_key_is_named() -> None:
    reader = keys.Reader(make().answer(bytes([agent.REQUEST_IDENTITIES])))
    assert (reader.byte(), reader.integer(), reader.string()) == (12, 1, BLOB)


@pytest.mark.parametrize(
    "data",
    [
        login(account=b"root"),
        login(account=b"kv-brain"),
        login(service=b"ssh-userauth"),
        login(method=b"hostbased"),
        login(blob=keys.public_blob(b"\0" * 32)),
        login()[:40],
        b"",
        b"\x89PNG or any other text that somebody wants signed",
        b'{"renew": "0123", "counter": 99}',
    ],
)
def test_anything_else_is_not_signed(data: bytes) -> None:
    assert make().answer(request(data)) == bytes([agent.FAILURE])


def test_another_key_is_not_known() -> None:
    other = keys.public_blob(keys.SigningKey().public)
    assert not signed(make().answer(request(login(), other)))


@given(st.binary(max_size=600))
@example(bytes([17]) + keys.pack(b"ssh-ed25519", b"a key to be added"))
@example(bytes([27]) + keys.pack(b"session-bind@openssh.com"))
def test_no_bytes_make_it_sign_or_fall(data: bytes) -> None:
    answer = make().answer(data)
    assert not signed(answer)


@given(st.lists(st.binary(min_size=1, max_size=80), max_size=8), st.data())
def test_cutting_the_stream_changes_no_answer(requests: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(keys.pack(one) for one in [*requests, request(login())])
    whole = agent.Conversation(make()).feed(stream)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = agent.Conversation(make())
    parts = [
        pieces.feed(stream[a:b]) for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)
    ]
    assert b"".join(parts) == whole


@pytest.mark.parametrize("length", [0, agent.MESSAGE_LIMIT + 1, 0xFFFFFFFF])
def test_an_impossible_length_ends_the_conversation(length: int) -> None:
    with pytest.raises(keys.WireError):
        agent.Conversation(make()).feed(struct.pack(">I", length) + b"x")


def test_who_asks_counts_by_process() -> None:
    near, far = socket.socketpair()
    with near, far:
        peer = agent.Peer.of(near)
    assert peer == agent.Peer(os.getpid(), os.getuid())
    made = make()
    assert made.admits(peer)
    assert not made.refused
    assert not made.admits(agent.Peer(1, 1000))
    assert made.refused == ["process 1 of uid 1000"]
