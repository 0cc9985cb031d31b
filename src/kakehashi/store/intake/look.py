"""A look at a pack that somebody made who may not be trusted.

What a pack is to say is known beforehand, to the byte, from the headers that went into it: all but
the pixels. So nothing of it is taken apart here but the zip's directory.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kakehashi.errors import StoreError
from kakehashi.imaging.ozip import FileReader, ZipStore

if TYPE_CHECKING:
    from pathlib import Path

    from kakehashi.store.pack import Described

FACTOR = 32
"""How much larger a pack may be than the files that went into it, which may be compressed more."""

OVERHEAD = 64 << 20
"""Bytes that a pack of no size may have."""

MOST_MEMBERS = 100_000
"""Of a pack: a member holds up to 64 slices of 512 x 512."""

# Of a member in the directory: 46 bytes, its name, and what large sizes add.
_ENTRY = 256
_CHUNK = re.compile(r"(.*?[0-9]/c/)([0-9]{1,9})/([0-9]{1,9})/([0-9]{1,9})")


def most_bytes(known: Described, size: int) -> int:
    """Return how large a pack can be.

    Parameters
    ----------
    known : Described
    size : int
        Bytes of the files that it is made of.
    """
    headers = sum(map(len, known.members.values()))
    # The smaller levels are an eighth of the first, and less.
    return OVERHEAD + min(FACTOR * size, 2 * (known.pixel_bytes() + headers))


def look_at(path: Path, known: Described) -> None:
    """Check that a pack says what it must, and has no member besides.

    Parameters
    ----------
    path : Path
    known : Described
        What it must say.

    Raises
    ------
    StoreError
        It is no pack, or of something else. The pixels are not looked at.
    """
    expected = known.documents() | known.members
    shards = known.shards()
    with FileReader(path) as reader:
        store = ZipStore(reader, most=_ENTRY * MOST_MEMBERS)
        for name, content in expected.items():
            # The size first, so that nothing larger is read.
            if store.size_of(name) != len(content) or store.member(name) != content:
                raise StoreError(f"its {name} is not what the files say that were packed")
        for name in store.names():
            if name not in expected and not _is_of(name, shards):
                raise StoreError("it has a member that no pack has")


def _is_of(name: str, shards: dict[str, tuple[int, ...]]) -> bool:
    found = _CHUNK.fullmatch(name)
    if found is None or found[1] not in shards:
        return False
    places = [int(found[index]) for index in (2, 3, 4)]
    # Of one place one way of writing: two names for it would be two contents.
    return name == found[1] + "/".join(map(str, places)) and all(
        place < count for place, count in zip(places, shards[found[1]], strict=True)
    )
