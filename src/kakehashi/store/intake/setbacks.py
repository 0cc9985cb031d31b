"""What failed, and when it is tried again: later and later, so that nothing else has to wait."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

from kakehashi.errors import StoreError

FIRST_S = 1.0
LONGEST_S = 600.0
"""Seconds until something is tried again, the first time and at most."""


@dataclass(frozen=True, slots=True)
class _Setback:
    count: int
    until: float


class Setbacks:
    """How often each of some things failed, and until when it rests."""

    def __init__(self) -> None:
        self._known: dict[str, _Setback] = {}

    def __len__(self) -> int:
        return len(self._known)

    def rests(self, name: str, now: float) -> bool:
        """Say whether it is too early to try it again."""
        return name in self._known and now < self._known[name].until

    def add(self, name: str, now: float) -> int:
        """Note that something failed; return how often it has."""
        count = 1 + (self._known[name].count if name in self._known else 0)
        pause = min(FIRST_S * 2 ** min(count - 1, 20), LONGEST_S)
        self._known[name] = _Setback(count, now + pause)
        return count

    def forget(self, name: str) -> None:
        """Note that it went well, or will not be tried again."""
        self._known.pop(name, None)


def place_of(error: BaseException) -> str:
    """Return what an error is and where it arose, without what it says: that may quote data."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f", {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


def why_of(error: Exception) -> str:
    """Return what an error says where it was made to be read, else :func:`place_of`."""
    if isinstance(error, StoreError | OSError):
        return str(error)
    return f"unexpected {place_of(error)}"
