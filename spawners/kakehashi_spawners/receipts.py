"""The last receipts of each person, in short, for their home page.

The receipts themselves stand at the store; these summaries are only so that a page needs not
ask for each. They survive the hub's restart in one file of its state folder.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from tornado.log import app_log

from kakehashi.errors import RefusedError, StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

SHOWN = 20
# A receipt is pending until every connection was seen closed; a dead node's waits for the node.
ASK_AGAIN_S = (3.0, 10.0, 60.0, 600.0, 3600.0)


def summary(about: Mapping[str, str], receipt: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten a receipt.

    Parameters
    ----------
    about : mapping
        ``session``, ``project`` and ``site``.
    receipt : mapping
        As the store wrote it.
    """
    items = receipt.get("items")
    listed = items if isinstance(items, list) else []
    left = sum(1 for item in listed if isinstance(item, dict) and item.get("result") == "left")
    return {
        **about,
        "ended_at": receipt.get("ended_at"),
        "state": receipt.get("state"),
        "left": left,
    }


class Receipts:
    """Summaries by person, newest first.

    Parameters
    ----------
    path : Path
        Where they are kept.
    ask : callable
        Asks the store for a session's receipt.
    """

    def __init__(self, path: Path, ask: Callable[[str], Awaitable[dict[str, Any]]]) -> None:
        self._path = path
        self._ask = ask
        self._following: set[asyncio.Task[None]] = set()
        self._kept: dict[str, list[dict[str, Any]]] | None = None

    def of(self, person: str) -> list[dict[str, Any]]:
        """Return a person's summaries."""
        return list(self._all().get(person, ()))

    def keep(self, person: str, about: Mapping[str, str], receipt: Mapping[str, Any]) -> None:
        """Remember a receipt, and follow it while it is pending."""
        entry = summary(about, receipt)
        mine = [one for one in self.of(person) if one.get("session") != about["session"]]
        self._all()[person] = [entry, *mine][:SHOWN]
        self._write()
        if entry["state"] != "complete":
            task = asyncio.ensure_future(self._follow(person, about))
            self._following.add(task)
            task.add_done_callback(self._following.discard)

    async def _follow(self, person: str, about: Mapping[str, str]) -> None:
        for pause in ASK_AGAIN_S:
            await asyncio.sleep(pause)
            try:
                receipt = await self._ask(about["session"])
            except (RefusedError, StoreError) as error:
                app_log.warning("receipt of %s: %s", about["session"], error)
                continue
            if receipt.get("state") == "complete":
                self._replace(person, summary(about, receipt))
                return

    def _replace(self, person: str, entry: dict[str, Any]) -> None:
        mine = self._all().get(person, [])
        self._all()[person] = [
            entry if one.get("session") == entry["session"] else one for one in mine
        ]
        self._write()

    def _all(self) -> dict[str, list[dict[str, Any]]]:
        if self._kept is None:
            self._kept = self._read()
        return self._kept

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            # The receipts are safe at the store; a page with fewer lines is no reason to stop.
            app_log.warning("%s: the list of receipts begins anew: %s", self._path, error)
            return {}
        if not isinstance(data, dict):
            return {}
        return {person: list(entries) for person, entries in data.items()}

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        try:
            part.write_text(json.dumps(self._all()), encoding="utf-8")
            part.replace(self._path)
        except OSError as error:
            app_log.warning("%s: cannot be written: %s", self._path, error)
