"""All parts in their order, and what there is of them when it is stopped."""

from __future__ import annotations

import datetime as dt
import time
from importlib import import_module
from typing import TYPE_CHECKING

from kakehashi.errors import LinkClosedError
from kakehashi.link.bench import line
from kakehashi.link.bench.results import PARTS, Part, Report, machine
from kakehashi.link.bench.sample import Sample
from kakehashi.link.bench.ways import FAILURES, Book, Settings
from kakehashi.link.pace import WINDOW_BYTES
from kakehashi.session.channels import CIPHERS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import ModuleType

    from kakehashi.link.session import Session

STORE_SIDE = "the store's disk, network and processor load: a session does not see them"


def measure(session: Session, settings: Settings, parts: Collection[Part] = PARTS) -> Report:
    """Measure a session's link from inside; SIGINT ends it with what there is.

    Parameters
    ----------
    session : Session
        The session that this process runs in.
    settings : Settings
    parts : collection of str
        What to measure.

    Raises
    ------
    LinkError
        The store cannot be reached, or the cohort has nothing to measure with.
    """
    started = time.monotonic()
    training = _training()
    with Sample(session, settings.bytes) as sample:
        book = Book(sample, settings)
        stopped = _all(book, [part for part in PARTS if part in parts], training)
        # After it was stopped, too: this asks nothing of the store.
        cohort = sample.cohort
    book.lacks("the rate of the line itself", "iperf3 has no way out of a session's network")
    book.lacks("the ends of the line", STORE_SIDE)
    return Report(
        site=session.site,
        measured_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 1),
        quick=settings.quick,
        complete=not stopped,
        stopped=stopped,
        machine=machine(() if training is None else training.accelerators()),
        cohort=cohort,
        ssh={
            "ciphers offered, in this order": CIPHERS,
            "cipher agreed on": "not observable in a session",
            "a connection carries a round trip": f"{WINDOW_BYTES} bytes (OpenSSH's window)",
            "compression": "no",
        },
        figures=tuple(book.figures),
        not_measured=tuple(book.not_measured),
    )


def _all(book: Book, parts: list[Part], training: ModuleType | None) -> str:
    """Measure the parts; return why it was stopped, empty if it was not."""
    acts: dict[Part, Callable[[Book], None]] = {
        "line": line.line,
        "reader": line.reader,
        "ranges": line.ranges,
        "write": line.write,
    }
    if training is not None:
        acts |= {
            "loop": training.loop,
            "networks": training.networks,
            "segmentation": training.segmentation,
        }
    part = "the series are read into memory"
    try:
        book.tell(part)
        book.sample.hold(book.tell)
        for part in parts:
            if part not in acts:
                book.lacks(f"part {part}", "torch and monai are not installed on this node")
                continue
            book.tell(part)
            try:
                acts[part](book)
            except LinkClosedError:
                raise
            except FAILURES as error:
                book.lacks(f"part {part}", f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        return f"stopped by hand in: {part}"
    except LinkClosedError:
        return f"the session ended in: {part}"
    return ""


def _training() -> ModuleType | None:
    try:
        return import_module("kakehashi.link.bench.training")
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in {"torch", "monai"}:
            raise
        return None
