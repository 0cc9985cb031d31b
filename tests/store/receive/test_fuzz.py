"""Ten thousand mutated objects and associations: no crash, no hang, nothing half."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import uid

from kakehashi.store.receive import Inbox
from kakehashi.store.receive.association import Association, Host
from kakehashi.store.receive.entry import is_whole, read_receipt
from kakehashi.store.receive.senders import Senders

from ..conftest import DATA
from . import scu
from .conftest import content, settings
from .scu import data_set, fragment, message, request, store_units, unit

IN_PROCESS, BY_NETWORK = 10_000, 400
SYNTAXES = (scu.EXPLICIT, str(uid.ImplicitVRLittleEndian), str(uid.DeflatedExplicitVRLittleEndian))


def implicit(sop: str) -> bytes:
    values = ((8, 0x16, scu.CT), (8, 0x18, sop), (0x20, 0xD, "1.2.3.1"), (0x20, 0xE, "1.2.3.1.1"))
    raw = b""
    for group, number, value in values:
        padded = scu.uid_value(value)
        raw += struct.pack("<HHI", group, number, len(padded)) + padded
    return raw


def sequences(sop: str) -> bytes:
    """With sequences of undefined length, within one another, before the series' UID."""
    inner = scu.ui(8, 0x1155, "1.2.3")
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    end, done = (struct.pack("<HHI", 0xFFFE, n, 0) for n in (0xE00D, 0xE0DD))
    head = struct.pack("<HH2sHI", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    nested = head + item + inner + head + item + inner + end + done + end + done
    whole = data_set(sop)
    cut = whole.index(struct.pack("<HH", 0x20, 0xD))
    return whole[:cut] + nested + whole[cut:]


class Material:
    """Honest associations, to be spoilt."""

    def __init__(self) -> None:
        real = [(DATA / "ct_tiny" / name).read_bytes() for name in ("17106", "17136")]
        self.objects = [raw[raw.index(b"\x08\x00\x05\x00CS") :] for raw in real]

    def units(self, chance: random.Random) -> list[bytes]:
        contexts = {
            2 * n + 1: (chance.choice((scu.CT, str(uid.MRImageStorage))), (syntax,))
            for n, syntax in enumerate(SYNTAXES)
        }
        contexts[7] = (scu.VERIFICATION, (scu.EXPLICIT,))
        units = [request(contexts, pad=chance.choice((b"", b"\0")))]
        for number in range(chance.randint(1, 3)):
            sop = f"1.2.{chance.randrange(50)}"
            kind = chance.randrange(5)
            if kind == 0:
                units += store_units(sop, implicit(sop), number=number, context=3)
            elif kind == 1:
                packed = zlib.compressobj(9, zlib.DEFLATED, -15)
                data = packed.compress(data_set(sop, pixels=bytes(5000))) + packed.flush()
                units += store_units(sop, data, number=number, context=5)
            elif kind == 2:
                data = chance.choice(self.objects)
                command = scu.command(1, number, sop_class=scu.CT, sop=sop)
                units += message(1, command, data, room=chance.randrange(50, 2000))
            elif kind == 3:
                units += store_units(sop, sequences(sop), number=number)
            else:
                units += message(7, scu.command(0x30, number, data_set=False))
                units += store_units(sop, data_set(sop, pixels=chance.randbytes(300)))
        return [*units, unit(5, bytes(4))]


EXTREMES = (0, 1, 2, 5, 6, 7, 0x7F, 0x80, 0xFF, 0xFFFE, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)


def flip(units: list[bytes], chance: random.Random) -> list[bytes]:
    at = chance.randrange(len(units))
    raw = bytearray(units[at])
    for _ in range(chance.choice((1, 1, 2, 8))):
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    return [*units[:at], bytes(raw), *units[at + 1 :]]


def wrong_length(units: list[bytes], chance: random.Random) -> list[bytes]:
    """A number somewhere: of a unit, of a fragment, or within."""
    at = chance.randrange(len(units))
    raw = bytearray(units[at])
    where = chance.choice((2, 6, chance.randrange(max(len(raw) - 4, 1))))
    size, code = chance.choice(((4, ">I"), (4, "<I"), (2, ">H"), (2, "<H")))
    value = chance.choice(EXTREMES) & (256**size - 1)
    raw[where : where + size] = struct.pack(code, value)
    return [*units[:at], bytes(raw), *units[at + 1 :]]


def cut(units: list[bytes], chance: random.Random) -> list[bytes]:
    raw = b"".join(units)
    return [raw[: chance.randrange(len(raw))]]


def shuffled(units: list[bytes], chance: random.Random) -> list[bytes]:
    mixed = list(units)
    for _ in range(chance.randint(1, 3)):
        one, other = chance.randrange(len(mixed)), chance.randrange(len(mixed))
        mixed[one], mixed[other] = mixed[other], mixed[one]
    return mixed


def repeated(units: list[bytes], chance: random.Random) -> list[bytes]:
    at = chance.randrange(len(units))
    return [*units[:at], *([units[at]] * chance.randint(0, 3)), *units[at + 1 :]]


def stuffed(units: list[bytes], chance: random.Random) -> list[bytes]:
    at = chance.randrange(len(units) + 1)
    flags, context = chance.randrange(8), chance.choice((0, 1, 3, 7, 255))
    rubbish = chance.choice(
        (
            chance.randbytes(chance.randrange(1, 200)),
            unit(chance.randrange(256), chance.randbytes(chance.randrange(40))),
            unit(4, fragment(context, flags, chance.randbytes(chance.randrange(60)))),
        )
    )
    return [*units[:at], rubbish, *units[at:]]


def spoilt_objects(units: list[bytes], chance: random.Random) -> list[bytes]:
    """All units stay whole; what they carry does not."""
    spoilt = []
    for one in units:
        if one[0] == 4 and len(one) > 14 and not one[11] & 1:
            raw = bytearray(one)
            for _ in range(chance.randint(1, 6)):
                value = chance.choice((0, 0xFF, chance.randrange(256)))
                raw[chance.randrange(12, len(raw))] = value
            spoilt.append(bytes(raw))
        else:
            spoilt.append(one)
    return spoilt


MUTATIONS = (flip, wrong_length, cut, shuffled, repeated, stuffed, spoilt_objects, spoilt_objects)


def spoil(material: Material, seed: int) -> bytes:
    chance = random.Random(seed)
    units = material.units(chance)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        # Nothing can be made of units of which nothing is left.
        units = [one for one in units if one] or [b"\0"]
        units = chance.choice(MUTATIONS)(units, chance)
    return b"".join(units)


def acknowledged(raw: bytes) -> Iterator[str]:
    """The SOPInstanceUIDs of the objects that a receiver's answers call stored."""
    position = 0
    while position < len(raw):
        kind, _, length = struct.unpack_from(">BBI", raw, position)
        body = raw[position + 6 : position + 6 + length]
        position += 6 + length
        assert kind in {2, 3, 4, 6, 7}
        assert len(body) == length
        if kind == 4:
            values, at = {}, 6
            while at < len(body):
                _, number, size = struct.unpack_from("<HHI", body, at)
                values[number] = body[at + 8 : at + 8 + size]
                at += 8 + size
            if values[0x900] == b"\0\0" and values[0x100] == b"\1\x80":
                yield values[0x1000].rstrip(b"\0 ").decode()


@pytest.fixture
def folder():
    # In memory: ten thousand times fsync is not what is tested here.
    shm = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(dir=shm if os.access(shm, os.W_OK) else None))
    yield path
    shutil.rmtree(path)


class Judge:
    """Says whether what was acknowledged is where it must be."""

    def __init__(self, root: Path) -> None:
        self.inbox = Inbox(root)
        self.folders = self.inbox.folders
        self.stored = self.held = 0

    def case(self, answers: bytes) -> None:
        for sop in acknowledged(answers):
            name = hashlib.sha256(sop.encode()).hexdigest()[:40]
            if (self.folders.inbox / f"{name}.dcm").exists():
                self.stored += 1
            else:
                assert list(self.folders.quarantine.glob(f"{name[:12]}-*.json")), sop
                self.held += 1

    def all_whole(self) -> None:
        assert list(self.folders.incoming.iterdir()) == []
        entries = list(self.inbox.entries())
        assert {e.path.name for e in entries} == {p.name for p in self.folders.inbox.iterdir()}
        for entry in entries:
            assert is_whole(entry.path, read_receipt(entry.path))
        held = self.inbox.held.list()
        assert {p.stem for p in self.folders.quarantine.glob("*.dcm")} == {one.id for one in held}
        for one in held:
            assert one.reason
            assert is_whole(one.path, one.receipt)


def test_ten_thousand_mutations(folder):
    chosen = settings()
    judge, material = Judge(folder), Material()
    inbox = judge.inbox
    host = Host(
        chosen,
        Senders(chosen),
        judge.folders.incoming,
        lambda _: True,
        lambda offer: inbox.admit([offer])[0],
    )
    refused = 0
    for seed in range(IN_PROCESS):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(spoil(material, seed))
            theirs.shutdown(socket.SHUT_WR)
            association = Association(host, ours, "127.0.0.1")
            ended = association.run()
            assert ended
            answers = b""
            while more := theirs.recv(1 << 16):
                answers += more
        judge.case(answers)
        refused += ended.startswith(("refused", "aborted"))
        if seed % 1000 == 999:
            judge.all_whole()
            inbox.discard(*inbox.entries())
    # The mutations reach all ends.
    assert min(judge.stored, judge.held, refused) > 300, (judge.stored, judge.held, refused)


def test_the_judge_is_red_where_an_object_is_gone(folder):
    judge = Judge(folder)
    answer = scu.command(0x8001, 0, data_set=False, sop="1.2.3") + scu.element(0x900, b"\0\0")
    with pytest.raises(AssertionError, match=r"1\.2\.3"):
        judge.case(unit(4, fragment(1, 3, answer)))
    (judge.folders.inbox / "half").write_bytes(b"x")
    with pytest.raises(AssertionError):
        judge.all_whole()


def test_a_listener_that_was_called_by_fools_serves_the_honest(run, folder):
    receiver = run(folder / "root", idle_s=5)
    material = Material()
    judge = Judge(receiver.root)
    for seed in range(BY_NETWORK):
        with socket.create_connection(("127.0.0.1", receiver.port)) as caller:
            caller.settimeout(20)
            answers = b""
            try:
                caller.sendall(spoil(material, seed))
                # Some hang up without a word more.
                if seed % 4:
                    caller.shutdown(socket.SHUT_WR)
                    while more := caller.recv(1 << 16):
                        answers += more
            except ConnectionError:
                # It was aborted while it still sent; what was read before is good.
                pass
        judge.case(answers)
    client = receiver.call()
    client.associate()
    honest = data_set("9.9.9", pixels=os.urandom(50_000))
    assert client.store("9.9.9", honest) == 0
    client.release()
    assert receiver.end() == 0
    judge.all_whole()
    assert {e.sop: content(e) for e in judge.inbox.entries()}["9.9.9"] == honest
