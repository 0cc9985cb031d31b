"""Random numbers that depend on nothing but what they are for."""

from __future__ import annotations

import hashlib
from random import Random

import numpy as np


def stream(*parts: object) -> Random:
    """Return a stream for plans; the same parts give the same stream on every machine."""
    return Random("/".join(str(part) for part in parts))  # noqa: S311 # no secret is made of it


def generator(*parts: object) -> np.random.Generator:
    """Return a stream for pixels."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
