"""The lease is renewed in time, whatever the store's clock and the node's show."""

from __future__ import annotations

import datetime as dt
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest

from kakehashi.session import keys, watch
from kakehashi.session.hubclient import Grant
from tests.session.test_hubclient import GRANT, KEY, SESSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kakehashi.session.hubclient import HubClient


class Portal:
    """Renews a lease, by a clock that is ahead of the node's by some seconds, or behind."""

    def __init__(self, lease_s: float, ahead_s: float) -> None:
        self.lease_s = lease_s
        self.ahead_s = ahead_s
        self.asked = threading.Semaphore(0)

    def grant(self) -> Grant:
        now = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=self.ahead_s)
        times = {"issued_at": now, "expires_at": now + dt.timedelta(seconds=self.lease_s)}
        texts = {name: time.strftime("%Y-%m-%dT%H:%M:%S.%fZ") for name, time in times.items()}
        return Grant.parse(GRANT | texts, SESSION, KEY.public)

    def renew(self, _key: keys.SigningKey, _counter: int) -> Grant:
        self.asked.release()
        return self.grant()


@pytest.fixture
def renewing(request: pytest.FixtureRequest) -> Iterator[Portal]:
    portal = Portal(*request.param)
    told: list[Any] = []
    renewer = watch.Renewer(
        cast("HubClient", portal), KEY, portal.grant(), offline_max_s=60, tell=told.append
    )
    renewer.start()
    yield portal
    renewer.stop()


@pytest.mark.parametrize(
    "renewing", [(0.9, 0.0), (0.9, 600.0), (0.9, -600.0), (0.9, 86400.0)], indirect=True
)
def test_a_lease_is_renewed_before_it_lapses(renewing: Portal) -> None:
    for _ in range(3):
        assert renewing.asked.acquire(timeout=0.9)


@pytest.mark.parametrize("renewing", [(900.0, 0.0), (900.0, 900.0), (900.0, -900.0)], indirect=True)
def test_a_wrong_clock_does_not_flood_the_portal(renewing: Portal) -> None:
    assert not renewing.asked.acquire(timeout=1)
