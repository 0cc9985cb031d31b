"""The hash-chained audit trail at the store.

One line is one step of a session, or one thing that a hub had to record. Each line holds the
SHA-256 of the line before it, so that a changed, dropped or reordered line is found; signed
anchors of the trail's head lie outside the store, so that a shortened trail is found too.
"""

from __future__ import annotations

from kakehashi.audit.anchor import Anchors, Head, read_anchors
from kakehashi.audit.canonical import canonical
from kakehashi.audit.trail import Audit, Record
from kakehashi.audit.verify import Problem, Verdict, verify

__all__ = [
    "Anchors",
    "Audit",
    "Head",
    "Problem",
    "Record",
    "Verdict",
    "canonical",
    "read_anchors",
    "verify",
]
