"""The decisions: who gets a session, a grant, a renewal, and when it is over.

Each public method is one step of a session. What it changes in the book and what it writes
to the audit trail happen together: the record is on the disk before the change is committed.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import secrets
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from kakehashi import __version__
from kakehashi.audit import Anchors, Audit, Head
from kakehashi.audit.canonical import utc
from kakehashi.errors import RefusedError
from kakehashi.secret import Secret
from kakehashi.store.arrivals_summary import Arrivals
from kakehashi.store.authority import receipt as receipts
from kakehashi.store.authority import rotation
from kakehashi.store.authority.book import Book, Session
from kakehashi.store.authority.ca import Keys, PublicKey
from kakehashi.store.authority.layout import Layout, names
from kakehashi.store.authority.manifest import Manifests
from kakehashi.store.authority.models import (
    GrantRequest,
    Item,
    RenewMessage,
    ReportMessage,
    SessionRequest,
    SiteMessage,
)
from kakehashi.store.authority.watch import Watch
from kakehashi.store.service.tokens import Tokens, load_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from kakehashi.config import Config, Project
    from kakehashi.store.authority.book import Block, BlockKind

MAX_REPORTS = 8
ACCOUNT_LEASE_MINUTES = 5.0
"""Longest lease of a session whose node has no namespaces for it."""

"""Reports of one session that each witness may give: the wrapper one, a site's root one or two."""

_Model = TypeVar("_Model", bound=BaseModel)


class Authority:
    """The store's authority over one book.

    Parameters
    ----------
    config : Config
        Needs ``store``; ``projects`` and ``sites`` are what may be granted.
    clock : callable
        Gives the time in seconds since 1970.

    Raises
    ------
    ConfigError, StoreError
        The store was not initialised, or this process may not read the authority's folder.
    """

    def __init__(self, config: Config, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._store = config.need_store()
        self._layout = Layout(self._store.root)
        self._names = names(self._store)
        self._clock = clock
        self._keys = Keys(self._layout.keys)
        self._tokens = (
            None
            if self._store.catalogue_port is None
            else Tokens(load_key(self._layout.keys / "catalogue"), clock)
        )
        self._book = Book(self._layout.book)
        self._manifests = Manifests()
        self._audit = Audit(self._layout.audit, clock)
        self._anchors = Anchors(self._audit, self._store.audit_anchors, self._keys.receipt, clock)

    def close(self) -> None:
        """Close the book."""
        self._book.close()

    def sshd_watch(self) -> Watch:
        """Return what writes down whom sshd refuses."""
        return Watch(self._layout, self._book, self._audit, self._clock)

    # What hubs ask

    def projects(self, groups: frozenset[str]) -> list[dict[str, Any]]:
        """Return the projects that a person of these groups may use now."""
        answer = []
        for project in self._config.projects:
            if (
                project.groups.isdisjoint(groups)
                or self._project_end(project) <= self._clock()
                or (project.starts is not None and self._clock() < _midnight(project.starts))
            ):
                continue
            try:
                series = self._manifests.read(self._layout.view(project.id)).series
            except RefusedError:
                series = 0
            answer.append(
                {
                    "id": project.id,
                    "title": project.title,
                    "title_ja": project.title_ja,
                    "purpose": project.purpose,
                    "expires": project.expires.isoformat(),
                    "sites": sorted(project.sites),
                    "series": series,
                }
            )
        return answer

    def arrivals(self) -> dict[str, Any]:
        """Return the summary of what hospitals sent, as JSON can hold it.

        Raises
        ------
        RefusedError
            ``not-found``: none was written yet.
        StoreError
            Its file is damaged, or cannot be read.
        """
        summary = Arrivals.load(self._layout.arrivals)
        if summary is None:
            raise RefusedError(
                "not-found", "there is no summary of arrivals yet; the store's intake writes it"
            )
        return summary.model_dump(mode="json")

    def create(self, hub: str, request: SessionRequest) -> dict[str, Any]:
        """Open a session and give its ticket, which is told once and kept nowhere.

        Raises
        ------
        RefusedError
            ``software``, ``no-project``, ``project-expired``, ``no-site`` or ``limit``.
        """
        limits = self._store.limits
        with self._refusals(None, request.person, {"hub": hub, "project": request.project}):
            self._check_software(request.software)
            self._check_blocks(request.person, request.site)
            project = self._permitted(request.project, request.groups, request.site)
            if request.hours > limits.session_hours:
                raise RefusedError(
                    "limit",
                    f"{request.hours:g} hours were asked for; a session may last "
                    f"{limits.session_hours:g} hours at most",
                )
            now = self._clock()
            ticket = Secret(secrets.token_urlsafe(32))
            session = secrets.token_hex(16)
            ticket_expires = now + limits.ticket_minutes * 60
            ends_at = min(ticket_expires + request.hours * 3600, self._project_end(project))
            with self._book.transaction():
                running = self._book.running(request.person)
                if running >= limits.sessions_per_person:
                    raise RefusedError(
                        "limit",
                        f"{request.person!r} has {running} sessions; "
                        f"{limits.sessions_per_person} are allowed. End one first",
                    )
                self._book.add_session(
                    session,
                    hub=hub,
                    person=request.person,
                    groups=request.groups,
                    project=project.id,
                    site=request.site,
                    kind=request.kind,
                    hours=request.hours,
                    created_at=now,
                    ticket_sha256=ticket.sha256(),
                    ticket_expires_at=ticket_expires,
                    view_account=self._names.view(project.id),
                    work_account=self._names.work(project.id),
                    ends_at=ends_at,
                )
                self._audit.append(
                    "session.created",
                    session=session,
                    person=request.person,
                    detail={
                        "hub": hub,
                        "project": project.id,
                        "site": request.site,
                        "kind": request.kind,
                        "hours": request.hours,
                    },
                )
        return {"session": session, "ticket": ticket.reveal(), "ends_at": utc(int(ends_at))}

    def grant(self, hub: str, request: GrantRequest) -> dict[str, Any]:
        """Redeem a ticket, once, for a first certificate.

        Raises
        ------
        RefusedError
            ``unknown-session``, ``ticket``, ``replayed``, ``ended``, ``ticket-expired``,
            ``malformed``, ``software``, ``no-project``, ``project-expired``, ``no-site``,
            ``address`` or ``no-view``.
        """
        session = self._session(hub, request.session)
        about = {"hub": hub, "host": request.host, "job": request.job}
        with self._refusals(session.id, session.person, about):
            if request.ticket.sha256() != session.ticket_sha256:
                raise RefusedError("ticket", "the ticket is not this session's")
            now = self._clock()
            if (
                session.redeemed_at is not None
                or session.state == "ended"
                or now >= session.ticket_expires_at
            ):
                raise self._spent(session, request)
            self._check_software(request.software)
            self._check_blocks(session.person, session.site)
            self._check_walls(session.site, request.walls)
            project = self._permitted(session.project, session.groups, session.site)
            sources = self._sources(session.site, request.address)
            key = PublicKey.parse(request.public_key)
            manifest = self._manifests.read(self._layout.view(project.id)).sha256
            ends_at = int(
                min(now + session.hours * 3600, session.ends_at, self._project_end(project))
            )
            with self._book.transaction():
                expires_at = self._lease_end(now, ends_at, request.walls)
                redeemed = self._book.redeem(
                    session.id,
                    now=now,
                    public_key=key.text,
                    fingerprint=key.fingerprint,
                    host=request.host,
                    address=request.address,
                    job=request.job,
                    walls=request.walls,
                    ends_at=ends_at,
                    lease_expires_at=expires_at,
                )
                if redeemed:
                    grant = self._sign(
                        session,
                        key,
                        manifest=manifest,
                        now=now,
                        expires_at=expires_at,
                        ends_at=ends_at,
                        sources=sources,
                    )
                    self._audit.append(
                        "session.granted",
                        session=session.id,
                        person=session.person,
                        detail={
                            **about,
                            "address": request.address,
                            "walls": request.walls,
                            "fingerprint": key.fingerprint,
                            "serial": grant["serial"],
                            "expires_at": grant["expires_at"],
                            "ends_at": grant["ends_at"],
                            "manifest": manifest,
                        },
                    )
            if not redeemed:
                # Somebody else was faster, between our look into the book and our turn.
                raise self._spent(self._session(hub, session.id), request)
        return grant

    def renew(self, hub: str, session_id: str, message: str, signature: str) -> dict[str, Any]:
        """Renew a lease for the same key; a lease that lapsed while the hub was out of reach too.

        Raises
        ------
        RefusedError
            ``unknown-session``, ``ended``, ``not-granted``, ``signature``, ``malformed``,
            ``stale``, ``no-project``, ``project-expired``, ``no-site`` or ``no-view``.
        """
        session = self._session(hub, session_id)
        with self._refusals(session.id, session.person, {"hub": hub, "step": "renew"}):
            key = self._signed(session, message, signature)
            if session.state == "ended":
                raise _ended(session)
            now = self._clock()
            if now >= session.ends_at:
                raise RefusedError("ended", "the session's time is over")
            asked = _parse(RenewMessage, message)
            if asked.renew != session.id:
                raise RefusedError("signature", "the message is another session's")
            self._check_blocks(session.person, session.site)
            project = self._permitted(session.project, session.groups, session.site)
            manifest = self._manifests.read(self._layout.view(project.id)).sha256
            ends_at = int(session.ends_at)
            expires_at = self._lease_end(now, ends_at, session.walls)
            with self._book.transaction():
                if not self._book.renew(session.id, asked.counter, expires_at):
                    raise RefusedError(
                        "stale",
                        f"the counter {asked.counter} does not rise above {session.counter}; "
                        "each renewal needs a higher one",
                    )
                sources = self._sources(session.site, session.address)
                grant = self._sign(
                    session,
                    key,
                    manifest=manifest,
                    now=now,
                    expires_at=expires_at,
                    ends_at=ends_at,
                    sources=sources,
                )
                self._audit.append(
                    "lease.renewed",
                    session=session.id,
                    person=session.person,
                    detail={
                        "counter": asked.counter,
                        "serial": grant["serial"],
                        "expires_at": grant["expires_at"],
                    },
                )
        return grant

    def report_wrapper(self, hub: str, session_id: str, message: str, signature: str) -> None:
        """Keep what the node's wrapper signed about the end.

        Raises
        ------
        RefusedError
            ``unknown-session``, ``not-granted``, ``signature``, ``malformed`` or ``limit``.
        """
        session = self._session(hub, session_id)
        with self._refusals(session.id, session.person, {"hub": hub, "step": "report"}):
            self._signed(session, message, signature)
            report = _parse(ReportMessage, message)
            if report.report != session.id:
                raise RefusedError("signature", "the message is another session's")
            self._keep_report(session, "wrapper", report.items)

    def witness(self, hub: str, site: str, message: str, signature: str) -> dict[str, Any]:
        """Hear a site's root: what it found after a job, or a question where to look.

        Raises
        ------
        RefusedError
            ``witness``, ``signature``, ``malformed``, ``unknown-job`` or ``limit``.
        """
        with self._refusals(None, None, {"hub": hub, "step": "witness", "site": site}):
            known = self._store.sites.get(site)
            if known is None or known.witness_key is None:
                raise RefusedError("witness", f"the site {site!r} has no witness key here")
            PublicKey.parse(known.witness_key).verify(message, signature)
            said = _parse(SiteMessage, message)
            if said.site != site:
                raise RefusedError("signature", "the message is another site's")
            if said.witness == "pending":
                waiting = self._book.unseen_by_site(site, said.host)
                return {"jobs": [{"job": one.job, "session": one.id} for one in waiting]}
            if said.job is None or said.items is None:
                raise RefusedError("malformed", "job, items: what was seen, and after which job")
            session = self._book.session_of_job(site, said.job)
            if session is None or session.host != said.host:
                raise RefusedError("unknown-job", f"no session ran at {site!r} as that job")
            self._keep_report(session, "site", said.items)
        return {}

    def states(self, hub: str, sessions: frozenset[str]) -> dict[str, Any]:
        """Return the state of those of a hub's sessions that there are."""
        return {
            session: {"state": state, "reason": reason}
            for session, (state, reason) in self._book.states(hub, sessions).items()
        }

    def announce_end(self, hub: str, session_id: str, reason: str, grace_s: float) -> None:
        """End a session after a grace, in which it may save; by itself, whatever comes.

        Raises
        ------
        RefusedError
            ``unknown-session``.
        """
        session = self._session(hub, session_id)
        with self._book.transaction():
            at = int(self._clock() + grace_s) + 1
            if self._book.announce_end(session.id, reason, at):
                self._audit.append(
                    "session.ending",
                    session=session.id,
                    person=session.person,
                    detail={"reason": reason, "grace_s": grace_s},
                )

    def end(
        self, hub: str | None, session_id: str, reason: str, scheduler: Mapping[str, Any] | None
    ) -> None:
        """End a session; its connections are closed by the guard within a second.

        Raises
        ------
        RefusedError
            ``unknown-session``.
        """
        session = self._session(hub, session_id)
        with self._book.transaction():
            if scheduler:
                self._book.set_scheduler(session.id, scheduler)
            self._end(session, reason)

    def revoke(self, hub: str | None, session_id: str, by: str, reason: str) -> None:
        """Take a session's right away; a session that has ended stays as it is.

        Raises
        ------
        RefusedError
            ``unknown-session``.
        """
        session = self._session(hub, session_id)
        with self._book.transaction():
            self._audit.append(
                "session.revoked",
                session=session.id,
                person=session.person,
                detail={"by": by, "reason": reason},
            )
            self._end(session, "revoked")

    def cut(
        self, kind: BlockKind, name: str, by: str, reason: str, *, block: bool = True
    ) -> list[str]:
        """Take away the rights of a person, of a site or of all, and keep new ones from coming.

        Parameters
        ----------
        kind : {"person", "site", "all"}
        name : str
            Of the person or site; empty for all.
        by, reason : str
            Stand in the audit trail.
        block : bool
            Whether new sessions are refused until :meth:`allow`.

        Returns
        -------
        list of str
            The sessions that were ended.
        """
        with self._book.transaction():
            about = {"kind": kind, "name": name, "by": by, "reason": reason}
            if block:
                self._book.block(kind, name, by, reason, self._clock())
                self._audit.append("right.blocked", detail=about)
            ended = [
                session
                for session in self._book.live()
                if kind == "all" or name == (session.person if kind == "person" else session.site)
            ]
            for session in ended:
                self._audit.append(
                    "session.revoked",
                    session=session.id,
                    person=session.person,
                    detail={"by": by, "reason": reason},
                )
                self._end(session, "revoked")
        return [session.id for session in ended]

    def live(self) -> list[dict[str, Any]]:
        """Return the sessions that have not ended, as an operator wants to see them."""
        return [
            {
                "session": one.id,
                "person": one.person,
                "project": one.project,
                "site": one.site,
                "host": one.host,
                "state": one.state,
                "lease_expires_at": utc(one.lease_expires_at) if one.lease_expires_at else None,
                "ends_at": utc(one.ends_at),
                "connections": self._book.connections_left(one.id),
            }
            for one in self._book.live()
        ]

    def allow(self, kind: BlockKind, name: str, by: str) -> bool:
        """Lift a block; False if there was none."""
        with self._book.transaction():
            lifted = self._book.unblock(kind, name)
            if lifted:
                self._audit.append("right.allowed", detail={"kind": kind, "name": name, "by": by})
        return lifted

    def blocks(self) -> list[Block]:
        """Return what is blocked."""
        return self._book.blocks()

    def record(self, hub: str, kind: str, person: str | None, detail: Mapping[str, Any]) -> int:
        """Write down what a hub has to record; returns the record's sequence number."""
        # The prefix keeps a hub from writing what only the store can have seen.
        entry = self._audit.append(
            f"hub.{kind}", person=person, detail={"hub": hub, "detail": dict(detail)}
        )
        return entry.seq

    def note_malformed(self, hub: str, path: str) -> None:
        """Write down that a hub asked for what cannot be asked for."""
        self._audit.append("refused", detail={"hub": hub, "path": path, "code": "malformed"})

    # Endings

    def connections_left(self, session_id: str) -> int:
        """Return how many connections of a session were not yet seen closed."""
        return self._book.connections_left(session_id)

    def receipt(self, hub: str | None, session_id: str) -> dict[str, Any] | None:
        """Return the receipt that stands for a session, or ``None``."""
        session = self._session(hub, session_id)
        if session.receipt_revision == 0:
            return None
        return receipts.read(self._layout.receipts, session.id)

    def write_receipt(self, session_id: str) -> dict[str, Any]:
        """Write the receipt of an ended session, unless one with the same evidence stands.

        Raises
        ------
        RefusedError
            ``unknown-session`` or ``not-ended``.
        """
        with self._book.transaction():
            session = self._session(None, session_id)
            if session.state != "ended":
                raise RefusedError("not-ended", "a session that runs has no receipt yet")
            site = self._store.sites.get(session.site)
            has_epilog = site is not None and site.witness_key is not None
            body = receipts.evidence(self._book, session, has_epilog=has_epilog)
            digest = receipts.digest(body)
            if digest == session.receipt_evidence:
                return receipts.read(self._layout.receipts, session.id)
            revision = session.receipt_revision + 1
            self._audit.append(
                "receipt.written",
                session=session.id,
                person=session.person,
                detail={"revision": revision, "state": body["state"], "evidence": digest},
            )
            now = self._clock()
            head = Head.sign(self._audit, self._keys.receipt, now)
            document = receipts.sign(
                body, revision=revision, written_at=utc(now), head=head, key=self._keys.receipt
            )
            receipts.write(self._layout.receipts, session.id, document)
            self._book.set_receipt(
                session.id, revision=revision, evidence=digest, state=body["state"]
            )
        return document

    def sweep(self, patience_s: float) -> None:
        """End what is overdue, drop replaced keys, and write the receipts that can be written.

        Parameters
        ----------
        patience_s : float
            Seconds after an end during which a receipt waits for the connections to close.
        """
        now = self._clock()
        for session in self._book.overdue(now):
            with self._book.transaction():
                reason = "time is over" if session.state == "granted" else "never started"
                self._end(session, session.end_reason or reason)
        for session in self._book.live():
            try:
                self._permitted(session.project, session.groups, session.site)
            except RefusedError as error:
                # The configuration was read anew: a right may be gone that was there.
                with self._book.transaction():
                    self._end(session, error.code)
        rotation.settle(self._store, self._book, self._audit, now)
        for session in self._book.without_final_receipt():
            waited = now - (session.ended_at or now)
            if waited >= patience_s or self.connections_left(session.id) == 0:
                self.write_receipt(session.id)

    def anchor(self) -> None:
        """Write the trail's signed head to the anchors, if it moved."""
        self._anchors.write()

    # Inside

    def _session(self, hub: str | None, session_id: str) -> Session:
        session = self._book.session(session_id)
        # Another hub's session is as unknown as one that never was.
        if session is None or (hub is not None and session.hub != hub):
            raise RefusedError("unknown-session", "there is no such session")
        return session

    def _permitted(self, project_id: str, groups: frozenset[str], site: str) -> Project:
        found = next((p for p in self._config.projects if p.id == project_id), None)
        # Whether a project exists is told only to those who belong to it.
        if found is None or found.groups.isdisjoint(groups):
            raise RefusedError("no-project", f"no grant for a project {project_id!r}")
        if self._project_end(found) <= self._clock():
            raise RefusedError(
                "project-expired",
                f"the project {project_id!r} expired on {found.expires.isoformat()}; its "
                "approval has to be renewed first",
            )
        if found.starts is not None and self._clock() < _midnight(found.starts):
            raise RefusedError(
                "project-not-begun",
                f"the project {project_id!r} begins on {found.starts.isoformat()}",
            )
        if site not in found.sites or (self._store.sites and site not in self._store.sites):
            raise RefusedError("no-site", f"the project {project_id!r} may not compute at {site!r}")
        return found

    def _sources(self, site: str, address: str | None) -> tuple[str, ...]:
        known = self._store.sites.get(site)
        if known is None:
            return (str(ipaddress.ip_network(address)),) if address else ()
        if address is not None and not any(
            ipaddress.ip_address(address) in ipaddress.ip_network(network)
            for network in known.addresses
        ):
            raise RefusedError(
                "address", f"the node's address {address} is none of the site {site!r}"
            )
        return known.addresses

    def _project_end(self, project: Project) -> float:
        return _midnight(project.expires + dt.timedelta(days=1))

    def _lease_end(self, now: float, ends_at: int, walls: str | None) -> int:
        minutes = self._store.limits.lease_minutes
        if walls == "account":
            minutes = min(minutes, ACCOUNT_LEASE_MINUTES)
        # Whole seconds, as certificates count; never less than one, or a short lease were none.
        return min(max(int(now + minutes * 60), int(now) + 1), ends_at)

    def _check_walls(self, site: str, walls: str) -> None:
        known = self._store.sites.get(site)
        if walls == "account" and not (known and known.accept_account_walls):
            raise RefusedError(
                "walls",
                f"sessions at {site!r} have no namespaces, and this store does not accept that: "
                f"store.sites.{site}.accept_account_walls is not set",
            )

    def _check_blocks(self, person: str, site: str) -> None:
        for block in self._book.blocks():
            about = {"person": person, "site": site, "all": ""}
            if block.name == about[block.kind]:
                raise RefusedError(
                    "blocked",
                    "the operators of the store have stopped "
                    + {"person": "your access", "site": f"the site {site!r}", "all": "all access"}[
                        block.kind
                    ]
                    + f": {block.reason}",
                )

    def _check_software(self, software: str) -> None:
        if software != __version__:
            raise RefusedError(
                "software",
                f"hub or node run Kakehashi {software}, the store {__version__}; install the "
                "same version on all of them",
            )

    def _spent(self, session: Session, request: GrantRequest) -> RefusedError:
        """Say why a ticket is good no more; one that was redeemed before raises the alarm."""
        if session.redeemed_at is None:
            if session.state == "ended":
                return _ended(session)
            return RefusedError("ticket-expired", "the ticket's time is over; start anew")
        with self._book.transaction():
            self._book.count_replay(session.id)
            self._audit.append(
                "ticket.replayed",
                session=session.id,
                person=session.person,
                detail={"alarm": True, "host": request.host, "address": request.address},
            )
            self._end(session, "replayed")
        self._revise_receipt(session)
        return RefusedError(
            "replayed", "the ticket was used before: the session is ended and an alarm written"
        )

    def _signed(self, session: Session, message: str, signature: str) -> PublicKey:
        if session.public_key is None:
            raise RefusedError("not-granted", "the session has no key yet; redeem its ticket")
        key = PublicKey.parse(session.public_key)
        key.verify(message, signature)
        return key

    def _sign(
        self,
        session: Session,
        key: PublicKey,
        *,
        manifest: str,
        now: float,
        expires_at: int,
        ends_at: int,
        sources: Sequence[str],
    ) -> dict[str, Any]:
        signed = self._keys.sign_user(
            key,
            session=session.id,
            accounts=(session.view_account, session.work_account),
            now=now,
            expires_at=expires_at,
            sources=sources,
        )
        self._book.add_certificate(
            signed.serial,
            session=session.id,
            fingerprint=key.fingerprint,
            issued_at=now,
            expires_at=expires_at,
        )
        return {
            "session": session.id,
            "person": session.person,
            "project": session.project,
            "serial": signed.serial,
            "issued_at": utc(now),
            "expires_at": utc(expires_at),
            "ends_at": utc(ends_at),
            "certificate": signed.certificate,
            "store": {
                "address": self._store.address,
                "port": self._store.port,
                "further_addresses": list(self._store.further_addresses),
                "host_ca": "\n".join(self._keys.trusted("host-ca")),
                "view_account": session.view_account,
                "work_account": session.work_account,
            },
            "manifest": {"path": "/manifest.json", "sha256": manifest},
            "catalogue": self._catalogue_token(session, expires_at),
            "software": __version__,
        }

    def _catalogue_token(self, session: Session, expires_at: int) -> str | None:
        if self._tokens is None:
            return None
        issued = self._tokens.issue(session.id, session.project, session.person, expires_at)
        return issued.reveal()

    def _keep_report(self, session: Session, witness: str, items: Sequence[Item]) -> None:
        plain = [item.model_dump() for item in items]
        with self._book.transaction():
            # Each its own: what a wrapper has to say must not leave the site's root without a word.
            given = sum(report.witness == witness for report in self._book.reports(session.id))
            if given >= MAX_REPORTS:
                raise RefusedError(
                    "limit", f"the session has {MAX_REPORTS} reports by the {witness} already"
                )
            self._book.add_report(
                session.id, "site" if witness == "site" else "wrapper", plain, self._clock()
            )
            self._audit.append(
                "session.reported",
                session=session.id,
                person=session.person,
                detail={"witness": witness, "items": plain},
            )
        self._revise_receipt(session)

    def _revise_receipt(self, session: Session) -> None:
        if session.receipt_revision:
            self.write_receipt(session.id)

    def _end(self, session: Session, reason: str) -> None:
        if self._book.end(session.id, reason, self._clock()):
            self._audit.append(
                "session.ended",
                session=session.id,
                person=session.person,
                detail={"reason": reason},
            )

    @contextmanager
    def _refusals(
        self, session: str | None, person: str | None, about: Mapping[str, Any]
    ) -> Iterator[None]:
        try:
            yield
        except RefusedError as error:
            # A replay has its own record, the alarm.
            if error.code != "replayed":
                self._audit.append(
                    "refused",
                    session=session,
                    person=person,
                    detail={**about, "code": error.code},
                )
            raise


def _midnight(day: dt.date) -> float:
    return dt.datetime.combine(day, dt.time(), dt.UTC).timestamp()


def _ended(session: Session) -> RefusedError:
    return RefusedError("ended", f"the session has ended: {session.end_reason}")


def _parse(model: type[_Model], message: str) -> _Model:
    try:
        return model.model_validate_json(message)
    except ValidationError as error:
        raise RefusedError("malformed", explain(error)) from None


def explain(error: ValidationError) -> str:
    """Say which fields break which rule, without what stood in them."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'request'}: {problem['msg']}"
        for problem in problems[:8]
    )
