"""What may be asked of a site's agent: requests and the site's own file, strictly checked.

The agent runs as root at a site and takes its requests from the hub. So nothing is taken on
trust: every field has a type, a range and a pattern, unknown fields are refused, and the
accounts, queues and program come from a file that only the site's root can write.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kakehashi.errors import SessionError, SiteError
from kakehashi.session.plan import Node
from kakehashi.site.witness import Witness

if TYPE_CHECKING:
    from pathlib import Path

ACCOUNT = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
QUEUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
GPU_TYPE = re.compile(r"[A-Za-z0-9_-]{1,32}")
SESSION = re.compile(r"[0-9a-f]{32}")
TICKET = re.compile(r"[A-Za-z0-9_-]{43}=?")
SITE = re.compile(r"[a-z][a-z0-9-]{0,31}")
WITNESS_KEYS = frozenset({"site", "key", "portal_url", "portal_ca"})
SAFE_PATH = re.compile(r"(/[A-Za-z0-9._+-]+)+")

# A pipe holds 64 KiB; a document of half that can be written before anyone reads it.
MAX_DOCUMENT = 32 * 1024
ENTER_KEYS = frozenset({"session", "ticket", "portal_url", "portal_ca", "site", "node", "software"})
JOB_KEYS = frozenset(
    {"name", "queue", "gpus", "gpu_type", "cpus", "memory_mb", "minutes", "software", "enter"}
)


class RequestError(SiteError):
    """A request, or the site's file, breaks a rule; ``code`` goes back to the hub.

    Attributes
    ----------
    code : str
        ``malformed``, ``account``, ``queue``, ``software``, ``scheduler`` or ``site-file``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class SiteFile:
    """The site's own word on what its agent may do; only its root can write it.

    Attributes
    ----------
    scheduler : str
        ``slurm`` or ``none``.
    accounts : frozenset of str
        Local accounts that sessions may run as.
    software : str
        Where Kakehashi is installed on the nodes; the only program that is ever started.
    queues : frozenset of str
        Partitions that may be asked for.
    commands : str
        Folder of the scheduler's commands.
    slurm_conf : str or None
        ``SLURM_CONF`` for them, where it is not the default.
    node : dict or None
        What of a node the payload may see; it then replaces what the hub sends.
    witness : Witness or None
        How root reports of nodes after jobs.
    tidy : tuple of str
        Folders of a node's own in which files of an account are removed after its last job.
    """

    scheduler: str
    accounts: frozenset[str]
    software: str
    queues: frozenset[str]
    commands: str = "/usr/bin"
    slurm_conf: str | None = None
    node: dict[str, Any] | None = None
    witness: Witness | None = None
    tidy: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One session's job, checked.

    ``document`` is the one line of ASCII JSON that the wrapper reads on standard input.
    ``minutes`` is the time limit, ``memory_mb`` the memory of the node in MiB.
    """

    queue: str
    gpus: int
    gpu_type: str | None
    cpus: int
    memory_mb: int
    minutes: int
    document: str


@dataclass(frozen=True)
class JobState:
    """What the scheduler says of a job.

    Attributes
    ----------
    state : str
        ``pending``, ``running``, ``ended`` or ``unknown``. ``unknown`` means that the scheduler
        gave no answer that can be understood; it never means that the job has ended.
    hosts : tuple of str
        Names of its nodes while it runs.
    reason : str
        The scheduler's own word on why.
    starts_at : str or None
        Estimated start of a pending job, ISO 8601 with ``Z``.
    """

    state: str
    hosts: tuple[str, ...] = ()
    reason: str = ""
    starts_at: str | None = None


@dataclass(frozen=True)
class QueueState:
    """GPUs of a queue on nodes that take jobs, and how many are free now.

    ``starts_at`` is when the first running job of a full queue reaches its time limit.
    """

    name: str
    gpus: int
    free_gpus: int
    starts_at: str | None = None


class Scheduler(Protocol):
    """A kind of scheduler; each call runs as the person's account, privileges dropped."""

    def submit(self, job: Job) -> str:
        """Queue a job and return its id."""

    def query(self, job_id: str) -> JobState:
        """Say what the scheduler knows of a job."""

    def cancel(self, job_id: str) -> None:
        """End a job; one that has ended already is no error."""

    def resources(self) -> tuple[QueueState, ...]:
        """Count the GPUs of each queue."""


def _integer(value: object, name: str, low: int, high: int) -> int:
    # bool is an int in Python, and "true GPUs" is not a number anyone meant.
    if type(value) is not int or not low <= value <= high:
        raise RequestError("malformed", f"{name}: expected an integer from {low} to {high}")
    return value


def _text(value: object, name: str, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise RequestError("malformed", f"{name}: expected text of the form {pattern.pattern}")
    return value


def _mapping(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError("malformed", f"{name}: expected a JSON object")
    return value


def _exactly(value: dict[str, Any], keys: frozenset[str], name: str) -> None:
    if set(value) != keys:
        odd = sorted(set(value) ^ keys)
        raise RequestError("malformed", f"{name}: missing or unknown fields: {odd[:8]!r}")


def check_account(value: object, site: SiteFile) -> str:
    """Return the account, if the site lists it."""
    account = _text(value, "account", ACCOUNT)
    if account not in site.accounts:
        raise RequestError("account", f"account {account!r} is not in this site's file")
    return account


def check_job(value: object, site: SiteFile) -> Job:
    """Check the ``job`` of a submit request against the rules and the site's file.

    Raises
    ------
    RequestError
        Names the first field that breaks a rule, and the rule.
    """
    job = _mapping(value, "job")
    _exactly(job, JOB_KEYS, "job")
    if job["name"] != "kakehashi":
        raise RequestError("malformed", "name: must be 'kakehashi'")
    queue = _text(job["queue"], "queue", QUEUE)
    if queue not in site.queues:
        raise RequestError("queue", f"queue {queue!r} is not in this site's file")
    if job["software"] != site.software:
        raise RequestError("software", f"software: this site's file names {site.software!r}")
    gpu_type = job["gpu_type"]
    if gpu_type is not None:
        gpu_type = _text(gpu_type, "gpu_type", GPU_TYPE)
    return Job(
        queue=queue,
        gpus=_integer(job["gpus"], "gpus", 0, 64),
        gpu_type=gpu_type,
        cpus=_integer(job["cpus"], "cpus", 1, 1024),
        memory_mb=_integer(job["memory_mb"], "memory_mb", 256, 1 << 26),
        minutes=_integer(job["minutes"], "minutes", 1, 31 * 24 * 60),
        document=_document(job["enter"], site),
    )


def _document(value: object, site: SiteFile) -> str:
    enter = _mapping(value, "enter")
    _exactly(enter, ENTER_KEYS, "enter")
    if site.node is not None:
        # The site's own word: a hub in wrong hands must not widen what a payload sees.
        enter = {**enter, "node": site.node}
    _text(enter["session"], "enter.session", SESSION)
    if not isinstance(enter["ticket"], str) or not TICKET.fullmatch(enter["ticket"]):
        # Not through _text: no message may come near the ticket.
        raise RequestError("malformed", "enter.ticket: is not a ticket")
    # The wrapper takes programs and a preloaded library from there, outside of the payload's
    # world: another folder than the site's would let a hub run what it likes.
    if _mapping(enter["node"], "enter.node").get("software") != site.software:
        raise RequestError(
            "software", f"enter.node.software: this site's file names {site.software!r}"
        )
    document = json.dumps(enter, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    if len(document) > MAX_DOCUMENT:
        raise RequestError("malformed", f"enter: longer than {MAX_DOCUMENT} bytes")
    return document


def read_site_file(path: Path) -> SiteFile:
    """Read the site's file.

    Raises
    ------
    RequestError
        It cannot be read, others than root can write it, or it breaks a rule.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = json.loads(file.read(1 << 20))
    except OSError as error:
        raise RequestError("site-file", f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RequestError("site-file", f"{path}: is not valid JSON") from error
    # An agent that runs as root must not be led by a file that somebody else can change.
    owners = {0} if os.geteuid() == 0 else {0, os.geteuid()}
    if status.st_uid not in owners or stat.S_IMODE(status.st_mode) & 0o022:
        raise RequestError("site-file", f"{path}: must belong to root and be writable by root only")
    try:
        return _site_file(data)
    except RequestError as error:
        raise RequestError("site-file", f"{path}: {error}") from None


def _site_file(value: object) -> SiteFile:
    data = _mapping(value, "(file)")
    needed = {"scheduler", "accounts", "software", "queues"}
    optional = {"commands", "slurm_conf", "node", "witness", "tidy"}
    if not needed <= set(data) <= needed | optional:
        raise RequestError(
            "site-file", f"expected the keys {sorted(needed)}, and of {sorted(optional)} any"
        )
    if data["scheduler"] not in {"slurm", "none"}:
        raise RequestError("site-file", "scheduler: expected 'slurm' or 'none'")
    slurm_conf = data.get("slurm_conf")
    return SiteFile(
        scheduler=data["scheduler"],
        accounts=_names(data["accounts"], "accounts", ACCOUNT),
        software=_text(data["software"], "software", SAFE_PATH),
        queues=_names(data["queues"], "queues", QUEUE),
        commands=_text(data.get("commands", "/usr/bin"), "commands", SAFE_PATH),
        slurm_conf=None if slurm_conf is None else _text(slurm_conf, "slurm_conf", SAFE_PATH),
        node=_node(data["node"], data["software"]) if "node" in data else None,
        witness=_witness(data["witness"]) if "witness" in data else None,
        tidy=tuple(sorted(_names(data.get("tidy", []), "tidy", SAFE_PATH))),
    )


def _node(value: object, software: str) -> dict[str, Any]:
    node = {**_mapping(value, "node"), "software": software}
    try:
        Node.parse(node)
    except SessionError as error:
        raise RequestError("site-file", str(error)) from None
    return node


def _witness(value: object) -> Witness:
    data = _mapping(value, "witness")
    _exactly(data, WITNESS_KEYS, "witness")
    authority = data["portal_ca"]
    url = data["portal_url"]
    if not isinstance(url, str) or not url.startswith(("https://", "http://127.0.0.1:")):
        raise RequestError("site-file", "witness.portal_url: expected an https address")
    return Witness(
        site=_text(data["site"], "witness.site", SITE),
        key=_text(data["key"], "witness.key", SAFE_PATH),
        portal_url=url,
        portal_ca=None if authority is None else _text(authority, "witness.portal_ca", SAFE_PATH),
    )


def _names(value: object, name: str, pattern: re.Pattern[str]) -> frozenset[str]:
    if not isinstance(value, list):
        raise RequestError("site-file", f"{name}: expected a list of names")
    return frozenset(_text(item, name, pattern) for item in value)
