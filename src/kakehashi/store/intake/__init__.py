"""From what hospitals sent to series that can be searched: de-identify, wait, pack."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kakehashi.store.intake.intake import Intake as Intake
    from kakehashi.store.intake.intake import Progress as Progress
    from kakehashi.store.intake.packer import Packer as Packer
    from kakehashi.store.intake.parser import Parser as Parser
    from kakehashi.store.intake.staging import Staged as Staged
    from kakehashi.store.intake.staging import Staging as Staging

__all__ = ["Intake", "Packer", "Parser", "Progress", "Staged", "Staging"]

_HOMES = {
    "Intake": "intake",
    "Packer": "packer",
    "Parser": "parser",
    "Progress": "intake",
    "Staged": "staging",
    "Staging": "staging",
}


def __getattr__(name: str) -> object:
    # The children's programs are in this package, and start with what they need alone.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
