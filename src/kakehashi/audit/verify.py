"""Finding what was done to a trail."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kakehashi.audit.trail import FIRST_PREV, Record
from kakehashi.errors import AuditError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kakehashi.audit.anchor import Head


@dataclass(frozen=True)
class Problem:
    """One thing that does not hold.

    Attributes
    ----------
    line : int or None
        The line of the trail, from 1; ``None`` where it concerns no single line.
    message : str
    """

    line: int | None
    message: str


@dataclass(frozen=True)
class Verdict:
    """What a check of a whole trail gave."""

    lines: int
    anchored: int
    problems: tuple[Problem, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether everything held."""
        return not self.problems


def verify(path: Path, heads: Iterable[Head] = ()) -> Verdict:
    """Check every line of a trail, and the trail against signed heads.

    Parameters
    ----------
    path : Path
        The trail; a missing file is an empty trail.
    heads : iterable of Head
        Heads whose signatures were checked, in any order.

    Returns
    -------
    Verdict
        ``lines`` counts the lines read, ``anchored`` is the highest sequence number that a
        head vouches for. A line after a bad one is measured by what stands in the bad one, so
        that one change gives one problem where that can be told.
    """
    problems: list[Problem] = []
    wanted: dict[int, list[Head]] = {}
    for head in heads:
        wanted.setdefault(head.seq, []).append(head)
    anchored = max(wanted, default=0)
    wanted.pop(0, None)

    count = 0
    last_seq, last_hash = 0, FIRST_PREV
    chained = True
    for number, line in enumerate(_lines(path), start=1):
        count = number
        try:
            if not line.endswith(b"\n"):
                raise AuditError("is torn: it has no end")  # noqa: TRY301 - same handling
            record = Record.parse(line[:-1])
        except AuditError as error:
            problems.append(Problem(number, f"line {number} {error}"))
            last_seq, chained = last_seq + 1, False
            continue
        fault = _link_fault(record, last_seq, last_hash, chained=chained)
        if fault:
            problems.append(Problem(number, f"line {number} {fault}"))
        for head in wanted.pop(record.seq, []):
            if head.hash != record.hash:
                problems.append(
                    Problem(
                        number,
                        f"line {number} is not the record {record.seq} that the store anchored at "
                        f"{head.time}: the trail was rewritten",
                    )
                )
        last_seq, last_hash, chained = record.seq, record.hash, True
    if wanted and anchored > last_seq:
        problems.append(
            Problem(
                count + 1,
                f"the trail ends after line {count} (record {last_seq}), but the store anchored "
                f"record {anchored}: {anchored - last_seq} record(s) were cut off",
            )
        )
    return Verdict(count, anchored, tuple(problems))


def _link_fault(record: Record, last_seq: int, last_hash: str, *, chained: bool) -> str | None:
    if record.seq > last_seq + 1:
        return (
            f"is record {record.seq}, expected {last_seq + 1}: "
            f"{record.seq - last_seq - 1} record(s) before it were dropped or moved"
        )
    if record.seq <= last_seq:
        return f"is record {record.seq}, expected {last_seq + 1}: it was moved or repeated"
    if chained and record.prev != last_hash:
        return "does not follow from the line before it: one of the two was replaced"
    return None


def _lines(path: Path) -> Iterable[bytes]:
    try:
        with path.open("rb") as file:
            # Only what was whole at this moment is read; a long check must not hold up the store.
            fcntl.flock(file, fcntl.LOCK_SH)
            left = os.fstat(file.fileno()).st_size
            fcntl.flock(file, fcntl.LOCK_UN)
            while left > 0 and (line := file.readline(left)):
                left -= len(line)
                yield line
    except FileNotFoundError:
        return
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror})") from error
