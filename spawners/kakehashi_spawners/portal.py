"""What spawners, endpoints and log-in of one hub share.

JupyterHub makes spawners and handlers itself and copies its configuration deeply, so this does
not travel through traitlets: :func:`install` puts the one portal of the process in place.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tornado.log import app_log

from kakehashi import __version__
from kakehashi.errors import ConfigError, KakehashiError, RefusedError, SiteError
from kakehashi_spawners.options import offer
from kakehashi_spawners.outbox import Outbox
from kakehashi_spawners.receipts import Receipts
from kakehashi_spawners.tls import Issuer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kakehashi.config import Config
    from kakehashi.site.job import QueueState
    from kakehashi_spawners.authority import Authority
    from kakehashi_spawners.sites import SiteClient
    from kakehashi_spawners.spawner import KakehashiSpawner

LIVE_S = 5.0
# How often the store is asked whether it has ended sessions of ours by itself.
WATCH_S = 3.0


@dataclass
class _Live:
    """A site's queues as last heard."""

    queues: tuple[QueueState, ...] = ()
    asked_at: float = float("-inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Portal:
    """The hub's side of the house.

    Parameters
    ----------
    config : Config
        The deployment.
    authority : Authority
        The store.
    sites : mapping of str to SiteClient
        The places to compute.

    Attributes
    ----------
    sessions : dict
        Session id to its spawner, from the authority's word until the end.
    outbox : Outbox
        What the store must be told in the end.
    site_outboxes : dict
        The same for each site's agent.
    receipts : Receipts
        What home pages show of ended sessions.
    """

    def __init__(
        self, config: Config, authority: Authority, sites: Mapping[str, SiteClient]
    ) -> None:
        self.config = config
        self.settings = config.need_portal()
        self.authority = authority
        self.sites = dict(sites)
        self.software = __version__
        self.sessions: dict[str, KakehashiSpawner] = {}
        self._watch: asyncio.Task[None] | None = None
        self.outbox = Outbox()
        # Of their own: a site that is silent must not keep the store from hearing of lost rights.
        self.site_outboxes: defaultdict[str, Outbox] = defaultdict(Outbox)
        certificates = self.settings.state / "internal-ssl"
        self.issuer = Issuer(
            certificates / "notebooks-ca" / "notebooks-ca.crt",
            certificates / "notebooks-ca" / "notebooks-ca.key",
        )
        self.proxy_certificate = certificates / "proxy-client" / "proxy-client.crt"
        self._live: defaultdict[str, _Live] = defaultdict(_Live)
        self.receipts = Receipts(self.settings.state / "receipts.json", authority.receipt)

    def record(self, kind: str, person: str | None, detail: Mapping[str, Any]) -> None:
        """Have the store write an audit record, now or when it answers again.

        Texts are cut and freed of control characters first: the store refuses such a record
        whole, and what an attacker sends must not keep the attack out of the trail.
        """
        kept = {key: _clean(value) for key, value in detail.items()}
        person = None if person is None else _line(person, 128) or None
        app_log.info("audit %s: %s %s", kind, person, kept)
        self.outbox.add(f"audit record {kind!r}", lambda: self.authority.audit(kind, person, kept))

    async def check_store(self) -> None:
        """Refuse to go on where the store's software is another version.

        Raises
        ------
        RefusedError
            With both versions and what to do.
        """
        theirs = await self.authority.version()
        if theirs != self.software:
            raise RefusedError(
                "version",
                f"the store has Kakehashi {theirs} and this hub {self.software}; "
                "install the same version on both",
            )

    async def choices(self, person: str, groups: Iterable[str]) -> dict[str, Any]:
        """List what a person may choose, with free GPUs as they are now."""
        projects = await self.authority.projects(groups)
        wanted = {name for project in projects for name in project.get("sites", ())}
        asked = [
            name
            for name, client in self.sites.items()
            if name in wanted and person in client.site.accounts
        ]
        answers = await asyncio.gather(*(self.live(name) for name in asked))
        return offer(person, self.config.sites, projects, dict(zip(asked, answers, strict=True)))

    async def live(self, site: str) -> tuple[QueueState, ...]:
        """Return a site's queues as heard at most a few seconds ago; empty where it is silent."""
        known = self._live[site]
        async with known.lock:
            if time.monotonic() - known.asked_at > LIVE_S:
                try:
                    known.queues = await self.sites[site].resources()
                except (SiteError, RefusedError) as error:
                    app_log.warning("%s: free GPUs are not known: %s", site, error)
                    known.queues = ()
                known.asked_at = time.monotonic()
        return known.queues

    def changed(self, site: str) -> None:
        """Ask a site anew when next its queues are shown: a job of ours came or went."""
        self._live[site].asked_at = float("-inf")

    def add(self, session: str, spawner: KakehashiSpawner) -> None:
        """Take a session in, and watch from now on whether the store ends it."""
        self.sessions[session] = spawner
        if self._watch is None or self._watch.done():
            self._watch = asyncio.ensure_future(self._watch_sessions())

    async def _watch_sessions(self) -> None:
        while self.sessions:
            await asyncio.sleep(WATCH_S)
            watched = dict(self.sessions)
            try:
                ended = await self.authority.ended(watched)
            except KakehashiError as error:
                # A store out of reach takes no right away; the nodes hear of it as well.
                app_log.warning("the store's sessions are not known: %s", error)
                continue
            for session, reason in ended.items():
                spawner = watched.get(session)
                if spawner is not None and self.sessions.get(session) is spawner:
                    spawner.lose_right(f"the store has ended the session: {reason}")

    def keep_only(self, person: str, projects: Iterable[str], reason: str) -> None:
        """End those sessions of a person whose project is not among the ones they still have."""
        still = set(projects)
        for spawner in list(self.sessions.values()):
            session = spawner.session
            if session is None or spawner.user.name != person or session.project in still:
                continue
            # First of all the store's side: it then cuts within seconds.
            self.outbox.add(
                f"revocation of {session.session}",
                partial(self.authority.revoke, session.session, "hub", reason),
            )
            spawner.lose_right(reason)

    def hub_address(self, site: str) -> str:
        """Return ``host:port`` of the hub's own interface as a site's nodes reach it."""
        return (
            self.config.sites[site].hub_address
            or f"{self.settings.hub_bind}:{self.settings.hub_port}"
        )

    def portal_ca(self) -> str | None:
        """Return the CA, in PEM, that nodes check the portal's certificate with."""
        path = self.settings.tls_ca
        try:
            return None if path is None else Path(path).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"portal.tls_ca: {path} cannot be read ({error})") from error


def _line(text: str, limit: int = 1000) -> str:
    cut = text[:limit]
    return "".join(char if char.isprintable() else " " for char in cut)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _line(value)
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value[:100]]
    return value


class _Holder:
    portal: Portal | None = None


def install(portal: Portal) -> None:
    """Put the process's portal in place."""
    _Holder.portal = portal


def current() -> Portal:
    """Return the process's portal.

    Raises
    ------
    ConfigError
        Nobody has configured one.
    """
    if _Holder.portal is None:
        raise ConfigError("the hub is not configured; call kakehashi_spawners.configure.configure")
    return _Holder.portal
