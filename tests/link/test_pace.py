"""The choice of the number of channels, against lines that exist only as numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.link.pace import DEPTH_LEAST, DEPTH_MOST, WINDOW_BYTES, Pace, depth


@dataclass
class FakeLine:
    """Carries so much a second in all, and so much per connection and round trip."""

    rate: float
    rtt_s: float
    noise: float = 0.0
    granted: int = 1000

    def carries(self, channels: int, pick: random.Random) -> float:
        each = WINDOW_BYTES / self.rtt_s if self.rtt_s else self.rate
        exact = min(self.rate, channels * each)
        return exact * (1 + self.noise * pick.uniform(-1, 1))


def drive(pace: Pace, line: FakeLine, seconds: float, start: float = 0.0) -> list[int]:
    """Let channels be opened as the pace says, one a tick; return their number over time."""
    pick = random.Random(1)
    now, moved, connected, seen = start, 0.0, 1, []
    while now < start + seconds:
        now += 0.05
        moved += 0.05 * line.carries(connected, pick)
        pace.tick(now, int(moved), connected=connected, busy=True, rtt_s=line.rtt_s)
        if connected < min(pace.target, line.granted):
            connected += 1
        elif connected < pace.target:
            pace.refused(now, connected)
        connected = min(connected, pace.target)
        seen.append(connected)
    return seen


@pytest.mark.parametrize(
    ("rate", "rtt_s", "needed"),
    [(250e6, 0.0001, 1), (250e6, 0.01, 2), (250e6, 0.02, 4), (250e6, 0.05, 9), (1.25e9, 0.01, 9)],
)
def test_a_line_gets_the_connections_that_fill_it(rate: float, rtt_s: float, needed: int) -> None:
    line = FakeLine(rate, rtt_s)
    seen = drive(Pace(32), line, 20)
    assert needed <= seen[-1] <= 2 * needed + 2
    assert max(seen) <= 3 * needed + 3, "not far beyond it either"


def test_a_line_that_no_number_fills_gets_all() -> None:
    assert drive(Pace(16), FakeLine(1e12, 0.2), 30)[-1] == 16


def test_noise_does_not_drive_it_to_the_bound() -> None:
    seen = drive(Pace(32), FakeLine(250e6, 0.001, noise=0.03), 60)
    assert seen[-1] <= 8


def test_what_is_refused_is_done_without() -> None:
    pace = Pace(32)
    seen = drive(pace, FakeLine(250e6, 0.05, granted=3), 4)
    assert seen[-1] == 3
    assert pace.target == 3
    seen = drive(pace, FakeLine(250e6, 0.05), 30, start=100)
    assert seen[-1] >= 9, "and asked for again later"


def test_a_pause_begins_anew() -> None:
    pace = Pace(32)
    drive(pace, FakeLine(250e6, 0.05), 10)
    assert pace.target > 4
    pace.rest()
    assert pace.target == 2


def test_a_distant_store_gets_more_from_the_beginning() -> None:
    for rtt_s, target in ((0.0001, 2), (0.01, 3), (0.02, 5), (0.05, 8), (0.5, 8)):
        pace = Pace(32)
        pace.far(rtt_s)
        assert pace.target == target
        pace.far(10 * rtt_s)
        pace.refused(0.0, 1)
        pace.far(rtt_s)
        assert pace.target == 1, "a bound is a bound"


def test_an_idle_line_says_nothing() -> None:
    pace = Pace(32)
    for step in range(1000):
        pace.tick(step * 0.05, step, connected=2, busy=False, rtt_s=0.01)
    assert pace.target == 2


@given(
    rate=st.floats(0, 1e11),
    rtt_s=st.none() | st.floats(0, 100),
    most=st.integers(1, 64),
    ticks=st.lists(
        st.tuples(st.floats(0, 10), st.integers(0, 1 << 40), st.integers(0, 64), st.booleans())
    ),
)
def test_it_keeps_to_its_bounds(
    rate: float, rtt_s: float | None, most: int, ticks: list[tuple[float, int, int, bool]]
) -> None:
    assert DEPTH_LEAST <= depth(rate, rtt_s) <= DEPTH_MOST
    pace, now, moved = Pace(most), 0.0, 0
    for step, more, connected, busy in ticks:
        now, moved = now + step, moved + more
        pace.tick(now, moved, connected=connected, busy=busy, rtt_s=rtt_s)
        assert 1 <= pace.target <= most
        if not busy:
            pace.refused(now, connected)
            assert 1 <= pace.target <= most
