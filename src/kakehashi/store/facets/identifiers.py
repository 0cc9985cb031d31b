"""Identifiers in 16 bytes each, and the way from an identifier to where it stands.

Most series and studies are named ``2.25.<number below 2**128>``, which is kept as that number.
Any other text is kept beside it, and a hash of it stands in its place.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from kakehashi.store.facets.library import load

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Keys: TypeAlias = npt.NDArray[np.uint64]
    """Of shape (n, 2): high and low half."""
    Numbers: TypeAlias = npt.NDArray[Any]

_FEW, _NEAR = 64, 4096
_SIDES: Final = ("left", "right")
UID_LENGTH = 44
"""Characters of the longest ``2.25.`` identifier."""
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def joined(texts: Sequence[str]) -> tuple[Numbers, Numbers]:
    """Return texts as UTF-8 one after the other, and where each begins and the last ends."""
    encoded = [text.encode() for text in texts]
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def keys_of(blob: Numbers, offsets: Numbers) -> tuple[Keys, npt.NDArray[np.bool_]]:
    """Return the keys of identifiers, and for which of them the key says all.

    Parameters
    ----------
    blob, offsets : ndarray
        As :func:`joined` gives them.
    """
    count = len(offsets) - 1
    keys = np.zeros((count, 2), np.uint64)
    plain = np.zeros(count, np.uint8)
    offsets = np.ascontiguousarray(offsets, np.int64)
    load().facets_uid_keys(
        blob.ctypes.data, offsets.ctypes.data, count, keys.ctypes.data, plain.ctypes.data
    )
    others = np.flatnonzero(plain == 0)
    if len(others):
        data = np.ascontiguousarray(blob).data
        begins, ends = offsets[others].tolist(), offsets[others + 1].tolist()
        digests = b"".join(
            hashlib.blake2b(data[begin:end], digest_size=16).digest()
            for begin, end in zip(begins, ends, strict=True)
        )
        keys[others] = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    return keys, plain.astype(bool)


def hashes_of(keys: Keys) -> npt.NDArray[np.uint64]:
    """Return 8 bytes for each key, evenly spread (the finaliser of SplitMix64)."""
    mixed: npt.NDArray[np.uint64] = keys[:, 0] * np.uint64(_MIX[0]) + keys[:, 1]
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(_MIX[1])
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(_MIX[2])
    mixed ^= mixed >> np.uint64(31)
    return mixed


class Identifiers:
    """Identifiers at positions from 0.

    Parameters
    ----------
    keys : ndarray
        Shape (n, 2).
    others, blob, offsets : ndarray
        Positions, sorted, of those whose text is kept, and the texts.
    hashes, order : ndarray
        Hashes of all keys, sorted, and the position that belongs to each; without ``order`` the
        positions themselves are sorted by hash.
    """

    def __init__(
        self,
        keys: Keys,
        others: Numbers,
        blob: Numbers,
        offsets: Numbers,
        *,
        hashes: Numbers,
        order: Numbers | None,
    ) -> None:
        self.keys = keys
        self.others = others
        self._blob = blob
        self._offsets = offsets
        self._hashes = hashes
        self._order = order

    def __len__(self) -> int:
        return len(self.keys)

    def contents(self) -> tuple[Keys, npt.NDArray[np.bool_]]:
        """Return all keys, and which of them say all, as :func:`keys_of` does."""
        plain = np.ones(len(self.keys), bool)
        plain[self.others] = False
        return np.ascontiguousarray(self.keys), plain

    def texts(self, positions: Numbers) -> list[str]:
        """Return the identifiers at some positions."""
        keys = np.ascontiguousarray(self.keys[positions])
        offsets = np.zeros(len(keys) + 1, np.int64)
        out = np.zeros(len(keys) * UID_LENGTH, np.uint8)
        load().facets_uid_text(keys.ctypes.data, len(keys), out.ctypes.data, offsets.ctypes.data)
        data = out.tobytes()
        places = offsets.tolist()
        found = [data[begin:end].decode() for begin, end in pairwise(places)]
        at, kept = self._kept(positions)
        for index, number in zip(at.tolist(), kept.tolist(), strict=True):
            begin, end = int(self._offsets[number]), int(self._offsets[number + 1])
            found[index] = self._blob[begin:end].tobytes().decode()
        return found

    def _ranges(self, wanted: npt.NDArray[np.uint64]) -> tuple[Numbers, Numbers]:
        """Return where each hash begins and ends among the sorted ones.

        Hashes are evenly spread, so that a few are looked for near where they should be: going by
        halves would read a page of the file at each step.
        """
        count = len(self._hashes)
        if len(wanted) > _FEW or count <= _NEAR:
            left = np.searchsorted(self._hashes, wanted)
            return left, np.searchsorted(self._hashes, wanted, side="right")
        ranges = []
        for one in wanted:
            middle, near = int(one) * count >> 64, _NEAR
            low, high = 0, 0
            while near < 2 * count:
                low, high = max(middle - near, 0), min(middle + near, count)
                if (low == 0 or self._hashes[low] < one) and (
                    high == count or self._hashes[high - 1] > one
                ):
                    break
                near *= 4
            window = self._hashes[low:high]
            ranges.append([low + int(np.searchsorted(window, one, side)) for side in _SIDES])
        found = np.array(ranges, np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    def _kept(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """Return which of the positions have their text kept, and the texts' numbers."""
        if not len(self.others):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        number = np.searchsorted(self.others, positions)
        number[number == len(self.others)] = 0
        at = np.flatnonzero(self.others[number] == positions)
        return at, number[at]

    def find(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the positions of identifiers, -1 for those that are not there."""
        return self.find_keys(*keys_of(*joined(texts)))

    def find_keys(self, keys: Keys, plain: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Return the positions of keys, -1 for those that are not there."""
        wanted = hashes_of(keys)
        found = np.full(len(keys), -1, np.int64)
        left, right = self._ranges(wanted)
        step = 0
        while len(open_ := np.flatnonzero((found < 0) & (left + step < right))):
            places = left[open_] + step
            at = places if self._order is None else self._order[places].astype(np.int64)
            same = (self.keys[at] == keys[open_]).all(axis=1)
            kept = np.ones(len(at), bool)
            kept[self._kept(at)[0]] = False
            same &= kept == plain[open_]
            found[open_[same]] = at[same]
            step += 1
        return found
