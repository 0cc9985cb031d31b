"""Appending to and reading the audit trail."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from kakehashi.audit.canonical import canonical, utc
from kakehashi.errors import AuditError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

FIRST_PREV = "0" * 64
MAX_LINE = 64 * 1024
"""Bytes that one line may have at most, its newline included."""


@dataclass(frozen=True)
class Record:
    """One line of the trail.

    Attributes
    ----------
    seq : int
        1 for the first line, then rising by one.
    time : str
        When, ISO 8601 UTC with ``Z``.
    kind : str
        What happened, e.g. ``"session.granted"``.
    session, person : str or None
        Whom it concerns, where it concerns one.
    detail : dict
        Further JSON values.
    prev, hash : str
        SHA-256 of the line before and of this one, hexadecimal.
    """

    seq: int
    time: str
    kind: str
    session: str | None
    person: str | None
    detail: dict[str, Any]
    prev: str
    hash: str

    def unhashed(self) -> dict[str, Any]:
        """Return what the hash is taken over."""
        fields: dict[str, Any] = {
            "seq": self.seq,
            "time": self.time,
            "kind": self.kind,
            "detail": self.detail,
            "prev": self.prev,
        }
        if self.session is not None:
            fields["session"] = self.session
        if self.person is not None:
            fields["person"] = self.person
        return fields

    def line(self) -> bytes:
        """Return the line as it stands in the file, without its newline."""
        return canonical({**self.unhashed(), "hash": self.hash})

    @classmethod
    def parse(cls, line: bytes) -> Record:
        """Read one line.

        Raises
        ------
        AuditError
            The line is not a record in its canonical spelling, or its hash is not its own.
        """
        try:
            data = json.loads(line)
            known = {"seq", "time", "kind", "session", "person", "detail", "prev", "hash"}
            if not isinstance(data, dict) or not set(data) <= known:
                raise AuditError("is not a record of the trail")
            record = cls(
                seq=data["seq"],
                time=data["time"],
                kind=data["kind"],
                session=data.get("session"),
                person=data.get("person"),
                detail=data["detail"],
                prev=data["prev"],
                hash=data["hash"],
            )
        except (ValueError, KeyError, RecursionError) as error:
            raise AuditError("is not a record of the trail") from error
        if type(record.seq) is not int or not isinstance(record.detail, dict):
            raise AuditError("is not a record of the trail")
        # A second spelling of the same values (other key order, duplicate keys) is a change too.
        if record.line() != line:
            raise AuditError("is not in its canonical spelling: it was changed")
        if hashlib.sha256(canonical(record.unhashed())).hexdigest() != record.hash:
            raise AuditError("does not have the hash that it names: it was changed")
        return record


class Audit:
    """The trail of one store; any process of the store may append.

    Parameters
    ----------
    path : Path
        The file of JSON lines; it is made, readable by its owner only, when first written.
    clock : callable
        Gives the time in seconds since 1970.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock

    def append(
        self,
        kind: str,
        *,
        session: str | None = None,
        person: str | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> Record:
        """Append one record; when this returns, it is on the disk.

        Raises
        ------
        AuditError
            The record cannot be written, or the trail's last line is not sound; then nothing
            was appended, and what had to be recorded must not be done.
        """
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                dropped = _drop_torn_line(file)
                last = _last(file)
                if dropped:
                    last = self._write(file, last, "audit.repaired", detail={"bytes": dropped})
                return self._write(
                    file, last, kind, session=session, person=person, detail=dict(detail or {})
                )
        except OSError as error:
            raise AuditError(
                f"{self.path}: the audit trail cannot be written ({error.strerror}); "
                "nothing is done that cannot be recorded"
            ) from error

    def head(self) -> tuple[int, str]:
        """Return sequence number and hash of the last record; (0, zeros) of an empty trail."""
        try:
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                last = _last(file)
        except FileNotFoundError:
            return 0, FIRST_PREV
        except OSError as error:
            raise AuditError(f"{self.path}: cannot be read ({error.strerror})") from error
        return (last.seq, last.hash) if last else (0, FIRST_PREV)

    def records(self) -> Iterator[Record]:
        """Give all records in order.

        Raises
        ------
        AuditError
            A line is not sound; the message names it.
        """
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(self.path.open("rb"))
            except FileNotFoundError:
                return
            except OSError as error:
                raise AuditError(f"{self.path}: cannot be read ({error.strerror})") from error
            for number, line in enumerate(file, start=1):
                try:
                    yield Record.parse(line.removesuffix(b"\n"))
                except AuditError as error:
                    raise AuditError(f"{self.path}: line {number} {error}") from error

    def _write(
        self,
        file: BinaryIO,
        last: Record | None,
        kind: str,
        *,
        detail: dict[str, Any],
        session: str | None = None,
        person: str | None = None,
    ) -> Record:
        # What JSON would spell otherwise (tuples, integer keys) is spelt so before it is hashed.
        draft = Record(
            seq=last.seq + 1 if last else 1,
            time=utc(self._clock()),
            kind=kind,
            session=session,
            person=person,
            detail=json.loads(canonical(detail)),
            prev=last.hash if last else FIRST_PREV,
            hash="",
        )
        digest = hashlib.sha256(canonical(draft.unhashed())).hexdigest()
        record = Record(**{**draft.__dict__, "hash": digest})
        line = record.line() + b"\n"
        if len(line) > MAX_LINE:
            raise AuditError(
                f"a record of {len(line)} bytes is too long; at most {MAX_LINE} bytes are kept"
            )
        end = file.seek(0, os.SEEK_END)
        try:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            # A full disk must not leave half a record behind.
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), end)
            raise
        return record


def _drop_torn_line(file: BinaryIO) -> int:
    """Cut off a last line without its newline: its writer died before anyone relied on it."""
    end = file.seek(0, os.SEEK_END)
    tail = _tail(file, end)
    torn = len(tail) - (tail.rfind(b"\n") + 1)
    if torn:
        file.truncate(end - torn)
    return torn


def _last(file: BinaryIO) -> Record | None:
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return None
    tail = _tail(file, end)
    lines = tail[: tail.rfind(b"\n") + 1].splitlines()
    if not lines:
        return None
    try:
        return Record.parse(lines[-1])
    except AuditError as error:
        raise AuditError(
            f"the last line of the audit trail {error}; nothing is appended to a trail that is "
            "not sound. Run `kakehashi audit verify`, and keep the file for those who ask"
        ) from error


def _tail(file: BinaryIO, end: int) -> bytes:
    file.seek(max(0, end - 2 * MAX_LINE))
    return file.read(2 * MAX_LINE)
