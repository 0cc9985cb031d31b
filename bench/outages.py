"""What a reader sees of cuts, resets, restarts and flipped bits: every byte compared.

Store and site are two network namespaces with 10 ms and 2 Gbit/s between them. One stream of many
files is read without a pause, and each part is compared with what lies at the store. What takes a
session happens in the lab (``bench/session_outages.py``).
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

# Run as a script, this folder is on the path but not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.far_host import Connect
from bench.far_store import FarStore
from bench.figures import Series, Table, arguments, at_least, at_most, let_pass, report
from bench.session_outages import LEASE_S, Seen, measured
from kakehashi.errors import BlockMismatchError, LinkError
from kakehashi.link.bulk import Wanted
from tests.lab.hosts import need_root, wait_for

RTT_MS, RATE_MBIT = 10, 2000
PART_BYTES = 2 << 20
FULL = 0.9
STEADY_S = 5.0
PATIENCE_S = 90.0
RESETS = 50
FLIP_EVERY = 30 << 20


class Reading:
    """One endless stream, and what came of it."""

    def __init__(self, far: FarStore, through: Callable[[Connect], Connect] | None = None) -> None:
        self._stack = contextlib.ExitStack()
        self.reader, _ = far.reader(self._stack, through=through)
        # A copy: what is changed at the store later is not changed here.
        self._truth = {
            path: memoryview((far.base / "data" / path).read_bytes()) for path in far.packed
        }
        self.bytes = self.wrong = 0
        self.errors: list[str] = []
        self.refused: list[str] = []
        self._over = threading.Event()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="reading")
        self._thread.start()

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.reader.close()
        self._thread.join()
        self._stack.close()
        if self._ended is not None:
            raise self._ended

    def rate(self, seconds: float) -> float:
        """Measure for so long; return bytes a second."""
        before, started = self.bytes, time.monotonic()
        let_pass(seconds)
        return (self.bytes - before) / (time.monotonic() - started)

    def wait_for_more(self) -> None:
        """Wait until something more has come."""
        before = self.bytes
        wait_for("bytes", lambda: self.bytes > before, PATIENCE_S)

    def _parts(self) -> Iterator[tuple[str, int]]:
        for path in itertools.cycle(self._truth):
            for at in range(0, len(self._truth[path]), PART_BYTES):
                yield path, at

    def _run(self) -> None:
        try:
            mine, theirs = itertools.tee(self._parts())
            wanted: Iterator[Wanted] = ((path, at, PART_BYTES) for path, at in theirs)
            ranges = self.reader.read_many(wanted)
            for path, at in mine:
                if self._over.is_set():
                    return
                self._take(path, at, lambda: next(ranges))
        except BaseException as error:
            self._ended = error

    def _take(self, path: str, at: int, take: Callable[[], memoryview]) -> None:
        try:
            data = take()
        except BlockMismatchError as error:
            self.refused.append(str(error))
        except LinkError as error:
            if not self._over.is_set():
                self.errors.append(repr(error))
        else:
            self.wrong += data != self._truth[path][at : at + PART_BYTES]
            self.bytes += len(data)


class Flipping:
    """Channels in which now and then a bit comes out wrong; ssh's own checks are behind it."""

    def __init__(self) -> None:
        self.flips = 0

    def __call__(self, connect: Connect) -> Connect:
        def through() -> socket.socket:
            inner = connect()
            near, far = socket.socketpair()
            for source, sink, flips in ((inner, far, True), (far, inner, False)):
                threading.Thread(
                    target=self._carry, args=(source, sink), kwargs={"flips": flips}, daemon=True
                ).start()
            return near

        return through

    def _carry(self, source: socket.socket, sink: socket.socket, *, flips: bool) -> None:
        left, buffer = FLIP_EVERY, bytearray(1 << 20)
        with contextlib.suppress(OSError):
            while count := source.recv_into(buffer):
                left -= count
                if flips and left < 0:
                    left = FLIP_EVERY
                    buffer[count // 2] ^= 0x10
                    self.flips += 1
                sink.sendall(memoryview(buffer)[:count])
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Event:
    """What happens; returns when the line and the store are whole again."""

    name: str
    happen: Callable[[FarStore, Reading], None]


def _cut(seconds: float) -> Callable[[FarStore, Reading], None]:
    def happen(far: FarStore, _: Reading) -> None:
        far.wan.cut()
        let_pass(seconds)
        far.wan.heal()

    return happen


def _resets(far: FarStore, reading: Reading) -> None:
    for _ in range(RESETS):
        reading.wait_for_more()
        far.wan.reset()


def _restart(far: FarStore, _: Reading) -> None:
    far.restart_sshd()


@dataclass(frozen=True)
class Outcome:
    """What was seen of an event."""

    name: str
    lasted_s: float
    back_s: float
    errors: int
    wrong: int
    refused: int


def go_through(far: FarStore, event: Event) -> Outcome:
    """Read, let it happen, and see when the full rate is back."""
    with Reading(far) as reading:
        full = _steady(reading)
        began = time.monotonic()
        event.happen(far, reading)
        healed = time.monotonic()
        back_s = _back(reading, full, healed)
        return Outcome(
            event.name, healed - began, back_s, len(reading.errors), reading.wrong,
            len(reading.refused),
        )  # fmt: skip


def _steady(reading: Reading) -> float:
    reading.wait_for_more()
    let_pass(STEADY_S)
    return reading.rate(STEADY_S)


def _back(reading: Reading, full: float, healed: float) -> float:
    """Return the seconds until the first second of full rate began."""
    while time.monotonic() - healed < PATIENCE_S:
        since = time.monotonic() - healed
        if reading.rate(1.0) >= FULL * full:
            return since
    return PATIENCE_S


def flips_on_the_wire(far: FarStore, seconds: float) -> tuple[Outcome, int]:
    """Read through channels with flipped bits."""
    flipping = Flipping()
    with Reading(far, flipping) as reading:
        wait_for("a flip", lambda: flipping.flips > 0, PATIENCE_S)
        let_pass(seconds)
        return Outcome(
            "bits flipped behind ssh", seconds, 0.0, len(reading.errors), reading.wrong,
            len(reading.refused),
        ), flipping.flips  # fmt: skip


def flip_at_rest(far: FarStore, seconds: float) -> Outcome:
    """Change a bit at the store, and put it right again; the block is refused meanwhile."""
    with Reading(far) as reading:
        _steady(reading)
        path = far.base / "data" / far.packed[1]
        with path.open("r+b") as file:
            file.seek(12345)
            old = file.read(1)
            began = time.monotonic()
            try:
                file.seek(12345)
                file.write(bytes([old[0] ^ 1]))
                file.flush()
                wait_for("the block to be refused", lambda: bool(reading.refused), PATIENCE_S)
                let_pass(seconds)
            finally:
                file.seek(12345)
                file.write(old)
        return Outcome(
            "a bit flipped at rest", time.monotonic() - began, 0.0, len(reading.errors),
            reading.wrong, len(reading.refused),
        )  # fmt: skip


def _session_table(seen: Sequence[Seen]) -> list[Table]:
    if not seen:
        return []
    return [
        Table(
            f"Outages: a session of the lab, leases of {LEASE_S:g} s",
            ("what happened", "lasted", "waited", "errors", "compared or gone on", "wrong"),
            tuple(
                (
                    one.name, f"{one.lasted_s:.0f} s", f"{one.back_s:.1f} s", str(one.errors),
                    str(one.checked), str(one.wrong) if one.wrong else "none",
                )
                for one in seen
            ),
        )
    ]  # fmt: skip


def main() -> None:
    """Let everything happen, and report."""
    need_root()
    options = arguments("cuts, resets, restarts and flipped bits")
    cuts = (5.0,) if options.quick else (75.0, 300.0)
    spell = 3.0 if options.quick else 20.0
    events = [
        *(Event(f"cut of {seconds:g} s", _cut(seconds)) for seconds in cuts),
        Event(f"{RESETS} resets", _resets),
        Event("sshd killed and started", _restart),
    ]
    console = Console(stderr=True)
    # That takes minutes.
    in_session = [] if options.quick else measured()
    with contextlib.ExitStack() as stack:
        far = FarStore(stack)
        far.wan.set(delay_ms=RTT_MS / 2, rate_mbit=RATE_MBIT)
        found: list[Outcome] = []
        for event in events:
            found.append(go_through(far, event))
            console.print(f"  {found[-1]}")
        on_wire, flips = flips_on_the_wire(far, spell)
        at_rest = flip_at_rest(far, spell)
    everything = [*found, on_wire, at_rest]
    errors = [one.errors for one in everything] + [one.errors for one in in_session]
    report(
        "Outages",
        [Series(one.name, "s", (one.back_s,)) for one in found],
        [
            at_most("errors", [sum(errors)], 0, "errors"),
            at_most("parts with a wrong byte", [sum(one.wrong for one in everything)], 0, "parts"),
            *(
                goal
                for one in in_session
                for goal in (
                    at_most(f"{one.name}: files or steps that differ", [one.wrong], 0, ""),
                    at_least(f"{one.name}: files compared, or steps gone on", [one.checked], 10),
                )
            ),
            at_most(
                "refused though right at rest",
                [sum(one.refused for one in (*found, on_wire))],
                0,
                "parts",
            ),
            at_least("refused, of a bit flipped at rest", [at_rest.refused], 1),
            at_least("bits flipped on the wire", [flips], 1),
            *(
                at_most(f"{one.name}: back at {FULL:.0%} of the rate", [one.back_s], 5, "s")
                for one in found
            ),
        ],
        tables=[
            Table(
                "Outages: one stream of large files, 10 ms, 2 Gbit/s",
                ("what happened", "lasted", "full rate again after", "errors", "wrong bytes"),
                tuple(
                    (
                        one.name,
                        f"{one.lasted_s:.0f} s",
                        f"{one.back_s:.1f} s" if one in found else "-",
                        str(one.errors),
                        "none" if not one.wrong else f"{one.wrong} parts",
                    )
                    for one in everything
                ),
            ),
            *_session_table(in_session),
        ],
        quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
