"""The listener outlives whatever happens to its associations' processes and to the disk."""

from __future__ import annotations

import datetime as dt
import errno
import hashlib
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from kakehashi.errors import StoreError
from kakehashi.store.receive.asking import Asker, understand
from kakehashi.store.receive.entry import HEADER_SIZE, Receipt
from kakehashi.store.receive.inbox import Inbox
from kakehashi.store.receive.journal import Journal
from kakehashi.store.receive.listener import _Listener
from kakehashi.store.receive.offer import Offer, Verdict

from . import scu
from .scu import ClosedError, data_set

GONE = (ClosedError, ConnectionError)


def test_a_process_that_dies_with_its_answer_unread_ends_no_other(run, monkeypatch):
    """The kernel then resets the listener's end, where it otherwise only closes."""

    receive, here = socket.socket.recv, os.getpid()

    def dies(channel: socket.socket, size: int, flags: int = 0) -> bytes:
        # The listener is a child of this process, an association's process is one of the listener.
        ours = channel.family == socket.AF_UNIX and os.getppid() != here
        if ours and receive(channel, size, socket.MSG_PEEK) == Verdict.STORED.encode():
            os.kill(os.getpid(), signal.SIGKILL)
        return receive(channel, size, flags)

    monkeypatch.setattr(socket.socket, "recv", dies)
    receiver = run()
    first, second = receiver.call(), receiver.call()
    for client in (first, second):
        client.associate()
    for client, sop in ((first, "1.2.3.4"), (second, "1.2.3.5")):
        with pytest.raises(GONE):
            client.store(sop, data_set(sop))
    # It was whole, and may as well be kept; its sender sends it again.
    assert [entry.sop for entry in receiver.entries()] == ["1.2.3.4", "1.2.3.5"]
    third = receiver.call()
    third.associate()
    third.release()


@pytest.mark.parametrize("place", ["lock", "undo"])
def test_a_disk_that_fails_is_said_to_those_who_asked(run, tmp_path, monkeypatch, place):
    """Where the lock cannot be had, and where not even what was begun can be taken back."""
    broken = tmp_path / "broken"

    def breaks(original, where=""):
        def method(one, *arguments, **keywords):
            if broken.exists() and where in str(one):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(one, *arguments, **keywords)

        return method

    if place == "lock":
        monkeypatch.setattr(Journal, "held", breaks(Journal.held))
    else:
        monkeypatch.setattr(Journal, "append", breaks(Journal.append))
        monkeypatch.setattr("pathlib.Path.unlink", breaks(Path.unlink, "/inbox/"))
    receiver = run()
    client = receiver.call()
    client.associate()
    broken.touch()
    assert client.store("1.2.3.4", data_set("1.2.3.4")) == 0x0110
    broken.unlink()
    assert client.store("1.2.3.4", data_set("1.2.3.4")) == 0
    client.release()
    assert [entry.sop for entry in receiver.entries()] == ["1.2.3.4"]


@pytest.fixture
def receipt() -> Receipt:
    now, of_nothing = dt.datetime.now(dt.UTC), hashlib.sha256().hexdigest()
    return Receipt(now, "east", "HOSP", "127.0.0.1", "1.2", "1.3", "1.4", "", "", 0, of_nothing)


ODD = (
    {"sha256": "\0" * 64},
    {"sha256": "A" * 64},
    {"sha256": "0" * 65},
    {"size": -1},
    {"size": 1},
    {"received_at": "9999-12-31T23:59:59+00:00"},
    {"received_at": "1970-01-01T00:00:00+00:00"},
    {"received_at": "2026-01-01T00:00:00"},
    {"sop": "../1"},
    {"study": "\0"},
)


@pytest.mark.parametrize("odd", ["[" * 60_000, *ODD], ids=lambda one: str(one)[:30])
def test_no_message_ends_the_listener(run, tmp_path, monkeypatch, odd):
    """Whoever takes over an association's process may say anything."""
    broken, place = tmp_path / "broken", Asker.place

    def says(asker: Asker, offer: Offer) -> Verdict:
        if not broken.exists():
            return place(asker, offer)
        message = odd
        if isinstance(odd, dict):
            message = json.dumps([offer.part, offer.receipt.as_json() | odd, offer.reason])
        asker._channel.send(message.encode())
        return Verdict(asker._channel.recv(1000).decode())

    monkeypatch.setattr(Asker, "place", says)
    receiver = run()
    first, second = receiver.call(), receiver.call()
    for client in (first, second):
        client.associate()
    broken.touch()
    with pytest.raises(GONE):
        first.store("1.2.3.4", data_set("1.2.3.4"))
    broken.unlink()
    assert second.store("1.2.3.5", data_set("1.2.3.5")) == 0
    second.release()
    assert [entry.sop for entry in receiver.entries()] == ["1.2.3.5"]


def test_what_cannot_be_placed_is_refused_alone(run, monkeypatch):
    """Whatever goes wrong with one object, the others of its round get their places."""
    place = Inbox._place

    def breaks(inbox: Inbox, offer: Offer) -> object:
        if offer.receipt.sop == "1.2.3.4":
            raise ValueError(offer.part)
        return place(inbox, offer)

    monkeypatch.setattr(Inbox, "_place", breaks)
    receiver = run()
    client = receiver.call()
    client.associate()
    sent = [client.store(sop, data_set(sop)) for sop in ("1.2.3.4", "1.2.3.5")]
    assert sent == [0x0110, 0]
    client.release()


def test_an_associations_process_speaks_for_itself_alone(receipt, tmp_path):
    """A decoder's hole would let a stranger speak here: other parts, hospitals and odd text."""
    known = receipt.as_json()
    (tmp_path / "9-1.part").write_bytes(bytes(HEADER_SIZE))
    (tmp_path / "8-1.part").write_bytes(bytes(HEADER_SIZE))
    (tmp_path / "9-2.part").symlink_to(tmp_path / "9-1.part")
    odd = ["9-1.part", known | {"calling": "\ud800"}, ""]
    for question in (
        ["8-1.part", known, ""],
        ["../9-1.part", known, ""],
        ["9-2.part", known, ""],
        ["9-3.part", known, ""],
        ["9-1.part", known | {"facility": "west"}, ""],
        odd,
        [9, receipt, ""],
        ["9-1.part", [], ""],
        "west",
        {},
        ["9-1.part"],
    ):
        with pytest.raises((StoreError, ValueError, TypeError, OSError)):
            understand(json.dumps(question).encode(), 9, frozenset(("east",)), tmp_path)
    good = json.dumps(["9-1.part", known, "why"]).encode()
    both = frozenset(("east", "west"))
    assert understand(good, 9, both, tmp_path) == Offer("9-1.part", receipt, "why")
    assert understand(b'"east"', 9, both, tmp_path) == "east"


def test_a_process_that_is_told_to_stop_as_it_ends_touches_no_other(run, monkeypatch):
    """It once fell out of its own part of the program, into what the listener does at its end."""
    here = os.getpid()

    def told(*_):
        if os.getppid() != here:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("logging.shutdown", told)
    receiver = run()
    first, second = receiver.call(), receiver.call()
    for client in (first, second):
        client.associate()
    second.release()
    third = receiver.call()
    third.associate()
    for client, sop in ((first, "1.2.3.4"), (third, "1.2.3.5")):
        assert client.store(sop, data_set(sop)) == 0


def test_a_process_that_falls_silent_and_stays_holds_up_no_other(run, tmp_path, monkeypatch):
    """The listener must not wait for the end of one that only closed its channel."""
    # The one folder in which it may take a file away.
    broken, enter = tmp_path / "root/receive/incoming/broken", Asker.enter

    def stays(asker: Asker, facility: str) -> bool:
        if broken.exists():
            broken.unlink()
            asker._channel.close()
            signal.pause()
        return enter(asker, facility)

    monkeypatch.setattr(Asker, "enter", stays)
    receiver = run()
    broken.touch()
    first = receiver.call()
    with pytest.raises(GONE):
        first.associate()
    second = receiver.call()
    second.associate()
    second.release()


def test_while_it_drains_the_listener_sleeps(run, tmp_path, monkeypatch):
    """The signal that ended it wakes it once."""
    rounds, turn = tmp_path / "rounds", _Listener._round

    def counted(one: _Listener, timeout_s: float | None) -> None:
        with rounds.open("ab") as file:
            file.write(b".")
        turn(one, timeout_s)

    monkeypatch.setattr(_Listener, "_round", counted)
    receiver = run(stop_s=0.5)
    client = receiver.call()
    client.associate()
    client.connection.sendall(scu.store_units("1.2.3.4", data_set("1.2.3.4"))[0])
    assert receiver.end() == 0
    assert rounds.stat().st_size < 12
