"""How the cost of reading grows: with the files' size, the readers at once, the manifest's length.

Rates are over a line of 10 ms and 2 Gbit/s between two network namespaces. A manifest is parsed in
a process of its own, whose memory is then all it took.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

# Run as a script, this folder is on the path but not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.far_host import Node
from bench.far_store import FarStore, at_work
from bench.figures import Series, Table, arguments, at_most, interleaved, let_pass, report
from kakehashi.link import Reader
from tests.lab.hosts import need_root, wait_for
from tests.link.stores import StoreFolder

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized
    from multiprocessing.synchronize import Event

    Counter = Synchronized[int]

FORK = multiprocessing.get_context("fork")
ROUNDS = 3
RTT_MS, RATE_MBIT = 10, 2000
SIZES = {"50 kB": 50_000, "500 kB": 500_000, "5 MB": 5_000_000, "50 MB": 50_000_000,
         "500 MB": 500_000_000}  # fmt: skip
# Of each size so much lies at the store; what was read is read again over the line.
TOTAL_BYTES = 500_000_000
READERS = (1, 4, 16, 64)
READERS_OF = "5 MB"
ENTRIES = (1_000, 10_000, 100_000, 1_000_000)
NODES = (1, 2)
# So slow that this machine's processors are not the limit of two.
NODE_RATE_MBIT = 600
WARM_S, MEASURE_S = 3.0, 3.0
PATIENCE_S = 60.0

PARSE = """
import sys, time
from kakehashi.link.manifest import Manifest
def most():
    # Not getrusage's, which begins with what the parent process had.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
before = most()
raw = open(sys.argv[1], "rb").read()
started = time.monotonic()
manifest = Manifest.parse(raw, sys.argv[2])
seconds = time.monotonic() - started
assert len(manifest.files) == int(sys.argv[3])
print(seconds, most() - before)
"""


class Growth:
    """Folders of files of one size each, at the far end."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.far = FarStore(stack)
        self.far.wan.set(delay_ms=RTT_MS / 2, rate_mbit=RATE_MBIT)
        self._further = [self.far.further_node(stack, number) for number in range(1, NODES[-1])]
        self._folders: dict[str, StoreFolder] = {}
        source = os.urandom(max(SIZES.values()))
        for name, size in SIZES.items():
            folder = StoreFolder(self.far.base / f"data/{size}")
            for number in range(max(1, TOTAL_BYTES // size)):
                start = number * 4096 % (len(source) - size + 1)
                folder.contents[f"series/1.{number}.ozx"] = source[start : start + size]
                folder.rows[f"series/1.{number}.ozx"] = {}
            self._write(folder)
            self._folders[name] = folder

    @staticmethod
    def _write(folder: StoreFolder) -> None:
        block = folder.block_size
        (folder.root / "series").mkdir(parents=True)
        for path, data in folder.contents.items():
            digests = (
                hashlib.sha256(data[at : at + block]).digest() for at in range(0, len(data), block)
            )
            (folder.root / path).write_bytes(data)
            (folder.root / path).with_suffix(".blocks").write_bytes(b"".join(digests))
        folder.publish()
        paths = list(folder.contents)
        # The bytes lie at the store now.
        folder.contents = dict.fromkeys(paths, b"")

    def iperf(self) -> float:
        """Return MB/s of plain TCP."""
        self.far.wan.set(rate_mbit=RATE_MBIT)
        return self.far.iperf(3, from_store=True)

    def _reader(
        self, stack: contextlib.ExitStack, name: str, node: Node | None = None
    ) -> tuple[Reader, list[str]]:
        folder = self._folders[name]
        connect, _ = self.far.channels(stack, node)
        path = f"/{folder.root.name}/manifest.json"
        reader = Reader.connect(connect, manifest_path=path, sha256=folder.sha256)
        return stack.enter_context(reader), list(folder.contents)

    def stream(self, name: str) -> float:
        """Return MB/s of one stream of files of a size."""
        self.far.wan.set(rate_mbit=RATE_MBIT)
        with contextlib.ExitStack() as stack:
            return _rate(self._streaming(stack, name))

    def nodes(self, count: int) -> float:
        """Return MB/s of so many hosts together, each with a process and a line of its own."""
        here = [self.far.node, *self._further][:count]
        for node in here:
            node.wan.set(delay_ms=RTT_MS / 2, rate_mbit=NODE_RATE_MBIT)
        over = FORK.Event()
        counts = [FORK.Value("Q", 0) for _ in here]
        children = [
            FORK.Process(target=self._read_on, args=(node, done, over))
            for node, done in zip(here, counts, strict=True)
        ]
        for child in children:
            child.start()
        try:
            for one in counts:
                wait_for("first bytes", functools.partial(_begun, one), PATIENCE_S)
            return _rate(lambda: sum(one.value for one in counts))
        finally:
            over.set()
            for child in children:
                child.join()
            if any(child.exitcode for child in children):
                raise SystemExit("a node did not read to the end")

    def _read_on(self, node: Node, done: Counter, over: Event) -> None:
        with contextlib.ExitStack() as stack:
            counted = self._streaming(stack, READERS_OF, node)
            while not over.wait(0.05):
                done.value = counted()

    def _streaming(
        self, stack: contextlib.ExitStack, name: str, node: Node | None = None
    ) -> Callable[[], int]:
        def take(_: str, tell: Callable[[int], None]) -> None:
            parts = (
                (path, at, 4 << 20)
                for path in itertools.cycle(paths)
                for at in range(0, SIZES[name], 4 << 20)
            )
            with reader.read_many(parts) as ranges:
                for data in ranges:
                    tell(len(data))

        reader, paths = self._reader(stack, name, node)
        return stack.enter_context(at_work(["all"], 1, take))

    def readers(self, count: int) -> float:
        """Return MB/s of so many threads, each with files of its own, by plain reads."""

        def whole(path: str, tell: Callable[[int], None]) -> None:
            with reader.open(path) as file:
                for at in range(0, file.size, 1 << 20):
                    tell(len(file.read(at, 1 << 20)))

        self.far.wan.set(rate_mbit=RATE_MBIT)
        with contextlib.ExitStack() as stack:
            reader, paths = self._reader(stack, READERS_OF)
            return _rate(stack.enter_context(at_work(paths, count, whole)))


def _rate(done: Callable[[], int]) -> float:
    wait_for("the first bytes", lambda: done() > 0, PATIENCE_S)
    let_pass(WARM_S)
    before, started = done(), time.monotonic()
    let_pass(MEASURE_S)
    return (done() - before) / 1e6 / (time.monotonic() - started)


def _begun(done: Counter) -> bool:
    return done.value > 0


def parse(base: Path, count: int) -> tuple[float, float]:
    """Return the seconds and the MiB that a manifest of so many series takes."""
    files = [
        {
            "path": f"series/1.2.826.0.1.3680043.10.{number}.ozx",
            "size": 10**8,
            "blocks": "0" * 64,
            "series": {"modality": "CT", "description": "Chest 1.0", "slices": 300},
        }
        for number in range(count)
    ]
    document = {
        "kakehashi_manifest": 1,
        "project": "bench",
        "cohort": {"version": 1, "sha256": "0" * 64},
        "block_size": 131072,
        "files": files,
    }
    raw = json.dumps(document).encode()
    path = base / f"{count}.json"
    path.write_bytes(raw)
    argv = [sys.executable, "-c", PARSE, str(path), hashlib.sha256(raw).hexdigest(), str(count)]
    seconds, mebibytes = subprocess.check_output(argv, text=True).split()
    path.unlink()
    return float(seconds), float(mebibytes)


def main() -> None:
    """Measure and report."""
    need_root()
    options = arguments("how the cost of reading grows")
    rounds, entries = (1, ENTRIES[:2]) if options.quick else (ROUNDS, ENTRIES)
    with contextlib.ExitStack() as stack:
        growth = Growth(stack)
        ways = {name: functools.partial(growth.stream, name) for name in SIZES}
        threads = {
            f"{count} at once": functools.partial(growth.readers, count) for count in READERS
        }
        nodes = {f"{count} nodes": functools.partial(growth.nodes, count) for count in NODES}
        iperf = {"iperf3": growth.iperf}
        values = interleaved(iperf | ways | threads | nodes, rounds, Console(stderr=True))
        parsed = {count: parse(growth.far.base, count) for count in entries}
    series = [Series(name, "MB/s", found) for name, found in values.items()]
    medians = {one.name: one.median for one in series}
    report(
        "How cost grows",
        series,
        [at_most("seconds to read a manifest of 10,000 series", [parsed[10_000][0]], 2, "s")],
        tables=[
            Table(
                f"Rate at 10 ms, 2 Gbit/s (iperf3 {medians['iperf3']:.0f} MB/s)",
                ("", "MB/s"),
                (
                    *((f"one stream of files of {name}", f"{medians[name]:.0f}") for name in SIZES),
                    *(
                        (f"files of {READERS_OF}, {name}, by plain reads", f"{medians[name]:.0f}")
                        for name in threads
                    ),
                ),
            ),
            Table(
                f"Nodes at once, each by a line of {NODE_RATE_MBIT} Mbit/s and 10 ms of its own",
                ("nodes", "MB/s together"),
                tuple((str(count), f"{medians[f'{count} nodes']:.0f}") for count in NODES),
            ),
            Table(
                "A manifest's start-up",
                ("series", "seconds", "MiB"),
                tuple(
                    (f"{count:,}", f"{seconds:.2f}", f"{mebibytes:.0f}")
                    for count, (seconds, mebibytes) in parsed.items()
                ),
            ),
        ],
        quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
