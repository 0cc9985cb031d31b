"""What hospitals send is taken in over DICOM, and no acknowledged object is ever lost.

The folder ``ROOT/receive`` holds identifiable data and is closed to all but its owner:
``incoming`` (objects while they arrive), ``inbox`` (whole objects that wait for their intake),
``quarantine``, ``journal`` (one line for whatever happened to an object), ``figures`` and
``expected`` (counts by hospital and day).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kakehashi.store.receive.entry import Entry as Entry
    from kakehashi.store.receive.inbox import Inbox as Inbox
    from kakehashi.store.receive.journal import ForeignPositionError as ForeignPositionError

__all__ = ["Entry", "ForeignPositionError", "Inbox"]


def __getattr__(name: str) -> object:
    # The settings of this package are read on hosts that have none of the store's packages.
    if name == "Inbox":
        from kakehashi.store.receive.inbox import Inbox  # noqa: PLC0415 - see above

        return Inbox
    if name == "Entry":
        from kakehashi.store.receive.entry import Entry  # noqa: PLC0415 - see above

        return Entry
    if name == "ForeignPositionError":
        from kakehashi.store.receive.journal import ForeignPositionError  # noqa: PLC0415 - see above

        return ForeignPositionError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
