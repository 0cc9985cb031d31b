"""The spawner: from a choice on the spawn page to a running session, and to its receipt."""

from __future__ import annotations

import asyncio
import datetime as dt
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from batchspawner import BatchSpawnerBase
from jupyterhub.spawner import SpawnException
from jupyterhub.utils import make_ssl_context
from tornado.httpclient import HTTPError as HttpStatusError
from tornado.httpclient import HTTPRequest
from tornado.simple_httpclient import SimpleAsyncHTTPClient
from tornado.web import HTTPError
from traitlets import Float, Integer, default

from kakehashi.errors import KakehashiError, RefusedError, SessionError, SiteError, StoreError
from kakehashi.site.job import JobState
from kakehashi_spawners import i18n, pages, server
from kakehashi_spawners.options import OptionsError, choose, from_form, parse
from kakehashi_spawners.portal import current

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from kakehashi.config import Site
    from kakehashi_spawners.sites import SiteClient

MINUTES = 60
FIRST_QUERY_S = 0.25
SLOWEST_QUERY_S = 3.0
KNOCK_S = 0.1
GRACE_S = 15.0
STOP_S = 60.0
# Asked at the identity provider so often that, with a poll's own length, 45 s are kept.
RIGHT_S = 25.0
REFUSALS_BEFORE_DEAD = 4
HEALTH_TIMEOUT_S = 5.0


class NotStartedError(SpawnException):  # type: ignore[misc]  # jupyterhub has no types
    """A session cannot start; the message is for the person."""

    def __init__(self, message: str, *, reason: str, status_code: int = 400) -> None:
        super().__init__(message, reason=reason, status_code=status_code)
        # Where JupyterHub's own pages look for words that may be shown.
        self.jupyterhub_message = message


@dataclass(frozen=True)
class Session:
    """A session as the hub knows it; this is what survives the hub's restart.

    ``ticket_sha256`` tells a ticket without holding it. ``host`` and ``port`` are where the
    proxy reaches the person's server, set by enrolment. Times are ISO 8601 with ``Z``; from
    enrolment on by this hub's own clock.
    """

    session: str
    site: str
    account: str
    project: str
    queue: str
    ends_at: str
    ticket_sha256: str
    host: str | None = None
    port: int | None = None
    lease_expires_at: str | None = None

    @property
    def enrolled(self) -> bool:
        """Whether the node has come and got its grant."""
        return self.port is not None


class KakehashiSpawner(BatchSpawnerBase):  # type: ignore[misc]  # batchspawner has no types
    """Runs a person's server in a session at a site.

    Of batchspawner it keeps the job's life and its saved state; templates, shell commands and
    the endpoint that sets attributes are not used.
    """

    poll_interval = Integer(15, help="Seconds between looks at a running session.").tag(config=True)
    http_timeout = Integer(60, help="Seconds for the person's server to answer.").tag(config=True)
    start_timeout = Integer(7 * 24 * 3600, help="Each site has its own; this one is no limit.").tag(
        config=True
    )
    right_interval = Float(
        RIGHT_S, help="Seconds after which a running session's right is asked for again."
    ).tag(config=True)
    startup_poll_interval = Float(FIRST_QUERY_S)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.session: Session | None = None
        self.submitted: asyncio.Future[str] | None = None
        self._enrolled: asyncio.Future[None] | None = None
        self._starting = False
        self._stopping = False
        self._lost: str | None = None
        self._refusal: str | None = None
        self._events: list[dict[str, Any]] = []
        self._told = asyncio.Event()
        self._refused_connections = 0
        self._right_checked = float("-inf")
        self._looking = asyncio.Lock()
        self._ending = asyncio.Lock()

    # -- choice -------------------------------------------------------------------------------

    @default("apply_user_options")
    def _default_apply_user_options(self) -> Callable[[Any, Any], None]:
        # JupyterHub would write the keys of options that nobody takes into its log.
        return _check_options

    async def get_options_form(self) -> str:
        """Return the spawn page's form with what this person may have."""
        try:
            choices = await current().choices(self.user.name, self._groups())
        except KakehashiError as error:
            raise HTTPError(503, "%s", str(error)) from error
        refusal, self._refusal = self._refusal, None
        form: str = pages.render_form(choices, i18n.current_language(), refusal)
        return form

    def options_from_form(self, form_data: dict[str, list[Any]]) -> dict[str, Any]:
        """Turn the posted form into options."""
        try:
            return from_form(form_data)
        except OptionsError as error:
            self.refuse("options", error)

    def options_from_query(self, query_data: dict[str, list[Any]]) -> dict[str, Any]:  # noqa: ARG002 - JupyterHub's signature
        """Refuse: a link on some page must not start a session of whoever follows it."""
        self.refuse("options", OptionsError("(form): choose here; a link cannot choose for you"))

    def refuse(self, reason: str, error: KakehashiError, status_code: int = 400) -> NoReturn:
        """Record why a session cannot start, and say it to the person."""
        self._refusal = str(error)
        current().record("start-refused", self.user.name, {"reason": reason, "words": str(error)})
        raise NotStartedError(str(error), reason=reason, status_code=status_code) from error

    def _groups(self) -> list[str]:
        return sorted(group.name for group in self.user.groups)

    # -- start --------------------------------------------------------------------------------

    async def start(self) -> str:
        """Open a session, queue its job, and wait until its node has enrolled.

        Returns
        -------
        str
            Address of the person's server.

        Raises
        ------
        NotStartedError
            With words for the person: what may not be, what the scheduler or the node said.
        """
        self._starting, self._stopping, self._lost = True, False, None
        self._refused_connections = 0
        self._events.clear()
        try:
            return await self._start()
        except OptionsError as error:
            self.refuse("options", error)
        except RefusedError as error:
            self.refuse("refused", error, 403)
        except SessionError as error:
            self.refuse("session", error, 500)
        except (SiteError, StoreError) as error:
            self.refuse("unavailable", error, 503)
        finally:
            self._starting = False

    async def _start(self) -> str:
        portal = current()
        person, groups = self.user.name, self._groups()
        options = parse(self.user_options)
        await portal.check_store()
        projects = await portal.authority.projects(groups)
        chosen = choose(options, person, portal.config.sites, projects)
        opened = await portal.authority.open_session(
            person=person,
            groups=groups,
            project=options.project,
            site=options.site,
            hours=options.hours,
            software=portal.software,
        )
        self.submitted = asyncio.get_running_loop().create_future()
        self._enrolled = asyncio.get_running_loop().create_future()
        self._right_checked = time.monotonic()
        self.session = Session(
            session=opened.session,
            site=options.site,
            account=chosen.account,
            project=options.project,
            queue=options.queue,
            ends_at=opened.ends_at,
            ticket_sha256=opened.ticket.sha256(),
        )
        portal.add(opened.session, self)
        enter = {
            "session": opened.session,
            "ticket": opened.ticket.reveal(),
            "portal_url": chosen.site.portal_url or portal.settings.url,
            "portal_ca": portal.portal_ca(),
            "site": options.site,
            "node": chosen.site.node.model_dump(mode="json"),
            "software": portal.software,
        }
        # Not awaited directly: who gives up now must still learn the job's id, to end it.
        task = asyncio.ensure_future(
            portal.sites[options.site].submit(
                chosen.account,
                chosen.queue,
                options.gpus,
                math.ceil(options.hours * MINUTES),
                enter,
            )
        )
        task.add_done_callback(self._on_submitted)
        await asyncio.shield(self.submitted)
        self._save()
        self.log.info(
            "%s: session %s: job %s at %s",
            self._log_name,
            opened.session,
            self.job_id,
            options.site,
        )
        self._tell("submitted", 10, "Your session is in the scheduler's hands")
        await self._wait_enrolled(chosen.site)
        session = self.session
        if session is None:
            raise SessionError("the session was stopped while it started")
        self._save()
        self._tell("starting", 80, "JupyterLab is starting")
        await self._wait_listening(session, chosen.site)
        portal.changed(options.site)
        return _address(session)

    def _on_submitted(self, task: asyncio.Task[str]) -> None:
        submitted = self.submitted
        if submitted is None or submitted.done():
            return
        error = task.exception()
        if error is None:
            self.job_id = task.result()
            submitted.set_result(task.result())
        else:
            submitted.set_exception(error)
            # Who waits gets it; who no longer waits must not be called careless in the log.
            submitted.exception()

    async def _wait_enrolled(self, site: Site) -> None:
        """Wait in the queue as long as the site allows, and then for the node."""
        pause = FIRST_QUERY_S
        submitted_at = time.monotonic()
        running_since: float | None = None
        enrolled = self._enrolled
        if enrolled is None:
            raise SessionError("the session was stopped while it started")
        while not enrolled.done():
            state = await self._query()
            if state.state == "ended" and not enrolled.done():
                raise SessionError(f"the job ended before the session was ready: {state.reason}")
            if state.state == "pending":
                self._tell("queued", 20, _waiting(state), state.reason, state.starts_at)
            elif state.state == "running":
                running_since = running_since or time.monotonic()
                self._tell("preparing", 40, f"The node {_first(state.hosts)} prepares your session")
            now = time.monotonic()
            if running_since is not None and now - running_since > site.start_timeout_s:
                raise SessionError(
                    f"the job runs at {site.title}, but no session came of it within "
                    f"{site.start_timeout_s} s; tell the portal's operators"
                )
            if running_since is None and now - submitted_at > site.queue_timeout_hours * 3600:
                raise SessionError(
                    f"no place at {site.title} within {site.queue_timeout_hours:g} h; "
                    "try again later, or with fewer GPUs"
                )
            await asyncio.wait([enrolled], timeout=pause)
            pause = min(pause * 1.5, SLOWEST_QUERY_S)
        enrolled.result()

    async def _wait_listening(self, session: Session, site: Site) -> None:
        """Wait until the person's server answers.

        JupyterHub would wait too, but with pauses that grow to seconds.
        """
        deadline = time.monotonic() + site.start_timeout_s
        asked = time.monotonic()
        while await self._knock(session) != "open":
            now = time.monotonic()
            if self.session is None:
                raise SessionError("the session was stopped while it started")
            if self._lost is not None:
                raise SessionError(f"right lost: {self._lost}")
            if now > deadline:
                raise SessionError(
                    f"JupyterLab did not answer within {site.start_timeout_s} s; its log is "
                    f".kakehashi/logs/{session.session}.log in the project's work folder"
                )
            if now - asked > SLOWEST_QUERY_S:
                asked = now
                state = await self._query()
                if state.state == "ended":
                    raise SessionError(f"the job ended while JupyterLab started: {state.reason}")
            await asyncio.sleep(KNOCK_S)

    def _save(self) -> None:
        self.orm_spawner.state = self.get_state()
        self.user.db.commit()

    def _site(self, name: str) -> SiteClient:
        try:
            return current().sites[name]
        except KeyError:
            raise SiteError(f"the site {name!r} is no longer configured") from None

    async def _query(self) -> JobState:
        if self.session is None or not self.job_id:
            return JobState("ended", reason="no job")
        try:
            return await self._site(self.session.site).query(self.session.account, self.job_id)
        except SiteError as error:
            return JobState("unknown", reason=str(error))

    # -- what the endpoints tell --------------------------------------------------------------

    async def query_job_status(self) -> JobState:
        """Ask the scheduler for the job's state."""
        return await self._query()

    def enrol(
        self,
        host: str,
        port: int,
        hub_port: int,
        places: server.Places,
        grant: dict[str, Any],
    ) -> dict[str, str]:
        """Note where the session's server will listen and return that server's environment.

        Parameters
        ----------
        host : str
            Name or address that the proxy reaches the node by.
        port : int
            Port of the node for the server, the same inside the payload.
        hub_port : int
            Port of the payload's loopback that leads to the hub.
        places : server.Places
            Where the server finds its files.
        grant : dict
            The first grant; the session's time counts from it.
        """
        if self.session is None or self._enrolled is None or self.session.enrolled:
            raise RefusedError("replayed", "this session has enrolled already")
        self.session = replace(
            self.session,
            host=host,
            port=port,
            ends_at=_by_own_clock(grant, "ends_at"),
            lease_expires_at=_by_own_clock(grant, "expires_at"),
        )
        self.ip, self.port = "127.0.0.1", port
        self.cert_paths = places.cert_paths
        self.hub_connect_url = f"https://127.0.0.1:{hub_port}"
        environment: dict[str, str] = self.get_env()
        if not self._enrolled.done():
            self._enrolled.set_result(None)
        return environment

    def fail(self, words: str) -> None:
        """Note that the session cannot start, in the node's own words."""
        if self._enrolled is not None and not self._enrolled.done():
            self._enrolled.set_exception(SessionError(words))
            self._enrolled.exception()

    def renewed(self, grant: dict[str, Any]) -> None:
        """Note a renewal: the session's keeper is alive."""
        if self.session is not None:
            lease_expires_at = _by_own_clock(grant, "expires_at")
            self.session = replace(self.session, lease_expires_at=lease_expires_at)
            self._refused_connections = 0

    def lose_right(self, reason: str) -> None:
        """End the session, because the person may not have it any longer."""
        self._lost = reason
        asyncio.ensure_future(self.poll_and_notify()).add_done_callback(_swallow)

    def left(self) -> None:
        """Look at the job soon: the wrapper says that it leaves."""
        if not self._stopping and not self._starting:
            asyncio.get_running_loop().call_later(
                1.0,
                lambda: asyncio.ensure_future(self.poll_and_notify()).add_done_callback(_swallow),
            )

    # -- while it runs ------------------------------------------------------------------------

    async def poll(self) -> int | None:
        """Say whether the session runs: None if so, else an exit status.

        The scheduler's silence is not an end. The scheduler's "running" is not enough: where
        nobody listens at the server's port any more, the session is dead.
        """
        if self._starting or self._stopping:
            return None
        # One at a time: a second look must not take the first one's ending for the job's own.
        async with self._looking:
            return await self._look()

    async def _look(self) -> int | None:
        if self.session is None:
            return 0
        if not self.session.enrolled:
            # Start was given up, or the hub died in the middle of it.
            await self.stop()
            return 1
        state = await self._query()
        if self._stopping:
            return None
        if state.state == "ended":
            await self._end("the job has ended", state)
            return 1
        if state.state == "unknown":
            self.log.warning("%s: the scheduler does not answer: %s", self._log_name, state.reason)
        reason = await self._reason_to_leave(state)
        if reason is None or self._stopping:
            return None
        await self._leave(reason)
        return 1

    async def _reason_to_leave(self, state: JobState) -> str | None:
        if self._lost is None:
            await self._check_right()
        if self._lost is not None:
            return f"right lost: {self._lost}"
        if state.state == "running" and not await self._listens():
            return "nobody listens at the session's port, though the job is running"
        return None

    async def _check_right(self) -> None:
        ask = getattr(self.authenticator, "ask", None)
        if ask is None or time.monotonic() - self._right_checked < self.right_interval:
            return
        self._right_checked = time.monotonic()
        # The answer comes back through lose_right, for every session of the person.
        await ask(self.user)

    async def _listens(self) -> bool:
        """Knock at the session's port.

        Only a refused connection, some times in a row and without a renewal between, counts as
        dead at once: a node that cannot be reached may be behind a cut network, and goes on by
        the site's ``offline_max_hours``.
        """
        session = self.session
        # While it starts, JupyterHub itself waits for the server, and not without end.
        if session is None or self._stopping or self.pending:
            return True
        outcome = await self._knock(session)
        if outcome == "open":
            self._refused_connections = 0
            return True
        self.log.warning("%s: the server does not answer its knock: %s", self._log_name, outcome)
        if outcome == "refused":
            self._refused_connections += 1
            return self._refused_connections < REFUSALS_BEFORE_DEAD
        offline_hours = current().config.sites[session.site].offline_max_hours
        lapsed = _parse(session.lease_expires_at) + dt.timedelta(hours=offline_hours)
        return dt.datetime.now(dt.UTC) < lapsed

    async def _knock(self, session: Session) -> str:
        settings = self.user.settings
        context = make_ssl_context(
            settings.get("internal_ssl_key"),
            settings.get("internal_ssl_cert"),
            cafile=settings.get("internal_ssl_ca"),
        )
        client = SimpleAsyncHTTPClient(force_instance=True)
        try:
            await client.fetch(
                HTTPRequest(
                    f"{_address(session)}{self.server.base_url}api",
                    connect_timeout=HEALTH_TIMEOUT_S,
                    request_timeout=HEALTH_TIMEOUT_S,
                    follow_redirects=False,
                    ssl_options=context,
                ),
                raise_error=False,
            )
        except (ConnectionRefusedError, ValueError):
            # ValueError: tornado's word for a connection that the keeper closed before TLS
            # began, because nobody listens behind it yet.
            return "refused"
        except (OSError, HttpStatusError):
            return "unreachable"
        finally:
            client.close()
        return "open"

    # -- end ----------------------------------------------------------------------------------

    async def stop(self, now: bool = False) -> None:  # noqa: FBT001, FBT002 - JupyterHub's signature
        """End the job, wait until it has gone, and have the receipt written."""
        if self.session is None:
            return
        await self._leave("stopped", wait=not now)

    async def _leave(self, reason: str, *, wait: bool = True) -> None:
        self._stopping = True
        try:
            if self.submitted is not None and not self.submitted.done():
                await asyncio.wait([self.submitted])
            if self.session is None:
                return
            state = JobState("ended", reason="no job")
            if self.job_id:
                await self._announce_end(self.session.session, reason)
                await self._cancel(self.session.site, self.session.account, self.job_id)
                state = await self._gone() if wait else JobState("unknown")
            await self._end(reason, state)
        finally:
            self._stopping = False

    async def _announce_end(self, session: str, reason: str) -> None:
        """Have the store close the link soon, also should the scheduler be silent for long.

        The grace is for what the wrapper has to save, and for its report.
        """
        try:
            await current().authority.announce_end(session, reason, GRACE_S)
        except (StoreError, RefusedError) as error:
            self.log.warning("%s: the store does not know that it ends: %s", self._log_name, error)

    async def _cancel(self, site: str, account: str, job: str) -> None:
        async def cancel() -> None:
            await self._site(site).cancel(account, job)

        try:
            await cancel()
        except (SiteError, RefusedError) as error:
            self.log.warning("%s: job %s: %s", self._log_name, job, error)
            current().site_outboxes[site].add(f"end of job {job}", cancel)

    async def _gone(self) -> JobState:
        deadline = time.monotonic() + STOP_S
        pause = FIRST_QUERY_S
        while True:
            state = await self._query()
            if state.state == "ended":
                return state
            if time.monotonic() > deadline:
                self.log.error("%s: job %s has not gone", self._log_name, self.job_id)
                return state
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, SLOWEST_QUERY_S)

    async def _end(self, reason: str, state: JobState) -> None:
        async with self._ending:
            session, self.session = self.session, None
            if session is None:
                return
            portal = current()
            portal.sessions.pop(session.session, None)
            portal.changed(session.site)
            scheduler = {
                "site": session.site,
                "job": self.job_id,
                "state": state.state,
                "reason": state.reason,
            }
            person = self.user.name
            about = {
                "session": session.session,
                "project": session.project,
                "site": session.site,
            }

            async def end() -> None:
                receipt = await portal.authority.end(session.session, reason, scheduler)
                portal.receipts.keep(person, about, receipt)

            try:
                await end()
            except StoreError as error:
                self.log.warning("%s: no receipt yet: %s", self._log_name, error)
                portal.outbox.add(f"end of session {session.session}", end)
            except RefusedError as error:
                self.log.warning("%s: no receipt: %s", self._log_name, error)
            self.log.info("%s: session %s: %s", self._log_name, session.session, reason)

    # -- saved state --------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return what a restarted hub needs."""
        state: dict[str, Any] = super().get_state()
        if self.session is not None:
            state["session"] = asdict(self.session)
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a session that ran before the hub's restart."""
        super().load_state(state)
        if "session" in state:
            self.session = Session(**state["session"])
            current().add(self.session.session, self)

    def clear_state(self) -> None:
        """Forget the session; it has been ended, or none was begun."""
        super().clear_state()
        if self.session is not None:
            current().sessions.pop(self.session.session, None)
        self.session, self.submitted, self._enrolled = None, None, None
        self._starting = self._stopping = False
        self._lost = None

    # -- pages --------------------------------------------------------------------------------

    def _tell(
        self,
        stage: str,
        progress: int,
        message: str,
        reason: str | None = None,
        starts_at: str | None = None,
    ) -> None:
        event = {
            "stage": stage,
            "progress": progress,
            "message": message,
            "reason": reason,
            "starts_at": starts_at,
        }
        if not self._events or self._events[-1] != event:
            self._events.append(event)
            told, self._told = self._told, asyncio.Event()
            told.set()

    async def progress(self) -> AsyncIterator[dict[str, Any]]:
        """Yield what has happened, and what happens, until JupyterHub stops listening."""
        shown = 0
        while True:
            told = self._told
            for event in self._events[shown:]:
                yield event
            shown = len(self._events)
            await told.wait()

    def page_session(self) -> dict[str, str]:
        """Return the running session for the home page; empty where there is none."""
        if self.session is None or not self.session.enrolled:
            return {}
        return {"session": self.session.session, "ends_at": self.session.ends_at}

    def page_receipts(self) -> list[dict[str, Any]]:
        """Return the last receipts for the home page, newest first."""
        return current().receipts.of(self.user.name)

    # -- certificates -------------------------------------------------------------------------

    async def create_certs(self) -> dict[str, str]:
        """Make none yet: the host is known at enrolment only."""
        return {}

    async def move_certs(self, paths: dict[str, str]) -> dict[str, str]:
        """Move none: they travel in the answer to the enrolment."""
        return paths

    # -- what batchspawner would do through a shell --------------------------------------------

    async def run_command(self, *_arguments: Any, **_options: Any) -> NoReturn:
        """Refuse; nothing here goes through a shell."""
        raise NotImplementedError("sessions are submitted by the site's agent")


def _check_options(spawner: KakehashiSpawner, options: object) -> None:
    """Refuse malformed options before anything else looks at them."""
    try:
        parse(options)
    except OptionsError as error:
        spawner.refuse("options", error)


def _waiting(state: JobState) -> str:
    start = f", estimated start {state.starts_at}" if state.starts_at else ""
    return f"Waiting in the queue ({state.reason}){start}"


def _first(hosts: tuple[str, ...]) -> str:
    return hosts[0] if hosts else "(not named)"


def _address(session: Session) -> str:
    """Return where the hub and its proxy reach a session's server."""
    return f"https://{_bracketed(session.host or '')}:{session.port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _parse(text: str | None) -> dt.datetime:
    try:
        moment = dt.datetime.fromisoformat(text or "")
    except ValueError:
        return dt.datetime.now(dt.UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)


def _by_own_clock(grant: dict[str, Any], name: str) -> str:
    """Return what this hub's clock shows at a time of a grant; the store's may be another."""
    left = _parse(str(grant.get(name))) - _parse(str(grant.get("issued_at")))
    return (dt.datetime.now(dt.UTC) + left).strftime("%Y-%m-%dT%H:%M:%SZ")


def _swallow(task: asyncio.Future[Any]) -> None:
    # poll_and_notify logs its callbacks' failures itself.
    if not task.cancelled():
        task.exception()
