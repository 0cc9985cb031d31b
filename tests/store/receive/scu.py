"""A small sender, written apart from the receiver: what one builds the other must understand."""

from __future__ import annotations

import socket
import struct

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
VERIFICATION = "1.2.840.10008.1.1"
APPLICATION = "1.2.840.10008.3.1.1.1"


def item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(value)) + value


def unit(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBI", kind, 0, len(body)) + body


def request(
    contexts: dict[int, tuple[str, tuple[str, ...]]],
    *,
    called: str = "KAKEHASHI",
    calling: str = "HOSP",
    max_length: int = 16384,
    version: int = 1,
    application: str = APPLICATION,
    pad: bytes = b"",
) -> bytes:
    """A-ASSOCIATE-RQ; ``pad`` is put behind every UID."""
    body = struct.pack(">HH", version, 0) + called.encode().ljust(16) + calling.encode().ljust(16)
    body += bytes(32) + item(0x10, application.encode() + pad)
    for number, (abstract, transfers) in contexts.items():
        inner = item(0x30, abstract.encode() + pad)
        inner += b"".join(item(0x40, uid.encode() + pad) for uid in transfers)
        body += item(0x20, bytes([number, 0, 0, 0]) + inner)
    user = item(0x51, struct.pack(">I", max_length)) + item(0x52, b"1.2.3") + item(0x55, b"TEST")
    return unit(1, body + item(0x50, user))


def element(number: int, value: bytes) -> bytes:
    return struct.pack("<HHI", 0, number, len(value)) + value


def uid_value(uid: str) -> bytes:
    return uid.encode() + b"\0" * (len(uid) % 2)


def command(
    field: int, message: int, *, sop_class: str = "", sop: str = "", data_set: bool = True
) -> bytes:
    body = element(2, uid_value(sop_class)) if sop_class else b""
    body += element(0x100, struct.pack("<H", field)) + element(0x110, struct.pack("<H", message))
    body += element(0x800, struct.pack("<H", 0 if data_set else 0x0101))
    body += element(0x1000, uid_value(sop)) if sop else b""
    return element(0, struct.pack("<I", len(body))) + body


def fragment(context: int, flags: int, piece: bytes) -> bytes:
    return struct.pack(">IBB", len(piece) + 2, context, flags) + piece


def message(context: int, command_set: bytes, data: bytes = b"", room: int = 16000) -> list[bytes]:
    """P-DATA units of a command and its data set."""
    units = [unit(4, fragment(context, 3, command_set))]
    for start in range(0, len(data), room):
        last = 2 if start + room >= len(data) else 0
        units.append(unit(4, fragment(context, last, data[start : start + room])))
    return units


def store_units(
    sop: str, data: bytes, *, number: int = 1, context: int = 1, sop_class: str = CT
) -> list[bytes]:
    return message(context, command(1, number, sop_class=sop_class, sop=sop), data)


def ui(group: int, number: int, uid: str) -> bytes:
    value = uid_value(uid)
    return struct.pack("<HH2sH", group, number, b"UI", len(value)) + value


def data_set(
    sop: str,
    *,
    sop_class: str = CT,
    study: str = "1.2.3.1",
    series: str = "1.2.3.1.1",
    pixels: bytes = b"",
) -> bytes:
    """The smallest object that is taken, in explicit VR little endian."""
    head = ui(8, 0x16, sop_class) + ui(8, 0x18, sop) + ui(0x20, 0xD, study) + ui(0x20, 0xE, series)
    pixels += b"\0" * (len(pixels) % 2)
    tail = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, len(pixels)) + pixels
    return head + (tail if pixels else b"")


class ClosedError(Exception):
    """The receiver closed the connection."""


class Scu:
    """One association."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(20)
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def exactly(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            more = self.connection.recv(count - len(got))
            if not more:
                raise ClosedError
            got += more
        return got

    def read(self) -> tuple[int, bytes]:
        kind, _, length = struct.unpack(">BBI", self.exactly(6))
        return kind, self.exactly(length)

    def associate(self, *transfers: str, **options) -> dict[int, tuple[int, str]]:
        """Propose CT (context 1) and verification (3); return result and syntax by context."""
        contexts = {1: (CT, transfers or (EXPLICIT,)), 3: (VERIFICATION, (EXPLICIT,))}
        self.connection.sendall(request(contexts, **options))
        return self.accepted()

    def accepted(self) -> dict[int, tuple[int, str]]:
        kind, body = self.read()
        assert kind == 2, (kind, body)
        answers = {}
        position = 68
        while position < len(body):
            what, _, length = struct.unpack_from(">BBH", body, position)
            value = body[position + 4 : position + 4 + length]
            if what == 0x21:
                answers[value[0]] = value[2], value[8:].decode()
            position += 4 + length
        return answers

    def response(self) -> dict[int, bytes]:
        """Read a command, of as many fragments as it has."""
        whole, last = b"", False
        while not last:
            kind, body = self.read()
            if kind == 7:
                raise ClosedError
            assert kind == 4, (kind, body)
            length, _, flags = struct.unpack_from(">IBB", body)
            whole += body[6 : 4 + length]
            last = bool(flags & 2)
        values, position = {}, 0
        while position < len(whole):
            _, number, length = struct.unpack_from("<HHI", whole, position)
            values[number] = whole[position + 8 : position + 8 + length]
            position += 8 + length
        return values

    def status(self) -> int:
        return int.from_bytes(self.response()[0x900], "little")

    def store(self, sop: str, data: bytes, **options) -> int:
        """Send an object; return the status."""
        self.connection.sendall(b"".join(store_units(sop, data, **options)))
        return self.status()

    def release(self) -> None:
        self.connection.sendall(unit(5, bytes(4)))
        assert self.read()[0] == 6
        self.connection.close()
