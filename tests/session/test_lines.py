"""A store with several lines to a site: side by side, and one for the other."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kakehashi.session.lines import REST_S, Lines
from tests.authority.real import RealStore
from tests.session.real import SERIES, World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.session.real import Person, Session, Software

FIRST, SECOND = "127.0.0.1", "127.0.0.2"
# Six channels that answer, then the file through the view, which has channels of its own.
READ = f"""
import pathlib, signal, socket, struct
def channel():
    while True:
        link = socket.socket(socket.AF_UNIX)
        link.connect("/run/kakehashi/store.sock")
        try:
            link.sendall(struct.pack(">IBI", 5, 1, 3))
            if len(link.recv(9)) == 9:
                return link
        except OSError:
            pass
links = [channel() for _ in range(6)]
pathlib.Path("copy").write_bytes(pathlib.Path("/store/series/{SERIES}.ozx").read_bytes())
pathlib.Path("up").write_text("1")
signal.pause()
"""


def world_of(person: Person, software: Software, *, bind: str) -> Iterator[World]:
    store = RealStore(sessions_per_person=64, bind=bind, further=(SECOND,))
    try:
        store.start()
        yield World(store, person, software)
    finally:
        store.remove()


@pytest.fixture
def both(person: Person, software: Software) -> Iterator[World]:
    """A store that can be reached at both addresses."""
    yield from world_of(person, software, bind="0.0.0.0")


@pytest.fixture
def one(person: Person, software: Software) -> Iterator[World]:
    """A store whose second line is down."""
    yield from world_of(person, software, bind=FIRST)


def channels(session: Session) -> Counter[str]:
    """Count the session's SFTP channels by the address that they go to."""
    found: Counter[str] = Counter()
    for pid, name in session.family().items():
        if name == "ssh":
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            # What sshfs has started goes to the work folder's one address.
            if "-s" in words[:-2] and "LogLevel=ERROR" in words:
                found.update(word.rpartition("@")[2] for word in words if "@127." in word)
    return found


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")


@needs_root
def test_channels_are_spread_over_both_lines(both: World) -> None:
    with both.session(READ) as session:
        session.file("up")
        found = channels(session)
        assert min(found[FIRST], found[SECOND]) >= 3, found
        assert (session.work / "alice/copy").read_bytes() == both.content


@needs_root
def test_what_fails_on_one_line_goes_over_the_other(one: World) -> None:
    with one.session(READ) as session:
        session.file("up")
        found = channels(session)
        assert found[FIRST] >= 6, found
        assert found[SECOND] == 0, found
        assert (session.work / "alice/copy").read_bytes() == one.content


def test_a_line_that_failed_is_left_alone_for_a_while() -> None:
    now = 100.0
    lines = Lines(["a", "b", "a"], lambda: now)
    assert lines.choose() == "a"
    lines.opened(1, "a")
    assert lines.choose() == "b"
    lines.opened(2, "b")
    lines.ended(2, failed=True)
    lines.opened(3, "a")
    assert lines.choose() == "a", "though there are more channels on it"
    now += REST_S
    assert lines.choose() == "b"


def test_where_all_failed_the_one_that_failed_first_is_tried() -> None:
    now = 0.0
    lines = Lines(["a", "b"], lambda: now)
    for pid, address in enumerate(["b", "a"]):
        lines.opened(pid, address)
        now += 1
        lines.ended(pid, failed=True)
    assert lines.choose() == "b"
    lines.ended(99, failed=True)
    assert lines.choose() == "b"


def test_an_end_without_a_failure_keeps_the_line() -> None:
    lines = Lines(["a"])
    lines.opened(1, "a")
    lines.ended(1, failed=False)
    assert lines.choose() == "a"
