"""A type for values that must never be shown."""

from __future__ import annotations

import hashlib
import hmac
from typing import NoReturn


class Secret:
    """A string that prints as stars.

    Only :meth:`reveal` gives the text, so that one search for that word finds each place
    where a secret leaves the type. It cannot be pickled, and compares in constant time.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself."""
        return self._text

    def sha256(self) -> str:
        """Return the hexadecimal SHA-256 of the text, which may be stored."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    def __repr__(self) -> str:
        return "Secret(***)"

    def __str__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return format("***", spec)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash(("Secret", self._text))

    def __bool__(self) -> bool:
        return bool(self._text)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled")
