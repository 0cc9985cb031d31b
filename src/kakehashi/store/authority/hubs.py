"""The hubs' credentials: the store keeps a hash of each, and the hub the only copy."""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import secrets
from typing import TYPE_CHECKING

from kakehashi.errors import StoreError
from kakehashi.secret import Secret

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")


def add(folder: Path, name: str) -> Secret:
    """Make a credential for a hub, in place of the one that it had.

    Raises
    ------
    StoreError
        The name is not one, or the folder cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise StoreError(
            f"{name!r} is no name for a hub; use lower-case letters, digits and hyphens"
        )
    token = Secret(secrets.token_urlsafe(32))
    part = folder / f"{name}.part"
    try:
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(token.sha256() + "\n")
        part.rename(folder / name)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written ({error.strerror})") from error
    return token


def identify(folder: Path, token: Secret) -> str | None:
    """Return the name of the hub whose credential this is, or ``None``."""
    shown = token.sha256()
    found = None
    # All are compared, so that the time taken does not tell which one was near.
    for path in sorted(folder.iterdir()):
        if not _NAME.fullmatch(path.name):
            continue
        # One that is taken away at this moment counts as gone.
        with contextlib.suppress(FileNotFoundError):
            if hmac.compare_digest(path.read_bytes().strip(), shown.encode()):
                found = path.name
    return found
