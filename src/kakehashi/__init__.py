"""Kakehashi: a medical image platform joined to HPC, for one session at a time.

Importing the package imports nothing else, because the session wrapper runs from it with
the standard library alone; :class:`Store` is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kakehashi.link import Store

__all__ = ["Store", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Store":
        from kakehashi.link import Store  # noqa: PLC0415 - keeps numpy out of the wrapper

        return Store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
