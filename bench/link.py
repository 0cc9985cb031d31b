"""The store over distance: the read-only view and the reader beside what there is besides.

That is plain TCP, ssh itself, sshfs, rclone, and nginx with TLS.

Store and site are two network namespaces; the line between them has the given round trip and
rate (``tests/lab/wan.py``). Each way reads by itself, in turn with all others, from a connection
or mount of its own, so nothing is cached; what is timed begins some seconds after its first bytes.
"""

from __future__ import annotations

import contextlib
import functools
import http
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

# Run as a script, this folder is on the path but not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.far_store import HEADER_BYTES, Cost, FarStore, Load, at_work
from bench.figures import (
    Goal,
    Series,
    Table,
    arguments,
    at_least,
    at_most,
    interleaved,
    let_pass,
    report,
)
from kakehashi.link.bulk import Wanted
from tests.lab.hosts import need_root, wait_for

ROUNDS = 2
# Until the number of channels has been found.
WARM_S = 3.0
PATIENCE_S = 60
READ_BYTES = 1 << 20
PART_BYTES = 8 << 20
SAMPLE = (10, 2000)
"""Round trip and rate for which CPU seconds are shown, as the goals are for 2 Gbit/s."""

Place = tuple[int, int | None]
PLACES: tuple[Place, ...] = (
    *((rtt_ms, 2000) for rtt_ms in (0, 5, 10, 20, 50)),
    (10, 10_000),
    # What this machine's own ssh can do.
    *((rtt_ms, None) for rtt_ms in (0, 10)),
)
Mount = Callable[[FarStore, contextlib.ExitStack], tuple[Sequence[Path], Callable[[], Cost]]]
Start = Callable[[FarStore, contextlib.ExitStack], Load]


@dataclass(frozen=True)
class Way:
    """One way to read; ``unit`` is what is counted."""

    name: str
    start: Start
    unit: str = "MB/s"
    warm_s: float = WARM_S


def from_mount(
    far: FarStore,
    stack: contextlib.ExitStack,
    *,
    mount: Mount,
    kind: str,
    workers: int,
) -> Load:
    """Read through a mount, as any program does."""
    roots, cost = mount(far, stack)
    paths = files_of(far, kind)
    # As many workers at each of several mounts.
    root_of = {path: roots[number % len(roots)] for number, path in enumerate(paths)}

    def whole(path: str, tell: Callable[[int], None]) -> None:
        with (root_of[path] / path).open("rb", buffering=0) as file:
            while data := file.read(READ_BYTES):
                tell(len(data))

    def header(path: str, tell: Callable[[int], None]) -> None:
        with (root_of[path] / path).open("rb", buffering=0) as file:
            file.read(HEADER_BYTES)
        tell(1)

    read = header if kind == "headers" else whole
    return Load(stack.enter_context(at_work(paths, workers, read)), cost)


def from_tls(far: FarStore, stack: contextlib.ExitStack, *, kind: str, workers: int) -> Load:
    """Read ranges over HTTPS, each worker by a connection of its own."""
    connect, cost = far.nginx(stack)
    own = threading.local()
    sizes = {path: (far.base / "data" / path).stat().st_size for path in files_of(far, kind)}

    def read(path: str, tell: Callable[[int], None]) -> None:
        if not hasattr(own, "connection"):
            own.connection = connect()
        for at in range(0, sizes[path], PART_BYTES):
            end = min(at + PART_BYTES, sizes[path]) - 1
            own.connection.request("GET", f"/{path}", headers={"Range": f"bytes={at}-{end}"})
            answer = own.connection.getresponse()
            assert answer.status == http.HTTPStatus.PARTIAL_CONTENT
            while data := answer.read(READ_BYTES):
                tell(len(data))

    return Load(stack.enter_context(at_work(files_of(far, kind), workers, read)), cost)


def from_reader(far: FarStore, stack: contextlib.ExitStack, *, kind: str, workers: int) -> Load:
    """Read through the reader, each file whole."""
    reader, cost = far.reader(stack)

    def whole(path: str, tell: Callable[[int], None]) -> None:
        with reader.open(path) as file:
            for at in range(0, file.size, READ_BYTES * 8):
                tell(len(file.read(at, READ_BYTES * 8)))

    def header(path: str, tell: Callable[[int], None]) -> None:
        with reader.open(path) as file:
            file.read(0, HEADER_BYTES)
        tell(1)

    read = header if kind == "headers" else whole
    return Load(stack.enter_context(at_work(files_of(far, kind), workers, read)), cost)


def from_stream(far: FarStore, stack: contextlib.ExitStack, *, kind: str) -> Load:
    """Read by the reader's own queue of many files, as the loader does; one thread takes."""
    reader, cost = far.reader(stack)
    files = reader.manifest.files

    def wanted() -> Iterator[Wanted]:
        for path in itertools.cycle(files_of(far, kind)):
            if kind == "headers":
                yield path, 0, HEADER_BYTES
            else:
                # In parts, so that what is counted moves on in small steps.
                for at in range(0, files[path].size, PART_BYTES):
                    yield path, at, PART_BYTES

    def take(_: str, tell: Callable[[int], None]) -> None:
        with reader.read_many(wanted()) as ranges:
            for data in ranges:
                tell(1 if kind == "headers" else len(data))

    return Load(stack.enter_context(at_work(["all"], 1, take)), cost)


def files_of(far: FarStore, kind: str) -> list[str]:
    return far.packed if kind == "packed" else far.small


def _ways() -> tuple[Way, ...]:
    def cat(far: FarStore, stack: contextlib.ExitStack) -> Load:
        return far.cat(stack, SSH_CONNECTIONS)

    ways = [Way(SSH, cat)]

    for kind, mounted in (
        ("packed", (("sshfs", 1), ("sshfs", 16), ("tuned sshfs", 1), ("tuned sshfs", 4),
                    ("tuned sshfs", 16), ("tuned sshfs", 32), ("tuned sshfs, two mounts", 32),
                    ("rclone", 1), ("rclone", 16), ("view", 1), ("view", 4))),
        ("small", (("sshfs", 1), ("tuned sshfs", 16), ("rclone", 16), ("view", 1), ("view", 16))),
        ("headers", (("tuned sshfs", 16), ("view", 16))),
    ):  # fmt: skip
        unit = "files/s" if kind == "headers" else "MB/s"
        for name, workers in mounted:
            mounts: dict[str, Mount] = {
                "sshfs": functools.partial(FarStore.sshfs, tuned=False),
                "tuned sshfs": functools.partial(FarStore.sshfs, tuned=True, workers=workers),
                "tuned sshfs, two mounts": functools.partial(
                    FarStore.sshfs, tuned=True, workers=workers // 2, mounts=2
                ),
                "rclone": FarStore.rclone,
                "view": FarStore.view,
            }
            start = functools.partial(from_mount, mount=mounts[name], kind=kind, workers=workers)
            # With long read-ahead in many files at once it takes a while until all go on.
            many = name.startswith("tuned") and workers >= MANY
            warm_s = 2 * WARM_S if many else WARM_S
            ways.append(Way(label(kind, name, workers), start, unit, warm_s))
        for workers in {"packed": (1, 4), "small": (16,), "headers": ()}[kind]:
            tls = functools.partial(from_tls, kind=kind, workers=workers)
            ways.append(Way(label(kind, "nginx, TLS ranges", workers), tls, unit))
        for workers in {"packed": (1, 4), "small": (16,), "headers": (64,)}[kind]:
            start = functools.partial(from_reader, kind=kind, workers=workers)
            ways.append(Way(label(kind, "reader", workers), start, unit))
        stream = functools.partial(from_stream, kind=kind)
        ways.append(Way(label(kind, STREAM, 1), stream, unit))
    return tuple(ways)


def label(kind: str, name: str, workers: int) -> str:
    return f"{kind}, {name}, {workers} at once" if workers > 1 else f"{kind}, {name}"


STREAM = "reader, one stream"
MANY = 16
IPERF = "iperf3, 4 connections"
FIRST_BYTE = "first byte, reader"
FIRST_BYTE_SSHFS = "first byte, sshfs"
SSH_CONNECTIONS = 4
SSH = f"ssh itself (cat), {SSH_CONNECTIONS} connections"
WAYS = _ways()


class Bench:
    """All ways at all places; keeps the CPU seconds beside the rates that it returns."""

    def __init__(self, far: FarStore, seconds: int) -> None:
        self.far = far
        self.seconds = seconds
        self.costs: dict[tuple[Place, str], list[Cost]] = {}

    def _go_to(self, place: Place) -> None:
        rtt_ms, rate_mbit = place
        self.far.wan.set(delay_ms=rtt_ms / 2, rate_mbit=rate_mbit)

    def iperf(self, place: Place) -> float:
        self._go_to(place)
        return self.far.iperf(self.seconds, from_store=True)

    def rate(self, place: Place, way: Way) -> float:
        """Return MB/s or files/s."""
        self._go_to(place)
        with contextlib.ExitStack() as stack:
            load = way.start(self.far, stack)
            # A busy machine may take seconds to connect, which is not what is measured here.
            wait_for(f"first bytes: {way.name}", lambda: load.done() > 0, PATIENCE_S)
            let_pass(way.warm_s)
            begun, before, started = load.done(), load.cost(), time.monotonic()
            let_pass(self.seconds)
            count, after, ended = load.done() - begun, load.cost(), time.monotonic()
        scale = 1e6 if way.unit == "MB/s" else 1
        gigabytes = count / 1e9
        if way.unit == "MB/s" and gigabytes:
            self.costs.setdefault((place, way.name), []).append(
                Cost(
                    (after.client - before.client) / gigabytes,
                    (after.ssh - before.ssh) / gigabytes,
                )
            )
        return count / scale / (ended - started)

    def first_byte(self, place: Place) -> float:
        """Return the ms from nothing to the first verified bytes: ssh, manifest, hashes, block."""
        self._go_to(place)
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            reader, _ = self.far.reader(stack)
            with reader.open(self.far.packed[0]) as file:
                file.read(0, HEADER_BYTES)
            return (time.monotonic() - started) * 1e3

    def first_byte_sshfs(self, place: Place) -> float:
        """Return the ms from nothing to the first bytes through sshfs."""
        self._go_to(place)
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            (root,), _ = self.far.sshfs(stack, tuned=False)
            with (root / self.far.packed[0]).open("rb", buffering=0) as file:
                file.read(HEADER_BYTES)
            return (time.monotonic() - started) * 1e3


def name_of(place: Place) -> str:
    rtt_ms, rate_mbit = place
    return f"{rtt_ms} ms, {f'{rate_mbit / 1000:g} Gbit/s' if rate_mbit else 'no limit'}"


def key(place: Place, way: str) -> str:
    return f"{name_of(place)}: {way}"


Values = dict[str, tuple[float, ...]]


def ratios(values: Values, one: str, other: str) -> tuple[float, ...]:
    """Return one by the other, run by run."""
    return tuple(a / b for a, b in zip(values[one], values[other], strict=True))


def median(values: Sequence[float]) -> float:
    return Series("", "", tuple(values)).median


def tables(
    values: Values, places: Sequence[Place], costs: dict[tuple[Place, str], list[Cost]]
) -> list[Table]:
    """Lay the figures out by round trip."""
    found = []
    runs = len(next(iter(values.values())))
    rates = list(dict.fromkeys(rate for _, rate in places))
    for rate in rates:
        here = [place for place in places if place[1] == rate]
        rows = [
            (IPERF, *(f"{median(values[key(place, IPERF)]):.0f}" for place in here)),
        ]
        for way in WAYS:
            cells = []
            for place in here:
                value = median(values[key(place, way.name)])
                share = median(ratios(values, key(place, way.name), key(place, IPERF)))
                cells.append(f"{value:.0f} ({share:.0%})" if way.unit == "MB/s" else f"{value:.0f}")
            rows.append((f"{way.name} [{way.unit}]" if way.unit != "MB/s" else way.name, *cells))
        for name in (FIRST_BYTE, FIRST_BYTE_SSHFS):
            cells = [f"{median(values[key(place, name)]):.0f}" for place in here]
            rows.append((f"{name} [ms]", *cells))
        limit = f"{rate / 1000:g} Gbit/s" if rate else "no limit of rate"
        found.append(
            Table(
                f"{limit}: MB/s and the share of iperf3 in the same round, median of {runs}",
                ("way", *(f"RTT {place[0]} ms" for place in here)),
                tuple(rows),
            )
        )
    if SAMPLE in places:
        rows = [
            (
                way.name,
                f"{median([cost.client for cost in costs[SAMPLE, way.name]]):.2f}",
                f"{median([cost.ssh for cost in costs[SAMPLE, way.name]]):.2f}",
            )
            for way in WAYS
            if (SAMPLE, way.name) in costs
        ]
        found.append(
            Table(
                f"{name_of(SAMPLE)}: CPU seconds for a GB",
                ("way", "what reads", "ssh and sshd, or nginx"),
                tuple(rows),
            )
        )
    return found


def goals(values: Values, places: Sequence[Place]) -> list[Goal]:
    """State what was asked of the link at 2 Gbit/s."""
    found = []
    packed, small = label("packed", STREAM, 1), label("small", STREAM, 1)
    for place in places:
        if place[1] != SAMPLE[1] or place[0] > 20:
            continue
        line, at = key(place, IPERF), name_of(place)
        found += [
            at_least(f"{at}: reader, packed, of iperf3", ratios(values, key(place, packed), line),
                     0.95),
            at_least(f"{at}: reader, small files, of iperf3",
                     ratios(values, key(place, small), line), 0.90),
            at_least(f"{at}: view of reader, packed, one at a time",
                     ratios(values, key(place, label("packed", "view", 1)),
                            key(place, label("packed", "reader", 1))), 0.75),
        ]  # fmt: skip
        if place == SAMPLE:
            found += [
                at_least(f"{at}: view of plain sshfs, packed",
                         ratios(values, key(place, label("packed", "view", 1)),
                                key(place, label("packed", "sshfs", 1))), 5),
                at_least(f"{at}: headers by the reader, files/s",
                         values[key(place, label("headers", STREAM, 1))], 2000),
            ]  # fmt: skip
    near, far = (0, SAMPLE[1]), (20, SAMPLE[1])
    if near in places and far in places:
        found.append(
            at_least("reader, packed: RTT 20 ms of RTT 0 ms at 2 Gbit/s",
                     ratios(values, key(far, packed), key(near, packed)), 0.9)
        )  # fmt: skip
    return found


def main() -> None:
    """Measure and report."""
    need_root()
    options = arguments("reading the store over distance")
    places = list(PLACES)
    rounds, seconds = ROUNDS, 2
    if options.quick:
        places, rounds, seconds = [SAMPLE], 1, 1
    # Ended from outside too, it leaves no mount and no process.
    with contextlib.ExitStack() as stack:
        far = FarStore(stack)
        bench = Bench(far, seconds)
        ways: dict[str, Callable[[], float]] = {}
        for place in places:
            ways[key(place, IPERF)] = functools.partial(bench.iperf, place)
            for way in WAYS:
                ways[key(place, way.name)] = functools.partial(bench.rate, place, way)
            ways[key(place, FIRST_BYTE)] = functools.partial(bench.first_byte, place)
            ways[key(place, FIRST_BYTE_SSHFS)] = functools.partial(bench.first_byte_sshfs, place)
        values = interleaved(ways, rounds, Console(stderr=True))
        overrun = far.wan.overrun
    units = {way.name: way.unit for way in WAYS} | {
        IPERF: "MB/s", FIRST_BYTE: "ms", FIRST_BYTE_SSHFS: "ms"
    }  # fmt: skip
    report(
        "Reading the store over distance",
        [Series(name, units[name.split(": ", 1)[1]], found) for name, found in values.items()],
        [
            *goals(values, places),
            at_most("packets that the line dropped for want of speed", [overrun], 0, "packets"),
        ],
        tables=tables(values, places, bench.costs),
        quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
