"""What one sender, one hospital and one object may take of the receiver."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from kakehashi.store.receive.settings import Receive, Sender

from . import scu
from .conftest import content
from .scu import ClosedError, data_set
from .test_receiver import Authority, rejected

EAST = Sender(facility="east", ae_titles=["HOSP"], addresses=["127.0.0.0/25"])
WEST = Sender(facility="west", ae_titles=["WEST"], addresses=["127.0.0.0/24"])


def calls(receiver, address: str = "127.0.0.1") -> scu.Scu:
    where = ("127.0.0.1", receiver.port)
    return scu.Scu(socket.create_connection(where, source_address=(address, 0)))


def asks(client: scu.Scu, calling: str = "HOSP") -> scu.Scu:
    client.connection.sendall(scu.request({1: (scu.CT, (scu.EXPLICIT,))}, calling=calling))
    return client


def drips(client: scu.Scu, pieces: Iterator[bytes]) -> int:
    """Send piece after piece, a little apart, until the other end has something to say."""
    sent = 0
    for piece in pieces:
        if select.select([client.connection], [], [], 0.02)[0]:
            return sent
        client.connection.sendall(piece)
        sent += len(piece)
    raise AssertionError("it may drip for ever")


# --- associations ---


def test_one_hospital_leaves_room_for_the_others(run):
    receiver = run(max_associations=4, senders=(EAST, WEST))
    eastern = [calls(receiver) for _ in range(2)]
    for client in eastern:
        client.associate()
    # From an address that both have, it is known only by the name that it says.
    assert rejected(asks(calls(receiver))) == (2, 3, 2)
    western = [calls(receiver, address) for address in ("127.0.0.1", "127.0.0.200")]
    for client in western:
        client.associate(calling="WEST")
    # From an address of its own a hospital that has its share does not even get a place to ask.
    assert rejected(asks(calls(receiver, "127.0.0.200"), "WEST")) == (2, 3, 2)
    eastern[0].release()
    while (again := asks(calls(receiver))).read()[0] != 2:
        again.connection.close()


def test_who_says_nothing_takes_the_place_of_no_other_hospital(run):
    far = Sender(facility="west", ae_titles=["WEST"], addresses=["127.0.0.200"])
    near = Sender(facility="east", ae_titles=["HOSP"], addresses=["127.0.0.1"])
    receiver = run(max_associations=4, senders=(near, far))
    silent = [calls(receiver) for _ in range(20)]
    western = calls(receiver, "127.0.0.200")
    western.associate(calling="WEST")
    western.release()
    for client in silent:
        client.connection.close()


def test_every_hospital_may_have_one():
    settings = Receive(max_associations=3, facility_share=0.01)
    assert settings.max_of_one_facility == 1
    assert Receive().max_of_one_facility == Receive().max_associations // 2


# --- time ---


def test_a_drip_is_not_waited_for(run):
    """A byte now and then, within a unit, and unit after unit of an object without an end."""
    receiver = run(idle_s=0.2)
    request = scu.request({1: (scu.CT, (scu.EXPLICIT,))})
    client = receiver.call()
    assert drips(client, (request[at : at + 1] for at in range(len(request)))) < len(request)
    assert client.read()[0] == 7

    command = scu.message(1, scu.command(1, 1, sop_class=scu.CT, sop="1.2.3.4"))[0]
    piece = scu.unit(4, scu.fragment(1, 0, b"x" * 20))
    for pieces in (iter([piece] * 500), (piece[at % len(piece) :][:1] for at in range(9000))):
        client = receiver.call()
        client.associate()
        client.connection.sendall(command)
        drips(client, pieces)
        assert client.read()[0] == 7
        with pytest.raises(ClosedError):
            client.read()


def test_a_slow_line_is_not_a_drip(run):
    """What brings its objects to an end in time goes on for as long as it likes."""
    receiver = run(idle_s=1)
    client = receiver.call()
    client.associate()
    for number in range(25):
        sop = f"1.2.3.{number}"
        for unit in scu.store_units(sop, data_set(sop)):
            assert not select.select([client.connection], [], [], 0.03)[0]
            client.connection.sendall(unit)
        assert client.status() == 0
    client.release()


def test_a_handshake_that_drips_is_not_waited_for(run, tmp_path):
    authority = Authority(tmp_path, "ca")
    key, certificate = authority.issue("receiver")
    receiver = run(idle_s=0.2, tls_key=key, tls_cert=certificate)
    client = receiver.call()
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)
    assert drips(client, (hello[at : at + 1] for at in range(len(hello)))) < len(hello)


# --- space ---


def test_an_object_that_is_too_large_is_refused_and_the_next_is_taken(run):
    receiver = run(max_object_mb=1)
    client = receiver.call()
    client.associate()
    large, small = data_set("1.2.3.4", pixels=bytes(1_200_000)), data_set("1.2.3.5")
    client.connection.sendall(b"".join(scu.store_units("1.2.3.4", large)))
    response = client.response()
    assert int.from_bytes(response[0x900], "little") == 0xA700
    assert b"larger than" in response[0x902]
    assert receiver.files("incoming") == []
    assert client.store("1.2.3.5", small) == 0
    client.release()
    assert [content(entry) for entry in receiver.entries()] == [small]


@pytest.mark.parametrize("sop_class", [scu.CT, "1.2.840.10008.1.1"])
def test_an_object_without_an_end_is_not_read_for_ever(run, sop_class):
    receiver = run(max_object_mb=1)
    client = receiver.call()
    client.associate()
    command = scu.command(1, 1, sop_class=sop_class, sop="1.2.3.4")
    client.connection.sendall(scu.message(1, command)[0])
    piece = scu.unit(4, scu.fragment(1, 0, bytes(100_000)))
    for _ in range(200):
        client.connection.sendall(piece)
        if select.select([client.connection], [], [], 0)[0]:
            break
    else:
        raise AssertionError("it reads for ever")
    assert client.read()[0] == 7
    assert receiver.files("incoming") == []


def test_the_disk_keeps_its_reserve(run, tmp_path):
    status = os.statvfs(tmp_path)
    receiver = run(reserve_mb=(status.f_blocks * status.f_frsize >> 20) + 1)
    client = receiver.call()
    client.associate()
    assert client.store("1.2.3.4", data_set("1.2.3.4")) == 0xA700
    client.release()
    assert receiver.files("incoming") == []


def test_the_reserve_is_looked_at_while_an_object_grows(run, monkeypatch):
    """The first look finds room; what comes meanwhile takes it."""
    real, looked = os.statvfs, []

    def shrinking(where):
        looked.append(where)
        values = list(real(where))
        values[4] = values[4] if len(looked) == 1 else 0
        return os.statvfs_result(values)

    monkeypatch.setattr("kakehashi.store.receive.part.os.statvfs", shrinking)
    receiver = run(reserve_mb=1)
    client = receiver.call()
    client.associate()
    assert client.store("1.2.3.4", data_set("1.2.3.4", pixels=bytes(20 << 20))) == 0xA700
    client.release()
    assert receiver.files("incoming") == []


def test_a_full_quarantine_is_said_and_holds_up_no_good_object(run, capfd):
    receiver = run(quarantine_mb=1)
    client = receiver.call()
    client.associate()
    odd = [bytes([number]) * 400_000 for number in range(3)]
    assert [client.store(f"1.2.{n}", data) for n, data in enumerate(odd[:2])] == [0, 0]
    for _ in range(2):
        client.connection.sendall(b"".join(scu.store_units("1.2.2", odd[2])))
        response = client.response()
        assert int.from_bytes(response[0x900], "little") == 0xA700
        assert b"quarantine is full" in response[0x902]
    # Once, however many are refused.
    assert capfd.readouterr().err.count("store.receive.quarantine_mb") == 1
    # The same again takes no more room.
    assert client.store("1.2.0", odd[0]) == 0
    assert client.store("1.3.1", data_set("1.3.1")) == 0
    inbox = receiver.inbox
    assert len(inbox.held.list()) == 2
    assert receiver.files("incoming") == []
    inbox.discard_held(inbox.held.list()[0].id)
    assert client.store("1.2.2", odd[2]) == 0
    client.release()
