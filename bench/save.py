"""Writing over distance: plain TCP, ssh itself, ``sftp``'s put and the work folder, side by side.

Each writes the same bytes into memory at the store, in turn with all others. The work folder's
time is to the end: read back, compared, flushed and in its place.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

# Run as a script, this folder is on the path but not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.far_host import CONNECTIONS, LOGIN, FarHost
from bench.far_store import Cost, cpu_of
from bench.figures import Goal, Series, Table, all_of, arguments, at_least, interleaved, report
from kakehashi.link.workchannel import ChannelFolder
from tests.lab.hosts import need_root

ROUNDS = 3
SIZE = 400 << 20
RTTS_MS = (0, 10, 20)
RATE_MBIT = 2000
IPERF_S = 2
TITLE = f"Writing over distance at {RATE_MBIT / 1000:g} Gbit/s"


class FarFolder(FarHost):
    """A writable folder at the far end."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        super().__init__(stack)
        self.source, target = self.base / "source", self.base / "target"
        self.data = os.urandom(SIZE)
        self.source.write_bytes(self.data)
        target.mkdir()
        self.put_there, self.saved_there = target / "put", target / "saved"
        self.serve(
            stack,
            files="ForceCommand internal-sftp",
            # The same bytes, and nothing is done with them.
            plain="ForceCommand cat > /dev/null",
        )
        connect = self.opener(stack, [])
        self.work = stack.enter_context(ChannelFolder(connect, root=str(target)))

    def sink(self) -> None:
        """Let ssh carry the bytes over several connections, to nowhere."""
        argv = self.plain_command()
        share = SIZE // CONNECTIONS
        clients = []
        for number in range(CONNECTIONS):
            feed = ["tail", "-c", f"+{number * share + 1}", str(self.source)]
            tail = subprocess.Popen(feed, stdout=subprocess.PIPE)
            head = subprocess.Popen(
                ["head", "-c", str(share)], stdin=tail.stdout, stdout=subprocess.PIPE
            )
            client = subprocess.Popen(argv, stdin=head.stdout)
            for pipe in (tail.stdout, head.stdout):
                assert pipe is not None
                pipe.close()
            clients += [tail, head, client]
        for client in clients:
            client.wait()

    def put(self) -> None:
        """Let ``sftp`` put the file."""
        subprocess.run(
            self.client("sftp", "-q", "-b", "-", LOGIN),
            input=f"put {self.source} {self.put_there}\n".encode(),
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def save(self) -> None:
        """Write the file into the work folder."""
        self.work.write(self.saved_there.name, self.data)


WAYS: dict[str, Callable[[FarFolder], None]] = {
    "ssh itself, 4 connections": FarFolder.sink,
    "sftp put": FarFolder.put,
    "work folder": FarFolder.save,
}
IPERF = "iperf3, 4 connections"


def main() -> None:
    """Measure and report."""
    need_root()
    options = arguments("writing over distance")
    rtts, rounds = ((10,), 1) if options.quick else (RTTS_MS, ROUNDS)
    with contextlib.ExitStack() as stack:
        far = FarFolder(stack)

        def line(rtt_ms: int) -> float:
            far.wan.set(delay_ms=rtt_ms / 2, rate_mbit=RATE_MBIT)
            return far.iperf(IPERF_S, from_store=False)

        costs: dict[str, list[Cost]] = {}

        def rate(rtt_ms: int, name: str, way: Callable[[FarFolder], None]) -> float:
            far.wan.set(delay_ms=rtt_ms / 2, rate_mbit=RATE_MBIT)
            own, every, started = time.process_time(), cpu_of(os.getpid()), time.monotonic()
            way(far)
            took = time.monotonic() - started
            own = time.process_time() - own
            every = cpu_of(os.getpid()) - every
            costs.setdefault(name, []).append(Cost(own / SIZE * 1e9, (every - own) / SIZE * 1e9))
            return SIZE / 1e6 / took

        ways: dict[str, Callable[[], float]] = {}
        for rtt in rtts:
            ways[f"{rtt} ms: {IPERF}"] = functools.partial(line, rtt)
            for name, way in WAYS.items():
                ways[f"{rtt} ms: {name}"] = functools.partial(rate, rtt, name, way)
        values = interleaved(ways, rounds, Console(stderr=True))
        if far.saved_there.read_bytes() != far.data:
            raise SystemExit("what was saved is not what was written")

    def share(rtt: int, other: str) -> tuple[float, ...]:
        pairs = zip(values[f"{rtt} ms: work folder"], values[f"{rtt} ms: {other}"], strict=True)
        return tuple(one / two for one, two in pairs)

    goals: list[Goal] = []
    for rtt in rtts:
        goals.append(at_least(f"{rtt} ms: work folder of iperf3", share(rtt, IPERF), 0.8))
        goals.append(at_least(f"{rtt} ms: work folder of sftp put", share(rtt, "sftp put"), 1))
    series = [Series(name, "MB/s", found) for name, found in values.items()]
    report(
        TITLE,
        series,
        goals,
        tables=[
            all_of(TITLE, series),
            Table(
                "CPU seconds for a GB, at any round trip",
                ("way", "what writes", "ssh, sshd and the line"),
                tuple(
                    (
                        name,
                        f"{statistics.median(cost.client for cost in found):.2f}",
                        f"{statistics.median(cost.ssh for cost in found):.2f}",
                    )
                    for name, found in costs.items()
                ),
            ),
        ],
        quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
