"""What many processes have noted, as one: an hour or a week of all of their tallies at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kakehashi.link.tally import Moment, Tally

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

_FIELDS = np.dtype(
    [
        ("at", "u8"),
        ("bytes", "u8"),
        *((name, "u4") for name in ("rereads", "reconnects", "steps", "channels")),
        *((name, "f4") for name in ("asked_s", "stalled_s", "waited_s", "rtt_s")),
        ("again", "u8"),
    ]
)


def together(tallies: Iterable[Tally], step: int, since: int = 0) -> list[Moment]:
    """Return what all processes did, oldest first; moments without anything are left out."""
    rows = np.concatenate([np.empty(0, _FIELDS), *(_rows(one, step, since) for one in tallies)])
    if not len(rows):
        return []
    rows = rows[np.argsort(rows["at"], kind="stable")]
    at, first = np.unique(rows["at"], return_index=True)
    both = np.zeros(len(at), _FIELDS)
    both["at"] = at
    # As Moment.beside does, for an hour of many processes at once.
    for name in ("bytes", "rereads", "reconnects", "steps", "channels", "waited_s"):
        both[name] = np.add.reduceat(rows[name], first)
    both["asked_s"] = np.maximum.reduceat(rows["asked_s"], first)
    for name, known in (("stalled_s", rows["asked_s"] > 0), ("rtt_s", rows["rtt_s"] > 0)):
        least = np.minimum.reduceat(np.where(known, rows[name], np.inf), first)
        both[name] = np.where(np.isinf(least), 0, least)
    return [Moment(*row[:-1]) for row in both.tolist()]


def _rows(tally: Tally, step: int, since: int) -> NDArray[np.void]:
    ring = np.frombuffer(tally.slots(step), _FIELDS)
    # As Tally.read does.
    found: NDArray[np.void] = ring[(ring["at"] >= max(since, 1)) & (ring["at"] == ring["again"])]
    return found
