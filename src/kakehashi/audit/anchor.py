"""Signed heads of the trail, kept where the store's own root cannot quietly change them."""

from __future__ import annotations

import base64
import binascii
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature

from kakehashi.audit.canonical import canonical, utc
from kakehashi.errors import AuditError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

    from kakehashi.audit.trail import Audit


@dataclass(frozen=True)
class Head:
    """The trail's last record at one time, signed by the store."""

    seq: int
    hash: str
    time: str
    signature: str

    def unsigned(self) -> dict[str, Any]:
        """Return what the signature is taken over."""
        return {"audit_head": 1, "seq": self.seq, "hash": self.hash, "time": self.time}

    def as_dict(self) -> dict[str, Any]:
        """Return the head as it stands in an anchor file."""
        return {
            "seq": self.seq,
            "hash": self.hash,
            "time": self.time,
            "signature": self.signature,
        }

    @classmethod
    def sign(cls, audit: Audit, key: Ed25519PrivateKey, now: float) -> Head:
        """Take and sign the head that the trail has now."""
        seq, digest = audit.head()
        draft = cls(seq, digest, utc(now), "")
        signature = base64.b64encode(key.sign(canonical(draft.unsigned()))).decode()
        return cls(seq, digest, draft.time, signature)

    @classmethod
    def parse(cls, data: object, key: Ed25519PublicKey) -> Head:
        """Read a head and check its signature.

        Raises
        ------
        AuditError
            It is not a head, or the store did not sign it.
        """
        if not isinstance(data, dict) or set(data) != {"seq", "hash", "time", "signature"}:
            raise AuditError("is not a head of the trail")
        head = cls(data["seq"], data["hash"], data["time"], data["signature"])
        if type(head.seq) is not int or not isinstance(head.signature, str):
            raise AuditError("is not a head of the trail")
        try:
            key.verify(base64.b64decode(head.signature, validate=True), canonical(head.unsigned()))
        except (InvalidSignature, binascii.Error, ValueError) as error:
            raise AuditError("does not carry the store's signature") from error
        return head


class Anchors:
    """Writes the head to each anchor file whenever it has moved.

    Parameters
    ----------
    audit : Audit
    paths : sequence of Path
        Files on other machines' storage; they are only ever appended to.
    key : Ed25519PrivateKey
        The store's signing key.
    clock : callable
        Gives the time in seconds since 1970.
    """

    def __init__(
        self,
        audit: Audit,
        paths: Sequence[Path],
        key: Ed25519PrivateKey,
        clock: Callable[[], float],
    ) -> None:
        self._audit = audit
        self._paths = tuple(paths)
        self._key = key
        self._clock = clock
        self._written: dict[Path, int] = {}
        self._failing: set[Path] = set()

    def write(self) -> None:
        """Append the signed head where it is news; a failing anchor is recorded once."""
        if not self._paths:
            return
        head = Head.sign(self._audit, self._key, self._clock())
        line = json.dumps(head.as_dict(), separators=(",", ":")).encode() + b"\n"
        for path in self._paths:
            if self._written.get(path) == head.seq:
                continue
            try:
                _append(path, line)
            except OSError as error:
                if path not in self._failing:
                    self._failing.add(path)
                    self._audit.append(
                        "anchor.failed", detail={"anchor": str(path), "error": str(error.strerror)}
                    )
            else:
                self._failing.discard(path)
                self._written[path] = head.seq


def _append(path: Path, line: bytes) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(28, "the anchor could not be written whole")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_anchors(path: Path, key: Ed25519PublicKey) -> list[Head]:
    """Read the heads of one anchor file.

    Raises
    ------
    AuditError
        The file cannot be read, or a line of it is not a head that the store signed.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise AuditError(f"{path}: the anchor cannot be read ({error.strerror})") from error
    heads = []
    for number, line in enumerate(lines, start=1):
        try:
            heads.append(Head.parse(json.loads(line), key))
        except (ValueError, AuditError) as error:
            reason = str(error) if isinstance(error, AuditError) else "is not JSON"
            raise AuditError(f"{path}: line {number} {reason}") from error
    return heads
