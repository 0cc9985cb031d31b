"""Sites as the spawner sees them: typed requests to an agent over some transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kakehashi.errors import RefusedError, SiteError
from kakehashi.site.job import JobState, QueueState
from kakehashi_spawners.transport import LocalTransport, Transport

if TYPE_CHECKING:
    from kakehashi.config import Queue, Site

STATES = frozenset({"pending", "running", "ended", "unknown"})


@dataclass(frozen=True)
class SiteClient:
    """One site.

    Attributes
    ----------
    name : str
        Its name in the configuration.
    site : Site
        Its configuration.
    transport : Transport
        The way to its agent.
    """

    name: str
    site: Site
    transport: Transport

    async def submit(
        self, account: str, queue: Queue, gpus: int, minutes: int, enter: dict[str, Any]
    ) -> str:
        """Queue a session's job and return its id.

        Parameters
        ----------
        account : str
            The person's own account at the site.
        queue : Queue
            Where to; it gives processors and memory.
        gpus : int
            How many GPUs.
        minutes : int
            Time limit.
        enter : dict
            What the wrapper reads on its standard input.

        Raises
        ------
        RefusedError
            The agent or the scheduler refused.
        SiteError
            The agent gave no answer.
        """
        job = {
            "name": "kakehashi",
            "queue": queue.name,
            "gpus": gpus,
            "gpu_type": queue.gpu_type if gpus else None,
            "cpus": queue.cpus,
            "memory_mb": queue.memory_mb,
            "minutes": minutes,
            "software": str(self.site.node.software),
            "enter": enter,
        }
        answer = await self._call("submit", account=account, job=job)
        return _text(answer, "job")

    async def query(self, account: str, job: str) -> JobState:
        """Ask for a job's state; whatever goes wrong on the way is ``unknown``, never ``ended``."""
        try:
            answer = await self._call("query", account=account, job=job)
        except (SiteError, RefusedError) as error:
            return JobState("unknown", reason=str(error))
        state, hosts, reason = answer.get("state"), answer.get("hosts"), answer.get("reason")
        starts_at = answer.get("starts_at")
        if state not in STATES or not isinstance(hosts, list):
            return JobState("unknown", reason="the site's agent gave no known state")
        return JobState(
            state,
            tuple(host for host in hosts if isinstance(host, str)),
            reason if isinstance(reason, str) else "",
            starts_at if isinstance(starts_at, str) else None,
        )

    async def cancel(self, account: str, job: str) -> None:
        """End a job; one that has ended already is no error."""
        await self._call("cancel", account=account, job=job)

    async def resources(self) -> tuple[QueueState, ...]:
        """Ask for the GPUs of each queue."""
        answer = await self._call("resources")
        queues = answer.get("queues")
        try:
            return tuple(QueueState(**queue) for queue in queues or ())
        except TypeError:
            raise SiteError("the site's agent gave no known list of queues") from None

    async def _call(self, verb: str, **fields: Any) -> dict[str, Any]:
        answer = await self.transport.call(
            {"verb": verb, "scheduler": self.site.scheduler, **fields}
        )
        if not answer["ok"]:
            raise RefusedError(_text(answer, "error"), f"{self.name}: {_text(answer, 'message')}")
        return answer


def connect(name: str, site: Site) -> SiteClient:
    """Make the client of a configured site."""
    return SiteClient(name, site, LocalTransport(site.agent))


def _text(answer: dict[str, Any], key: str) -> str:
    value = answer.get(key)
    if not isinstance(value, str):
        raise SiteError(f"the site's agent left out {key!r}")
    return value
