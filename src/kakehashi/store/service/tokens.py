"""Tokens of the catalogue service: who asks, in which session, for which project, until when.

The store makes a token when it gives or renews a lease, and the service checks it. It is a
message with a code (HMAC-SHA256, RFC 2104) under a key that never leaves the store.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kakehashi.audit.canonical import canonical
from kakehashi.config import PROJECT_ID, read_secret
from kakehashi.errors import RefusedError, StoreError
from kakehashi.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LONGEST_LIFE_S = 15 * 60
"""Seconds that a token is good for at most; as long as a lease."""

LONGEST_TOKEN = 2048
"""Characters of a token at most."""

_VERSION = 1
_PURPOSE = "kakehashi catalogue"
_DIGESTS = b"kakehashi catalogue: digests of queries"
_SESSION = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token says.

    Attributes
    ----------
    session : str
        32 hexadecimal digits.
    project, person : str
        Whose rights count, and who asks.
    issued, expires : int
        Seconds since 1970, by the store's clock.
    """

    session: str
    project: str
    person: str
    issued: int
    expires: int


class Tokens:
    """Makes and checks tokens.

    Parameters
    ----------
    key : Secret
        See :func:`load_key`.
    clock : callable, optional
        Gives seconds since 1970.
    """

    def __init__(self, key: Secret, clock: Callable[[], float] = time.time) -> None:
        self._key = key
        self._clock = clock

    def issue(self, session: str, project: str, person: str, expires: float) -> Secret:
        """Return a token.

        Parameters
        ----------
        session, project, person : str
        expires : float
            Seconds since 1970; what lies further ahead than a lease may last is cut.

        Raises
        ------
        StoreError
            The session or project is not written as one, or the time lies in the past.
        """
        if not _SESSION.fullmatch(session) or not PROJECT_ID.fullmatch(project):
            raise StoreError("a token is for a session (32 hexadecimal digits) and a project's id")
        now = math.floor(self._clock())
        until = min(math.floor(expires), now + LONGEST_LIFE_S)
        if until <= now:
            raise StoreError("a token cannot expire in the past; renew the lease first")
        claims = asdict(Claims(session, project, person, now, until))
        payload = canonical(claims | {"v": _VERSION, "for": _PURPOSE})
        token = f"{_encode(payload)}.{_encode(self._code(payload))}"
        if len(token) > LONGEST_TOKEN:
            raise StoreError(f"the person's name is too long for a token of {LONGEST_TOKEN}")
        return Secret(token)

    def verify(self, token: Secret) -> Claims:
        """Return what a token says.

        Raises
        ------
        RefusedError
            It is not one of ours, was changed, or is not good at this moment; the code is
            ``credential`` and the message does not say which.
        """
        text = token.reveal()
        head, dot, tail = text.partition(".")
        try:
            payload, code = _decode(head), _decode(tail)
        except ValueError:
            raise _refused() from None
        right = hmac.compare_digest(self._code(payload), code)
        if not right or not dot or len(text) > LONGEST_TOKEN:
            raise _refused()
        said = json.loads(payload)  # ours from here on: nobody else can make the code
        if said.pop("v") != _VERSION or said.pop("for") != _PURPOSE:
            raise _refused()
        claims = Claims(**said)
        if not claims.issued - 1 <= self._clock() < claims.expires:
            raise _refused()
        return claims

    def digest(self, text: str) -> str:
        """Return a digest by which a text is known again here, and guessed nowhere else."""
        # Under a key of its own: a text must never be one that a token could be made of.
        key = hmac.digest(self._key.reveal().encode(), _DIGESTS, hashlib.sha256)
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()

    def _code(self, payload: bytes) -> bytes:
        return hmac.digest(self._key.reveal().encode(), payload, hashlib.sha256)


def _refused() -> RefusedError:
    return RefusedError("credential", "this is not a valid token for the catalogue")


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError("not base64url") from error
    if _encode(raw) != text:
        # The last character has bits that mean nothing: one token, one spelling.
        raise ValueError("not the one spelling")
    return raw


def load_key(path: Path) -> Secret:
    """Return the key that tokens are made with; make it where there is none yet.

    Two processes that come here at the same time get the same key.

    Raises
    ------
    ConfigError
        Others than its owner can read it, or it is empty.
    StoreError
        It cannot be made.
    """
    if not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            part.unlink(missing_ok=True)
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
                file.flush()
                os.fsync(file.fileno())
            # A link, and not a rename: who comes second must not replace the first one's key.
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(part)
            part.unlink()
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be made ({error.strerror}); run `kakehashi store init` first"
            ) from error
    return read_secret(path)
