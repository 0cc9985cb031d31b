"""Messages between the intake and its children: facts as JSON, and bytes, each with its length.

The parent takes nothing for granted of what comes from a child: a child has looked at bytes from
outside, and may be another program by now.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_FACTS = 32 << 20
"""Most bytes of a message's JSON: a report of a million characters, or a large series' hashes."""

GONE, TOO_LONG = "gone", "it took too long"
"""Why nothing comes, or comes any more."""

_LENGTHS = struct.Struct("<IQ")


class Silence(Exception):  # noqa: N818 - it is the end of a conversation, and not always an error
    """The other side is gone, took too long, or said what makes no sense; the text says which."""


@dataclass(frozen=True, slots=True)
class Message:
    """What one side said.

    Attributes
    ----------
    facts : dict
    content : bytearray
    descriptor : int or None
        An open file that came with it; whoever received it closes it.
    """

    facts: dict[str, Any]
    content: bytearray
    descriptor: int | None = None


def say(
    to: socket.socket,
    facts: dict[str, Any],
    content: bytes = b"",
    descriptors: Sequence[int] = (),
) -> None:
    """Send a message; the socket's own timeout holds for each step.

    Raises
    ------
    Silence
        The other side is gone.
    """
    text = json.dumps(facts).encode()
    try:
        socket.send_fds(to, [_LENGTHS.pack(len(text), len(content))], descriptors)
        to.sendall(text)
        to.sendall(content)
    except TimeoutError as error:
        raise Silence(TOO_LONG) from error
    except OSError as error:
        raise Silence(GONE) from error


def hear(
    source: socket.socket, *, longest: int = 0, until: float | None = None, files: bool = False
) -> Message:
    """Receive a message.

    Parameters
    ----------
    source : socket
    longest : int
        Most bytes of content.
    until : float, optional
        Time (monotonic) at which it must be there.
    files : bool
        An open file may come with it.

    Raises
    ------
    Silence
    """
    descriptor: int | None = None
    if files:
        # The first bytes carry it; there are no more than these until we answer.
        try:
            head, found, _, _ = socket.recv_fds(source, _LENGTHS.size, 1)
        except OSError as error:
            raise Silence(GONE) from error
        descriptor = found[0] if found else None
    else:
        head = bytes(_exactly(source, _LENGTHS.size, until))
    if len(head) < _LENGTHS.size:
        raise Silence(GONE)
    text, size = _LENGTHS.unpack(head)
    if text > LONGEST_FACTS or size > longest:
        raise Silence(f"it said more than the {longest} bytes that were asked for")
    raw = _exactly(source, text, until)
    content = _exactly(source, size, until)
    try:
        facts = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Silence("what it said is not JSON") from error
    if not isinstance(facts, dict):
        raise Silence("what it said is no object of JSON")
    return Message(facts, content, descriptor)


def _exactly(source: socket.socket, size: int, until: float | None) -> bytearray:
    # As it comes, not all at once: a length that is a lie costs no memory.
    buffer = bytearray()
    while len(buffer) < size:
        try:
            if until is not None:
                source.settimeout(max(0.001, until - time.monotonic()))
            piece = source.recv(min(size - len(buffer), 1 << 20))
        except TimeoutError as error:
            raise Silence(TOO_LONG) from error
        except OSError as error:
            raise Silence(GONE) from error
        if not piece:
            raise Silence(GONE)
        buffer += piece
    return buffer
