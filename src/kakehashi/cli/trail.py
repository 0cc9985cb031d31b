"""The store's audit trail for commands that root runs: written as the account that owns it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kakehashi.config import Config


class StoreTrail:
    """The audit trail of a configured store.

    Parameters
    ----------
    config : Config
    """

    def __init__(self, config: Config) -> None:
        self._store = config.need_store()

    def append(self, kind: str, *, person: str | None, detail: Mapping[str, Any]) -> object:
        """Append a record; when this returns, it is on the disk."""
        from kakehashi.audit import Audit
        from kakehashi.store.authority.accounts import acting_as
        from kakehashi.store.authority.layout import Layout, names

        with acting_as(names(self._store).authority):
            return Audit(Layout(self._store.root).audit).append(kind, person=person, detail=detail)
