"""The order of an epoch's samples, and all that is random about them, from a seed.

The order is a permutation that can be asked at any position without being written out: a Feistel
network over the next even number of bits, with keyed BLAKE2b as its round function (Luby and
Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", SIAM J. Comput.
17, 1988), walked until it lands among the samples (cycle-walking; Black and Rogaway, "Ciphers
with arbitrary finite domains", CT-RSA 2002). Nothing in it comes from a library whose next
version may shuffle otherwise, so a seed means the same order for ever; changing anything here
breaks every training that is to be resumed or repeated.

Ranks take positions in turn: of what begins at position ``start``, rank r of n has ``start + r``,
``start + r + n`` and so on. So whatever n is, what n ranks in step have done is a beginning of
the epoch's order, and any other number of ranks can go on from there.

An announced maintenance turns the rest of its epoch: from its position on, first what is held in
memory, then all else, each in the order that it had. :class:`Turned` is that, and can be asked at
any position too.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_ROUNDS = 8
# A network of fewer bits reaches too few of the permutations of a small set.
_LEAST_BITS = 8
_LARGEST = 1 << 64


@dataclass(frozen=True)
class Order:
    """One epoch's order.

    Attributes
    ----------
    count : int
        Number of samples.
    seed, epoch : int
        From 0; another epoch has another order.
    """

    count: int
    seed: int
    epoch: int
    _key: bytes = field(init=False, repr=False, compare=False)
    # Bits of half the network.
    _half: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("count", self.count), ("seed", self.seed), ("epoch", self.epoch)):
            if not 0 <= value < _LARGEST:
                raise ValueError(f"{name} must be a whole number from 0 to 2^64 - 1, got {value}")

        text = b"".join(value.to_bytes(8) for value in (self.seed, self.epoch, self.count))
        key = hashlib.blake2b(text, digest_size=32, person=b"kakehashi order").digest()
        # Set here and not by cached_property: in Python 3.11 its lock is of the whole class, and
        # a process that is forked while another thread holds it would wait for it for ever.
        object.__setattr__(self, "_key", key)
        half = -(-max(_LEAST_BITS, (self.count - 1).bit_length()) // 2)
        object.__setattr__(self, "_half", half)

    def sample(self, position: int) -> int:
        """Return which sample comes at a position of the epoch.

        Raises
        ------
        IndexError
            The epoch has no such position.
        """
        if not 0 <= position < self.count:
            raise IndexError(f"position {position} asked for; the epoch has {self.count} samples")
        half, mask = self._half, (1 << self._half) - 1
        value = position
        while True:
            left, right = value >> half, value & mask
            for turn in range(_ROUNDS):
                left, right = right, left ^ (self._hash(b"r", turn, right) & mask)
            value = left << half | right
            if value < self.count:
                return value

    def position(self, sample: int) -> int:
        """Return where in the epoch a sample comes: what :meth:`sample` is the inverse of.

        Raises
        ------
        IndexError
            There is no such sample.
        """
        if not 0 <= sample < self.count:
            raise IndexError(f"sample {sample} asked for; the epoch has {self.count} samples")
        half, mask = self._half, (1 << self._half) - 1
        value = sample
        while True:
            left, right = value >> half, value & mask
            for turn in reversed(range(_ROUNDS)):
                left, right = right ^ (self._hash(b"r", turn, left) & mask), left
            value = left << half | right
            if value < self.count:
                return value

    def draw(self, sample: int, what: int, bound: int) -> int:
        """Return a number from 0 to ``bound - 1`` that belongs to a sample of this epoch.

        Parameters
        ----------
        sample : int
            The sample, wherever in the order it comes.
        what : int
            Tells apart what is drawn for the same sample.
        bound : int
            At least 1. Its multiple of a 128-bit hash is cut off, so that no number is favoured
            by more than 2^-64.
        """
        if bound < 1:
            raise ValueError(f"bound must be at least 1, got {bound}")
        return self._hash(b"d", what, sample) * bound >> 128

    def _hash(self, use: bytes, number: int, value: int) -> int:
        text = use + number.to_bytes(4) + value.to_bytes(8)
        return int.from_bytes(hashlib.blake2b(text, key=self._key, digest_size=16).digest())


class Turned:
    """An epoch's order with what was announced for it.

    Parameters
    ----------
    order : Order
        The epoch's own order.
    announced : iterable of tuple
        For each maintenance, in the order of announcement, its first position in the epoch and
        the samples that are held, each given once. A later one turns what the earlier ones made.

    Attributes
    ----------
    held : tuple of range
        For each maintenance the positions, as it made them, that are of samples held.
    """

    def __init__(self, order: Order, announced: Iterable[tuple[int, Iterable[int]]]) -> None:
        self.order = order
        self._turns: list[_Turn] = []
        for start, samples in announced:
            if not 0 <= start <= order.count:
                raise IndexError(
                    f"a maintenance from position {start} on; the epoch has {order.count} samples"
                )
            places = (self.position(sample) for sample in samples)
            self._turns.append(_Turn(start, sorted(at for at in places if at >= start)))
        self.held = tuple(range(t.start, t.start + len(t.first)) for t in self._turns)

    def sample(self, position: int) -> int:
        """Return which sample comes at a position; see :meth:`Order.sample`."""
        for turn in reversed(self._turns):
            position = turn.before(position)
        return self.order.sample(position)

    def position(self, sample: int) -> int:
        """Return where a sample comes; see :meth:`Order.position`."""
        position = self.order.position(sample)
        for turn in self._turns:
            position = turn.after(position)
        return position


@dataclass(frozen=True)
class _Turn:
    """From ``start`` on, the positions ``first`` (in order), then those between them."""

    start: int
    first: list[int]

    def before(self, position: int) -> int:
        """Return the position that what now comes at this one had."""
        number = position - self.start
        if number < 0:
            return position
        if number < len(self.first):
            return self.first[number]
        number -= len(self.first)
        # Of those that come first, how many stood before the one that is looked for.
        passed = bisect_right(
            range(len(self.first)), number, key=lambda at: self.first[at] - self.start - at
        )
        return self.start + number + passed

    def after(self, position: int) -> int:
        """Return the position that what came at this one has now."""
        if position < self.start:
            return position
        passed = bisect_left(self.first, position)
        if passed < len(self.first) and self.first[passed] == position:
            return self.start + passed
        return position - passed + len(self.first)


def share(count: int, start: int, rank: int, world: int) -> range:
    """Return a rank's positions of what is left of an epoch.

    Parameters
    ----------
    count : int
        Samples of the epoch.
    start : int
        Positions that are done, by all ranks together.
    rank, world : int
        Which rank of how many.
    """
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank must be 0 to world - 1, got rank {rank} of {world}")
    return range(start + rank, count, world)
