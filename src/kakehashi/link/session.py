"""What a payload can know about the session that it runs in.

The session wrapper writes two files into the payload's private ``/run/kakehashi``:
``session.json`` once, and ``lease.json`` anew (replaced whole) at each change. On a node without
namespaces they lie elsewhere, and the environment's ``KAKEHASHI_SESSION`` names the first one.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from kakehashi.errors import SessionError
from kakehashi.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_PATH = Path("/run/kakehashi/session.json")
ENVIRONMENT = "KAKEHASHI_SESSION"

LeaseState = Literal["live", "offline", "ending"]
_LEASE_STATES = frozenset({"live", "offline", "ending"})
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ManifestReference:
    """Where the manifest lies at the store, and the hash that the grant gives for it."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Lease:
    """The right to reach the store, as the wrapper last knew it.

    Attributes
    ----------
    expires_at : datetime
        When the present certificate lapses (UTC); it is renewed before that.
    ends_at : datetime
        When the session ends at the latest (UTC).
    state : {"live", "offline", "ending"}
        ``offline``: hub or store out of reach, the session goes on for the time being.
    message : str
        A sentence for the person, empty if there is nothing to say.
    catalogue : Secret or None
        What the store's catalogue service wants to see; None where the store has none.
    """

    expires_at: dt.datetime
    ends_at: dt.datetime
    state: LeaseState
    message: str
    catalogue: Secret | None = None


@dataclass(frozen=True)
class Session:
    """A running session, as written by the wrapper into ``session.json``.

    Attributes
    ----------
    session : str
        Identifier, 32 hexadecimal digits.
    person, project, site : str
        Who computes, for what, where.
    ends_at : datetime
        When the session ends at the latest (UTC).
    manifest : ManifestReference
        Path and hash of the list of files that this session may read.
    view, work : Path or None
        Folders of the read-only view and of the project's work folder; ``None`` where the node
        mounts nothing.
    socket : Path
        Unix socket on which each connection is one SFTP channel to the store.
    work_socket : Path
        The same for the project's work folder.
    replicas : tuple of Path
        Further sockets like ``socket``, of endpoints of the store with the same files; usually
        none.
    traffic : tuple of Path
        Files that show the traffic of what serves ``view``, if it keeps count.
    software : str
        Version of Kakehashi at the node.
    source : Path
        The file that this was read from.
    """

    session: str
    person: str
    project: str
    site: str
    ends_at: dt.datetime
    manifest: ManifestReference
    view: Path | None
    work: Path | None
    socket: Path
    work_socket: Path
    replicas: tuple[Path, ...]
    software: str
    traffic: tuple[Path, ...] = ()
    source: Path = field(default=DEFAULT_PATH)

    @classmethod
    def current(cls, path: Path | str | None = None) -> Self:
        """Read the session that this process runs in.

        Parameters
        ----------
        path : Path or str, optional
            The session's file, if it is neither where ``KAKEHASHI_SESSION`` says nor at its
            usual place.

        Raises
        ------
        SessionError
            There is no such file, i.e. this is not inside a session; or it is damaged.
        """
        source = Path(path if path is not None else os.environ.get(ENVIRONMENT) or DEFAULT_PATH)
        data = _Fields(source, _load(source))
        reference = _Fields(source, data.mapping("manifest"), "manifest.")
        sha256 = reference.text("sha256")
        if not _SHA256.fullmatch(sha256):
            raise SessionError(
                f"{source}: manifest.sha256 must be 64 hexadecimal digits; "
                "end this session and start a new one"
            )
        return cls(
            session=data.text("session"),
            person=data.text("person"),
            project=data.text("project"),
            site=data.text("site"),
            ends_at=data.time("ends_at"),
            manifest=ManifestReference(reference.text("path"), sha256),
            view=data.path("view"),
            work=data.path("work"),
            socket=Path(data.text("socket")),
            work_socket=Path(data.text("work_socket")),
            replicas=data.paths("replicas"),
            traffic=data.paths("traffic"),
            software=data.text("software"),
            source=source,
        )

    @classmethod
    def of(cls, session: Session | Path | str | None) -> Session:
        """Return the session that is given, or the one that :meth:`current` finds."""
        return session if isinstance(session, Session) else cls.current(session)

    def lease(self) -> Lease:
        """Return the lease as it stands now; read anew at each call.

        Raises
        ------
        SessionError
            ``lease.json`` is missing beside ``session.json``, or damaged.
        """
        source = self.source.with_name("lease.json")
        data = _Fields(source, _load(source))
        state = data.text("state")
        if state not in _LEASE_STATES:
            raise SessionError(
                f"{source}: state is {state!r}; expected one of {', '.join(sorted(_LEASE_STATES))}"
            )
        return Lease(
            expires_at=data.time("expires_at"),
            ends_at=data.time("ends_at"),
            state=cast("LeaseState", state),
            message=data.text("message"),
            catalogue=None if data.get("catalogue") is None else Secret(data.text("catalogue")),
        )


def _load(source: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(source.read_bytes())
    except FileNotFoundError:
        raise SessionError(
            f"this is only available inside a Kakehashi session: no {source}; "
            "start a session from the portal and run this there"
        ) from None
    except OSError as error:
        raise SessionError(f"{source}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise SessionError(f"{source}: is not valid JSON; start a new session") from error
    if not isinstance(data, dict):
        raise SessionError(f"{source}: must hold a JSON object; start a new session")
    return data


class _Fields:
    """Typed look-up in a JSON object; what is missing or of a wrong type is named."""

    def __init__(self, source: Path, data: Mapping[str, Any], prefix: str = "") -> None:
        self._source = source
        self._data = data
        self._prefix = prefix

    def _wrong(self, key: str, expected: str) -> SessionError:
        return SessionError(
            f"{self._source}: {self._prefix}{key} must be {expected}, "
            f"got {type(self._data.get(key)).__name__}; start a new session"
        )

    def get(self, key: str) -> object:
        return self._data.get(key)

    def text(self, key: str) -> str:
        value = self._data.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def path(self, key: str) -> Path | None:
        if key not in self._data:
            raise SessionError(
                f"{self._source}: {self._prefix}{key} is missing; start a new session"
            )
        value = self._data[key]
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._wrong(key, "a string or null")
        return Path(value)

    def paths(self, key: str) -> tuple[Path, ...]:
        value = self._data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self._wrong(key, "a list of strings")
        return tuple(map(Path, value))

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self._data.get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return value

    def time(self, key: str) -> dt.datetime:
        try:
            value = dt.datetime.fromisoformat(self.text(key))
        except ValueError:
            value = None
        if value is None or value.tzinfo is None:
            raise self._wrong(key, "a time in ISO 8601 with a zone (2025-01-31T12:00:00Z)")
        return value.astimezone(dt.UTC)
