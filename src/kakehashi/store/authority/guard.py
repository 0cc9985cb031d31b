"""The guard: finds connections without a live lease, and names them to the supervisor.

It runs without privileges. What it writes to standard output is ``kill PID START`` for each
process to be closed, and ``ok`` after each round that it could finish; the supervisor, who
closes, takes its silence as a reason to close everything.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from kakehashi.audit import Audit
from kakehashi.config import Config
from kakehashi.store.authority.book import Book, Connection
from kakehashi.store.authority.layout import Layout
from kakehashi.store.authority.processes import Process, processes, uptime
from kakehashi.store.authority.services import Services

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROUND_S = 0.3
"""Seconds between two rounds."""

LOGIN_GRACE_S = 15
"""Seconds that sshd gives a connection to authenticate (LoginGraceTime)."""

UNKNOWN_GRACE_S = LOGIN_GRACE_S + 5
"""Age in seconds from which a connection that the book does not know is closed."""


class Guard:
    """One guard over one book.

    Parameters
    ----------
    book : Book
    audit : Audit
    services : callable
        Gives the pids of the store's own processes, which are not connections.
    kill : callable
        Called with each process to be closed.
    """

    def __init__(
        self,
        book: Book,
        audit: Audit,
        services: Callable[[], Services],
        kill: Callable[[Process], None],
    ) -> None:
        self._book = book
        self._audit = audit
        self._services = services
        self._kill = kill
        self._ticks = os.sysconf("SC_CLK_TCK")

    def look(self) -> None:
        """Look once at all connections.

        Raises
        ------
        sqlite3.Error, OSError, KakehashiError
            The book, ``/proc`` or the audit trail cannot be used: nothing was confirmed.
        """
        # The book first: a connection stands in it before its process can be of any use, so a
        # record whose process is not in the later list is surely gone.
        known = self._book.open_connections()
        table = processes()
        live = {(process.pid, process.start_time): process for process in table.values()}
        now = time.time()
        self._close_gone(known, live, now)
        unleased = self._book.unleased(now)
        for connection in known:
            process = live.get((connection.pid, connection.start_time))
            reason = unleased.get(connection.id)
            if process and reason is not None:
                if connection.cut_at is None:
                    self._book.mark_cut(connection.id, reason, now)
                self._kill(process)
        recorded = {(c.pid, c.start_time) for c in known}
        for process in self._candidates(table.values()):
            key = (process.pid, process.start_time)
            if key not in recorded and self._age(process) > UNKNOWN_GRACE_S:
                self._kill(process)
        self._record_denials()

    def _candidates(self, table: Iterable[Process]) -> list[Process]:
        services = self._services()
        # The children of sshd, and what sshd left behind when it died.
        parents = {services.sshd, services.supervisor}
        return [
            process
            for process in table
            if process.parent in parents
            and process.pid not in services.pids()
            and process.name.startswith("sshd")
        ]

    def _age(self, process: Process) -> float:
        return uptime() - process.start_time / self._ticks

    def _close_gone(
        self, known: Iterable[Connection], live: dict[tuple[int, int], Process], now: float
    ) -> None:
        for connection in known:
            if (connection.pid, connection.start_time) in live:
                continue
            with self._book.transaction():
                if self._book.mark_closed(connection.id, now) and connection.cut_at is not None:
                    self._audit.append(
                        "connection.closed",
                        session=connection.session,
                        detail={
                            "by": "guard",
                            "account": connection.account,
                            "reason": connection.cut_reason,
                            "open_s": round(now - connection.opened_at, 3),
                        },
                    )

    def _record_denials(self) -> None:
        if not self._book.has_denials():
            return
        with self._book.transaction():
            for denial in self._book.take_denials():
                self._audit.append(
                    "connection.refused",
                    session=denial.session,
                    detail={"account": denial.account, "reason": denial.reason},
                )


def main() -> None:
    """Guard until the supervisor ends; the configuration comes on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = Config.model_validate_json(sys.stdin.buffer.read())
    layout = Layout(config.need_store().root)
    guard = Guard(
        Book(layout.book),
        Audit(layout.audit),
        lambda: Services.read(layout.run),
        lambda process: _say(f"kill {process.pid} {process.start_time}"),
    )
    while True:
        guard.look()
        _say("ok")
        time.sleep(ROUND_S)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
