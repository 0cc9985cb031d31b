"""Reads out of sshd's log whom sshd refused by itself, and why.

What a stranger sends stands in these messages. So an address is believed only from the message
that begins a connection, which holds nothing of theirs; every pattern is anchored at both ends;
a reason is one of our own words; and what is quoted is cut short.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from kakehashi.store.authority.sshdlog import Entry

Reason = Literal[
    # The certificate: of a foreign authority, by the book, by its own dates and options.
    "authority",
    "lease",
    "principal",
    "expired",
    "not-yet-valid",
    "address",
    # No certificate at all, no such account, or it never came to that.
    "plain-key",
    "account",
    "no-key",
    "timeout",
    "negotiation",
    "too-many",
    # What somebody wanted who had been let in.
    "shell",
    "command",
    "terminal",
    "agent",
    "x11",
    "subsystem",
    "forward",
    "forward-socket",
    "reverse-forward",
    "reverse-forward-socket",
    "tunnel",
    "request",
]

LONGEST = 100
"""Characters of a stranger's text that are kept."""

MOST = 4096
"""Processes that are remembered; the oldest are forgotten first."""

EARLY = 16
"""Messages of one process that wait until it is known whose they are."""

_T = TypeVar("_T")
_ADDRESS = r"[0-9A-Fa-f.:]{2,45}(?:%[A-Za-z0-9_.-]{1,16})?"
_CONNECTION = re.compile(rf"Connection from ({_ADDRESS}) port (\d{{1,5}}) on .*")
_CHILD = re.compile(r"User child is on pid (\d{1,10})")
_CERTIFICATE = re.compile(
    r"ED25519-CERT SHA256:\S{43} ID (.*?)(?: \(serial (\d{1,20})\)(?: CA ED25519 SHA256:\S{43})?)?"
)
# The name is that of an account that there is, so it has no spaces.
_PUBLICKEY = re.compile(r"(Accepted|Failed) publickey for (\S+) from (\S+) port (\d+) ssh2: (.*)")
_INVALID = re.compile(rf"Invalid user (.*) from {_ADDRESS}(?: port \d{{1,5}})?")
_NOT_ALLOWED = re.compile(r"User (\S+) from \S+ not allowed because .*")
_TOO_MANY = re.compile(rf"drop connection #\d+ from \[({_ADDRESS})\]:\d{{1,5}} on .*")
_LEFT = re.compile(
    r"(?:Connection (?:closed|reset) by|Disconnected from|Disconnecting) "
    r"(?:authenticating|invalid) user (.*) \S+ port \d{1,5}(?:: .*)? \[preauth\]"
)
_NO_SUBSYSTEM = re.compile(r"subsystem request for .* by user \S+ failed, subsystem not found")
_OVER = re.compile(r"(?:Closing connection to|Disconnected from user) .*")
# LogVerbose puts file, function and line before the message.
_TOLD = re.compile(r"debug1: \w+\.c:(\w+)\(\):\d+ \([^()]*\): (?:\1: )?(.*)")
_CHANNEL = re.compile(r"ctype (.*) rchan \d+ win \d+ max \d+")
_GLOBAL = re.compile(r"rtype (.*) want_reply \d")
_REQUEST = re.compile(r"session \d+ req (.*)")

_HINTS: tuple[tuple[re.Pattern[str], Reason], ...] = (
    (re.compile(r"AuthorizedPrincipalsCommand .* failed, status \d+"), "lease"),
    (re.compile(r"Certificate does not contain an authorized principal"), "principal"),
    (re.compile(r"Certificate invalid: expired"), "expired"),
    (re.compile(r"Certificate invalid: not yet valid"), "not-yet-valid"),
    (
        re.compile(
            r".*Authentication tried for .* with valid certificate but not from a "
            r"permitted source address .*"
        ),
        "address",
    ),
)
_NEVER_CAME: tuple[tuple[re.Pattern[str], Reason], ...] = (
    (re.compile(r"userauth_pubkey: signature algorithm .* not in .*"), "plain-key"),
    (re.compile(rf"Timeout before authentication for {_ADDRESS} port \d{{1,5}}"), "timeout"),
    (re.compile(rf"Unable to negotiate with {_ADDRESS} port \d{{1,5}}: .*"), "negotiation"),
)
_CHANNELS: dict[str, Reason | None] = {
    "session": None,
    "direct-tcpip": "forward",
    "direct-streamlocal@openssh.com": "forward-socket",
    "tun@openssh.com": "tunnel",
}
_GLOBALS: dict[str, Reason | None] = {
    "no-more-sessions@openssh.com": None,
    "hostkeys-prove-00@openssh.com": None,
    "keepalive@openssh.com": None,
    "tcpip-forward": "reverse-forward",
    "streamlocal-forward@openssh.com": "reverse-forward-socket",
}
_REQUESTS: dict[str, Reason | None] = {
    "subsystem": None,
    "env": None,
    "eow@openssh.com": None,
    "keepalive@openssh.com": None,
    "shell": "shell",
    "exec": "command",
    "pty-req": "terminal",
    "auth-agent-req@openssh.com": "agent",
    "x11-req": "x11",
}
_WANTED = {
    "server_input_channel_open": (_CHANNEL, _CHANNELS),
    "server_input_global_request": (_GLOBAL, _GLOBALS),
    "session_input_channel_req": (_REQUEST, _REQUESTS),
}


@dataclass(frozen=True)
class Refusal:
    """Something that sshd refused.

    Attributes
    ----------
    time : float
        Seconds since 1970.
    reason : Reason
    address : str
        Where it came from.
    account : str or None
        Which account was wanted; a stranger's text unless ``admitted``.
    key_id : str or None
        The certificate's key id; a stranger's text where the reason is ``authority``.
    serial : int or None
        The certificate's serial.
    admitted : bool
        Whether sshd had let them in before.
    """

    time: float
    reason: Reason
    address: str
    account: str | None = None
    key_id: str | None = None
    serial: int | None = None
    admitted: bool = False


@dataclass
class _Talk:
    """What is known of one connection."""

    address: str
    port: str
    account: str | None = None
    key_id: str | None = None
    serial: int | None = None
    admitted: bool = False
    refused: bool = False
    hints: list[Reason] = field(default_factory=list)


class Reader:
    """Follows connections through the log, one message after the other."""

    def __init__(self) -> None:
        self._talks: OrderedDict[int, _Talk] = OrderedDict()
        self._early: OrderedDict[int, list[Entry]] = OrderedDict()

    def read(self, entry: Entry) -> list[Refusal]:
        """Take the next message; return what was refused, as far as is known by now."""
        text = entry.text
        if found := _CONNECTION.fullmatch(text):
            _keep(self._talks, entry.pid, _Talk(found[1], found[2]), MOST)
            return []
        if found := _TOO_MANY.fullmatch(text):
            return [Refusal(entry.time, "too-many", found[1])]
        talk = self._talks.get(entry.pid)
        if talk is None:
            self._wait(entry)
            return []
        if talk.admitted:
            return self._inside(entry, talk)
        reason = self._knocking(text, talk)
        if reason is None:
            return []
        talk.refused = True
        return [_refusal(entry, talk, reason)]

    def _wait(self, entry: Entry) -> None:
        """Keep what a process says before its parent has said whose it is."""
        if _TOLD.fullmatch(entry.text) or _NO_SUBSYSTEM.fullmatch(entry.text):
            waiting = self._early.get(entry.pid, [])
            _keep(self._early, entry.pid, [*waiting, entry][:EARLY], MOST // EARLY)

    def _inside(self, entry: Entry, talk: _Talk) -> list[Refusal]:
        """Read a message of a connection that was let in."""
        if found := _CHILD.fullmatch(entry.text):
            # From here on another process speaks for this connection.
            child = int(found[1])
            _keep(self._talks, child, talk, MOST)
            early = self._early.pop(child, [])
            return [refusal for one in early for refusal in self._inside(one, talk)]
        if _OVER.fullmatch(entry.text):
            # Its number may be another's next.
            del self._talks[entry.pid]
            return []
        reason = _wanted(entry.text)
        return [_refusal(entry, talk, reason)] if reason else []

    def _knocking(self, text: str, talk: _Talk) -> Reason | None:
        """Read a message of a connection that was not let in yet."""
        for pattern, hint in _HINTS:
            if pattern.fullmatch(text):
                talk.hints.append(hint)
        if found := _PUBLICKEY.fullmatch(text):
            return self._key(talk, found)
        if found := _INVALID.fullmatch(text) or _NOT_ALLOWED.fullmatch(text):
            talk.account = _cut(found[1])
            return "account"
        if talk.refused:
            # The rest only says in other words that nothing else helped either.
            return None
        if found := _LEFT.fullmatch(text):
            talk.account = _cut(found[1])
            return "no-key"
        for pattern, reason in _NEVER_CAME:
            if pattern.fullmatch(text):
                return reason
        return None

    def _key(self, talk: _Talk, found: re.Match[str]) -> Reason | None:
        """Read what sshd thought of a key."""
        if (found[3], found[4]) != (talk.address, talk.port):
            return None
        talk.account = _cut(found[2])
        certificate = _CERTIFICATE.fullmatch(found[5])
        talk.key_id = _cut(certificate[1]) if certificate else None
        talk.serial = int(certificate[2]) if certificate and certificate[2] else None
        # The first hint is the cause; what follows is its consequence.
        reason = talk.hints[0] if talk.hints else "authority"
        talk.hints.clear()
        if found[1] == "Accepted":
            talk.admitted = True
            return None
        return reason if certificate else "plain-key"


def _wanted(text: str) -> Reason | None:
    """Return what somebody inside wanted and does not get."""
    if _NO_SUBSYSTEM.fullmatch(text):
        return "subsystem"
    told = _TOLD.fullmatch(text)
    if told is None or told[1] not in _WANTED:
        return None
    pattern, known = _WANTED[told[1]]
    wanted = pattern.fullmatch(told[2])
    # What nobody thought of is no less refused.
    return known.get(wanted[1], "request") if wanted else None


def _keep(table: OrderedDict[int, _T], pid: int, value: _T, most: int) -> None:
    table[pid] = value
    table.move_to_end(pid)
    while len(table) > most:
        table.popitem(last=False)


def _refusal(entry: Entry, talk: _Talk, reason: Reason) -> Refusal:
    return Refusal(
        entry.time,
        reason,
        talk.address,
        account=talk.account,
        key_id=talk.key_id,
        serial=talk.serial,
        admitted=talk.admitted,
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
