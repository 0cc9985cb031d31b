"""A session's way to the store: one verified reader with two faces.

The Python face is :class:`Store`, the other the read-only view (:mod:`kakehashi.link.view`).
:class:`WorkFolder` is the project's work folder. :class:`SeriesDataset` and :class:`SeriesLoader`
feed torch and MONAI, and :func:`plan` and :func:`pin` let them go on while the store is shut;
:func:`save`, :class:`Saver` and :func:`load` are for checkpoints.
:class:`TrafficLog` is what the session reads over time, :func:`step` marks a loop's steps in it.
Names are loaded when they are first asked for: the view's process and the hub's side of things
must not import numpy or torch only because they live in the same package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kakehashi.link.checkpoint import DamagedError, Saved, Saver, Saving, load, save
    from kakehashi.link.dataset import SeriesDataset, SeriesLoader
    from kakehashi.link.maintenance import Estimate, Maintenance, Position, pin, plan, position_at
    from kakehashi.link.manifest import Manifest
    from kakehashi.link.pinned import PinProgress, Pins
    from kakehashi.link.reader import Reader
    from kakehashi.link.recorder import step
    from kakehashi.link.ring import Ring
    from kakehashi.link.session import Lease, Session
    from kakehashi.link.store import Series, Store
    from kakehashi.link.traffic import TrafficLog
    from kakehashi.link.work import WorkFolder
    from kakehashi.link.zarrstore import ZarrStore

__all__ = [
    "DamagedError",
    "Estimate",
    "Lease",
    "Maintenance",
    "Manifest",
    "PinProgress",
    "Pins",
    "Position",
    "Reader",
    "Ring",
    "Saved",
    "Saver",
    "Saving",
    "Series",
    "SeriesDataset",
    "SeriesLoader",
    "Session",
    "Store",
    "TrafficLog",
    "WorkFolder",
    "ZarrStore",
    "load",
    "pin",
    "plan",
    "position_at",
    "save",
    "step",
]

_HOME = {
    "DamagedError": "checkpoint",
    "Estimate": "maintenance",
    "Lease": "session",
    "Maintenance": "maintenance",
    "Manifest": "manifest",
    "PinProgress": "pinned",
    "Pins": "pinned",
    "Position": "maintenance",
    "Reader": "reader",
    "Ring": "ring",
    "Saved": "checkpoint",
    "Saver": "checkpoint",
    "Saving": "checkpoint",
    "Series": "store",
    "SeriesDataset": "dataset",
    "SeriesLoader": "dataset",
    "Session": "session",
    "Store": "store",
    "TrafficLog": "traffic",
    "WorkFolder": "work",
    "ZarrStore": "zarrstore",
    "load": "checkpoint",
    "pin": "maintenance",
    "plan": "maintenance",
    "position_at": "maintenance",
    "save": "checkpoint",
    "step": "recorder",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
