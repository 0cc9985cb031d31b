"""The line of the lab: each setting shows in what two hosts see of each other."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hosts import LabError, run, wait_for
from tests.lab.wan import ADDRESSES, Line, Network, Wan

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 60
# Python has no names for them.
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33


@pytest.fixture
def networks() -> Iterator[tuple[Network, Network]]:
    with Network() as one, Network() as other:
        yield one, other


@pytest.fixture
def wan(networks: tuple[Network, Network]) -> Iterator[Wan]:
    one, other = networks
    with Wan(one.path, other.path) as wan:
        yield wan


Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends(networks: tuple[Network, Network], wan: Wan) -> Iterator[Ends]:
    with Ends(networks) as ends:
        yield ends


class Ends(contextlib.ExitStack):
    """Connections between the two hosts."""

    def __init__(self, networks: tuple[Network, Network]) -> None:
        super().__init__()
        self.networks = networks

    def connect(self, address: str = ADDRESSES[1], port: int = 0) -> Pair:
        """Return both ends of a new TCP connection."""
        one, other = self.networks
        with other.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen()
            listener.settimeout(PATIENCE_S)
            near = self.enter_context(one.socket())
            near.settimeout(PATIENCE_S)
            near.connect(listener.getsockname())
            far = self.enter_context(listener.accept()[0])
        for end in (near, far):
            end.settimeout(PATIENCE_S)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return near, far

    def datagrams(self) -> Pair:
        """Return a connected UDP socket and the bound one that it sends to."""
        one, other = self.networks
        far = self.enter_context(other.socket(socket.SOCK_DGRAM))
        far.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        far.bind((ADDRESSES[1], 0))
        near = self.enter_context(one.socket(socket.SOCK_DGRAM))
        near.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 64 << 20)
        near.connect(far.getsockname())
        return near, far


def round_trips_ms(pair: Pair, count: int = 21) -> list[float]:
    near, far = pair
    found = []
    for _ in range(count):
        started = time.monotonic()
        near.sendall(b"?")
        assert far.recv(1) == b"?"
        far.sendall(b"!")
        assert near.recv(1) == b"!"
        found.append((time.monotonic() - started) * 1e3)
    return found


def receive(end: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        got = end.recv_into(view[at:])
        assert got, "the connection ended early"
        at += got
    return data


def carry(pair: Pair, data: bytes) -> tuple[bytearray, float]:
    """Send data from the one end to the other; return what arrived and the seconds."""
    near, far = pair
    sender = threading.Thread(target=near.sendall, args=(data,), daemon=True)
    started = time.monotonic()
    sender.start()
    arrived = receive(far, len(data))
    seconds = time.monotonic() - started
    sender.join(PATIENCE_S)
    return arrived, seconds


def arrived_numbers(wan: Wan, pair: Pair, count: int, size: int = 100) -> list[int]:
    """Send numbered datagrams at once; return the numbers that arrived, in their order."""
    near, far = pair
    before = wan.figures().directions[0]
    for number in range(count):
        near.send(number.to_bytes(4, "big").ljust(size, b"."))

    def settled() -> bool:
        now = wan.figures().directions[0]
        ended = sum(
            getattr(now, name) - getattr(before, name)
            for name in ("packets", "lost", "tail_dropped", "cut_dropped")
        )
        # A connection of before may still have had something to say.
        return bool(ended >= count)

    wait_for("every datagram is delivered or dropped", settled, PATIENCE_S)
    # The end of a loss-free line: what comes after all the others.
    far.settimeout(0.5)
    found = []
    with contextlib.suppress(TimeoutError):
        while True:
            found.append(int.from_bytes(far.recv(65536)[:4], "big"))
    return found


def random_data(size: int) -> bytes:
    return os.urandom(1 << 20) * (size >> 20)


def test_delay_is_on_the_way_both_ways(wan: Wan, ends: Ends) -> None:
    pair = ends.connect()
    assert statistics.median(round_trips_ms(pair)) < 20
    wan.set(delay_ms=20)
    delayed = round_trips_ms(pair)
    assert min(delayed) >= 40
    assert statistics.median(delayed) < 60
    wan.set(delay_ms=0)
    assert statistics.median(round_trips_ms(pair)) < 20


def test_jitter_spreads_and_keeps_the_order(wan: Wan, ends: Ends) -> None:
    wan.set(jitter_ms=40)
    trips = round_trips_ms(ends.connect())
    assert max(trips) - min(trips) > 15
    assert arrived_numbers(wan, ends.datagrams(), 300) == list(range(300))


def test_jitter_lets_packets_overtake_where_asked(wan: Wan, ends: Ends) -> None:
    wan.set(jitter_ms=40, reorder=True)
    numbers = arrived_numbers(wan, ends.datagrams(), 300)
    assert sorted(numbers) == list(range(300))
    assert numbers != list(range(300))
    data = random_data(4 << 20)
    assert carry(ends.connect(), data)[0] == data


def test_rate_holds_a_sender_back(wan: Wan, ends: Ends) -> None:
    data = random_data(16 << 20)
    unlimited = carry(ends.connect(), data)[1]
    wan.set(rate_mbit=100)
    pair = ends.connect()
    arrived, seconds = carry(pair, data)
    assert arrived == data
    # What a token bucket and the queue let through at once is little beside the whole.
    assert seconds > 0.9 * len(data) * 8 / 100e6
    assert seconds > 3 * unlimited
    back, seconds = carry((pair[1], pair[0]), data)
    assert back == data
    assert seconds > 0.9 * len(data) * 8 / 100e6
    wan.set(rate_mbit=None)
    assert carry(pair, data)[1] < seconds / 3


def test_a_full_queue_drops_what_comes_last(wan: Wan, ends: Ends) -> None:
    wan.set(rate_mbit=1, queue_bytes=100_000)
    numbers = arrived_numbers(wan, ends.datagrams(), 1000, size=972)
    counts = wan.figures().directions[0]
    assert counts.tail_dropped == 1000 - len(numbers)
    # 100 datagrams of 1000 bytes fit into the queue; few leave it while the rest is sent.
    assert numbers[:99] == list(range(99))
    assert 99 <= len(numbers) < 400
    assert 90_000 <= counts.queue_peak_bytes <= 100_000


def test_a_queue_is_one_bandwidth_delay_product_unless_said() -> None:
    assert Line(delay_ms=5, rate_mbit=2000).queue == 2_500_000
    assert Line(delay_ms=5, rate_mbit=2000, queue_bytes=7).queue == 7


def test_a_queue_too_short_for_tcp_drops_single_packets_and_no_byte(wan: Wan, ends: Ends) -> None:
    wan.set(delay_ms=2, rate_mbit=200, queue_bytes=30_000)
    data = random_data(8 << 20)
    assert carry(ends.connect(), data)[0] == data
    assert wan.figures().directions[0].tail_dropped > 0


def test_loss_is_counted_and_is_what_was_asked(wan: Wan, ends: Ends) -> None:
    pair = ends.datagrams()
    assert arrived_numbers(wan, pair, 3000) == list(range(3000))
    assert wan.figures().directions[0].lost == 0
    wan.set(loss=0.2)
    numbers = arrived_numbers(wan, pair, 3000)
    assert wan.figures().directions[0].lost == 3000 - len(numbers)
    assert 450 < 3000 - len(numbers) < 750


def test_tcp_survives_loss_within_what_the_kernel_sends_as_one(wan: Wan, ends: Ends) -> None:
    wan.set(loss=0.01, delay_ms=1)
    data = random_data(16 << 20)
    assert carry(ends.connect(), data)[0] == data
    counts = wan.figures().directions[0]
    sent = counts.packets + counts.lost
    assert sent >= len(data) // 1460
    assert 0.003 < counts.lost / sent < 0.03


def test_a_cut_holds_a_connection_and_healing_lets_it_go_on(wan: Wan, ends: Ends) -> None:
    wan.set(delay_ms=50)
    near, far = pair = ends.connect()
    round_trips_ms(pair, 1)
    before = wan.figures().directions[0].cut_dropped
    near.sendall(b"under way")
    wan.cut()
    far.settimeout(0.5)
    with pytest.raises(TimeoutError):
        far.recv(100)
    wait_for("packets vanish", lambda: wan.figures().directions[0].cut_dropped > before, PATIENCE_S)
    far.settimeout(PATIENCE_S)
    wan.heal()
    assert receive(far, 9) == b"under way"
    round_trips_ms(pair, 1)


def drain(end: socket.socket) -> None:
    while end.recv(1 << 16):
        pass


def assert_reset(*ends: socket.socket) -> None:
    for end in ends:
        with pytest.raises(ConnectionResetError):
            drain(end)


def test_reset_ends_every_flow_at_both_ends(wan: Wan, ends: Ends) -> None:
    wan.set(delay_ms=5)
    first, second = ends.connect(), ends.connect()
    for pair in (first, second):
        round_trips_ms(pair, 3)
    assert wan.reset() == 2
    assert_reset(*first, *second)
    assert wan.reset() == 0
    round_trips_ms(ends.connect(), 3)


def test_reset_of_one_port_leaves_the_others(wan: Wan, ends: Ends) -> None:
    doomed, spared = ends.connect(port=7001), ends.connect(port=7002)
    for pair in (doomed, spared):
        round_trips_ms(pair, 3)
    assert wan.reset(port=7001) == 1
    assert_reset(*doomed)
    round_trips_ms(spared, 3)


@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_reset_in_full_flow(wan: Wan, ends: Ends, loss: float) -> None:
    wan.set(delay_ms=10, loss=loss)
    near, far = ends.connect()
    sent: list[int | None] = []

    def send() -> None:
        try:
            while True:
                near.sendall(bytes(1 << 16))
        except OSError as error:
            sent.append(error.errno)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    receive(far, 1 << 20)
    assert wan.reset() == 1
    assert_reset(far)
    sender.join(PATIENCE_S)
    assert sent in ([errno.ECONNRESET], [errno.EPIPE])


def test_reset_in_a_cut_is_learnt_after_it(wan: Wan, ends: Ends) -> None:
    near, far = pair = ends.connect()
    round_trips_ms(pair, 3)
    wan.cut()
    assert wan.reset() == 1
    near.settimeout(0.3)
    with pytest.raises(TimeoutError):
        near.recv(1)
    wan.heal()
    near.settimeout(PATIENCE_S)
    for end in (near, far):
        end.sendall(b"?")
    assert_reset(near, far)


def test_the_connection_gets_no_reset_by_itself(wan: Wan, ends: Ends) -> None:
    near, far = ends.connect()
    round_trips_ms((near, far), 3)
    near.close()
    assert far.recv(1) == b""
    assert wan.figures().resets_sent == 0


def test_hosts_that_know_each_other_already_talk_over_the_line(
    networks: tuple[Network, Network],
) -> None:
    one, other = networks
    names = ("one", "other")
    addresses = ("10.198.1.1", "10.198.1.2")
    run(["ip", "link", "add", "one", "netns", str(one.pid), "type", "veth",
         "peer", "name", "other", "netns", str(other.pid)])  # fmt: skip
    for network, name, address in zip(networks, names, addresses, strict=True):
        run(network.inside(["ip", "addr", "add", f"{address}/24", "dev", name]))
        run(network.inside(["ip", "link", "set", name, "up"]))
    with Ends(networks) as ends:
        assert statistics.median(round_trips_ms(ends.connect(addresses[1]))) < 20
        with Wan(one.path, other.path, addresses=addresses, delay_ms=20):
            assert min(round_trips_ms(ends.connect(addresses[1]))) >= 40
        assert statistics.median(round_trips_ms(ends.connect(addresses[1]))) < 20


def devices(network: Network) -> str:
    return run(network.inside(["ip", "-brief", "link"])).stdout


def test_nothing_is_left(networks: tuple[Network, Network]) -> None:
    one, other = networks
    with Wan(one.path, other.path):
        assert "wan" in devices(one)
        assert "wan" in devices(other)
    assert "wan" not in devices(one)
    assert "wan" not in devices(other)


def test_the_line_ends_with_the_process_that_made_it(networks: tuple[Network, Network]) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.lab.wan import Wan\n"
        "with Wan(*map(Path, sys.argv[1:])): print('up', flush=True); sys.stdin.read()"
    )
    paths = [str(network.path) for network in networks]
    with subprocess.Popen(
        [sys.executable, "-c", script, *paths],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"up\n"
        assert "wan" in devices(networks[0])
        maker.send_signal(signal.SIGKILL)
    wait_for("the device goes", lambda: "wan" not in devices(networks[0]), PATIENCE_S)


def test_wrong_settings_are_refused(wan: Wan, networks: tuple[Network, Network]) -> None:
    before = wan.line
    for wrong in ({"delay_ms": -1}, {"loss": 1.5}, {"rate_mbit": 0}):
        with pytest.raises(ValueError, match=str(*wrong.values())):
            wan.set(**wrong)
    with pytest.raises(TypeError):
        wan.set(speed=3)
    with pytest.raises(ValueError, match="65536"):
        wan.reset(port=65536)
    assert wan.line == before
    with pytest.raises(LabError), Wan(Path("/nonexistent"), networks[0].path):
        pass
