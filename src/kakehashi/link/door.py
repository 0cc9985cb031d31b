"""The session's sockets: each connection through one is a channel to the store."""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING

from kakehashi.errors import LinkClosedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kakehashi.link.session import Session

_CONNECT_S = 30.0


def enter(path: Path) -> socket.socket:
    """Open a channel through a socket.

    Raises
    ------
    OSError
        It is not there, or does not answer.
    """
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.settimeout(_CONNECT_S)
        channel.connect(str(path))
    except BaseException:
        channel.close()
        raise
    return channel


def enter_open(path: Path, what: str) -> socket.socket:
    """Open a channel through a socket that is there for as long as the session is.

    Parameters
    ----------
    path : Path
    what : str
        What it leads to, for the error.

    Raises
    ------
    LinkClosedError
        There is no such socket any more: the session has ended.
    OSError
        It does not answer.
    """
    try:
        return enter(path)
    except FileNotFoundError:
        raise LinkClosedError(
            f"{what} is closed: no {path}; the session has ended, start a new one"
        ) from None


def to_store(session: Session) -> list[Callable[[], socket.socket]]:
    """Return what opens a channel to each endpoint of the store, as a reader takes it.

    The first one ends with the session; one of the others may be missing meanwhile.
    """
    first = partial(enter_open, session.socket, "the link to the store")
    return [first, *(partial(enter, path) for path in session.replicas)]
