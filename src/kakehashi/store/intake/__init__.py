"""From what hospitals sent to series that can be searched: de-identify, wait, pack."""

from __future__ import annotations

from kakehashi.store.intake.intake import Intake, Progress
from kakehashi.store.intake.parser import Parser
from kakehashi.store.intake.staging import Staged, Staging

__all__ = ["Intake", "Parser", "Progress", "Staged", "Staging"]
