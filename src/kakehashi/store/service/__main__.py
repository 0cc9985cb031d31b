"""Runs the catalogue service, as `kakehashi store serve` starts it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from tornado.netutil import bind_sockets

from kakehashi.audit import Audit
from kakehashi.config import Config
from kakehashi.errors import ConfigError, KakehashiError
from kakehashi.store.authority.book import Book
from kakehashi.store.authority.layout import Layout as AuthorityLayout
from kakehashi.store.authority.service import tls
from kakehashi.store.catalogue import Catalogue
from kakehashi.store.cohorts import Cohorts
from kakehashi.store.facets import Index
from kakehashi.store.layout import Layout
from kakehashi.store.service.app import http_server
from kakehashi.store.service.notes import Notes, flush_or_say
from kakehashi.store.service.parts import Parts
from kakehashi.store.service.reports import Reports
from kakehashi.store.service.tokens import Tokens, load_key

if TYPE_CHECKING:
    from pathlib import Path


class _Book:
    """The authority's book, as far as the service asks it."""

    def __init__(self, path: Path) -> None:
        self._book = Book(path)

    def is_live(self, session: str) -> bool:
        found = self._book.session(session)
        if found is None or found.state != "granted" or found.lease_expires_at is None:
            return False
        return time.time() < min(found.lease_expires_at, found.ends_at)


_FLUSH_S = 10.0


async def run(config: Config) -> None:
    """Serve until SIGTERM; prints ``ready`` when it listens.

    Raises
    ------
    ConfigError, StoreError
        It is not configured, or something that it needs is missing.
    """
    store = config.need_store()
    if store.catalogue_port is None:
        raise ConfigError("store.catalogue_port is not set; the catalogue service needs a port")
    authority, layout = AuthorityLayout(store.root), Layout(store.root)
    tokens = Tokens(load_key(authority.keys / "catalogue"))
    index = Index.open(layout.facets)
    threading.Thread(target=index.warm, name="warm", daemon=True).start()
    notes = Notes(Audit(authority.audit))
    parts = Parts(
        tokens=tokens,
        is_live=_Book(authority.book).is_live,
        project={project.id: project for project in config.projects}.get,
        index=index,
        catalogue=Catalogue.open(store, reading=True),
        cohorts=Cohorts.open(store),
        reports=Reports.open(store),
        layout=layout,
        audit=notes.add,
    )
    server = http_server(parts, tls(store))
    server.add_sockets(bind_sockets(store.catalogue_port, store.authority_bind))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _FLUSH_S)
        await asyncio.to_thread(flush_or_say, notes)
    server.stop()
    await server.close_all_connections()
    parts.workers.close()
    await asyncio.to_thread(notes.flush, everything=True)


def main() -> None:
    """Serve; the configuration comes on standard input."""
    config = Config.model_validate_json(sys.stdin.buffer.read())
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        asyncio.run(run(config))
    except KakehashiError as error:
        sys.exit(f"kakehashi: {error}")


if __name__ == "__main__":
    main()
