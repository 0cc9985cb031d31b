"""A stranger's SSH client: it says what OpenSSH's own client refuses to say."""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

ME = b"SSH-2.0-stranger"
WAYS = (b"curve25519-sha256", b"ssh-ed25519", b"aes128-ctr", b"aes128-ctr",
        b"hmac-sha2-256", b"hmac-sha2-256", b"none", b"none", b"", b"")  # fmt: skip
KEXINIT, NEWKEYS, ECDH_INIT, ECDH_REPLY = 20, 21, 30, 31
SERVICE_REQUEST, SERVICE_ACCEPT, AUTH_REQUEST, AUTH_FAILURE = 5, 6, 50, 51


def text(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def take(data: bytes) -> tuple[bytes, bytes]:
    end = 4 + int(struct.unpack_from(">I", data)[0])
    return data[4:end], data[end:]


class Stranger:
    """A connection up to the first log-in."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 10)
        self._stream = self._socket.makefile("rb")
        self._sent = 0
        self._out: tuple[CipherContext, bytes] | None = None
        self._in: tuple[CipherContext, bytes] | None = None
        self._agree()

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def log_in(self, name: bytes) -> None:
        """Ask for an account without any proof, and see that it is refused."""
        self._send(bytes([SERVICE_REQUEST]) + text(b"ssh-userauth"))
        assert self._receive()[0] == SERVICE_ACCEPT
        said = text(name) + text(b"ssh-connection") + text(b"none")
        self._send(bytes([AUTH_REQUEST]) + said)
        assert self._receive()[0] == AUTH_FAILURE

    def _agree(self) -> None:
        self._socket.sendall(ME + b"\r\n")
        they = self._stream.readline().rstrip(b"\r\n")
        mine = bytes([KEXINIT]) + os.urandom(16) + b"".join(map(text, WAYS)) + bytes(5)
        self._send(mine)
        theirs = self._receive()
        private = X25519PrivateKey.generate()
        public = private.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )
        self._send(bytes([ECDH_INIT]) + text(public))
        reply = self._receive()
        assert reply[0] == ECDH_REPLY
        # Whose key it is does not matter to a stranger.
        key, rest = take(reply[1:])
        point, _ = take(rest)
        number = private.exchange(X25519PublicKey.from_public_bytes(point)).lstrip(b"\0")
        secret = text(b"\0" * (number[0] >> 7) + number)
        parts = (ME, they, mine, theirs, key, public, point)
        digest = hashlib.sha256(b"".join(map(text, parts)) + secret).digest()
        self._send(bytes([NEWKEYS]))
        assert self._receive()[0] == NEWKEYS

        def derive(letter: bytes) -> bytes:
            return hashlib.sha256(secret + digest + letter + digest).digest()

        def cipher(start: bytes, key: bytes) -> Cipher[modes.CTR]:
            return Cipher(algorithms.AES(derive(key)[:16]), modes.CTR(derive(start)[:16]))

        self._out = cipher(b"A", b"C").encryptor(), derive(b"E")
        self._in = cipher(b"B", b"D").decryptor(), derive(b"F")

    def _send(self, payload: bytes) -> None:
        padding = 16 - (len(payload) + 5) % 16
        padding += 16 if padding < 4 else 0
        packet = struct.pack(">IB", len(payload) + padding + 1, padding) + payload + bytes(padding)
        if self._out:
            cipher, key = self._out
            seal = hmac.digest(key, struct.pack(">I", self._sent) + packet, "sha256")
            packet = cipher.update(packet) + seal
        self._sent += 1
        self._socket.sendall(packet)

    def _receive(self) -> bytes:
        first = self._stream.read(16)
        head = self._in[0].update(first) if self._in else first
        length, padding = struct.unpack_from(">IB", head)
        rest = self._stream.read(length + 4 - 16)
        packet = head + (self._in[0].update(rest) if self._in else rest)
        if self._in:
            self._stream.read(32)
        return bytes(packet[5 : 4 + length - padding])
