"""The statement at a session's end: each item says who saw it.

A receipt is made from the book alone, so that writing it twice gives the same one; new
evidence (a connection seen closed late, a site's report) gives a new revision of it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature

from kakehashi.audit.anchor import Head
from kakehashi.audit.canonical import canonical, utc
from kakehashi.errors import AuditError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

    from kakehashi.store.authority.book import Book, Connection, ConnectionCounts, Session

LISTED_CONNECTIONS = 50
"""Connections that a receipt lists one by one; the rest is in its total."""

NOT_OBSERVABLE = ("GPU memory", "swap")
"""What only somebody on the node could speak of."""

_SESSION = re.compile(r"[0-9a-f]{32}")


def evidence(book: Book, session: Session, *, has_epilog: bool) -> dict[str, Any]:
    """Return what the book says about an ended session, item by item.

    Parameters
    ----------
    book : Book
    session : Session
    has_epilog : bool
        Whether the site's root looks at nodes after sessions; its word is then waited for.
    """
    counts = book.connection_counts(session.id)
    left = counts.opened - counts.closed
    reports = book.reports(session.id)
    items = [
        _ticket(session),
        *_certificates(book, session),
        *_connections(counts, book.connections(session.id, LISTED_CONNECTIONS)),
    ]
    said = {
        witness: [item for report in reports if report.witness == witness for item in report.items]
        for witness in ("wrapper", "site")
    }
    for witness, found in said.items():
        items += [_item(i["item"], witness, i["result"], i["detail"]) for i in found]
    if not said["wrapper"]:
        items.append(
            _item(
                "report of the session's wrapper",
                "none",
                "unknown",
                "the session's wrapper did not report",
            )
        )
    # Where no ticket was redeemed there was no session on any node, and nothing to look at.
    awaited = has_epilog and session.redeemed_at is not None and not said["site"]
    if not said["site"]:
        items.append(_site_silent(session, awaited=awaited))
    if session.scheduler is None:
        items.append(_item("job", "none", "unknown", "nothing of the scheduler was passed on"))
    else:
        text = json.dumps(session.scheduler, ensure_ascii=False, sort_keys=True)
        items.append(_item("job", "scheduler", "seen", text))
    seen = {item["item"] for found in said.values() for item in found}
    for name in NOT_OBSERVABLE:
        if name not in seen:
            items.append(_item(name, "none", "unknown", "not observable"))
    return {
        "kakehashi_receipt": 1,
        "session": session.id,
        "state": "pending" if left or awaited else "complete",
        "person": session.person,
        "project": session.project,
        "site": session.site,
        "host": session.host,
        "job": session.job,
        "walls": session.walls,
        "created_at": utc(session.created_at),
        "granted_at": utc(session.redeemed_at) if session.redeemed_at else None,
        "ended_at": utc(session.ended_at) if session.ended_at else None,
        "reason": session.end_reason,
        "items": items,
    }


def digest(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the evidence, by which a receipt is known to be the same."""
    return hashlib.sha256(canonical(body)).hexdigest()


def sign(
    body: Mapping[str, Any],
    *,
    revision: int,
    written_at: str,
    head: Head,
    key: Ed25519PrivateKey,
) -> dict[str, Any]:
    """Return the signed receipt, with the audit trail's head as it was."""
    document = {
        **body,
        "revision": revision,
        "written_at": written_at,
        "audit": head.as_dict(),
    }
    return {**document, "signature": base64.b64encode(key.sign(canonical(document))).decode()}


def verify(document: Mapping[str, Any], key: Ed25519PublicKey) -> Head:
    """Check a receipt's signature and that of the audit head in it; returns that head.

    Raises
    ------
    AuditError
        The receipt was changed after the store signed it, or is none.
    """
    try:
        unsigned = {name: value for name, value in document.items() if name != "signature"}
        signature = base64.b64decode(document["signature"], validate=True)
        key.verify(signature, canonical(unsigned))
        if document["kakehashi_receipt"] != 1:
            raise AuditError("the receipt is of a kind that this software does not know")
    except (KeyError, TypeError, InvalidSignature, binascii.Error, ValueError) as error:
        raise AuditError(
            "the receipt does not carry the store's signature: it was changed, or another "
            "store wrote it"
        ) from error
    return Head.parse(document.get("audit"), key)


def write(folder: Path, session: str, document: Mapping[str, Any]) -> None:
    """Write a receipt whole, in place of an earlier revision."""
    path = folder / f"{session}.json"
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: Path, session: str) -> dict[str, Any]:
    """Read a receipt, unchecked.

    Raises
    ------
    AuditError
        There is none, or it is damaged.
    """
    if not _SESSION.fullmatch(session):
        raise AuditError(f"{session!r} is not a session; it has 32 hexadecimal digits")
    path = folder / f"{session}.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AuditError(f"there is no receipt of the session {session}") from error
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise AuditError(f"{path}: the receipt is damaged: it is not JSON") from error
    if not isinstance(document, dict):
        raise AuditError(f"{path}: the receipt is damaged: it is not a JSON object")
    return document


def sessions(folder: Path) -> Iterator[str]:
    """Give the sessions that have a receipt, in order of their identifiers."""
    for path in sorted(folder.glob("*.json")):
        if _SESSION.fullmatch(path.stem):
            yield path.stem


def _item(item: str, witness: str, result: str, detail: str) -> dict[str, str]:
    return {"item": item, "witness": witness, "result": result, "detail": detail}


def _ticket(session: Session) -> dict[str, str]:
    if session.redeemed_at is None:
        return _item("ticket", "store", "gone", "never redeemed; it can no longer be")
    if session.replays:
        return _item(
            "ticket",
            "store",
            "seen",
            f"redeemed at {utc(session.redeemed_at)}, then shown {session.replays} more time(s): "
            "alarm",
        )
    return _item("ticket", "store", "gone", f"redeemed once, at {utc(session.redeemed_at)}")


def _certificates(book: Book, session: Session) -> list[dict[str, str]]:
    signed = book.certificates(session.id)
    if signed.last_expires_at is None:
        return [_item("certificates", "store", "gone", "none was issued")]
    ended = utc(session.ended_at) if session.ended_at else "the end"
    return [
        _item(
            "certificates",
            "store",
            "gone",
            f"{signed.issued} issued, the last one expires at {utc(signed.last_expires_at)}; "
            f"the store accepts none of them since {ended}",
        )
    ]


def _site_silent(session: Session, *, awaited: bool) -> dict[str, str]:
    name = "report of the site's root"
    if awaited:
        return _item(
            name,
            "none",
            "unknown",
            f"pending: root of the site {session.site!r} has to scan the node {session.host!r}; "
            "its epilog does so after the job, or when the node is back",
        )
    if session.redeemed_at is None:
        return _item(name, "none", "unknown", "nothing to report: no node had joined the session")
    return _item(
        name,
        "none",
        "unknown",
        "the site gives no epilog: what stands here of the node is claimed by the wrapper",
    )


def _connections(counts: ConnectionCounts, listed: Sequence[Connection]) -> list[dict[str, str]]:
    if not counts.opened:
        return [_item("connections", "store", "gone", "none was opened")]
    total = f"{counts.opened} opened, {counts.closed} seen closed"
    if counts.last_closed_at is not None:
        total += f", the last one at {utc(counts.last_closed_at)}"
    left = counts.opened > counts.closed
    items = [_item("connections", "store", "left" if left else "gone", total)]
    return items + [_connection(connection) for connection in listed]


def _connection(connection: Connection) -> dict[str, str]:
    text = f"opened at {utc(connection.opened_at)}"
    if connection.closed_at is None:
        result, text = "left", f"{text}, not yet seen closed"
    else:
        by = f"by the store ({connection.cut_reason})" if connection.cut_at else "by the node"
        result, text = "gone", f"{text}, closed at {utc(connection.closed_at)} {by}"
    return _item(f"connection {connection.id} to {connection.account}", "store", result, text)
