"""Which public keys of a certificate authority are trusted.

The file is the whole truth, in a form that sshd reads itself (what follows a key is a comment
to it): the key that signs, and while it is being replaced the one before, with the time.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kakehashi.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

_KEY = r"ssh-ed25519 [A-Za-z0-9+/]{68}"
_FILE = re.compile(rf"({_KEY})\n(?:({_KEY}) replaced-at-([0-9]+)\n)?")


@dataclass(frozen=True)
class Trust:
    """The trusted keys of one authority.

    Attributes
    ----------
    current : str
        ``ssh-ed25519 AAAA..`` of the key that signs.
    previous : str or None
        The one that it replaces, trusted until the leases given under it are over.
    replaced_at : int
        When that was, in whole seconds since 1970, rounded up.
    """

    current: str
    previous: str | None = None
    replaced_at: int = 0

    @classmethod
    def read(cls, path: Path) -> Trust:
        """Read the file.

        Raises
        ------
        StoreError
            It is missing or damaged.
        """
        try:
            match = _FILE.fullmatch(path.read_text(encoding="ascii"))
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be read ({error.strerror}); `kakehashi store init` makes it"
            ) from error
        if match is None:
            raise StoreError(
                f"{path}: is damaged; it must hold one line `ssh-ed25519 AAAA..`, or two while a "
                "key is being replaced"
            )
        return cls(match[1], match[2], int(match[3] or 0))

    def write(self, path: Path) -> None:
        """Write the file whole, in place of what stood there."""
        text = f"{self.current}\n"
        if self.previous is not None:
            text += f"{self.previous} replaced-at-{self.replaced_at}\n"
        write_public(path, text)

    @property
    def keys(self) -> tuple[str, ...]:
        """The trusted keys, the one that signs first."""
        return (self.current,) if self.previous is None else (self.current, self.previous)


def write_public(path: Path, text: str) -> None:
    """Write a file that is no secret, whole and on the disk, in place of what stood there."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.chmod(0o644)
    part.rename(path)
