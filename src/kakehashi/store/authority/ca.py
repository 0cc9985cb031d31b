"""The certificate authorities for users and for the store's sshd, and the signing key."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    SSHCertificateBuilder,
    SSHCertificateType,
)

from kakehashi.errors import ConfigError, RefusedError, StoreError
from kakehashi.store.authority.trust import Trust, write_public

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CLOCK_SKEW_S = 60
"""Seconds by which a user's certificate begins in the past, for a clock that is set back."""

HOST_CERTIFICATE_S = 10 * 365 * 24 * 3600
_PUBLIC_KEY = re.compile(r"ssh-ed25519 ([A-Za-z0-9+/]{68})(?: [ -~]{0,64})?")
_BLOB_PREFIX = b"\0\0\0\x0bssh-ed25519\0\0\0\x20"

Ca = Literal["user-ca", "host-ca"]


@dataclass(frozen=True)
class CaFiles:
    """Names of one authority's files in the keys' folder: its key, and who is trusted."""

    key: str
    trusted: str


CAS: dict[Ca, CaFiles] = {
    "user-ca": CaFiles("user_ca", "user_cas"),
    "host-ca": CaFiles("host_ca", "host_cas"),
}


@dataclass(frozen=True)
class PublicKey:
    """A node's public key, checked to be Ed25519.

    Attributes
    ----------
    text : str
        ``ssh-ed25519 AAAA..`` without comment.
    fingerprint : str
        ``SHA256:..`` as OpenSSH writes it.
    key : Ed25519PublicKey
    """

    text: str
    fingerprint: str
    key: Ed25519PublicKey

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read an OpenSSH public key line.

        Raises
        ------
        RefusedError
            ``malformed``: it is anything but one plain Ed25519 key.
        """
        match = _PUBLIC_KEY.fullmatch(text.strip())
        blob = base64.b64decode(match[1]) if match else b""
        if len(blob) != len(_BLOB_PREFIX) + 32 or not blob.startswith(_BLOB_PREFIX):
            raise RefusedError(
                "malformed", "public_key is not an Ed25519 key as `ssh-ed25519 AAAA..`"
            )
        digest = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
        return cls(
            text=f"ssh-ed25519 {base64.b64encode(blob).decode()}",
            fingerprint=f"SHA256:{digest}",
            key=Ed25519PublicKey.from_public_bytes(blob[len(_BLOB_PREFIX) :]),
        )

    def verify(self, message: str, signature: str) -> None:
        """Check a base64 signature over a message's UTF-8 bytes.

        Raises
        ------
        RefusedError
            ``signature``: the session's key did not make it.
        """
        try:
            self.key.verify(base64.b64decode(signature, validate=True), message.encode())
        except (InvalidSignature, binascii.Error, ValueError) as error:
            raise RefusedError(
                "signature", "the message is not signed by this session's key"
            ) from error


@dataclass(frozen=True)
class Signed:
    """A certificate and its serial number."""

    certificate: str
    serial: int


class Keys:
    """The authority's keys, in its folder.

    Those of the certificate authorities are read at each use: they are replaced while the
    authority runs.

    Parameters
    ----------
    folder : Path
        Holds ``user_ca``, ``host_ca`` and ``receipt``, each with ``.pub``, and who is trusted.

    Raises
    ------
    ConfigError
        A key is missing or unreadable, or others than its owner can read it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.receipt = _load(folder / "receipt")
        for ca in CAS:
            self.public(ca)
            self.trusted(ca)

    @staticmethod
    def create(folder: Path) -> None:
        """Make each key that is not there yet, readable by its owner only."""
        for name in ("receipt", *(files.key for files in CAS.values())):
            if not (folder / name).exists():
                write_key(folder / name, Ed25519PrivateKey.generate())
        for files in CAS.values():
            if not (folder / files.trusted).exists():
                signs = public_line(_load(folder / files.key).public_key())
                Trust(signs).write(folder / files.trusted)

    def public(self, ca: Ca) -> str:
        """Return the public half of the key with which an authority signs."""
        return public_line(self._signing(ca).public_key())

    def trusted(self, ca: Ca) -> tuple[str, ...]:
        """Return the public keys of an authority that are trusted, the newest first."""
        return Trust.read(self._folder / CAS[ca].trusted).keys

    def _signing(self, ca: Ca) -> Ed25519PrivateKey:
        return _load(self._folder / CAS[ca].key)

    def sign_user(
        self,
        key: PublicKey,
        *,
        session: str,
        accounts: Sequence[str],
        now: float,
        expires_at: int,
        sources: Sequence[str] = (),
    ) -> Signed:
        """Sign a node's key for one session.

        Parameters
        ----------
        key : PublicKey
        session : str
            Stands in the key id, ``SESSION:SERIAL``.
        accounts : sequence of str
            The accounts that the certificate opens.
        now : float
            Seconds since 1970.
        expires_at : int
            End of the lease, seconds since 1970.
        sources : sequence of str
            Networks (CIDR) from which alone it is good; empty for any.
        """
        serial = secrets.randbelow(2**63 - 1) + 1
        builder = (
            SSHCertificateBuilder()
            .public_key(key.key)
            .serial(serial)
            .type(SSHCertificateType.USER)
            .key_id(f"{session}:{serial}".encode())
            .valid_principals([account.encode() for account in accounts])
            .valid_after(int(now) - CLOCK_SKEW_S)
            .valid_before(expires_at)
        )
        if sources:
            builder = builder.add_critical_option(b"source-address", ",".join(sources).encode())
        return Signed(builder.sign(self._signing("user-ca")).public_bytes().decode(), serial)

    def sign_host(self, key: Ed25519PublicKey, *, names: Sequence[str], now: float) -> str:
        """Sign the store's own host key for the names under which nodes reach it."""
        builder = (
            SSHCertificateBuilder()
            .public_key(key)
            .serial(secrets.randbelow(2**63 - 1) + 1)
            .type(SSHCertificateType.HOST)
            .key_id(b"kakehashi-store")
            .valid_principals([name.encode() for name in names])
            # Nodes check it by their own clocks, one of which may be behind.
            .valid_after(0)
            .valid_before(int(now) + HOST_CERTIFICATE_S)
        )
        return builder.sign(self._signing("host-ca")).public_bytes().decode()


def public_line(key: Ed25519PublicKey) -> str:
    """Return a public key as ``ssh-ed25519 AAAA..``."""
    return key.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ).decode()


def write_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Write a new private key (mode 0600) and its public half beside it."""
    data = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = path.with_name(path.name + ".pub")
    write_public(public, public_line(key.public_key()) + "\n")
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def load_public(path: Path) -> Ed25519PublicKey:
    """Read a ``.pub`` file.

    Raises
    ------
    StoreError
        It is missing or no Ed25519 key.
    """
    try:
        return PublicKey.parse(path.read_text(encoding="ascii")).key
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
    except (RefusedError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: is not an Ed25519 public key") from error


def load_private(path: Path) -> Ed25519PrivateKey:
    """Read a private key that only its owner can read.

    Raises
    ------
    ConfigError
        It is missing, open to others, or no Ed25519 key.
    """
    return _load(path)


def _load(path: Path) -> Ed25519PrivateKey:
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); `kakehashi store init` makes it"
        ) from error
    if mode & 0o077:
        raise ConfigError(f"{path}: others can read this key (mode {mode & 0o777:o}); chmod 600")
    try:
        key = serialization.load_ssh_private_key(data, password=None)
    except ValueError:
        # The cause could quote the file.
        raise ConfigError(f"{path}: is not an OpenSSH private key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: is not an Ed25519 key")
    return key
