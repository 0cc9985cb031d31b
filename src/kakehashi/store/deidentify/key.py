"""The key of the store: what turns identifiers into pseudonyms that nobody else can make."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import stat
from typing import TYPE_CHECKING

from pydicom._uid_dict import UID_dictionary

from kakehashi.errors import StoreError
from kakehashi.secret import Secret
from kakehashi.store.layout import sync_folder

if TYPE_CHECKING:
    from pathlib import Path

_BYTES = 32
_WEEKS = (52, 520)


def load_key(path: Path, *, create: bool = False) -> Secret:
    """Read the store's key, 32 bytes that stand in a file as 64 hexadecimal digits.

    With another key the same person gets another pseudonym. So it has to be kept as long as
    the store, in a backup of its own: whoever has it can test guesses of patient ids.

    Parameters
    ----------
    path : Path
        A file that only its owner may read (mode 600).
    create : bool
        Make a new key if there is none. Of several processes that do so at once one wins,
        and all get the same key.

    Returns
    -------
    Secret
        The hexadecimal digits.

    Raises
    ------
    StoreError
        There is no key, others can read it, or the file holds something else.
    """
    try:
        if create and not path.exists():
            _make(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            text = file.read(4 * _BYTES).strip()
    except OSError as error:
        raise StoreError(
            f"{path}: the key for pseudonyms cannot be read ({error.strerror}); restore it from "
            "its backup, as with a new one no pseudonym stays the same"
        ) from error
    if not stat.S_ISREG(status.st_mode) or stat.S_IMODE(status.st_mode) & 0o077:
        raise StoreError(f"{path}: others may read the key for pseudonyms; chmod 600 it")
    if status.st_uid != os.geteuid():
        raise StoreError(f"{path}: the key for pseudonyms belongs to another account")
    try:
        raw = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        raw = b""
    if len(raw) != _BYTES:
        raise StoreError(f"{path}: not a key for pseudonyms, which is {2 * _BYTES} hex digits")
    return Secret(raw.hex())


def _make(path: Path) -> None:
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(_BYTES).encode() + b"\n")
            file.flush()
            os.fsync(descriptor)
        try:
            # A link, not a rename: a key that another process made meanwhile is never replaced.
            path.hardlink_to(part)
        except FileExistsError:
            return
    finally:
        part.unlink()
    sync_folder(path.parent)


class Pseudonyms:
    """Pseudonyms, UIDs and days by HMAC-SHA256 of the key over a purpose and an identifier.

    Parameters
    ----------
    key : Secret
        From :func:`load_key`.
    """

    def __init__(self, key: Secret) -> None:
        raw = bytes.fromhex(key.reveal())
        if len(raw) != _BYTES:
            raise StoreError(f"the key for pseudonyms has {len(raw)} bytes, not {_BYTES}")
        self._mac = hmac.new(raw, digestmod=hashlib.sha256)

    def __repr__(self) -> str:
        return "Pseudonyms(***)"

    def patient_id(self, facility: str, patient_id: str) -> str:
        """Return a person's pseudonym: ``K`` and 16 letters or digits (80 bits).

        It depends on the facility and on the id without spaces around it, not on who
        issued the id.
        """
        digest = self._digest("patient", facility, patient_id.strip(" \0"))
        return "K" + base64.b32encode(digest[:10]).decode()

    def uid(self, original: str) -> str:
        """Return the UID that takes the place of another; registered ones stay.

        The same everywhere, so that references between objects, also of other facilities,
        still lead to what they are meant for.
        """
        original = original.strip(" \0")
        if not original or original in UID_dictionary:
            return original
        number = int.from_bytes(self._digest("uid", original)[:16], "big")
        # The form of a UUID of version 8 (RFC 9562), as 2.25 asks for.
        number = number & ~(0xF << 76) | 8 << 76
        return f"2.25.{number & ~(3 << 62) | 2 << 62}"

    def shift_days(self, facility: str, patient_id: str) -> int:
        """Return the days by which all dates of a person are moved.

        Between -3640 and -364, and a multiple of seven, so that days of the week stay.
        """
        digest = self._digest("days", facility, patient_id.strip(" \0"))
        first, last = _WEEKS
        return -7 * (first + int.from_bytes(digest[:8], "big") % (last - first + 1))

    def _digest(self, purpose: str, *parts: str) -> bytes:
        """Return 32 bytes; each part's length goes in, so that no two lists look alike."""
        mac = self._mac.copy()
        for part in (purpose, *parts):
            raw = part.encode("utf-8", "surrogatepass")
            mac.update(len(raw).to_bytes(4, "big") + raw)
        return mac.digest()
