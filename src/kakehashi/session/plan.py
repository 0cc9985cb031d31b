"""What a session is to be: the document that starts it, and the payload's world, as values."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, cast
from urllib.parse import urlsplit

from kakehashi.errors import SessionError
from kakehashi.secret import Secret

HOME = "/home/session"
RUN = "/run/kakehashi"
STORE = "/store"
WORK = "/work"
HOSTNAME = "session"
# Memory that every node has. The name is short: paths of sockets have 107 bytes at most.
MEMORY = "/dev/shm"  # noqa: S108 - a folder of its own is made in it, by a name nobody knows
FOLDER_PREFIX = "kakehashi-"
# In that folder: the scheduler's name of the job, for the site's epilog.
JOB_FILE = "job"

Walls = Literal["namespaces", "account"]
WALLS: tuple[Walls, ...] = ("namespaces", "account")

_SESSION = re.compile(r"[0-9a-f]{32}")
_TICKET = re.compile(r"[A-Za-z0-9_-]{43}=?")
_SITE = re.compile(r"[a-z][a-z0-9-]{0,31}")
_PATH = re.compile(r"(/[^/\0]+)+")
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

# A bind of one of these, or of a folder that holds one, would cover or open the payload's own.
_OWN = ("/dev", "/proc", "/sys", "/run/user", "/tmp", "/var/tmp", HOME, RUN, STORE, WORK)  # noqa: S108 - names inside the payload
_CLOSED_BELOW = ("/dev", "/proc", "/sys", RUN, STORE, WORK, HOME)


@dataclass(frozen=True)
class Node:
    """What the site's configuration says of its compute nodes (paths of the node)."""

    software: str
    read_only: tuple[str, ...]
    devices: tuple[str, ...]
    scratch_mb: int
    allow_unencrypted_swap: bool
    allow_sshfs_view: bool
    walls: Walls = "namespaces"
    allow_no_landlock: bool = False

    @classmethod
    def parse(cls, value: object) -> Self:
        """Check the ``node`` object of the document that starts a session.

        Raises
        ------
        SessionError
            A field is missing, unknown or of the wrong kind; the message names it.
        """
        data = _object(value, "node", frozenset(cls.__dataclass_fields__))
        read_only = tuple(_text(item, "node.read_only", _PATH) for item in _list(data, "read_only"))
        devices = tuple(_text(item, "node.devices") for item in _list(data, "devices"))
        for device in devices:
            if not device.startswith("/dev/") or ".." in device:
                raise SessionError(f"node.devices: {device!r} is not a pattern below /dev")
        scratch = data["scratch_mb"]
        if type(scratch) is not int or scratch < 64:
            raise SessionError(f"node.scratch_mb: expected an integer from 64 up, not {scratch!r}")
        if data["walls"] not in WALLS:
            raise SessionError(f"node.walls: expected one of {WALLS}, not {data['walls']!r}")
        node = cls(
            software=_text(data["software"], "node.software", _PATH),
            read_only=read_only,
            devices=devices,
            scratch_mb=scratch,
            allow_unencrypted_swap=_flag(data, "allow_unencrypted_swap"),
            allow_sshfs_view=_flag(data, "allow_sshfs_view"),
            walls=cast("Walls", data["walls"]),
            allow_no_landlock=_flag(data, "allow_no_landlock"),
        )
        for path in (node.software, *node.read_only):
            check_shared_path(path)
        return node


@dataclass(frozen=True)
class Document:
    """What the wrapper reads on its standard input."""

    session: str
    ticket: Secret
    portal_url: str
    portal_ca: str | None
    site: str
    node: Node
    software: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read and check the document.

        Raises
        ------
        SessionError
            It is not JSON, or a field is missing, unknown or of the wrong kind. The message
            never quotes the document, which holds the ticket.
        """
        try:
            value = json.loads(text)
        except ValueError:
            raise SessionError(
                "standard input: expected one JSON document, as the site's agent writes it"
            ) from None
        data = _object(value, "document", frozenset(cls.__dataclass_fields__))
        ticket = data["ticket"]
        if not isinstance(ticket, str) or not _TICKET.fullmatch(ticket):
            raise SessionError("ticket: is not an enrolment ticket")
        authority = data["portal_ca"]
        if authority is not None and not isinstance(authority, str):
            raise SessionError("portal_ca: expected PEM text or null")
        return cls(
            session=_text(data["session"], "session", _SESSION),
            ticket=Secret(ticket),
            portal_url=_portal(data["portal_url"]),
            portal_ca=authority,
            site=_text(data["site"], "site", _SITE),
            node=Node.parse(data["node"]),
            software=_text(data["software"], "software"),
        )


@dataclass(frozen=True)
class Plan:
    """The payload's world, before it is built.

    Attributes
    ----------
    uid, gid : int
        The person's account on the node.
    user : str
        Its name.
    software : str
        Folder of the software, read-only in the payload; its ``.venv/bin`` leads ``PATH``.
    read_only : tuple of str
        Further paths of the node that the payload may read.
    devices : tuple of str
        Patterns of device files that it gets.
    scratch_mb : int
        Memory for all its temporary folders together, MiB.
    stand_ins : bool
        Put empty memory in the place of the store and the work folder (to check a node).
    folder : str or None
        The session's private folder on the node where there are no namespaces; with them None.
    job : str
        The scheduler's name for the job, left in that folder for the site's epilog.
    server_port, hub_port : int
        TCP ports that the payload may use where its network is the node's; otherwise 0.
    without : frozenset of str
        Protections deliberately left out, so that a test can see the check for each turn red.
        Nothing that starts sessions sets it.
    """

    uid: int
    gid: int
    user: str
    software: str
    read_only: tuple[str, ...]
    devices: tuple[str, ...]
    scratch_mb: int
    stand_ins: bool = False
    folder: str | None = None
    job: str = ""
    server_port: int = 0
    hub_port: int = 0
    without: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return asdict(self) | {"without": sorted(self.without)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the plan that :meth:`to_json` wrote."""
        lists = {name: tuple(value[name]) for name in ("read_only", "devices")}
        return cls(**(value | lists | {"without": frozenset(value["without"])}))


@dataclass(frozen=True)
class Places:
    """Where the payload finds its own folders.

    Attributes
    ----------
    home, temporary, runtime : str
        Private memory: its home, and its folders for temporary and for runtime files.
    run : str
        What the wrapper tells it, read-only.
    shared : str or None
        In the place of ``/dev/shm``, where that is not the payload's own.
    """

    home: str
    temporary: str
    runtime: str
    run: str
    shared: str | None

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """Return the places of a plan."""
        if plan.folder is None:
            return cls(HOME, "/tmp", f"/run/user/{plan.uid}", RUN, None)  # noqa: S108 - the payload's private memory
        names = ("home", "tmp", "rt", "run", "shm")
        return cls(*(f"{plan.folder}/{name}" for name in names))


def private_folder(session: str) -> str:
    """Return the session's folder on a node without namespaces."""
    return f"{MEMORY}/{FOLDER_PREFIX}{session[:12]}"


def check_shared_path(path: str) -> None:
    """Refuse a path of the node that would cover, or lie in, a place of the payload's own.

    Raises
    ------
    SessionError
        Names the path, and the place that it collides with.
    """
    parts = path.split("/")
    if not path.startswith("/") or {".", ".."} & set(parts) or path == "/":
        raise SessionError(f"{path!r} cannot be shown to the payload: not a plain absolute path")
    for own in (*_OWN, "/etc", "/usr"):
        if own == path or own.startswith(path + "/"):
            raise SessionError(
                f"{path} cannot be shown to the payload: it would cover {own}; name a folder below"
            )
    for closed in _CLOSED_BELOW:
        if path.startswith(closed + "/"):
            raise SessionError(
                f"{path} cannot be shown to the payload: {closed} is the payload's own there; "
                "install or bind it elsewhere on the node"
            )


def _object(value: object, name: str, keys: frozenset[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SessionError(f"{name}: expected a JSON object")
    missing, unknown = sorted(keys - set(value)), sorted(set(value) - keys)
    if missing or unknown:
        raise SessionError(f"{name}: missing fields {missing}, unknown fields {unknown}")
    return value


def _list(data: dict[str, Any], name: str) -> list[Any]:
    value = data[name]
    if not isinstance(value, list):
        raise SessionError(f"node.{name}: expected a list")
    return value


def _text(value: object, name: str, pattern: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or not value or any(not char.isprintable() for char in value):
        raise SessionError(f"{name}: expected a text of printable characters")
    if pattern is not None and not pattern.fullmatch(value):
        raise SessionError(f"{name}: {value!r} is not of the form {pattern.pattern}")
    return value


def _flag(data: dict[str, Any], name: str) -> bool:
    value = data[name]
    if type(value) is not bool:
        raise SessionError(f"node.{name}: expected true or false")
    return bool(value)


def _portal(value: object) -> str:
    url = _text(value, "portal_url").rstrip("/")
    parts = urlsplit(url)
    if parts.hostname and (
        parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)
    ):
        return url
    raise SessionError(
        f"portal_url: {url!r} must begin with https:// (http:// only for the loopback address)"
    )
